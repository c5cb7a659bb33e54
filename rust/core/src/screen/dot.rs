//! Inner products of a feature and some rows, block by block of [`BLOCK`] dimensions, of two kinds.
//!
//! *Exact* but for the last bit: products of f32 are exact in f64, and f64 sums them. The order of the
//! sum is fixed, so that every twin gives the same bits: lane i adds up the dimensions i, i + 16, i +
//! 32...; then lanes are added in halves (8, 4, 2, 1).
//!
//! *Close*: 16 lanes of f32, each of which adds up at most 16 products, then f64. Twins may
//! differ within [`CLOSE`].

#[cfg(any(test, target_arch = "x86_64"))]
use crate::simd::Level;
use crate::simd::{Element, Simd};

/// Dimensions of a block, at most: adding its lanes up takes as long as some hundred products.
pub(super) const BLOCK: usize = 1024;
/// Dimensions that lanes of f32 add up.
#[cfg(target_arch = "x86_64")]
const SHORT: usize = 256;
const LANES: usize = 16;
/// Rows at once, at most: a feature's numbers are converted once for them.
pub(super) const GROUP: usize = 8;
/// A close product is within this of the exact one, relative to the product of the norms: 16 products
/// and sums of a lane, each off by 2^-24 at most, and room for f64.
pub(super) const CLOSE: f64 = 20.0 / (1 << 24) as f64;

/// How products are added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sum {
    Exact,
    Close,
}

/// Calls the twin for `count` rows.
#[cfg(target_arch = "x86_64")]
macro_rules! for_count {
    ($count:expr, $function:ident, $element:ty, $w:expr, $ahead:expr, $rows:expr, $output:expr) => {
        match $count {
            0 | 1 => x86::$function::<$element, 1>($w, $ahead, $rows, $output),
            2 => x86::$function::<$element, 2>($w, $ahead, $rows, $output),
            3 => x86::$function::<$element, 3>($w, $ahead, $rows, $output),
            4 => x86::$function::<$element, 4>($w, $ahead, $rows, $output),
            5 => x86::$function::<$element, 5>($w, $ahead, $rows, $output),
            6 => x86::$function::<$element, 6>($w, $ahead, $rows, $output),
            7 => x86::$function::<$element, 7>($w, $ahead, $rows, $output),
            _ => x86::$function::<$element, 8>($w, $ahead, $rows, $output),
        }
    };
}

/// The products of one feature's block with the same block of one to eight rows. What begins at `ahead` is
/// fetched meanwhile, as much as `w` is; that is a hint.
#[inline]
pub(super) fn dots<E: Element>(
    w: &[E],
    ahead: *const E,
    rows: &[&[E]; GROUP],
    count: usize,
    sum: Sum,
    simd: Simd,
) -> [f64; GROUP] {
    let mut output = [0.0; GROUP];
    match (simd.level(), sum) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a Simd of this level is only made after AVX-512F was detected.
        (Level::Avx512, Sum::Exact) => unsafe {
            for_count!(count, avx512_exact, E, w, ahead, rows, &mut output);
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a Simd of this level is only made after AVX-512F was detected.
        (Level::Avx512, Sum::Close) => unsafe {
            for_count!(count, avx512_close, E, w, ahead, rows, &mut output);
        },
        #[cfg(target_arch = "x86_64")]
        (Level::Avx2, _) => {
            for (at, (output, row)) in output.iter_mut().zip(rows).take(count).enumerate() {
                let ahead = if at == 0 { ahead } else { w.as_ptr() };
                // SAFETY: a Simd of this level is only made after AVX2 and FMA were detected.
                *output = unsafe {
                    match sum {
                        Sum::Exact => x86::avx2_exact(w, ahead, row),
                        Sum::Close => x86::avx2_close(w, ahead, row),
                    }
                };
            }
        }
        _ => {
            let _ = ahead;
            for (output, row) in output.iter_mut().zip(rows).take(count) {
                *output = scalar(w, row);
            }
        }
    }
    output
}

/// The truth, of either kind.
fn scalar<E: Element>(w: &[E], x: &[E]) -> f64 {
    let mut lanes = [0.0; LANES];
    add_rest(&mut lanes, w, x, 0);
    reduce(lanes)
}

/// Adds what lies from `start` on, a multiple of the lanes.
#[inline(always)]
fn add_rest<E: Element>(lanes: &mut [f64; LANES], w: &[E], x: &[E], start: usize) {
    for (w, x) in w[start..].chunks(LANES).zip(x[start..].chunks(LANES)) {
        for ((lane, w), x) in lanes.iter_mut().zip(w).zip(x) {
            // The product is exact, so that this is also what a fused multiply-add gives.
            *lane += f64::from(w.to_f32()) * f64::from(x.to_f32());
        }
    }
}

#[inline(always)]
fn reduce(mut lanes: [f64; LANES]) -> f64 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512d, _mm256_add_pd, _mm256_castpd256_pd128, _mm256_castps256_ps128, _mm256_cvtps_pd,
        _mm256_extractf128_pd, _mm256_extractf128_ps, _mm256_fmadd_pd, _mm256_fmadd_ps,
        _mm256_setzero_pd, _mm256_setzero_ps, _mm256_storeu_pd, _mm256_storeu_ps, _mm512_add_pd,
        _mm512_castpd512_pd256, _mm512_castps512_ps256, _mm512_cvtps_pd, _mm512_extractf64x4_pd,
        _mm512_fmadd_pd, _mm512_fmadd_ps, _mm512_setzero_pd, _mm512_setzero_ps,
        _mm512_shuffle_f32x4, _mm512_storeu_pd, _mm_add_pd, _mm_add_sd, _mm_cvtsd_f64,
        _mm_unpackhi_pd,
    };

    use super::{add_rest, reduce, GROUP, LANES, SHORT};
    use crate::simd::{fetch_from, Element};

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512_exact<E: Element, const R: usize>(
        w: &[E],
        ahead: *const E,
        rows: &[&[E]; GROUP],
        output: &mut [f64; GROUP],
    ) {
        let rows = &rows[..R];
        let len = rows.iter().fold(w.len(), |len, row| len.min(row.len()));
        let whole = len - len % LANES;
        let mut sums = [[_mm512_setzero_pd(); 2]; R];
        for start in (0..whole).step_by(LANES) {
            fetch_from(ahead.wrapping_add(start));
            // SAFETY: start + 16 <= whole <= every length.
            unsafe {
                let at = w.as_ptr().add(start);
                let low = _mm512_cvtps_pd(E::load_8(at));
                let high = _mm512_cvtps_pd(E::load_8(at.add(8)));
                for (sums, row) in sums.iter_mut().zip(rows) {
                    let at = row.as_ptr().add(start);
                    sums[0] = _mm512_fmadd_pd(low, _mm512_cvtps_pd(E::load_8(at)), sums[0]);
                    let x = _mm512_cvtps_pd(E::load_8(at.add(8)));
                    sums[1] = _mm512_fmadd_pd(high, x, sums[1]);
                }
            }
        }
        for ((output, sums), row) in output.iter_mut().zip(sums).zip(rows) {
            if whole == len {
                *output = halves(_mm512_add_pd(sums[0], sums[1]));
                continue;
            }
            let mut lanes = [0.0; LANES];
            // SAFETY: the array holds 16 f64.
            unsafe {
                _mm512_storeu_pd(lanes.as_mut_ptr(), sums[0]);
                _mm512_storeu_pd(lanes.as_mut_ptr().add(8), sums[1]);
            }
            add_rest(&mut lanes, &w[..len], &row[..len], whole);
            *output = reduce(lanes);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512_close<E: Element, const R: usize>(
        w: &[E],
        ahead: *const E,
        rows: &[&[E]; GROUP],
        output: &mut [f64; GROUP],
    ) {
        let rows = &rows[..R];
        let len = rows.iter().fold(w.len(), |len, row| len.min(row.len()));
        let whole = len - len % LANES;
        let mut totals = [_mm512_setzero_pd(); R];
        for from in (0..whole).step_by(SHORT) {
            let mut sums = [_mm512_setzero_ps(); R];
            for start in (from..whole.min(from + SHORT)).step_by(LANES) {
                fetch_from(ahead.wrapping_add(start));
                // SAFETY: start + 16 <= whole <= every length.
                unsafe {
                    let w = E::load_16(w.as_ptr().add(start));
                    for (sum, row) in sums.iter_mut().zip(rows) {
                        *sum = _mm512_fmadd_ps(w, E::load_16(row.as_ptr().add(start)), *sum);
                    }
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                let low = _mm512_cvtps_pd(_mm512_castps512_ps256(sum));
                let swapped = _mm512_shuffle_f32x4::<0b01_00_11_10>(sum, sum);
                let high = _mm512_cvtps_pd(_mm512_castps512_ps256(swapped));
                *total = _mm512_add_pd(*total, _mm512_add_pd(low, high));
            }
        }
        for ((output, total), row) in output.iter_mut().zip(totals).zip(rows) {
            *output = halves(total);
            if whole < len {
                let mut lanes = [0.0; LANES];
                add_rest(&mut lanes, &w[..len], &row[..len], whole);
                *output += reduce(lanes);
            }
        }
    }

    /// Adds 8 lanes as `reduce` does.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn halves(sum: __m512d) -> f64 {
        let four = _mm256_add_pd(
            _mm512_castpd512_pd256(sum),
            _mm512_extractf64x4_pd::<1>(sum),
        );
        let two = _mm_add_pd(
            _mm256_castpd256_pd128(four),
            _mm256_extractf128_pd::<1>(four),
        );
        _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2_exact<E: Element>(w: &[E], ahead: *const E, x: &[E]) -> f64 {
        let len = w.len().min(x.len());
        let whole = len - len % LANES;
        let mut sums = [_mm256_setzero_pd(); 4];
        for start in (0..whole).step_by(LANES) {
            fetch_from(ahead.wrapping_add(start));
            for half in 0..2 {
                let at = start + 8 * half;
                // SAFETY: at + 8 <= start + 16 <= whole <= both lengths.
                unsafe {
                    let w = E::load_8(w.as_ptr().add(at));
                    let x = E::load_8(x.as_ptr().add(at));
                    sums[2 * half] = _mm256_fmadd_pd(
                        _mm256_cvtps_pd(_mm256_castps256_ps128(w)),
                        _mm256_cvtps_pd(_mm256_castps256_ps128(x)),
                        sums[2 * half],
                    );
                    sums[2 * half + 1] = _mm256_fmadd_pd(
                        _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(w)),
                        _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(x)),
                        sums[2 * half + 1],
                    );
                }
            }
        }
        let mut lanes = [0.0; LANES];
        for (lanes, sum) in lanes.chunks_exact_mut(4).zip(sums) {
            // SAFETY: the chunk holds 4 f64.
            unsafe { _mm256_storeu_pd(lanes.as_mut_ptr(), sum) };
        }
        add_rest(&mut lanes, &w[..len], &x[..len], whole);
        reduce(lanes)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2_close<E: Element>(w: &[E], ahead: *const E, x: &[E]) -> f64 {
        let len = w.len().min(x.len());
        let whole = len - len % LANES;
        let mut lanes = [0.0; LANES];
        for from in (0..whole).step_by(SHORT) {
            let mut sums = [_mm256_setzero_ps(); 2];
            for start in (from..whole.min(from + SHORT)).step_by(LANES) {
                fetch_from(ahead.wrapping_add(start));
                for (half, sum) in sums.iter_mut().enumerate() {
                    let at = start + 8 * half;
                    // SAFETY: at + 8 <= start + 16 <= whole <= both lengths.
                    unsafe {
                        let w = E::load_8(w.as_ptr().add(at));
                        *sum = _mm256_fmadd_ps(w, E::load_8(x.as_ptr().add(at)), *sum);
                    }
                }
            }
            let mut found = [0.0_f32; LANES];
            for (lanes, sum) in found.chunks_exact_mut(8).zip(sums) {
                // SAFETY: the chunk holds 8 f32.
                unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
            }
            for (lane, found) in lanes.iter_mut().zip(found) {
                *lane += f64::from(found);
            }
        }
        add_rest(&mut lanes, &w[..len], &x[..len], whole);
        reduce(lanes)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn twins_agree(
            values in prop::collection::vec((-1e3_f32..1e3, -1e-3_f32..1e-3), 0..=BLOCK),
            count in 1..=GROUP,
        ) {
            let w: Vec<f32> = values.iter().map(|value| value.0).collect();
            let x: Vec<f32> = values.iter().map(|value| value.1).collect();
            twins_agree_on(&w, &x, count)?;
            let coarse = |values: &[f32]| values.iter().map(|value| bf16::from_f32(*value)).collect();
            let (w, x): (Vec<bf16>, Vec<bf16>) = (coarse(&w), coarse(&x));
            twins_agree_on(&w, &x, count)?;
        }
    }

    fn twins_agree_on<E: Element>(w: &[E], x: &[E], count: usize) -> Result<(), TestCaseError> {
        let others: Vec<E> = x.iter().rev().copied().collect();
        let rows: [&[E]; GROUP] = std::array::from_fn(|at| if at % 2 == 0 { x } else { &others });
        let norm = |values: &[E]| {
            let squares = values.iter().map(|v| f64::from(v.to_f32()).powi(2));
            squares.sum::<f64>().sqrt()
        };
        for simd in Level::ALL.into_iter().filter_map(Simd::new) {
            let found = dots(w, w.as_ptr(), &rows, count, Sum::Exact, simd);
            let close = dots(w, w.as_ptr(), &rows, count, Sum::Close, simd);
            for at in 0..count {
                let exact = scalar(w, rows[at]);
                prop_assert_eq!(found[at].to_bits(), exact.to_bits());
                let bound = CLOSE * norm(w) * norm(rows[at]);
                prop_assert!((close[at] - exact).abs() <= bound, "{} {exact}", close[at]);
            }
        }
        Ok(())
    }
}
