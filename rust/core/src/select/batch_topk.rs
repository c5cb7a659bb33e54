//! The k * rows largest of all rows together (BatchTopK: Bussmann et al., arXiv 2412.06410).

use super::kth::{bound_below_kth, kth_largest, not_above_kth};
use super::{check, group_count, join, non_finite, Codes, Options, Part};
use crate::rows::{map_ranges, Matrix};
use crate::simd::{value_of, Element};
use crate::{Cancel, Result};

/// Candidates of one range of rows, in rising flat index.
pub(crate) struct Candidates {
    pub keys: Vec<u64>,
    /// Where each row's keys end.
    pub ends: Vec<usize>,
}

/// Fewer rows are not guessed about.
const FEW_ROWS: usize = 64;
/// Rows that a guess is made from.
const SAMPLE: usize = 32;

/// The `k * rows` largest positive values of all rows together; fewer where fewer are
/// positive. Ties at the edge go to the lower row, then to the lower index.
///
/// Where there are many rows, some of them tell about where the edge will lie: if at least as many
/// values as wanted lie above the guess, one pass over the values was enough.
///
/// # Errors
/// `k` above the width; with `check_finite`, a row that holds NaN or an infinity; `cancel`.
pub fn batch_topk<E: Element>(
    pre_activations: Matrix<'_, E>,
    k: usize,
    options: Options,
    cancel: &Cancel,
) -> Result<Codes<E>> {
    check(pre_activations, Some(k))?;
    let rows = pre_activations.rows();
    if let Some(guess) = guess(pre_activations, k, options, cancel)? {
        // So many above the guess tell that it was a bad one.
        let most = k.saturating_mul(2).saturating_add(64);
        let parts = collect(
            pre_activations,
            guess,
            most,
            options.check_finite,
            options,
            cancel,
        )?;
        let found: usize = parts.iter().flatten().map(|part| part.keys.len()).sum();
        if found >= k.saturating_mul(rows) {
            if let Some(parts) = parts.into_iter().collect::<Option<Vec<_>>>() {
                return keep_largest(rows, k, parts, options, cancel);
            }
        }
    }
    let bound = screen(pre_activations, k, options, cancel)?;
    let bound = if k == 0 { f32::INFINITY } else { bound };
    let parts = collect(pre_activations, bound, usize::MAX, false, options, cancel)?;
    keep_largest(
        rows,
        k,
        parts.into_iter().flatten().collect(),
        options,
        cancel,
    )
}

/// The values above `bound`, or None for a range of rows that has more than `most` a row.
fn collect<E: Element>(
    pre_activations: Matrix<'_, E>,
    bound: f32,
    most: usize,
    check_finite: bool,
    options: Options,
    cancel: &Cancel,
) -> Result<Vec<Option<Candidates>>> {
    let (rows, width) = (pre_activations.rows(), pre_activations.width());
    let parts = map_ranges(rows, width, options.threads, |range| {
        let most = most.saturating_mul(range.len());
        let mut found = Candidates {
            keys: Vec::new(),
            ends: Vec::with_capacity(range.len()),
        };
        for row in range {
            cancel.check()?;
            let values = pre_activations.row(row);
            if !check_finite {
                options.simd.collect_above(values, bound, &mut found.keys);
            } else if !options
                .simd
                .collect_finite_above(values, bound, &mut found.keys)
            {
                return Err(non_finite(row));
            }
            if found.keys.len() > most {
                return Ok(None);
            }
            found.ends.push(found.keys.len());
        }
        Ok(Some(found))
    });
    // The first error is that of the lowest row: ranges are in order.
    parts.into_iter().collect()
}

/// What the `k * rows` largest values probably exceed, from the largest of some rows.
fn guess<E: Element>(
    pre_activations: Matrix<'_, E>,
    k: usize,
    options: Options,
    cancel: &Cancel,
) -> Result<Option<f32>> {
    let (rows, width) = (pre_activations.rows(), pre_activations.width());
    let groups = group_count(k.saturating_mul(2), width);
    if rows < FEW_ROWS || k == 0 || groups == 0 {
        return Ok(None);
    }
    let mut maxima = vec![0.0_f32; groups];
    let mut keys = Vec::new();
    for row in (0..rows).step_by(rows.div_ceil(SAMPLE)) {
        cancel.check()?;
        let values = pre_activations.row(row);
        maxima.fill(0.0);
        options.simd.group_maxima(values, &mut maxima);
        // Twice as many a row as wanted on average: rows differ.
        let bound = not_above_kth(&maxima, 2 * k, options.simd);
        options.simd.collect_above(values, bound, &mut keys);
    }
    let sampled = rows.div_ceil(rows.div_ceil(SAMPLE));
    let mut bits: Vec<u32> = keys.iter().map(|key| bits_of(*key)).collect();
    // A sixth more than wanted: what the sample can't know.
    let wanted = k * sampled + k * sampled / 6;
    if wanted > bits.len() {
        return Ok(None);
    }
    Ok(Some(f32::from_bits(kth_largest(
        &mut bits, wanted, cancel,
    )?)))
}

/// A bound that the `k * rows` largest values exceed, from maxima of groups; 0 keeps all.
fn screen<E: Element>(
    pre_activations: Matrix<'_, E>,
    k: usize,
    options: Options,
    cancel: &Cancel,
) -> Result<f32> {
    let (rows, width) = (pre_activations.rows(), pre_activations.width());
    let groups = group_count(k, width);
    if groups == 0 && !options.check_finite {
        return Ok(0.0);
    }
    let parts = map_ranges(rows, width, options.threads, |range| {
        let mut bits = Vec::with_capacity(range.len() * groups);
        let mut maxima = vec![0.0_f32; groups];
        for row in range {
            cancel.check()?;
            let values = pre_activations.row(row);
            let finite = if groups == 0 {
                options.simd.all_finite(values)
            } else {
                maxima.fill(0.0);
                options.simd.group_maxima(values, &mut maxima)
            };
            if options.check_finite && !finite {
                return Err(non_finite(row));
            }
            bits.extend(maxima.iter().map(|maximum| maximum.to_bits()));
        }
        Ok(bits)
    });
    // The first error is that of the lowest row: ranges are in order.
    let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
    bound_below_kth(&mut parts.concat(), k.saturating_mul(rows), cancel)
}

/// Keeps the `k * rows` largest candidates.
pub(crate) fn keep_largest<E: Element>(
    rows: usize,
    k: usize,
    parts: Vec<Candidates>,
    options: Options,
    cancel: &Cancel,
) -> Result<Codes<E>> {
    let wanted = k.saturating_mul(rows);
    let found: usize = parts.iter().map(|part| part.keys.len()).sum();
    // All values above `edge` are kept, and of those equal to it the first so many.
    let (edge, equal_left) = if found > wanted {
        let mut bits: Vec<u32> = Vec::with_capacity(found);
        bits.extend(
            parts
                .iter()
                .flat_map(|part| &part.keys)
                .map(|key| bits_of(*key)),
        );
        let edge = match wanted {
            0 => u32::MAX,
            _ => kth_largest(&mut bits, wanted, cancel)?,
        };
        let above = bits.iter().filter(|bits| **bits > edge).count();
        (edge, wanted - above)
    } else {
        (0, 0)
    };
    // Which of the equal ones those are depends on all rows before; the rest doesn't.
    let mut slices = Vec::with_capacity(rows);
    let mut left = equal_left;
    for part in &parts {
        let mut start = 0;
        for end in &part.ends {
            let keys = &part.keys[start..*end];
            let take = if left == 0 {
                0
            } else {
                let equal = keys.iter().filter(|key| bits_of(**key) == edge).count();
                equal.min(left)
            };
            left -= take;
            slices.push((keys, take));
            start = *end;
        }
    }
    // Sorting costs far more than reading.
    let cost = (found / rows.max(1)).saturating_mul(64);
    let outputs = map_ranges(slices.len(), cost, options.threads, |range| {
        let mut part = Part::<E>::with_rows(range.len());
        let mut kept = Vec::new();
        for (keys, take) in &slices[range] {
            cancel.check()?;
            kept.clear();
            let mut equal_left = *take;
            for key in *keys {
                let bits = bits_of(*key);
                if bits > edge {
                    kept.push(*key);
                } else if bits == edge && equal_left > 0 {
                    equal_left -= 1;
                    kept.push(*key);
                }
            }
            part.push_row(&mut kept);
        }
        Ok(part)
    });
    join(rows, outputs)
}

fn bits_of(key: u64) -> u32 {
    value_of(key).0.to_bits()
}
