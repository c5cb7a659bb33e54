//! What one feature's activations tell.

use super::place::{position_bin, Places, Spot, Stretches, POSITION_BINS, SEGMENTS};
use super::spill::STRETCH;
use super::tokens::{Bases, Lift, Tally};
use crate::examples::histogram::{bin_of, BINS};
use crate::examples::samples::Ranking;
use crate::examples::sum;
use crate::shard::order::{mix, GOLDEN};
use crate::{Cancel, Error, Result};

/// How many random rows are tried for each negative that is wanted.
const DRAWS: u64 = 64;

/// What is kept of each feature.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Strongest activations.
    pub examples: usize,
    /// At most so many examples of one sequence; 0: any number.
    pub per_sequence: usize,
    /// Intervals of equal numbers of activations.
    pub quantiles: usize,
    /// Activations drawn from each.
    pub per_quantile: usize,
    /// Places where the feature is not active.
    pub negatives: usize,
    /// Nor so many tokens before and after them.
    pub window: usize,
    /// Tokens at each offset.
    pub tokens: usize,
    /// Decides what is drawn.
    pub seed: u64,
}

/// An activation drawn from an interval.
#[derive(Debug, Clone, Copy)]
pub struct Drawn {
    pub quantile: usize,
    pub rank: usize,
    pub low: f32,
    pub high: f32,
    pub count: usize,
    pub activation: (f32, u32),
}

/// See the tables of a feature database.
#[derive(Debug)]
pub struct Page {
    pub sum: u128,
    pub largest: f32,
    pub histogram: [u64; BINS],
    pub segments: [u64; SEGMENTS],
    pub positions: [u64; POSITION_BINS],
    /// Strength and row.
    pub examples: Vec<(f32, u32)>,
    pub intervals: Vec<Drawn>,
    pub negatives: Vec<u32>,
    pub lifts: Vec<Lift>,
}

/// All rows, and what was made of them once for all features.
#[derive(Debug, Clone, Copy)]
pub struct Texts<'a> {
    /// The rows.
    pub places: Places<'a>,
    /// Made of them.
    pub stretches: &'a Stretches,
    /// Made of them.
    pub bases: &'a Bases,
}

/// Makes the pages of one feature after another.
#[derive(Debug)]
pub struct Pages<'a> {
    texts: Texts<'a>,
    tally: Tally<'a>,
    options: Options,
}

impl<'a> Pages<'a> {
    pub fn new(texts: Texts<'a>, options: Options) -> Self {
        Self {
            texts,
            tally: Tally::new(texts.bases),
            options,
        }
    }

    /// The page of a feature from its activations, each `row << 32 | bits of the strength`, in any
    /// order; `each(number, spot, strength)` is called for all of them in the order of rows. The
    /// keys are of no use afterwards. The error names a row that comes twice, or has no place.
    pub fn make(
        &mut self,
        feature: u32,
        keys: &mut [u64],
        cancel: &Cancel,
        mut each: impl FnMut(usize, Spot, f32),
    ) -> Result<Page> {
        if !keys.is_sorted() {
            keys.sort_unstable();
        }
        let Texts {
            places, stretches, ..
        } = self.texts;
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] >> 32 == pair[1] >> 32) {
            return Err(bad_row(feature, pair[0] >> 32));
        }
        if let Some(last) = keys.last().map(|key| key >> 32) {
            if last >= places.rows().len() as u64 {
                return Err(bad_row(feature, last));
            }
        }
        let seed = mix(self.options.seed.wrapping_add(GOLDEN)) ^ mix(u64::from(feature));
        let mut page = Page {
            sum: 0,
            largest: 0.0,
            histogram: [0; BINS],
            segments: [0; SEGMENTS],
            positions: [0; POSITION_BINS],
            examples: Vec::new(),
            intervals: Vec::new(),
            negatives: Vec::new(),
            lifts: Vec::new(),
        };
        // Positive floats are in the order of their bits.
        let largest = keys.iter().map(|&key| key as u32).max().unwrap_or(0);
        page.largest = f32::from_bits(largest);
        for (number, &key) in keys.iter().enumerate() {
            if number % STRETCH == 0 {
                cancel.check()?;
            }
            let (row, strength) = ((key >> 32) as usize, f32::from_bits(key as u32));
            let spot = stretches.spot(&places, row);
            page.sum = sum::add(page.sum, strength);
            page.histogram[bin_of(strength)] += 1;
            page.segments[spot.segment] += 1;
            page.positions[position_bin(spot.position)] += 1;
            each(number, spot, strength);
        }
        let tokens = self.options.tokens;
        page.lifts = self.tally.lifts(keys, page.largest, tokens, cancel)?;
        page.negatives = self.negatives(seed, keys);
        for key in keys.iter_mut() {
            *key = u64::from(!(*key as u32)) << 32 | *key >> 32;
        }
        cancel.check()?;
        page.examples = self.examples(keys);
        cancel.check()?;
        page.intervals = self.intervals(seed, keys);
        Ok(page)
    }

    /// The strongest, the first of equal ones first. Few are wanted of many: no more are sorted.
    fn examples(&self, keys: &mut [u64]) -> Vec<(f32, u32)> {
        let Options {
            examples,
            per_sequence,
            ..
        } = self.options;
        let mut found: Vec<(f32, u32)> = Vec::with_capacity(examples.min(keys.len()));
        let mut sequences: Vec<i64> = Vec::new();
        let (mut start, mut end) = (0, 0);
        while found.len() < examples && end < keys.len() {
            // The rest is weaker than what was sorted before.
            end = keys.len().min((2 * end).max(2 * examples));
            let rest = &mut keys[start..];
            if end - start < rest.len() {
                rest.select_nth_unstable(end - start);
            }
            rest[..end - start].sort_unstable();
            for &key in &rest[..end - start] {
                if found.len() == examples {
                    break;
                }
                let (strength, row) = activation(key);
                let spot = self.texts.stretches.spot(&self.texts.places, row as usize);
                let present = sequences.iter().filter(|&&id| id == spot.sequence).count();
                if per_sequence == 0 || present < per_sequence {
                    sequences.push(spot.sequence);
                    found.push((strength, row));
                }
            }
            start = end;
        }
        found
    }

    fn intervals(&self, seed: u64, keys: &mut [u64]) -> Vec<Drawn> {
        let Options {
            quantiles,
            per_quantile,
            ..
        } = self.options;
        let ranking = Ranking { seed };
        // Keys begin with the strongest, intervals with the weakest.
        let all = keys.len();
        let cut = |at: usize| all - (all as u128 * at as u128 / quantiles.max(1) as u128) as usize;
        if all <= quantiles {
            keys.sort_unstable();
        } else {
            let cuts: Vec<usize> = (1..quantiles).rev().map(cut).collect();
            split(keys, &cuts, 0);
        }
        let mut drawn = Vec::new();
        for quantile in 0..quantiles {
            let inside = &keys[cut(quantile + 1)..cut(quantile)];
            let (Some(&first), Some(&last)) = (inside.iter().min(), inside.iter().max()) else {
                continue;
            };
            let ranked = inside
                .iter()
                .map(|&key| (ranking.rank(i64::from(activation(key).1)), key));
            let ranked = least(ranked, per_quantile);
            drawn.extend(ranked.iter().enumerate().map(|(at, &(_, key))| Drawn {
                quantile,
                rank: at + 1,
                low: activation(last).0,
                high: activation(first).0,
                count: inside.len(),
                activation: activation(key),
            }));
        }
        drawn
    }

    /// `keys` rise by row.
    fn negatives(&self, seed: u64, keys: &[u64]) -> Vec<u32> {
        let Options {
            negatives, window, ..
        } = self.options;
        let rows = self.texts.places.rows();
        let mut found: Vec<u32> = Vec::new();
        if keys.is_empty() || rows.is_empty() {
            return found;
        }
        for draw in 0..negatives as u64 * DRAWS {
            if found.len() == negatives {
                break;
            }
            let number = mix(seed.wrapping_add(mix(draw.wrapping_add(1)).wrapping_mul(GOLDEN)));
            let row = ((u128::from(number) * rows.len() as u128) >> 64) as usize;
            if !self.active_near(row, window, keys) && !found.contains(&(row as u32)) {
                found.push(row as u32);
            }
        }
        found
    }

    /// Whether the feature is active within `window` tokens of a row, in its text.
    fn active_near(&self, row: usize, window: usize, keys: &[u64]) -> bool {
        let rows = self.texts.places.rows();
        let place = &rows[row];
        let first = row.saturating_sub(window) as u64;
        let from = keys.partition_point(|key| key >> 32 < first);
        keys[from..]
            .iter()
            .map(|key| (key >> 32) as usize)
            .take_while(|&active| active <= row.saturating_add(window))
            .any(|active| {
                rows[active].sequence() == place.sequence()
                    && rows[active].position.abs_diff(place.position) as usize <= window
            })
    }
}

fn bad_row(feature: u32, row: u64) -> Error {
    Error::InvalidArgument(format!(
        "feature {feature} is active more than once at row {row}, or the row has no place; expected \
         each feature once a row"
    ))
}

/// Strength and row of a sorted key.
#[inline]
pub fn activation(key: u64) -> (f32, u32) {
    (f32::from_bits(!((key >> 32) as u32)), key as u32)
}

/// Moves keys so that those before each of the rising `cuts` are less than those from it on. The
/// first key is number `start`.
fn split(keys: &mut [u64], cuts: &[usize], start: usize) {
    let middle = cuts.len() / 2;
    let Some(&cut) = cuts.get(middle) else {
        return;
    };
    if cut - start < keys.len() {
        keys.select_nth_unstable(cut - start);
    }
    let (before, after) = keys.split_at_mut(cut - start);
    split(before, &cuts[..middle], start);
    split(after, &cuts[middle + 1..], cut);
}

/// The `n` least, in order.
fn least(all: impl Iterator<Item = (u64, u64)>, n: usize) -> Vec<(u64, u64)> {
    if n == 0 {
        return Vec::new();
    }
    let mut held: Vec<(u64, u64)> = Vec::new();
    let mut bound = (u64::MAX, u64::MAX);
    for one in all {
        if one <= bound {
            held.push(one);
            if held.len() >= n.saturating_mul(2).max(32) {
                bound = *held.select_nth_unstable(n - 1).1;
                held.truncate(n);
            }
        }
    }
    held.sort_unstable();
    held.truncate(n);
    held
}
