//! The inner loops, each compiled for every SIMD level.

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

for_every_level! {
    /// Normalises one row in place.
    normalise_row => normalise(values: &mut [E], weight: &[E], eps: f32);
    /// Turns the end of each head of one token in place; `turns.len() <= head`.
    rotate_row => rotate(values: &mut [E], head: usize, turns: &[f32]);
}
