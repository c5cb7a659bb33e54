//! How far the cheap score of a row and a feature can be from the exact pre-activation, where both were
//! rounded to 8 bits ([`super::coarse`] has the bounds of bf16).
//!
//! Rounding is by subtractive dither: for fixed numbers u, drawn once, uniform and independent, one a
//! dimension, `x = s (q + 1/2 - u) + e` with `q = floor(x / s + u)` a whole number. Then e is uniform on
//! `[-s/2, s/2)`, whatever x is, and its entries are independent (L. Schuchman, "Dither signals and their
//! effect on quantization noise", 1964). So too `w = t (p + 1/2 - v) + h`. A score is the product of what
//! was rounded,
//!
//! `x'.w' = s t (q.p + (1/2 - u).p + q.(1/2 - v) + (1/2 - u).(1/2 - v))`,
//!
//! of which the second term is the feature's alone, the third the row's, the last nobody's: only `q.p` is
//! a matrix product. Its error is `x.w - x'.w' = x.h + e.w'`. A uniform number on an interval of length s
//! is sub-Gaussian with its own variance, s^2 / 12; so, first over e (whatever h is, `|w'| <= |w| + t
//! sqrt(d) / 2`), then over h,
//!
//! `P(|x.w - x'.w'| >= m) <= 2 exp(-6 m^2 / (t^2 |x|^2 + s^2 (|w| + t sqrt(d) / 2)^2))`.
//!
//! `m^2 = C^2 (t^2 |x|^2 + s^2 (|w| + t sqrt(d) / 2)^2)` with [`C2`] makes that 1e-24 for each row and
//! feature: 1e12 rows of 28,672 features fail with a probability below 3e-8, however the failures hang
//! together. (Rounding up or down at random without taking the dither off again leaves errors that are
//! only known to lie in an interval of length s: by Hoeffding's lemma the margins would be the square root
//! of 3 times as wide.) Everything else that can move a score (32-bit arithmetic here, the roundings of the
//! definition) is bounded outright and comes on top. Margins are kept squared, which spares the root.

use crate::simd::Element;

/// `ln(2 / 1e-24) / 6`.
const C2: f32 = 9.327;

/// Widens a margin enough to add bounds that are small beside it: `(m + b)^2 <= (1 + ETA) m^2 +
/// (1 + 1 / ETA) b^2`.
const ETA: f32 = 1.0 / 128.0;
pub(super) const ONE_AND_ETA: f32 = 1.0 + ETA;
pub(super) const ONE_AND_INVERSE: f32 = 1.0 + 1.0 / ETA;

/// Bounds the roundings of a score (products, scales, sums), relative to `|x| |w|`: fewer than 64, each
/// below 2^-24.
pub(super) const SCORE_ROUNDING: f32 = 1.0 / 262_144.0;
/// Bounds what quotients in 32 bits and a dither in 24 move a number by, in its units.
const UNIT_ROUNDING: f32 = 1.0 / 65_536.0;

/// Norms and scales below are raised to this, so that no product of squares loses its bits.
pub(super) const SMALLEST_NORM: f32 = 1e-6;
/// As [`SMALLEST_NORM`], of a scale.
pub(super) const SMALLEST_SCALE: f32 = 1e-12;
/// Norms above this are outside the certificate: products of squares would overflow.
pub(super) const LARGEST_NORM: f32 = 1e9;

/// The norm of what [`UNIT_ROUNDING`] allows for in all dimensions.
fn units(scale: f32, d_in: usize) -> f32 {
    UNIT_ROUNDING * scale * (d_in as f32).sqrt()
}

/// What the definition's own roundings add, by the dtype of the weights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rounding {
    /// Of the bias, relative to it.
    pub bias: f32,
    /// Of a pre-activation, relative to it.
    pub value: f32,
}

impl Rounding {
    /// Of weights of this dtype.
    pub(super) fn of<E: Element>() -> Self {
        // f32 is the only element of four bytes.
        if size_of::<E>() == size_of::<f32>() {
            Self::F32
        } else {
            Self::BF16
        }
    }

    /// Pre-activations are rounded to f32: product, sum.
    pub(super) const F32: Self = Self {
        bias: 1.0 / 1_048_576.0,
        value: 1.0 / 1_048_576.0,
    };
    /// Pre-activations are rounded to bf16, half a unit in 8 bits twice.
    pub(super) const BF16: Self = Self {
        bias: 1.25 / 128.0,
        value: 1.25 / 128.0,
    };
}

/// A row's half of the margins.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct RowBound {
    /// One unit of its whole numbers.
    pub scale: f32,
    /// 128 times the sum of its whole numbers: what unsigned weights add to a product.
    pub offset: i32,
    /// The terms of the dither that are the row's, or nobody's.
    pub shift: f32,
    /// `|x|^2`, not below the truth.
    pub norm2: f32,
    /// Multiplies a feature's squared norm.
    pub error2: f32,
    /// Outside the certificate: only exact values will do.
    pub is_exact: bool,
    /// All zeros, padding perhaps: its products are known, and no bound could tell them apart.
    pub is_zero: bool,
}

impl RowBound {
    pub(super) fn new(scale: f32, sum: i32, shift: f32, norm: f32, d_in: usize) -> Self {
        let norm = norm.max(SMALLEST_NORM) * (1.0 + 1e-5);
        let slack = SCORE_ROUNDING * norm + units(scale, d_in);
        Self {
            scale,
            offset: 128 * sum,
            shift,
            norm2: norm * norm,
            error2: ONE_AND_ETA * C2 * scale * scale + ONE_AND_INVERSE * slack * slack,
            is_exact: false,
            is_zero: false,
        }
    }

    pub(super) fn exact() -> Self {
        Self {
            is_exact: true,
            ..Self::default()
        }
    }

    pub(super) fn zero() -> Self {
        Self {
            is_zero: true,
            ..Self::exact()
        }
    }
}

/// The features' half, one entry a feature; padded to whole panels.
#[derive(Debug, Default)]
pub(super) struct FeatureBounds {
    /// One unit of a feature's whole numbers.
    pub scale: Vec<f32>,
    /// The term of the dither that is the feature's.
    pub shift: Vec<f32>,
    /// `C^2` times the square of the unit, and a little.
    pub error2: Vec<f32>,
    /// `(|w| + t sqrt(d) / 2)^2`.
    pub norm2: Vec<f32>,
    /// The bias and its slack: scores err on the side of keeping.
    pub bias: Vec<f32>,
    /// Twice the slack of the bias: from an upper score to a lower one.
    pub slack: Vec<f32>,
    /// Whether any slack was ever above 0.
    pub has_bias: bool,
}

impl FeatureBounds {
    pub(super) fn with_len(len: usize) -> Self {
        Self {
            scale: vec![0.0; len],
            shift: vec![0.0; len],
            error2: vec![0.0; len],
            norm2: vec![0.0; len],
            bias: vec![0.0; len],
            slack: vec![0.0; len],
            has_bias: false,
        }
    }

    pub(super) fn set(&mut self, feature: usize, of: FeatureScale) {
        self.scale[feature] = of.scale;
        self.shift[feature] = of.shift;
        self.error2[feature] = of.error2;
        self.norm2[feature] = of.norm2;
    }

    pub(super) fn set_bias(&mut self, feature: usize, bias: f32, rounding: Rounding) {
        let slack = bias.abs() * rounding.bias;
        self.bias[feature] = bias + slack;
        self.slack[feature] = 2.0 * slack;
        self.has_bias |= slack > 0.0;
    }
}

/// What quantising a feature yields.
#[derive(Clone, Copy, Debug)]
pub(super) struct FeatureScale {
    pub scale: f32,
    pub shift: f32,
    pub error2: f32,
    pub norm2: f32,
}

impl FeatureScale {
    /// Of a feature of this unit, term of the dither and norm, in `d_in` dimensions.
    pub(super) fn new(scale: f32, shift: f32, norm: f32, d_in: usize) -> Self {
        let rounded = norm * (1.0 + 1e-5) + scale * (d_in as f32).sqrt() / 2.0;
        let norm = rounded.max(SMALLEST_NORM);
        Self {
            scale,
            shift,
            error2: ONE_AND_ETA * C2 * scale * scale
                + ONE_AND_INVERSE * units(scale, d_in) * units(scale, d_in),
            norm2: norm * norm,
        }
    }

    /// Of a feature that is outside the certificate: always a candidate.
    pub(super) fn boundless() -> Self {
        Self {
            scale: 0.0,
            shift: 0.0,
            error2: f32::INFINITY,
            norm2: f32::INFINITY,
        }
    }
}
