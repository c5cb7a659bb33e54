//! The inner loops, each compiled for every SIMD level: the code is one and the same, so all
//! levels agree to the bit (Rust never fuses or reorders float operations).

use crate::simd::{for_every_level, Element};

/// The largest e4m3 number.
pub const MAX: f32 = 448.0;
/// The smallest normal e4m3 number, 2^-6.
const LEAST_NORMAL: f32 = 0.015_625;

/// The nearest e4m3 number, ties to even. `|value| <= 448`, or NaN, which stays.
#[inline(always)]
pub fn round(value: f32) -> f32 {
    // 1.5 * 2^20 times the value's power of two has its last bit where e4m3 has its own, three
    // below the leading one; below 2^-6 the last bit stays at 2^-9.
    let exponent = (value.to_bits() & 0x7F80_0000).max(LEAST_NORMAL.to_bits());
    let magic = f32::from_bits(exponent) * 1_572_864.0;
    (value + magic) - magic
}

/// The code of an e4m3 number as [`round`] gives it, with the sign of `value`.
#[inline(always)]
fn code_of(rounded: f32, value: f32) -> u8 {
    let magnitude = rounded.abs();
    let normal = (magnitude.to_bits() >> 20).wrapping_sub(120 << 3);
    // 2^14 has its last bit at 2^-9, the step of e4m3's subnormals.
    let subnormal = (magnitude + 16384.0).to_bits() & 7;
    let code = if magnitude < LEAST_NORMAL {
        subnormal
    } else {
        normal
    };
    let code = if magnitude.is_nan() { 0x7F } else { code };
    (code as u8 & 0x7F) | ((value.to_bits() >> 24) as u8 & 0x80)
}

/// The number of a code.
#[inline(always)]
fn value_of(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7F);
    let normal = f32::from_bits((magnitude << 20) + (120 << 23));
    let subnormal = magnitude as f32 * (1.0 / 512.0);
    let value = if magnitude < 8 { subnormal } else { normal };
    let value = if magnitude == 0x7F { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | (u32::from(code & 0x80) << 24))
}

/// The bits of the largest magnitude; a NaN is larger than an infinity.
#[inline(always)]
fn largest<E: Element>(values: &[E]) -> u32 {
    values.iter().fold(0, |most, value| {
        most.max(value.to_f32().to_bits() & 0x7FFF_FFFF)
    })
}

/// The scale of a group whose largest magnitude has these bits; 1 for zeros.
#[inline(always)]
pub fn scale_of(largest: u32) -> f32 {
    let scale = f32::from_bits(largest) / MAX;
    if scale == 0.0 {
        1.0
    } else {
        scale
    }
}

#[inline(always)]
fn scaled(value: f32, scale: f32) -> f32 {
    // A scale among f32's subnormals is coarse, and the quotient then may pass 448.
    (value / scale).clamp(-MAX, MAX)
}

#[inline(always)]
fn fake_quantize<E: Element>(values: &[E], group: usize, output: &mut [E]) {
    for (values, output) in values.chunks(group).zip(output.chunks_mut(group)) {
        let scale = scale_of(largest(values));
        for (value, output) in values.iter().zip(output) {
            *output = E::from_f32(round(scaled(value.to_f32(), scale)) * scale);
        }
    }
}

#[inline(always)]
fn raise_largest<E: Element>(values: &[E], group: usize, most: &mut [u32]) {
    for (values, most) in values.chunks(group).zip(most) {
        *most = (*most).max(largest(values));
    }
}

#[inline(always)]
fn quantize<E: Element>(values: &[E], group: usize, scales: &[f32], codes: &mut [u8]) {
    let parts = values.chunks(group).zip(codes.chunks_mut(group));
    for ((values, codes), &scale) in parts.zip(scales) {
        for (value, code) in values.iter().zip(codes) {
            let value = scaled(value.to_f32(), scale);
            *code = code_of(round(value), value);
        }
    }
}

#[inline(always)]
fn dequantize<E: Element>(codes: &[u8], group: usize, scales: &[f32], output: &mut [E]) {
    let parts = codes.chunks(group).zip(output.chunks_mut(group));
    for ((codes, output), &scale) in parts.zip(scales) {
        for (&code, output) in codes.iter().zip(output) {
            *output = E::from_f32(value_of(code) * scale);
        }
    }
}

for_every_level! {
    /// Quantises and dequantises one row, group by group.
    fake_quantize_row => fake_quantize(values: &[E], group: usize, output: &mut [E]);
    /// Raises `most[i]` to the bits of the largest magnitude in group `i` of one row.
    raise_largest_row => raise_largest(values: &[E], group: usize, most: &mut [u32]);
    /// The codes of one row; group `i` has `scales[i]`.
    quantize_row => quantize(values: &[E], group: usize, scales: &[f32], codes: &mut [u8]);
    /// The numbers of one row of codes; group `i` has `scales[i]`.
    dequantize_row => dequantize(codes: &[u8], group: usize, scales: &[f32], output: &mut [E]);
}
