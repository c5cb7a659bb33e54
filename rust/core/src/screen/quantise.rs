//! Rounding to 8 bits and to bf16: loops plain enough for the compiler to vectorise, compiled once for each
//! instruction set.

use half::bf16;

#[cfg(any(test, target_arch = "x86_64"))]
use crate::simd::Level;
use crate::simd::{Element, Simd};

/// Of a row or a feature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Magnitude {
    /// The largest magnitude (times its weight, where there are weights); passes NaN over.
    pub largest: f32,
    /// The Euclidean norm: NaN where a number is NaN, infinite where the squares are too large.
    pub norm: f32,
}

impl Magnitude {
    /// Whether every number was.
    pub(super) fn is_finite(self) -> bool {
        self.largest.is_finite() && !self.norm.is_nan()
    }
}

/// AVX-512 on bytes and words too: any CPU of it but the first.
#[cfg(target_arch = "x86_64")]
fn has_avx512_bytes() -> bool {
    is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
}

/// Defines a function that calls `$body`, compiled for the level of `simd`.
macro_rules! twins {
    ($(#[$doc:meta])* $visible:vis fn $name:ident $(<$element:ident>)? ($($argument:ident : $type:ty),*) $(-> $output:ty)? = $body:ident) => {
        $(#[$doc])*
        $visible fn $name $(<$element: Element>)? ($($argument: $type,)* simd: Simd) $(-> $output)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
            fn avx512 $(<$element: Element>)? ($($argument: $type),*) $(-> $output)? { $body($($argument),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$element: Element>)? ($($argument: $type),*) $(-> $output)? { $body($($argument),*) }
            match simd.level() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a Simd of this level is only made after AVX-512F was detected, and the rest
                // was detected just now.
                Level::Avx512 if has_avx512_bytes() => unsafe { avx512($($argument),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a Simd of either level is only made where AVX2 and FMA are (all CPUs with
                // AVX-512F have both).
                Level::Avx512 | Level::Avx2 => unsafe { avx2($($argument),*) },
                _ => $body($($argument),*),
            }
        }
    };
}

const LANES: usize = 32;
/// Numbers whose squares are added in f32 before they go to f64.
const BLOCK: usize = 512;

twins! {
    /// The largest magnitude and the norm.
    pub(super) fn magnitude<E>(values: &[E]) -> Magnitude = magnitude_body
}

#[inline(always)]
fn magnitude_body<E: Element>(values: &[E]) -> Magnitude {
    let mut largest = [0.0_f32; LANES];
    let mut square = 0.0_f64;
    for block in values.chunks(BLOCK) {
        let mut squares = [0.0_f32; LANES];
        let chunks = block.chunks_exact(LANES);
        for (lane, value) in chunks.remainder().iter().enumerate() {
            let value = value.to_f32();
            largest[lane] = larger(largest[lane], value.abs());
            squares[lane] += value * value;
        }
        for chunk in chunks {
            for lane in 0..LANES {
                let value = chunk[lane].to_f32();
                largest[lane] = larger(largest[lane], value.abs());
                squares[lane] += value * value;
            }
        }
        square += squares.iter().map(|value| f64::from(*value)).sum::<f64>();
    }
    Magnitude {
        largest: largest.iter().fold(0.0, |left, right| larger(left, *right)),
        norm: square.sqrt() as f32,
    }
}

#[inline(always)]
fn larger(left: f32, right: f32) -> f32 {
    if right > left {
        right
    } else {
        left
    }
}

twins! {
    /// The largest of `|values[i]| * weights[i]`, over the shorter length.
    pub(super) fn largest_weighted(values: &[f32], weights: &[f32]) -> f32 = largest_weighted_body
}

#[inline(always)]
fn largest_weighted_body(values: &[f32], weights: &[f32]) -> f32 {
    let len = values.len().min(weights.len());
    let mut largest = [0.0_f32; LANES];
    let (values, weights) = (
        values[..len].chunks_exact(LANES),
        weights[..len].chunks_exact(LANES),
    );
    let tail = values.remainder().iter().zip(weights.remainder());
    for (lane, (value, weight)) in tail.enumerate() {
        largest[lane] = larger(largest[lane], value.abs() * weight);
    }
    for (values, weights) in values.zip(weights) {
        for lane in 0..LANES {
            largest[lane] = larger(largest[lane], values[lane].abs() * weights[lane]);
        }
    }
    largest.iter().fold(0.0, |left, right| larger(left, *right))
}

twins! {
    /// `output[i] = floor(values[i] * inverse + dither[i]) + 128`, for products of at most 127.
    pub(super) fn round_weights<E>(values: &[E], inverse: f32, dither: &[f32], output: &mut [u8]) = round_weights_body
}

#[inline(always)]
fn round_weights_body<E: Element>(values: &[E], inverse: f32, dither: &[f32], output: &mut [u8]) {
    for ((output, value), dither) in output.iter_mut().zip(values).zip(dither) {
        *output = rounded_up_by_128(value.to_f32() * inverse, *dither);
    }
}

twins! {
    /// `output[i] = floor(values[i] * inverse + dither[i])`, products beyond `limit` (at most 127) cut
    /// to it; returns the sum.
    pub(super) fn round_row(values: &[f32], inverse: f32, limit: f32, dither: &[f32], output: &mut [i8]) -> i32 = round_row_body
}

#[inline(always)]
fn round_row_body(
    values: &[f32],
    inverse: f32,
    limit: f32,
    dither: &[f32],
    output: &mut [i8],
) -> i32 {
    let mut sum = 0_i32;
    for ((output, value), dither) in output.iter_mut().zip(values).zip(dither) {
        let scaled = (value * inverse).clamp(-limit, limit);
        let rounded = i32::from(rounded_up_by_128(scaled, *dither)) - 128;
        *output = rounded as i8;
        sum += rounded;
    }
    sum
}

twins! {
    /// The sum of `rounded[i] * (1/2 - dither[i])`.
    pub(super) fn dither_of_row(rounded: &[i8], dither: &[f32]) -> f32 = dither_of_row_body
}

#[inline(always)]
fn dither_of_row_body(rounded: &[i8], dither: &[f32]) -> f32 {
    sum_products(rounded, dither, f32::from)
}

twins! {
    /// The sum of `(rounded[i] - 128) * (1/2 - dither[i])`.
    pub(super) fn dither_of_weights(rounded: &[u8], dither: &[f32]) -> f32 = dither_of_weights_body
}

#[inline(always)]
fn dither_of_weights_body(rounded: &[u8], dither: &[f32]) -> f32 {
    sum_products(rounded, dither, |rounded| f32::from(rounded) - 128.0)
}

#[inline(always)]
fn sum_products<T: Copy>(rounded: &[T], dither: &[f32], value: impl Fn(T) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (rounded, dither) = (rounded.chunks_exact(LANES), dither.chunks_exact(LANES));
    let tail = rounded.remainder().iter().zip(dither.remainder());
    for (lane, (rounded, dither)) in tail.enumerate() {
        lanes[lane] += value(*rounded) * (0.5 - dither);
    }
    for (rounded, dither) in rounded.zip(dither) {
        for lane in 0..LANES {
            lanes[lane] += value(rounded[lane]) * (0.5 - dither[lane]);
        }
    }
    lanes.iter().sum()
}

twins! {
    /// `output[i]` = the bf16 nearest to `values[i]`, ties to even; returns the norm of what that leaves.
    pub(super) fn round_coarsely<E>(values: &[E], output: &mut [u16]) -> f32 = round_coarsely_body
}

#[inline(always)]
fn round_coarsely_body<E: Element>(values: &[E], output: &mut [u16]) -> f32 {
    let mut square = 0.0_f64;
    for (values, output) in values.chunks(BLOCK).zip(output.chunks_mut(BLOCK)) {
        let mut squares = [0.0_f32; LANES];
        let (values, output) = (values.chunks(LANES), output.chunks_mut(LANES));
        for (values, output) in values.zip(output) {
            for ((value, output), square) in values.iter().zip(output).zip(&mut squares) {
                let value = value.to_f32();
                let rounded = <bf16 as Element>::from_f32(value);
                *output = rounded.to_bits();
                let left = value - rounded.to_f32();
                *square += left * left;
            }
        }
        square += squares.iter().map(|value| f64::from(*value)).sum::<f64>();
    }
    square.sqrt() as f32
}

/// `floor(scaled + dither) + 128`, of a product of at most 127: truncation is the floor of what is
/// positive. What is out of range (weights that another thread writes to meanwhile may be) is cut
/// off, and a NaN gives 0.
#[inline(always)]
fn rounded_up_by_128(scaled: f32, dither: f32) -> u8 {
    let raised = scaled + dither + 128.0;
    // Plain comparisons, false for NaN. A cast that saturates is not vectorised: ten times the time.
    let raised = if raised > 0.0 { raised } else { 0.0 };
    let raised = if raised < 255.0 { raised } else { 255.0 };
    // SAFETY: no NaN, and from 0 to 255, by the two lines above.
    unsafe { raised.to_int_unchecked::<i32>() as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels() -> impl Iterator<Item = Simd> {
        Level::ALL.into_iter().filter_map(Simd::new)
    }

    fn numbers(len: usize) -> Vec<f32> {
        (0..len)
            .map(|at| ((at * 7919 % 1009) as f32 - 504.0) / 37.0)
            .collect()
    }

    #[test]
    fn magnitudes_are_those_of_the_definition() {
        for len in [0, 1, 31, 33, 512, 515, 1100] {
            let values = numbers(len);
            let norm = values
                .iter()
                .map(|v| f64::from(*v).powi(2))
                .sum::<f64>()
                .sqrt();
            let largest = values
                .iter()
                .fold(0.0_f32, |left, right| left.max(right.abs()));
            for simd in levels() {
                let found = magnitude(&values, simd);
                assert_eq!(found.largest, largest);
                assert!((f64::from(found.norm) - norm).abs() <= 1e-6 * norm);
                let weights = vec![0.5; len];
                assert_eq!(largest_weighted(&values, &weights, simd), largest / 2.0);
            }
        }
    }

    #[test]
    fn what_is_not_finite_shows() {
        for simd in levels() {
            for place in [0, 40, 1023] {
                let mut values = vec![1.0_f32; 1024];
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    values[place] = bad;
                    assert!(!magnitude(&values, simd).is_finite());
                }
                values[place] = 1e30;
                let large = magnitude(&values, simd);
                assert!(large.is_finite() && large.norm.is_infinite());
            }
        }
    }

    #[test]
    fn coarse_rounding_is_to_nearest() {
        let mut values = numbers(1100);
        values.extend([
            0.0,
            -0.0,
            1e-40,
            -3e38,
            1.0 + 1.0 / 256.0,
            1.0 + 3.0 / 256.0,
        ]);
        for simd in levels() {
            for len in [0, 1, 31, 33, 515, values.len()] {
                let mut rounded = vec![7; len];
                let error = round_coarsely(&values[..len], &mut rounded, simd);
                let mut square = 0.0;
                for (value, rounded) in values.iter().zip(&rounded) {
                    let nearest = bf16::from_f32(*value);
                    assert_eq!(*rounded, nearest.to_bits());
                    square += (f64::from(*value) - f64::from(nearest.to_f32())).powi(2);
                }
                if square.sqrt() < 1e9 {
                    assert!((f64::from(error) - square.sqrt()).abs() <= 1e-5 * square.sqrt());
                }
            }
        }
    }

    #[test]
    fn rounding_goes_up_as_often_as_the_dither_says() {
        let values: Vec<f32> = (0..200).map(|at| at as f32 - 100.0 + 0.25).collect();
        for simd in levels() {
            let mut low = vec![0; 200];
            let sum = round_row(&values, 1.0, 127.0, &[0.7; 200], &mut low, simd);
            let mut high = vec![0; 200];
            round_row(&values, 1.0, 127.0, &[0.8; 200], &mut high, simd);
            for at in 0..200 {
                assert_eq!(i32::from(low[at]), at as i32 - 100);
                assert_eq!(i32::from(high[at]), at as i32 - 99);
            }
            assert_eq!(sum, (-100..100).sum::<i32>());
            let mut weights = vec![0; 200];
            round_weights(&values, 1.0, &[0.8; 200], &mut weights, simd);
            assert!(weights
                .iter()
                .enumerate()
                .all(|(at, w)| usize::from(*w) == at + 29));
            let by_hand: f32 = low.iter().map(|low| f32::from(*low) * -0.25).sum();
            let dither = vec![0.75; 200];
            assert!((dither_of_row(&low, &dither, simd) - by_hand).abs() < 1e-3);
            let raised: Vec<u8> = low
                .iter()
                .map(|low| (i32::from(*low) + 128) as u8)
                .collect();
            assert!((dither_of_weights(&raised, &dither, simd) - by_hand).abs() < 1e-3);
            // What is cut off reaches the limit and no further.
            let mut cut = vec![0; 2];
            let sum = round_row(&[1e6, -1e6], 1.0, 63.0, &[0.99; 2], &mut cut, simd);
            assert_eq!((cut, sum), (vec![63, -63], 0));
        }
    }
}
