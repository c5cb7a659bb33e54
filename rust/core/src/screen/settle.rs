//! Values rounded as if sums were exact.
//!
//! Where a sum in f64 lies so near to the edge between two results that its own error could decide, it is
//! added up again in pairs of f64 (T. Ogita, S. Rump, S. Oishi, "Accurate sum and dot product", 2005).
//! One in some hundred thousand is; of all others the result is the same, however they were added up.

use super::certificate::FeatureBounds;
use super::dot::BLOCK;
use crate::simd::{two_sum, Element};

/// Roundings of a sum on the way to it: 64 of a lane, 4 of lanes, one a block, and some to spare.
const ROUNDINGS: usize = 80;

/// What tells how far a row's sums may be off.
#[derive(Clone, Copy)]
pub(super) struct Settle<'a, E> {
    pub x: &'a [E],
    /// `|x|`, not below the truth.
    pub norm: f64,
    pub bounds: &'a FeatureBounds,
}

impl<'a, E: Element> Settle<'a, E> {
    /// Of a row whose norm isn't known.
    pub(super) fn of(x: &'a [E], bounds: &'a FeatureBounds) -> Self {
        let norm2: f64 = x.iter().map(|x| f64::from(x.to_f32()).powi(2)).sum();
        let norm = norm2.sqrt() * (1.0 + 1e-6);
        Self { x, norm, bounds }
    }

    /// The pre-activation of `feature`, of weights `w`, whose product was summed to `product` in f64 (or
    /// less closely, where that makes no difference).
    #[inline]
    pub(super) fn value(&self, feature: usize, w: &[E], product: f64, bias: E) -> E {
        let roundings = ROUNDINGS + w.len() / BLOCK;
        let size = self.norm * f64::from(self.bounds.norm2[feature]).sqrt();
        // The bias is added with one more rounding.
        let total = product.abs() + f64::from(bias.to_f32()).abs();
        let off = (roundings as f64 * size + total) * f64::EPSILON;
        let low = E::pre_activation(product - off, bias);
        let high = E::pre_activation(product + off, bias);
        if low.to_f32() == high.to_f32() || !product.is_finite() {
            return E::pre_activation(product, bias);
        }
        let (mut sum, mut rest) = (0.0, 0.0);
        for (x, w) in self.x.iter().zip(w) {
            // Exact: 24 bits by 24.
            let product = f64::from(x.to_f32()) * f64::from(w.to_f32());
            let (next, missed) = two_sum(sum, product);
            sum = next;
            rest += missed;
        }
        E::exact_pre_activation(sum, rest, bias)
    }
}
