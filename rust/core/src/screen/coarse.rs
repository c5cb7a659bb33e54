//! Rounding to bf16, and how far scores of bf16 can be from the exact ones: for certain.
//!
//! With `x = x' + e` and `w = w' + h`, `x.w - x'.w' = e.w + x'.h`, so by Cauchy and Schwarz
//!
//! `|x.w - x'.w'| <= |e| |w| + |x'| |h|`,
//!
//! of which all four norms are known: no dither, no probability, whatever the numbers are. To that
//! comes what sums in f32 lose: products of bf16 are exact in f32, and a sum of n terms in any order is off by
//! at most `n 2^-24 |x'| |w'|`. bf16 rows and weights have no e and no h, so that these sums are all there is.

use super::certificate::{
    FeatureScale, RowBound, LARGEST_NORM, ONE_AND_ETA, ONE_AND_INVERSE, SCORE_ROUNDING,
    SMALLEST_NORM,
};
use super::quantise::{magnitude, round_coarsely};
use crate::simd::{Element, Simd};

/// Bounds what squares too small for f32, and bf16 too small for the CPU (which may take them for 0),
/// have in a norm.
const TINY: f32 = 1e-15;

/// `(p + q)^2 <= first p^2 + second q^2`.
struct Split {
    first: f32,
    second: f32,
}

/// p is the row's error, q the weights': alike in f32, where it is best to weigh them alike; bf16 weights
/// have none.
fn split<E: Element>() -> Split {
    let (first, second) = match E::IS_COARSE {
        true => (ONE_AND_ETA, ONE_AND_INVERSE),
        false => (2.0, 2.0),
    };
    Split { first, second }
}

/// What sums of so many terms lose, relative to the product of the norms.
fn sums(d_in: usize) -> f32 {
    1.01 * (d_in + 64) as f32 / (1 << 24) as f32
}

/// A norm of rounded numbers, and its error, not below the truth.
fn raised(norm: f32, error: f32) -> (f32, f32) {
    let error = error * (1.0 + 1e-4) + TINY;
    ((norm * (1.0 + 1e-5) + error).max(SMALLEST_NORM), error)
}

/// Rounds a row; None where it is not finite.
pub(super) fn round_row<E: Element>(
    values: &[f32],
    output: &mut [u16],
    simd: Simd,
) -> Option<RowBound> {
    let found = magnitude(values, simd);
    if !found.is_finite() {
        return None;
    }
    if found.norm > LARGEST_NORM {
        return Some(RowBound::exact());
    }
    if found.largest == 0.0 {
        return Some(RowBound::zero());
    }
    let (norm, error) = raised(found.norm, round_coarsely(values, output, simd));
    let slack = error + (sums(values.len()) + SCORE_ROUNDING) * norm;
    Some(RowBound {
        scale: 1.0,
        offset: 0,
        shift: 0.0,
        norm2: norm * norm,
        error2: split::<E>().first * slack * slack,
        is_exact: false,
        is_zero: false,
    })
}

/// Rounds a feature; None where it is not finite.
pub(super) fn round_feature<E: Element>(
    w: &[E],
    output: &mut [u16],
    simd: Simd,
) -> Option<FeatureScale> {
    let found = magnitude(w, simd);
    if !found.is_finite() || found.norm > LARGEST_NORM {
        output.fill(0);
        return found.is_finite().then(FeatureScale::boundless);
    }
    let (norm, error) = raised(found.norm, round_coarsely(w, output, simd));
    Some(FeatureScale {
        scale: 1.0,
        shift: 0.0,
        error2: split::<E>().second * error * error,
        norm2: norm * norm,
    })
}
