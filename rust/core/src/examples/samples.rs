//! A few rows of every strength: of each (feature, histogram bin) those that a keyed hash ranks
//! first.
//!
//! A row's rank depends on the seed and the row alone. So the rows kept are a uniform sample of the
//! bin's, the same however the rows were cut into shards, batches and threads; samples merge
//! exactly; and most rows, whose rank is late, need no look at all (see [`Samples::level`]).

use super::histogram::{bin_of, BINS};
use crate::shard::order::{mix, unmix, GOLDEN};
use crate::simd::fetch;

/// The most rows kept of a bin.
pub const MAX_PER_BIN: usize = 255;

/// The keyed ranking of rows: a bijection of 64 bits, so no two rows have the same rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranking {
    /// What the ranking is made from.
    pub seed: u64,
}

impl Ranking {
    /// The place of a row among all: lower ones are kept.
    #[inline]
    pub fn rank(self, row: i64) -> u64 {
        mix(mix((row as u64).wrapping_add(self.key())) ^ GOLDEN)
    }

    /// The row of a rank.
    pub fn row(self, rank: u64) -> i64 {
        unmix(unmix(rank) ^ GOLDEN).wrapping_sub(self.key()) as i64
    }

    /// How early a rank is, in eighths of a halving: never less for a lower rank than for a higher
    /// one.
    #[inline]
    pub fn earliness(rank: u64) -> u8 {
        let halvings = rank.leading_zeros();
        if halvings > 31 {
            return u8::MAX;
        }
        // The three bits that follow the first that is set.
        let rest = (rank << halvings) << 1 >> 61;
        (8 * halvings + 7) as u8 - rest as u8
    }

    /// The [`Ranking::earliness`] of so many rows from `first` on, put behind what is in `to`.
    pub(super) fn earliness_of(self, first: i64, rows: usize, to: &mut Vec<u8>) {
        let all = (first..).take(rows);
        to.extend(all.map(|row| Self::earliness(self.rank(row))));
    }

    const fn key(self) -> u64 {
        mix(self.seed.wrapping_add(GOLDEN))
    }
}

/// What every (feature, bin) keeps. A cell is `feature * BINS + bin`.
#[derive(Debug, Clone)]
pub struct Samples {
    per_bin: usize,
    ranking: Ranking,
    /// `[features * BINS]`: 1 + the cell's place in what follows, 0 if it holds nothing.
    slots: Vec<u32>,
    /// The cells that hold something, in order of their first row.
    cells: Vec<u32>,
    /// `[cells, per_bin]` rising in each cell; those of unused slots are [`UNUSED`].
    held: Vec<Held>,
}

/// A sampled row: its rank and its strength.
type Held = (u64, f32);

/// An unused slot. Activations have no strength of 0.
const UNUSED: Held = (u64::MAX, 0.0);

impl Samples {
    /// Nothing yet. `features * BINS` fits a u32 (checked by the caller).
    pub(super) fn new(features: usize, per_bin: usize, seed: u64) -> Self {
        let slots = if per_bin == 0 { 0 } else { features * BINS };
        Self {
            per_bin,
            ranking: Ranking { seed },
            slots: vec![0; slots],
            cells: Vec::new(),
            held: Vec::new(),
        }
    }

    /// The most rows kept of a bin; 0 keeps none.
    pub fn per_bin(&self) -> usize {
        self.per_bin
    }

    /// Which rows are kept.
    pub fn ranking(&self) -> Ranking {
        self.ranking
    }

    /// A row can only enter a cell if its rank's [`Ranking::earliness`] is at least this: 0 for a
    /// cell with room.
    #[inline]
    pub(super) fn level(&self, cell: usize) -> u8 {
        match self.held(cell).last() {
            Some(&last) if last.1 > 0.0 => Ranking::earliness(last.0),
            _ => 0,
        }
    }

    /// All slots of a cell; none if it holds nothing.
    fn held(&self, cell: usize) -> &[Held] {
        match self.slots.get(cell) {
            None | Some(0) => &[],
            Some(&slot) => {
                let end = slot as usize * self.per_bin;
                &self.held[end - self.per_bin..end]
            }
        }
    }

    /// Has the CPU fetch the place of a cell.
    #[inline]
    pub(super) fn fetch_slot(&self, cell: usize) {
        fetch(&self.slots, cell);
    }

    /// Has the CPU fetch what a cell holds.
    #[inline]
    pub(super) fn fetch(&self, cell: usize) {
        if let Some(&slot) = self.slots.get(cell) {
            let end = slot as usize * self.per_bin;
            fetch(&self.held, end.saturating_sub(self.per_bin));
            fetch(&self.held, end.saturating_sub(1));
        }
    }

    /// Offers a row to a cell; no row is offered twice to the same one.
    pub(super) fn offer(&mut self, cell: usize, rank: u64, strength: f32) {
        if self.per_bin == 0 {
            return;
        }
        if self.slots[cell] == 0 {
            self.cells.push(cell as u32);
            self.held.resize(self.cells.len() * self.per_bin, UNUSED);
            self.slots[cell] = self.cells.len() as u32;
        }
        let end = self.slots[cell] as usize * self.per_bin;
        // Each slot keeps the lower rank and hands the other on, without a branch: where a row ends
        // up can't be foreseen. Ranks differ, so those that are equal belong to an unused slot.
        let mut rest = (rank, strength);
        for held in &mut self.held[end - self.per_bin..end] {
            let before = *held;
            let first = rest.0 <= before.0;
            *held = if first { rest } else { before };
            rest = if first { before } else { rest };
        }
    }

    /// The cells that hold something.
    pub(super) fn cells(&self) -> &[u32] {
        &self.cells
    }

    /// Offers all that `other` holds.
    pub(super) fn merge(&mut self, other: &Self) {
        for &cell in &other.cells {
            for &(rank, strength) in other.held(cell as usize) {
                if strength > 0.0 {
                    self.offer(cell as usize, rank, strength);
                }
            }
        }
    }

    /// `[features + 1]` offsets, and strengths and rows of each feature by rising bin, in a bin by
    /// rising rank.
    pub fn sorted(&self, features: usize) -> (Vec<i64>, Vec<f32>, Vec<i64>) {
        let total = self.held.iter().filter(|held| held.1 > 0.0).count();
        let mut offsets = Vec::with_capacity(features + 1);
        let (mut strengths, mut rows) = (Vec::with_capacity(total), Vec::with_capacity(total));
        offsets.push(0);
        for feature in 0..features {
            for cell in feature * BINS..(feature + 1) * BINS {
                for &(rank, strength) in self.held(cell).iter().filter(|held| held.1 > 0.0) {
                    strengths.push(strength);
                    rows.push(self.ranking.row(rank));
                }
            }
            offsets.push(rows.len() as i64);
        }
        (offsets, strengths, rows)
    }

    /// Puts back a feature's part of [`Samples::sorted`]; the error says why no collection can have
    /// made it. `bins` is the feature's histogram.
    pub(super) fn restore(
        &mut self,
        feature: usize,
        strengths: &[f32],
        rows: &[i64],
        bins: &[u64],
    ) -> Result<(), String> {
        let mut counts = [0_u64; BINS];
        let mut last: Option<(usize, u64)> = None;
        for (&strength, &row) in strengths.iter().zip(rows) {
            if !(strength > 0.0 && strength.is_finite() && row >= 0) {
                return Err(format!("a sample has strength {strength} of row {row}"));
            }
            let place = (bin_of(strength), self.ranking.rank(row));
            if last.is_some_and(|last| last >= place) {
                return Err(format!("the sample of row {row} is out of order"));
            }
            counts[place.0] += 1;
            self.offer(feature * BINS + place.0, place.1, strength);
            last = Some(place);
        }
        let kept = self.per_bin as u64;
        match counts
            .iter()
            .zip(bins)
            .position(|(&count, &bin)| count != bin.min(kept))
        {
            Some(bin) => Err(format!(
                "bin {bin} was active {} times and has {} samples of at most {kept}",
                bins[bin], counts[bin]
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranks_are_undone(seed: u64, row in 0..i64::MAX) {
            let ranking = Ranking { seed };
            prop_assert_eq!(ranking.row(ranking.rank(row)), row);
        }

        #[test]
        fn keeps_the_first_ranks(
            per_bin in 0usize..5,
            seed: u64,
            rows in prop::collection::btree_set(0i64..100, 0..30),
        ) {
            let mut samples = Samples::new(2, per_bin, seed);
            let ranking = samples.ranking();
            let cell = BINS + bin_of(1.5);
            for &row in &rows {
                let (rank, level) = (ranking.rank(row), samples.level(cell));
                let before = samples.clone().sorted(2);
                samples.offer(cell, rank, 1.5);
                // What the level keeps out would not have entered.
                if Ranking::earliness(rank) < level {
                    prop_assert_eq!(before, samples.sorted(2));
                }
            }
            let mut expected: Vec<i64> = rows.into_iter().collect();
            expected.sort_by_key(|&row| ranking.rank(row));
            expected.truncate(per_bin);
            let (offsets, strengths, kept) = samples.sorted(2);
            prop_assert_eq!(offsets, [0, 0, expected.len() as i64]);
            prop_assert_eq!(strengths, vec![1.5; expected.len()]);
            prop_assert_eq!(kept, expected);
        }
    }

    proptest! {
        #[test]
        fn lower_ranks_are_no_later(rank: u64, shift in 0u32..64, more in 0u64..1000) {
            let rank = rank >> shift;
            let higher = rank.saturating_add(more << (shift / 2));
            prop_assert!(Ranking::earliness(rank) >= Ranking::earliness(higher));
        }
    }

    #[test]
    fn earliness_is_in_eighths_of_a_halving() {
        let found =
            [0, 1, 1 << 32, 1 << 63, (1 << 63) - 1, 9 << 60, u64::MAX].map(Ranking::earliness);
        assert_eq!(found, [255, 255, 255, 7, 8, 6, 0]);
    }

    #[test]
    fn ranks_are_even() {
        // The first ranked of 8 rows, over 4000 seeds: each row 500 times; chi-square over 7
        // degrees of freedom exceeds 45 with probability below 2e-7.
        let mut counts = [0_u32; 8];
        for seed in 0..4000 {
            let first = (0..8)
                .min_by_key(|&row| Ranking { seed }.rank(row))
                .unwrap();
            counts[first as usize] += 1;
        }
        let chi2: f64 = counts
            .iter()
            .map(|&c| (f64::from(c) - 500.0).powi(2) / 500.0)
            .sum();
        assert!(chi2 < 45.0, "{counts:?}");
    }
}
