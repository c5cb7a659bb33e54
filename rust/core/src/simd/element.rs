//! The element types that the loops read, and the sort key of a code.

use half::{bf16, f16};

mod private {
    /// Keeps [`super::Stored`] to the types below, whose bits the x86 loads rely on.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// `f32`, `bf16` or `f16`: what weights may be kept in.
pub trait Stored: private::Sealed + ArchLoad + Copy + Send + Sync + 'static {
    /// Exact.
    fn to_f32(self) -> f32;
}

/// `f32` or `bf16`: what activations, codes and weights are made of. Sums are f32.
pub trait Element: Stored + Default {
    /// Whether pre-activations are rounded so coarsely that a sum in f32 nearly always gives them.
    const IS_COARSE: bool;

    /// To the nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// A product in f64 and a bias, by the definition of exact codes: f32 rounds their sum once; bf16
    /// rounds the product (by way of f32) and then the sum, as a layer in bf16 does.
    fn pre_activation(product: f64, bias: Self) -> Self;
    /// As [`Element::pre_activation`] of the product `product + rest`, of which `rest` is what one f64
    /// can't hold; rounded as if f64 had no end.
    fn exact_pre_activation(product: f64, rest: f64, bias: Self) -> Self;
}

/// `left + right`, and what its rounding has taken away (D. Knuth).
#[inline(always)]
pub fn two_sum(left: f64, right: f64) -> (f64, f64) {
    let sum = left + right;
    let right_part = sum - left;
    let missed = (left - (sum - right_part)) + (right - right_part);
    (sum, missed)
}

/// `sum + rest`, in f64, rounded to odd: who rounds it again, to 24 bits or fewer, gets what rounding
/// the exact number once gives (S. Boldo and G. Melquiond, "Emulation of FMA", 2008).
fn to_odd(sum: f64, rest: f64) -> f64 {
    let (sum, rest) = two_sum(sum, rest);
    if rest == 0.0 || sum.to_bits() & 1 == 1 || !sum.is_finite() {
        return sum;
    }
    // Its neighbour on the side of what is left.
    let away = (rest > 0.0) == (sum > 0.0);
    f64::from_bits(if away {
        sum.to_bits() + 1
    } else {
        sum.to_bits() - 1
    })
}

impl Stored for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        // The upper half of an f32; `half` also quietens NaN, which costs a branch.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Element for f32 {
    const IS_COARSE: bool = false;

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn pre_activation(product: f64, bias: Self) -> Self {
        (product + f64::from(bias)) as f32
    }
    fn exact_pre_activation(product: f64, rest: f64, bias: Self) -> Self {
        let (sum, missed) = two_sum(product, f64::from(bias));
        to_odd(sum, missed + rest) as f32
    }
}

impl Element for bf16 {
    const IS_COARSE: bool = true;

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // As `half` does, without a branch, so that loops over many are vectorised.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }
    #[inline(always)]
    fn pre_activation(product: f64, bias: Self) -> Self {
        let product = Self::from_f32(product as f32).to_f32();
        Self::from_f32(product + bias.to_f32())
    }
    fn exact_pre_activation(product: f64, rest: f64, bias: Self) -> Self {
        Self::pre_activation(to_odd(product, rest), bias)
    }
}

#[cfg(target_arch = "x86_64")]
pub use super::x86::Load as ArchLoad;

/// On other architectures no element needs a vector load.
#[cfg(not(target_arch = "x86_64"))]
pub trait ArchLoad {}
#[cfg(not(target_arch = "x86_64"))]
impl ArchLoad for f32 {}
#[cfg(not(target_arch = "x86_64"))]
impl ArchLoad for bf16 {}
#[cfg(not(target_arch = "x86_64"))]
impl ArchLoad for f16 {}

/// The sort key of a positive value at an index: rising keys are falling values,
/// ties by rising index (positive floats order as their bits do).
#[inline(always)]
pub(crate) fn key_of(value: f32, index: usize) -> u64 {
    (u64::from(!value.to_bits()) << 32) | index as u64
}

/// The value and the index of a key.
#[inline(always)]
pub fn value_of(key: u64) -> (f32, u32) {
    (f32::from_bits(!((key >> 32) as u32)), key as u32)
}
