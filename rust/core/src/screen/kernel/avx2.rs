//! AVX2 has no sum of four 8-bit products: two instructions make it, the first of which adds pairs in
//! 16 bits and would saturate if rows had 8 bits.

use std::arch::x86_64::{
    __m256i, _mm256_add_epi32, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_set1_epi16, _mm256_set1_epi32, _mm256_setzero_si256, _mm256_storeu_si256,
};

use super::{quad_of, Block, Tiles};
use crate::screen::layout::{PANEL, STEP, TILE, TILE_ROWS};

/// # Safety
/// The CPU has AVX2; the tiles of `rows` rows and of two features are readable for `steps` steps.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn multiply(
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
            // SAFETY: as the caller says; a group stays within its tile of 16 rows, since groups of 4
            // and 2 begin at multiples of their size.
            unsafe {
                row += match rows - row {
                    1 => some_rows::<1>(x, row, w, half, steps, block, fresh),
                    2 | 3 => some_rows::<2>(x, row, w, half, steps, block, fresh),
                    _ => some_rows::<4>(x, row, w, half, steps, block, fresh),
                };
            }
        }
    }
}

/// `R` rows by the 16 features of one half.
///
/// # Safety
/// As for [`multiply`]; rows `row` to `row + R` lie in one tile.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn some_rows<const R: usize>(
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
    let ones = _mm256_set1_epi16(1);
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
                    for (total, w) in total.iter_mut().zip([low, high]) {
                        let pairs = _mm256_maddubs_epi16(w, four);
                        *total = _mm256_add_epi32(*total, _mm256_madd_epi16(pairs, ones));
                    }
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
