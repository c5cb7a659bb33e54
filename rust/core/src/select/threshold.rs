//! All values above a threshold (JumpReLU's test): no row depends on another.

use super::{check, join, Codes, Options, Part};
use crate::rows::{map_ranges, Matrix};
use crate::simd::Element;
use crate::{Cancel, Error, Result};

/// One threshold for all features, or one for each.
#[derive(Clone, Copy, Debug)]
pub enum Threshold<'a> {
    /// For all.
    Shared(f32),
    /// As many as features.
    Each(&'a [f32]),
}

/// The positive values that exceed the threshold, compared as f32. A negative threshold is
/// as good as 0; nothing exceeds a NaN.
///
/// # Errors
/// Thresholds of another number than the width; with `check_finite`, a row that holds NaN or
/// an infinity; `cancel`.
pub fn threshold<E: Element>(
    pre_activations: Matrix<'_, E>,
    threshold: Threshold<'_>,
    options: Options,
    cancel: &Cancel,
) -> Result<Codes<E>> {
    check(pre_activations, None)?;
    let (rows, width) = (pre_activations.rows(), pre_activations.width());
    let each: Vec<f32>;
    let threshold = match threshold {
        Threshold::Shared(bound) => Threshold::Shared(at_least_zero(bound)),
        Threshold::Each(bounds) if bounds.len() == width => {
            each = bounds.iter().map(|bound| at_least_zero(*bound)).collect();
            Threshold::Each(&each)
        }
        Threshold::Each(bounds) => {
            return Err(Error::InvalidArgument(format!(
                "{} thresholds for {width} features; give one, or one a feature",
                bounds.len()
            )))
        }
    };
    let parts = map_ranges(rows, width, options.threads, |range| {
        let mut part = Part::with_rows(range.len());
        let mut keys = Vec::new();
        for row in range {
            cancel.check()?;
            let values = pre_activations.row(row);
            if options.check_finite && !options.simd.all_finite(values) {
                part.bad_row = Some(row);
                break;
            }
            keys.clear();
            match threshold {
                Threshold::Shared(bound) => options.simd.collect_above(values, bound, &mut keys),
                Threshold::Each(bounds) => {
                    options.simd.collect_above_each(values, bounds, &mut keys);
                }
            }
            part.push_row(&mut keys);
        }
        Ok(part)
    });
    join(rows, parts)
}

/// relu comes first. (`f32::max` would turn NaN into 0.)
fn at_least_zero(bound: f32) -> f32 {
    if bound < 0.0 {
        0.0
    } else {
        bound
    }
}
