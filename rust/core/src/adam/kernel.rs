//! Adam's arithmetic on one row. One body, compiled for each instruction set; it has no fused
//! multiply-add and sums in 16 fixed lanes, so that all of them agree to the bit.

use super::{Decay, Factors};
use crate::simd::{Level, Simd};

const LANES: usize = 16;

/// How far ahead of the arithmetic its rows are asked for, bytes: the hardware foresees no page.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 1024;

/// The step of one number, downwards.
#[inline(always)]
fn stride(mean: f32, square: f32, by: &Factors) -> f32 {
    by.step_size * mean / (square.sqrt() * by.root_correction + by.eps)
}

/// Asks for what a pass over a row will come to soon; past its end that is the next row.
#[inline(always)]
fn ask_ahead(row: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        // SAFETY: a prefetch reads nothing that the program sees and never faults, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().cast::<i8>().wrapping_add(AHEAD)) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// A row of the weight and of its moments.
pub(super) struct Moving<'a> {
    pub w: &'a mut [f32],
    pub m: &'a mut [f32],
    pub v: &'a mut [f32],
}

/// `m` and `v` follow the gradient less `along` times the row, and `w` goes against it.
/// Returns the square of its new norm.
#[inline(always)]
fn touched_body(row: Moving<'_>, gradient: &[f32], along: f32, decay: Decay, by: &Factors) -> f32 {
    let w = row.w;
    let len = w.len();
    let (m, v) = (&mut row.m[..len], &mut row.v[..len]);
    let gradient = &gradient[..len];
    let one = |w: &mut f32, m: &mut f32, v: &mut f32, gradient: f32| {
        let g = (gradient - along * *w) * by.scale;
        *m = *m * decay.mean + g * by.rest1;
        *v = *v * decay.square + g * g * by.rest2;
        *w -= stride(*m, *v, by);
        *w * *w
    };
    let mut sums = [0.0_f32; LANES];
    let whole = len - len % LANES;
    for start in (0..whole).step_by(LANES) {
        let here = start..start + LANES;
        let (w, m, v) = (
            &mut w[here.clone()],
            &mut m[here.clone()],
            &mut v[here.clone()],
        );
        let gradient = &gradient[here];
        ask_ahead(w);
        ask_ahead(m);
        ask_ahead(v);
        for lane in 0..LANES {
            sums[lane] += one(&mut w[lane], &mut m[lane], &mut v[lane], gradient[lane]);
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for i in whole..len {
        sum += one(&mut w[i], &mut m[i], &mut v[i], gradient[i]);
    }
    sum
}

/// The same for a gradient of 0, of moments that stay as they are: what they have missed, this step
/// included, is `decay`. Returns too whether any number would move at twice the step.
#[inline(always)]
fn idle_body(w: &mut [f32], m: &[f32], v: &[f32], decay: Decay, by: &Factors) -> (f32, bool) {
    let len = w.len();
    let (m, v) = (&m[..len], &v[..len]);
    let one = |w: &mut f32, m: f32, v: f32| {
        let stride = stride(m * decay.mean, v * decay.square, by);
        let moved = (*w - 2.0 * stride).to_bits() ^ w.to_bits();
        *w -= stride;
        (*w * *w, moved)
    };
    let (mut sums, mut changes) = ([0.0_f32; LANES], [0_u32; LANES]);
    let whole = len - len % LANES;
    for start in (0..whole).step_by(LANES) {
        let here = start..start + LANES;
        let (w, m, v) = (&mut w[here.clone()], &m[here.clone()], &v[here]);
        ask_ahead(w);
        ask_ahead(m);
        ask_ahead(v);
        for lane in 0..LANES {
            let (square, moved) = one(&mut w[lane], m[lane], v[lane]);
            sums[lane] += square;
            changes[lane] |= moved;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    let mut moved = changes.iter().any(|bits| *bits != 0);
    for i in whole..len {
        let (square, bits) = one(&mut w[i], m[i], v[i]);
        sum += square;
        moved |= bits != 0;
    }
    (sum, moved)
}

#[inline(always)]
fn multiply_body(row: &mut [f32], factor: f32) {
    for value in row {
        *value *= factor;
    }
}

/// Gives a body its twins and the choice among them.
macro_rules! twins {
    ($name:ident, $body:ident, ($($argument:ident: $type:ty),*) -> $result:ty) => {
        pub(super) fn $name(simd: Simd, $($argument: $type),*) -> $result {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) -> $result {
                    $body($($argument),*)
                }
                #[target_feature(enable = "avx512f")]
                fn avx512($($argument: $type),*) -> $result {
                    $body($($argument),*)
                }
                match simd.level() {
                    Level::Scalar => $body($($argument),*),
                    // SAFETY: a Simd of this level is only made after AVX2 was detected.
                    Level::Avx2 => unsafe { avx2($($argument),*) },
                    // SAFETY: a Simd of this level is only made after AVX-512F was detected.
                    Level::Avx512 => unsafe { avx512($($argument),*) },
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            match simd.level() {
                Level::Scalar | Level::Avx2 | Level::Avx512 => $body($($argument),*),
            }
        }
    };
}

twins!(touched, touched_body, (
    row: Moving<'_>, gradient: &[f32], along: f32, decay: Decay, by: &Factors
) -> f32);
twins!(idle, idle_body, (
    w: &mut [f32], m: &[f32], v: &[f32], decay: Decay, by: &Factors
) -> (f32, bool));
twins!(multiply, multiply_body, (row: &mut [f32], factor: f32) -> ());
