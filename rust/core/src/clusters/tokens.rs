//! The tokens that tell most about a feature.

use std::cmp::Ordering;

use super::place::Places;

/// Where tokens are looked for: before the token it fires on, there, and after it.
pub const OFFSETS: [i32; 3] = [-1, 0, 1];
/// Imagined activations on tokens drawn at random, so that three lucky hits on a rare token don't
/// win by their enormous lift.
const SHRINKAGE: f64 = 4.0;
/// A strength is counted as a whole number of these parts of the feature's largest: sums of whole
/// numbers don't depend on their order.
const WEIGHT: f64 = (1 << 30) as f64;

/// How often each token stands at each offset of any token.
#[derive(Debug)]
pub struct Bases {
    counts: [Vec<u64>; 3],
    totals: [u64; 3],
}

impl Bases {
    /// Counts all rows.
    pub fn of(places: &Places<'_>) -> Self {
        let largest = places.rows().iter().map(|place| place.token).max();
        let vocabulary = largest.map_or(0, |token| token as usize + 1);
        let mut counts = OFFSETS.map(|_| vec![0; vocabulary]);
        let mut totals = [0; 3];
        for row in 0..places.rows().len() {
            for (at, &offset) in OFFSETS.iter().enumerate() {
                if let Some(token) = places.token(row, offset) {
                    counts[at][token] += 1;
                    totals[at] += 1;
                }
            }
        }
        Self { counts, totals }
    }

    /// The largest token id and one.
    pub fn vocabulary(&self) -> usize {
        self.counts[0].len()
    }
}

/// A token that tells something; see the table `token_lift`.
#[derive(Debug, Clone, Copy)]
pub struct Lift {
    pub offset: i32,
    pub token: usize,
    pub count: u64,
    pub share: f64,
    pub weighted_share: f64,
    pub base: f64,
    pub score: f64,
}

/// By score, ties by token.
fn order(a: &Lift, b: &Lift) -> Ordering {
    let by_score = b.score.total_cmp(&a.score);
    by_score.then_with(|| a.token.cmp(&b.token))
}

/// No less than `shrunk * ratio.log2()`: a logarithm is at most the exponent and one.
fn at_most(shrunk: f64, ratio: f64) -> f64 {
    let exponent = (ratio.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    shrunk * f64::from(exponent + 1)
}

/// Counts one feature's tokens at a time.
#[derive(Debug)]
pub struct Tally<'a> {
    bases: &'a Bases,
    counts: [Vec<(u64, u64)>; 3],
    touched: [Vec<usize>; 3],
}

impl<'a> Tally<'a> {
    pub fn new(bases: &'a Bases) -> Self {
        Self {
            bases,
            counts: OFFSETS.map(|_| vec![(0, 0); bases.vocabulary()]),
            touched: OFFSETS.map(|_| Vec::new()),
        }
    }

    /// Counts an activation of a feature whose largest strength is `largest`.
    #[inline]
    pub fn add(&mut self, places: &Places<'_>, row: usize, strength: f32, largest: f32) {
        let weight = (f64::from(strength) / f64::from(largest) * WEIGHT).round() as u64;
        for (at, &offset) in OFFSETS.iter().enumerate() {
            if let Some(token) = places.token(row, offset) {
                let (count, sum) = &mut self.counts[at][token];
                if *count == 0 {
                    self.touched[at].push(token);
                }
                *count += 1;
                *sum += weight;
            }
        }
    }

    /// The `n` tokens of best score at each offset, and forgets the feature.
    pub fn finish(&mut self, n: usize) -> Vec<Lift> {
        let mut found = Vec::new();
        for (at, &offset) in OFFSETS.iter().enumerate() {
            let touched = std::mem::take(&mut self.touched[at]);
            let counts = &mut self.counts[at];
            let (total, weights) = touched.iter().fold((0, 0), |(count, weight), &token| {
                (count + counts[token].0, weight + counts[token].1)
            });
            let all = self.bases.totals[at] as f64;
            let mut lifts: Vec<Lift> = Vec::new();
            for &token in &touched {
                let (count, weight) = std::mem::take(&mut counts[token]);
                let base = self.bases.counts[at][token] as f64 / all;
                // Where all are too weak to weigh anything, each counts the same.
                let weighted_share = match weights {
                    0 => count as f64 / total as f64,
                    _ => weight as f64 / weights as f64,
                };
                let total = total as f64;
                let shrunk = (weighted_share * total + SHRINKAGE * base) / (total + SHRINKAGE);
                let ratio = shrunk / base;
                // Most tokens are none of the best, and a logarithm takes long.
                if lifts.len() == n
                    && lifts
                        .last()
                        .is_none_or(|last| at_most(shrunk, ratio) < last.score)
                {
                    continue;
                }
                let lift = Lift {
                    offset,
                    token,
                    count,
                    share: count as f64 / total,
                    weighted_share,
                    base,
                    score: shrunk * ratio.log2(),
                };
                let place = lifts.partition_point(|held| order(held, &lift) == Ordering::Less);
                if place < n {
                    lifts.truncate(n - 1);
                    lifts.insert(place, lift);
                }
            }
            found.extend(lifts);
            self.touched[at] = touched;
            self.touched[at].clear();
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_score_is_above_its_bound(shrunk in 1e-12_f64..1.0, base in 1e-9_f64..1.0) {
            for ratio in [shrunk / base, 1.0, 2.0, 0.5, 2.0_f64.next_down(), 1e-300] {
                prop_assert!(shrunk * ratio.log2() <= at_most(shrunk, ratio));
            }
        }
    }
}
