//! The inner loops, each compiled for every SIMD level.

use std::marker::PhantomData;

use crate::simd::{for_every_level, Element};

/// Sums that are kept apart, so that they are added up side by side: the order, and with it the
/// result, is the same at every level.
const SUMS: usize = 64;

#[inline(always)]
fn sum_of_squares<E: Element>(values: &[E]) -> f32 {
    let mut sums = [0_f32; SUMS];
    let chunks = values.chunks_exact(SUMS);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            let value = value.to_f32();
            *sum += value * value;
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        let value = value.to_f32();
        *sum += value * value;
    }
    let mut half = SUMS;
    while half > 1 {
        half /= 2;
        for at in 0..half {
            sums[at] += sums[at + half];
        }
    }
    sums[0]
}

#[inline(always)]
fn normalise<E: Element>(values: &mut [E], weight: &[E], eps: f32) {
    let mean = sum_of_squares(values) / values.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for (value, weight) in values.iter_mut().zip(weight) {
        let normalised = E::from_f32(value.to_f32() * scale);
        *value = E::from_f32(normalised.to_f32() * weight.to_f32());
    }
}

#[inline(always)]
fn rotate<E: Element>(values: &mut [E], head: usize, turns: &[f32]) {
    for head in values.chunks_exact_mut(head) {
        let start = head.len() - turns.len();
        for (pair, turn) in head[start..].chunks_exact_mut(2).zip(turns.chunks_exact(2)) {
            let (even, odd) = (pair[0].to_f32(), pair[1].to_f32());
            let (cosine, sine) = (turn[0], turn[1]);
            pair[0] = E::from_f32(even * cosine - odd * sine);
            pair[1] = E::from_f32(odd * cosine + even * sine);
        }
    }
}

/// e^x of `x <= 0`, within 2e-7 relative, 0 below -87; NaN stays. Plain arithmetic, so that loops
/// over it are vectorised. Source: the reduction and coefficients of Cephes' `expf`.
#[inline(always)]
fn exponential(x: f32) -> f32 {
    const TO_INTEGER: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + TO_INTEGER;
    let whole = shifted - TO_INTEGER;
    let r = clamped - whole * 0.693_359_4 - whole * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + coefficient;
    }
    let fraction = p * r * r + r + 1.0;
    // The sum's last bits are the integer; a NaN's are any, and its fraction stays NaN.
    let power = shifted
        .to_bits()
        .wrapping_sub(TO_INTEGER.to_bits())
        .wrapping_add(127)
        << 23;
    let value = fraction * f32::from_bits(power & 0x7F80_0000);
    if x < -87.0 {
        0.0
    } else {
        value
    }
}

/// `_kind`: the macro's loops are of an element type.
#[inline(always)]
fn softmax<E: Element>(scores: &mut [f32], _kind: PhantomData<E>) {
    let mut largest = f32::NEG_INFINITY;
    for &score in scores.iter() {
        largest = if score > largest { score } else { largest };
    }
    let mut sums = [0_f32; 16];
    for chunk in scores.chunks_mut(16) {
        for (score, sum) in chunk.iter_mut().zip(&mut sums) {
            *score = exponential(*score - largest);
            *sum += *score;
        }
    }
    let inverse = 1.0 / sums.iter().sum::<f32>();
    for score in scores {
        *score *= inverse;
    }
}

for_every_level! {
    /// Normalises one row in place.
    normalise_row => normalise(values: &mut [E], weight: &[E], eps: f32);
    /// Turns the end of each head of one token in place; `turns.len() <= head`.
    rotate_row => rotate(values: &mut [E], head: usize, turns: &[f32]);
    /// Makes weights of one query's scores, in place; a NaN or an infinity makes them NaN.
    softmax_row => softmax(scores: &mut [f32], kind: PhantomData<E>);
}
