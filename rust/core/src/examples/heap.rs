//! The n strongest rows of each feature, as one flat array of binary heaps.

use std::cmp::Ordering;

use crate::simd::fetch;

/// One bounded heap for each feature. The root of a heap is its weakest entry:
/// the one with the lowest strength and, among equals, the highest row.
#[derive(Debug, Clone)]
pub struct TopHeaps {
    n: usize,
    /// `[features, n]`; the first `filled[f]` of each are a heap, the rest zero.
    strengths: Vec<f32>,
    /// `[features, n]`; as `strengths`, the rest -1.
    rows: Vec<i64>,
    filled: Vec<u32>,
    /// What a strength must reach to be looked at: the root's once a heap is full.
    /// Kept apart because most activations touch nothing else of a heap.
    floors: Vec<f32>,
}

/// The strength and the row id of an unused slot.
pub const UNUSED: (f32, i64) = (0.0, -1);

/// Orders weaker first. Strengths are finite, so they do compare.
#[inline]
fn weaker(a: (f32, i64), b: (f32, i64)) -> bool {
    a.0 < b.0 || (a.0 == b.0 && a.1 > b.1)
}

impl TopHeaps {
    /// Empty heaps. The caller has checked that `features * n` can be allocated.
    pub(super) fn new(features: usize, n: usize) -> Self {
        Self {
            n,
            strengths: vec![UNUSED.0; features * n],
            rows: vec![UNUSED.1; features * n],
            filled: vec![0; features],
            floors: vec![0.0; features],
        }
    }

    /// Slots of each feature.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Offers a row to a feature's heap. `strength` is positive and finite, and no
    /// row is offered twice to the same feature.
    #[inline]
    pub fn offer(&mut self, feature: usize, strength: f32, row: i64) {
        if strength >= self.floors[feature] {
            self.insert(feature, (strength, row));
        }
    }

    /// What a strength must reach to enter a feature's heap: 0 until the heap is full.
    #[inline]
    pub(super) fn floor(&self, feature: usize) -> f32 {
        self.floors[feature]
    }

    /// Has the CPU fetch what an offer looks at.
    #[inline]
    pub(super) fn fetch(&self, feature: usize) {
        let start = feature * self.n;
        fetch(&self.floors, feature);
        fetch(&self.filled, feature);
        fetch(&self.strengths, start);
        fetch(&self.strengths, start + self.n - 1);
        fetch(&self.rows, start);
        fetch(&self.rows, start + self.n / 2);
        fetch(&self.rows, start + self.n - 1);
    }

    /// [`TopHeaps::offer`] of what is known to reach the floor.
    #[cold]
    fn insert(&mut self, feature: usize, entry: (f32, i64)) {
        let slots = feature * self.n..(feature + 1) * self.n;
        let strengths = &mut self.strengths[slots.clone()];
        let rows = &mut self.rows[slots];
        let filled = self.filled[feature] as usize;
        if filled < self.n {
            let mut at = filled;
            while at > 0 {
                let parent = (at - 1) / 2;
                if !weaker(entry, (strengths[parent], rows[parent])) {
                    break;
                }
                (strengths[at], rows[at]) = (strengths[parent], rows[parent]);
                at = parent;
            }
            (strengths[at], rows[at]) = entry;
            self.filled[feature] += 1;
            if filled + 1 == self.n {
                self.floors[feature] = strengths[0];
            }
        } else if weaker((strengths[0], rows[0]), entry) {
            sift_down(strengths, rows, entry);
            self.floors[feature] = strengths[0];
        }
    }

    /// A feature's entries, in no particular order.
    pub fn entries(&self, feature: usize) -> impl Iterator<Item = (f32, i64)> + '_ {
        let start = feature * self.n;
        let end = start + self.filled[feature] as usize;
        self.strengths[start..end]
            .iter()
            .copied()
            .zip(self.rows[start..end].iter().copied())
    }

    /// Whether a feature has none.
    pub(super) fn is_empty(&self, feature: usize) -> bool {
        self.filled[feature] == 0
    }

    /// `[features, n]` strengths and rows, each feature's by falling strength, ties
    /// by rising row; unused slots last.
    pub fn sorted(&self) -> (Vec<f32>, Vec<i64>) {
        let mut strengths = vec![UNUSED.0; self.strengths.len()];
        let mut rows = vec![UNUSED.1; self.rows.len()];
        let mut entries = Vec::with_capacity(self.n);
        for feature in 0..self.filled.len() {
            entries.clear();
            entries.extend(self.entries(feature));
            entries.sort_unstable_by(strongest_first);
            for (rank, &entry) in entries.iter().enumerate() {
                let slot = feature * self.n + rank;
                (strengths[slot], rows[slot]) = entry;
            }
        }
        (strengths, rows)
    }
}

fn strongest_first(a: &(f32, i64), b: &(f32, i64)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Puts `entry` in the place of the root.
fn sift_down(strengths: &mut [f32], rows: &mut [i64], entry: (f32, i64)) {
    let n = strengths.len();
    let mut at = 0;
    loop {
        let mut child = 2 * at + 1;
        if child >= n {
            break;
        }
        let sibling = child + 1;
        if sibling < n
            && weaker(
                (strengths[sibling], rows[sibling]),
                (strengths[child], rows[child]),
            )
        {
            child = sibling;
        }
        if !weaker((strengths[child], rows[child]), entry) {
            break;
        }
        (strengths[at], rows[at]) = (strengths[child], rows[child]);
        at = child;
    }
    (strengths[at], rows[at]) = entry;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        // Few distinct strengths, so that ties abound.
        #[test]
        fn keeps_what_a_full_sort_keeps(
            n in 1usize..12,
            strengths in prop::collection::vec(1u8..6, 0..60),
            seed in any::<u64>(),
        ) {
            let mut entries: Vec<(f32, i64)> =
                strengths.iter().zip(0..).map(|(&s, row)| (f32::from(s), row)).collect();
            // Any order of arrival: a cheap shuffle keyed by the seed.
            entries.sort_by_key(|&(_, row)| (row as u64 + 1).wrapping_mul(seed | 1).rotate_left(17));
            let mut heaps = TopHeaps::new(2, n);
            for &(strength, row) in &entries {
                heaps.offer(1, strength, row);
            }
            entries.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            entries.resize(n.max(entries.len()), UNUSED);
            let (strengths, rows) = heaps.sorted();
            prop_assert!(strengths[..n].iter().all(|&s| s == UNUSED.0));
            prop_assert!(rows[..n].iter().all(|&row| row == UNUSED.1));
            let found: Vec<_> = strengths[n..].iter().copied().zip(rows[n..].iter().copied()).collect();
            prop_assert_eq!(&found[..], &entries[..n]);
        }
    }
}
