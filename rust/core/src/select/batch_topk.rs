//! The k * rows largest of all rows together (BatchTopK: Bussmann et al., arXiv 2412.06410).

use super::kth::{bound_below_kth, kth_largest};
use super::{check, group_count, non_finite, Codes, Options, Part};
use crate::rows::{map_ranges, Matrix};
use crate::simd::{value_of, Element};
use crate::{Cancel, Result};

/// Candidates of one range of rows, in rising flat index.
pub(crate) struct Candidates {
    pub keys: Vec<u64>,
    /// Where each row's keys end.
    pub ends: Vec<usize>,
}

/// The `k * rows` largest positive values of all rows together; fewer where fewer are
/// positive. Ties at the edge go to the lower row, then to the lower index.
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
    let (rows, width) = (pre_activations.rows(), pre_activations.width());
    let bound = screen(pre_activations, k, options, cancel)?;
    let parts = map_ranges(rows, width, options.threads, |range| {
        let mut found = Candidates {
            keys: Vec::new(),
            ends: Vec::with_capacity(range.len()),
        };
        for row in range {
            cancel.check()?;
            if k > 0 {
                options
                    .simd
                    .collect_above(pre_activations.row(row), bound, &mut found.keys);
            }
            found.ends.push(found.keys.len());
        }
        Ok(found)
    });
    keep_largest(rows, k, parts.into_iter().collect::<Result<_>>()?, cancel)
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
    cancel: &Cancel,
) -> Result<Codes<E>> {
    let wanted = k.saturating_mul(rows);
    let found: usize = parts.iter().map(|part| part.keys.len()).sum();
    // All values above `edge` are kept, and of those equal to it the first `equal_left`.
    let (edge, mut equal_left) = if found > wanted {
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
    let mut output = Part::<E>::with_rows(rows);
    output.values.reserve(found.min(wanted));
    output.indices.reserve(found.min(wanted));
    let mut kept = Vec::new();
    for part in parts {
        let mut start = 0;
        for end in part.ends {
            cancel.check()?;
            kept.clear();
            for key in &part.keys[start..end] {
                let bits = bits_of(*key);
                if bits > edge {
                    kept.push(*key);
                } else if bits == edge && equal_left > 0 {
                    equal_left -= 1;
                    kept.push(*key);
                }
            }
            output.push_row(&mut kept);
            start = end;
        }
    }
    let mut row_offsets = Vec::with_capacity(rows + 1);
    let mut end = 0;
    row_offsets.push(end);
    row_offsets.extend(output.counts.iter().map(|count| {
        end += *count as i64;
        end
    }));
    Ok(Codes {
        values: output.values,
        indices: output.indices,
        row_offsets,
    })
}

fn bits_of(key: u64) -> u32 {
    value_of(key).0.to_bits()
}
