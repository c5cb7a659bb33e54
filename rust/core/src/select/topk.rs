//! The k largest of each row.

use super::kth::{just_below, not_above_kth};
use super::{check, group_count, join, Codes, Options, Part};
use crate::rows::{map_ranges, Matrix};
use crate::simd::{prefetch, Element};
use crate::{Cancel, Result};

/// The k largest positive values of each row; fewer where fewer are positive.
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
        let mut keys = Vec::new();
        let last = range.end;
        for row in range {
            cancel.check()?;
            let values = pre_activations.row(row);
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
            if keys.len() > k {
                keys.select_nth_unstable(k);
                keys.truncate(k);
            }
            part.push_row(&mut keys);
        }
        Ok(part)
    });
    join(rows, parts)
}
