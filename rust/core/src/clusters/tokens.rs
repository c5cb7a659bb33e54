//! The tokens that tell most about a feature.

use std::cmp::Ordering;

use super::place::Places;
use super::spill::STRETCH;
use crate::simd::fetch;
use crate::{Cancel, Result};

/// Where tokens are looked for: before the token it fires on, there, and after it.
pub const OFFSETS: [i32; 3] = [-1, 0, 1];
/// Imagined activations on tokens drawn at random, so that three lucky hits on a rare token don't
/// win by their enormous lift.
const SHRINKAGE: f64 = 4.0;
/// A strength is counted as a whole number of these parts of the feature's largest: sums of whole
/// numbers don't depend on their order.
const WEIGHT: f64 = (1 << 30) as f64;
/// Rows lie anywhere: their tokens are fetched so many activations before they are read.
const AHEAD: usize = 16;
/// Of a row whose text has a token before it, or after it.
const BEFORE: u32 = 1 << 30;
const AFTER: u32 = 1 << 31;
const TOKEN: u32 = BEFORE - 1;

/// How often each token stands at each offset of any token, and the token of each row.
#[derive(Debug)]
pub struct Bases {
    /// The share of each token.
    shares: [Vec<f64>; 3],
    /// Of each row the token, with [`BEFORE`] and [`AFTER`]: a fifth of what a place takes.
    tokens: Vec<u32>,
}

impl Bases {
    /// Counts all rows.
    pub fn of(places: &Places<'_>) -> Self {
        let largest = places.rows().iter().map(|place| place.token).max();
        let vocabulary = largest.map_or(0, |token| token as usize + 1);
        let mut counts = OFFSETS.map(|_| vec![0_u64; vocabulary]);
        let mut totals = [0_u64; 3];
        let mut tokens = Vec::with_capacity(places.rows().len());
        for row in 0..places.rows().len() {
            let mut entry = 0;
            for (at, &offset) in OFFSETS.iter().enumerate() {
                if let Some(token) = places.token(row, offset) {
                    counts[at][token] += 1;
                    totals[at] += 1;
                    entry |= [BEFORE, token as u32, AFTER][at];
                }
            }
            tokens.push(entry);
        }
        let shares = [0, 1, 2].map(|at| {
            let share = |&count: &u64| count as f64 / totals[at] as f64;
            counts[at].iter().map(share).collect()
        });
        Self { shares, tokens }
    }

    /// The largest token id and one.
    pub fn vocabulary(&self) -> usize {
        self.shares[0].len()
    }

    /// The token at an offset from a row that there is, where the text has one.
    #[inline]
    fn token(&self, row: usize, offset: i32) -> Option<usize> {
        let entry = *self.tokens.get(row)?;
        let found = match offset {
            -1 if entry & BEFORE != 0 => *self.tokens.get(row.wrapping_sub(1))?,
            0 => entry,
            1 if entry & AFTER != 0 => *self.tokens.get(row + 1)?,
            _ => return None,
        };
        Some((found & TOKEN) as usize)
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

/// The nearest whole number, a half upwards, of what is not negative and less than 2^52.
#[inline]
fn rounded(number: f64) -> u64 {
    let whole = number as i64;
    whole as u64 + u64::from(number - whole as f64 >= 0.5)
}

/// Counts one feature's tokens at one offset at a time: what that takes stays in the cache.
#[derive(Debug)]
pub struct Tally<'a> {
    bases: &'a Bases,
    /// Of each token how often, and the sum of weights.
    counts: Vec<(u64, u64)>,
    touched: Vec<u32>,
}

impl<'a> Tally<'a> {
    pub fn new(bases: &'a Bases) -> Self {
        Self {
            bases,
            counts: vec![(0, 0); bases.vocabulary()],
            touched: Vec::new(),
        }
    }

    /// The `n` tokens of best score at each offset, from activations `row << 32 | bits of the
    /// strength` of which the largest is `largest`.
    /// After an error counts are left over: this must be thrown away.
    pub fn lifts(
        &mut self,
        keys: &[u64],
        largest: f32,
        n: usize,
        cancel: &Cancel,
    ) -> Result<Vec<Lift>> {
        let mut found = Vec::new();
        if n == 0 {
            return Ok(found);
        }
        let row = |key: u64| (key >> 32) as usize;
        for (at, &offset) in OFFSETS.iter().enumerate() {
            self.touched.clear();
            let (mut total, mut weights) = (0_u64, 0_u64);
            for (number, &key) in keys.iter().enumerate() {
                if number % STRETCH == 0 {
                    cancel.check()?;
                }
                if let Some(&soon) = keys.get(number + AHEAD) {
                    fetch(&self.bases.tokens, row(soon));
                }
                let Some(token) = self.bases.token(row(key), offset) else {
                    continue;
                };
                let strength = f64::from(f32::from_bits(key as u32));
                let weight = rounded(strength / f64::from(largest) * WEIGHT);
                let (count, sum) = &mut self.counts[token];
                if *count == 0 {
                    self.touched.push(token as u32);
                }
                *count += 1;
                *sum += weight;
                total += 1;
                weights += weight;
            }
            let mut lifts: Vec<Lift> = Vec::new();
            for &token in &self.touched {
                let token = token as usize;
                let (count, weight) = std::mem::take(&mut self.counts[token]);
                let base = self.bases.shares[at][token];
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
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn halves_are_rounded_up(number in 0.0_f64..1e10) {
            let half = number.floor() + 0.5;
            for number in [number, number.floor(), half, half.next_down(), half.next_up()] {
                prop_assert_eq!(rounded(number), number.round() as u64);
            }
        }

        #[test]
        fn no_score_is_above_its_bound(shrunk in 1e-12_f64..1.0, base in 1e-9_f64..1.0) {
            for ratio in [shrunk / base, 1.0, 2.0, 0.5, 2.0_f64.next_down(), 1e-300] {
                prop_assert!(shrunk * ratio.log2() <= at_most(shrunk, ratio));
            }
        }
    }
}
