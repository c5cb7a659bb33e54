//! What one feature's activations tell.

use super::place::{Places, POSITION_BINS, SEGMENTS};
use super::tokens::{Bases, Lift, Tally};
use crate::examples::histogram::{bin_of, BINS};
use crate::examples::samples::Ranking;
use crate::examples::sum;
use crate::shard::order::{mix, GOLDEN};

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

/// Makes the pages of one feature after another.
#[derive(Debug)]
pub struct Pages<'a> {
    places: Places<'a>,
    tally: Tally<'a>,
    options: Options,
}

impl<'a> Pages<'a> {
    pub fn new(places: Places<'a>, bases: &'a Bases, options: Options) -> Self {
        Self {
            places,
            tally: Tally::new(bases),
            options,
        }
    }

    /// The page of a feature from its activations, each `row << 32 | bits of the strength`, which
    /// are sorted: afterwards each is what [`activation`] reads, the strongest first. The error is a
    /// row that comes twice, or has no place.
    pub fn make(&mut self, feature: u32, keys: &mut [u64]) -> Result<Page, u32> {
        keys.sort_unstable();
        let rows = self.places.rows().len();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] >> 32 == pair[1] >> 32) {
            return Err((pair[0] >> 32) as u32);
        }
        if let Some(last) = keys.last().map(|key| key >> 32) {
            if last >= rows as u64 {
                return Err(last as u32);
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
        for &key in keys.iter() {
            let (row, strength) = ((key >> 32) as usize, f32::from_bits(key as u32));
            let place = &self.places.rows()[row];
            page.sum = sum::add(page.sum, strength);
            page.histogram[bin_of(strength)] += 1;
            page.segments[place.segment()] += 1;
            page.positions[place.position_bin()] += 1;
            if self.options.tokens > 0 {
                self.tally.add(&self.places, row, strength, page.largest);
            }
        }
        page.lifts = self.tally.finish(self.options.tokens);
        page.negatives = self.negatives(seed, keys);
        for key in keys.iter_mut() {
            *key = u64::from(!(*key as u32)) << 32 | *key >> 32;
        }
        keys.sort_unstable();
        page.examples = self.examples(keys);
        page.intervals = self.intervals(seed, keys);
        Ok(page)
    }

    fn examples(&self, keys: &[u64]) -> Vec<(f32, u32)> {
        let Options {
            examples,
            per_sequence,
            ..
        } = self.options;
        let mut found: Vec<(f32, u32)> = Vec::with_capacity(examples.min(keys.len()));
        let mut sequences: Vec<i64> = Vec::new();
        for &key in keys {
            if found.len() == examples {
                break;
            }
            let (strength, row) = activation(key);
            let sequence = self.places.rows()[row as usize].sequence();
            let present = sequences.iter().filter(|&&id| id == sequence).count();
            if per_sequence == 0 || present < per_sequence {
                sequences.push(sequence);
                found.push((strength, row));
            }
        }
        found
    }

    fn intervals(&self, seed: u64, keys: &[u64]) -> Vec<Drawn> {
        let Options {
            quantiles,
            per_quantile,
            ..
        } = self.options;
        let ranking = Ranking { seed };
        let mut drawn = Vec::new();
        for quantile in 0..quantiles {
            // Keys begin with the strongest, intervals with the weakest.
            let cut = |at: usize| {
                keys.len() - (keys.len() as u128 * at as u128 / quantiles as u128) as usize
            };
            let inside = &keys[cut(quantile + 1)..cut(quantile)];
            let (Some(&first), Some(&last)) = (inside.first(), inside.last()) else {
                continue;
            };
            let mut ranked: Vec<(u64, u64)> = inside
                .iter()
                .map(|&key| (ranking.rank(i64::from(activation(key).1)), key))
                .collect();
            if ranked.len() > per_quantile && per_quantile > 0 {
                ranked.select_nth_unstable(per_quantile - 1);
            }
            ranked.truncate(per_quantile);
            ranked.sort_unstable();
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
        let rows = self.places.rows();
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
        let rows = self.places.rows();
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

/// Strength and row of a sorted key.
#[inline]
pub fn activation(key: u64) -> (f32, u32) {
    (f32::from_bits(!((key >> 32) as u32)), key as u32)
}
