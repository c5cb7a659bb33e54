//! VNNI: sums of four 8-bit products, in 16 lanes (AVX-512) or 8 (AVX-VNNI).

use std::arch::x86_64::{
    __m256i, __m512i, _mm256_dpbusd_avx_epi32, _mm256_loadu_si256, _mm256_set1_epi32,
    _mm256_setzero_si256, _mm256_storeu_si256, _mm512_dpbusd_epi32, _mm512_loadu_si512,
    _mm512_set1_epi32, _mm512_setzero_si512, _mm512_storeu_si512,
};

use super::{quad_of, Block, Tiles};
use crate::screen::layout::{PANEL, STEP, TILE, TILE_ROWS};

/// # Safety
/// The CPU has AVX-512 VNNI; the tiles of `rows` rows and of two features are readable for `steps` steps.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) unsafe fn multiply_512(
    x: Tiles<'_>,
    rows: usize,
    w: Tiles<'_>,
    steps: usize,
    block: &mut Block,
    fresh: bool,
) {
    let mut row = 0;
    while row < rows {
        // SAFETY: as the caller says; a group stays within its tile of 16 rows, since groups of 8, 4
        // and 2 begin at multiples of their size.
        unsafe {
            row += match rows - row {
                1 => rows_512::<1>(x, row, w, steps, block, fresh),
                2 => rows_512::<2>(x, row, w, steps, block, fresh),
                3 | 4 => rows_512::<4>(x, row, w, steps, block, fresh),
                _ => rows_512::<8>(x, row, w, steps, block, fresh),
            };
        }
    }
}

/// `R` rows by 32 features.
///
/// # Safety
/// As for [`multiply_512`]; rows `row` to `row + R` lie in one tile.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn rows_512<const R: usize>(
    x: Tiles<'_>,
    row: usize,
    w: Tiles<'_>,
    steps: usize,
    block: &mut Block,
    fresh: bool,
) -> usize {
    let sums = block[row * PANEL..][..R * PANEL].as_mut_ptr();
    let mut totals: [[__m512i; 2]; R] = [[_mm512_setzero_si512(); 2]; R];
    // SAFETY: R rows of 32 sums are in bounds (sliced above); x and w as the caller says.
    unsafe {
        if !fresh {
            for (r, total) in totals.iter_mut().enumerate() {
                for (half, total) in total.iter_mut().enumerate() {
                    *total = _mm512_loadu_si512(sums.add(r * PANEL + 16 * half).cast());
                }
            }
        }
        let x = x.bytes.as_ptr().add(row / TILE_ROWS * x.stride);
        let (low, high) = (w.bytes.as_ptr(), w.bytes.as_ptr().add(w.stride));
        for step in 0..steps {
            for quad in 0..STEP / 4 {
                let at = step * TILE + quad * STEP;
                let low = _mm512_loadu_si512(low.add(at).cast());
                let high = _mm512_loadu_si512(high.add(at).cast());
                for (r, total) in totals.iter_mut().enumerate() {
                    let at = x.add(quad_of(row % TILE_ROWS + r, step, quad));
                    let four = _mm512_set1_epi32(at.cast::<i32>().read_unaligned());
                    total[0] = _mm512_dpbusd_epi32(total[0], low, four);
                    total[1] = _mm512_dpbusd_epi32(total[1], high, four);
                }
            }
        }
        for (r, total) in totals.iter().enumerate() {
            for (half, total) in total.iter().enumerate() {
                _mm512_storeu_si512(sums.add(r * PANEL + 16 * half).cast(), *total);
            }
        }
    }
    R
}

/// # Safety
/// The CPU has AVX-VNNI; the tiles of `rows` rows and of two features are readable for `steps` steps.
#[target_feature(enable = "avx2,avxvnni")]
pub(super) unsafe fn multiply_256(
    x: Tiles<'_>,
    rows: usize,
    w: Tiles<'_>,
    steps: usize,
    block: &mut Block,
    fresh: bool,
) {
    for half in 0..2 {
        let mut row = 0;
        while row < rows {
            // SAFETY: as in `multiply_512`.
            unsafe {
                row += match rows - row {
                    1 => rows_256::<1>(x, row, w, half, steps, block, fresh),
                    2 | 3 => rows_256::<2>(x, row, w, half, steps, block, fresh),
                    _ => rows_256::<4>(x, row, w, half, steps, block, fresh),
                };
            }
        }
    }
}

/// `R` rows by the 16 features of one half.
///
/// # Safety
/// As for [`multiply_256`]; rows `row` to `row + R` lie in one tile.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn rows_256<const R: usize>(
    x: Tiles<'_>,
    row: usize,
    w: Tiles<'_>,
    half: usize,
    steps: usize,
    block: &mut Block,
    fresh: bool,
) -> usize {
    let sums = block[row * PANEL..][..R * PANEL].as_mut_ptr();
    let mut totals: [[__m256i; 2]; R] = [[_mm256_setzero_si256(); 2]; R];
    // SAFETY: R rows of 32 sums are in bounds (sliced above); x and w as the caller says.
    unsafe {
        let sums = sums.add(half * TILE_ROWS);
        if !fresh {
            for (r, total) in totals.iter_mut().enumerate() {
                for (part, total) in total.iter_mut().enumerate() {
                    *total = _mm256_loadu_si256(sums.add(r * PANEL + 8 * part).cast());
                }
            }
        }
        let x = x.bytes.as_ptr().add(row / TILE_ROWS * x.stride);
        let w = w.bytes.as_ptr().add(half * w.stride);
        for step in 0..steps {
            for quad in 0..STEP / 4 {
                let at = w.add(step * TILE + quad * STEP);
                let low = _mm256_loadu_si256(at.cast());
                let high = _mm256_loadu_si256(at.add(32).cast());
                for (r, total) in totals.iter_mut().enumerate() {
                    let at = x.add(quad_of(row % TILE_ROWS + r, step, quad));
                    let four = _mm256_set1_epi32(at.cast::<i32>().read_unaligned());
                    total[0] = _mm256_dpbusd_avx_epi32(total[0], low, four);
                    total[1] = _mm256_dpbusd_avx_epi32(total[1], high, four);
                }
            }
        }
        for (r, total) in totals.iter().enumerate() {
            for (part, total) in total.iter().enumerate() {
                _mm256_storeu_si256(sums.add(r * PANEL + 8 * part).cast(), *total);
            }
        }
    }
    R
}
