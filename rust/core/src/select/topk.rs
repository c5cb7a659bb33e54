//! The k largest of each row.

use super::kth::{just_below, not_above_kth};
use super::{check, group_count, join, Codes, Options, Part};
use crate::rows::{map_ranges, Matrix};
use crate::simd::{prefetch, value_of, Element};
use crate::{Cancel, Result};

/// The k largest positive values of each row; fewer where fewer are positive.
///
/// Rows of one source have their k-th largest values close together, so that the rows before tell
/// about where a row's edge lies: if at least k values lie above a guess, one pass was enough.
///
/// # Errors
/// `k` above the width; with `check_finite`, a row that holds NaN or an infinity; `cancel`.
pub fn topk<E: Element>(
    pre_activations: Matrix<'_, E>,
    k: usize,
    options: Options,
    cancel: &Cancel,
) -> Result<Codes<E>> {
    check(pre_activations, Some(k))?;
    let rows = pre_activations.rows();
    let groups = group_count(k, pre_activations.width());
    let parts = map_ranges(rows, pre_activations.width(), options.threads, |range| {
        let mut part = Part::with_rows(range.len());
        part.values.reserve(range.len() * k);
        part.indices.reserve(range.len() * k);
        let mut maxima = vec![0.0_f32; groups];
        let (mut keys, mut scratch) = (Vec::new(), Vec::new());
        let mut edge = Edge::default();
        let last = range.end;
        for row in range {
            cancel.check()?;
            let values = pre_activations.row(row);
            keys.clear();
            let guess = if groups > 0 && k > 0 {
                edge.guess()
            } else {
                None
            };
            let mut is_done = false;
            if let Some(guess) = guess {
                let finite = options.simd.collect_finite_above(values, guess, &mut keys);
                if !finite && options.check_finite {
                    part.bad_row = Some(row);
                    break;
                }
                is_done = edge.learn_count(keys.len(), k);
            }
            if !is_done {
                let mut bound = 0.0;
                let finite = if groups == 0 {
                    !options.check_finite || options.simd.all_finite(values)
                } else {
                    maxima.fill(0.0);
                    let finite = options.simd.group_maxima(values, &mut maxima);
                    if k > 0 {
                        bound = just_below(not_above_kth(&maxima, k, options.simd));
                    }
                    finite || !options.check_finite
                };
                if !finite {
                    part.bad_row = Some(row);
                    break;
                }
                // The rest is in the cache; the next row can be on its way.
                if row + 1 < last {
                    prefetch(pre_activations.row(row + 1));
                }
                keys.clear();
                if k > 0 {
                    options.simd.collect_above(values, bound, &mut keys);
                }
            }
            options.simd.keep_smallest(&mut keys, k, &mut scratch);
            part.push_sorted(&keys);
            if let Some(least) = keys.last().filter(|_| keys.len() == k) {
                edge.learn_kth(value_of(*least).0, !is_done);
            }
        }
        Ok(part)
    });
    join(rows, parts)
}

/// Below the mean k-th value by so much of it guesses start, and are at least: a row's own k-th value
/// strays by some percent.
const LEAST_MARGIN: f32 = 0.05;
/// Guesses farther below are no help.
const MOST_MARGIN: f32 = 0.3;
/// After a guess that failed, so many rows in a row aren't guessed about, at most.
const LONGEST_REST: u32 = 64;

/// What the rows so far tell of the next one's k-th value.
#[derive(Debug, Default)]
struct Edge {
    /// A moving mean of k-th values; 0 before the first.
    mean: f32,
    /// Beyond the least one.
    margin: f32,
    /// Rows left that are not guessed about, and how many it will be after the next failure.
    rest: u32,
    next_rest: u32,
}

impl Edge {
    /// What a few more than k values of the next row probably exceed.
    fn guess(&mut self) -> Option<f32> {
        if self.rest > 0 {
            self.rest -= 1;
            return None;
        }
        let guess = self.mean * (1.0 - LEAST_MARGIN - self.margin);
        // Not an infinity either, nor NaN.
        (guess > 0.0 && guess < f32::MAX).then_some(guess)
    }

    /// `count` values exceeded the guess. Whether that is a good number.
    fn learn_count(&mut self, count: usize, k: usize) -> bool {
        if count < k || count > k.saturating_mul(4).saturating_add(64) {
            if count < k {
                self.margin = (self.margin + LEAST_MARGIN / 4.0).min(MOST_MARGIN);
            }
            self.next_rest = (2 * self.next_rest).clamp(1, LONGEST_REST);
            self.rest = self.next_rest;
            return false;
        }
        self.next_rest = 0;
        if count > 2 * k {
            self.margin *= 0.75;
        }
        true
    }

    /// The k-th value of a row; `anew` where nothing was known of it.
    fn learn_kth(&mut self, value: f32, anew: bool) {
        self.mean = if anew && self.rest <= 1 {
            value
        } else {
            self.mean + (value - self.mean) / 8.0
        };
    }
}
