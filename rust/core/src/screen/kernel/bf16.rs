//! bf16: plain Rust, and AVX-512's sums of two products.
//!
//! A line of a tile holds 32 dimensions of a row, or 2 of each of 16 features.

use super::{Block, Tiles};
use crate::screen::layout::{PANEL, STEP, TILE, TILE_ROWS};

/// The truth, in its plainest form.
pub(super) fn multiply(
    x: Tiles<'_>,
    rows: usize,
    w: Tiles<'_>,
    steps: usize,
    block: &mut Block,
    fresh: bool,
) {
    multiply_body(x, rows, w, steps, block, fresh);
}

/// The same, compiled for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(super) fn multiply_avx2(
    x: Tiles<'_>,
    rows: usize,
    w: Tiles<'_>,
    steps: usize,
    block: &mut Block,
    fresh: bool,
) {
    multiply_body(x, rows, w, steps, block, fresh);
}

/// The two bf16 of four bytes, as f32.
#[inline(always)]
fn pair(four: &[u8]) -> [f32; 2] {
    let half = |at: usize| u32::from(u16::from_ne_bytes([four[at], four[at + 1]])) << 16;
    [f32::from_bits(half(0)), f32::from_bits(half(2))]
}

#[inline(always)]
fn multiply_body(
    x: Tiles<'_>,
    rows: usize,
    w: Tiles<'_>,
    steps: usize,
    block: &mut Block,
    fresh: bool,
) {
    for (row, sums) in block.chunks_exact_mut(PANEL).enumerate().take(rows) {
        let x_tiles = &x.bytes[row / TILE_ROWS * x.stride..];
        for (half, sums) in sums.chunks_exact_mut(TILE_ROWS).enumerate() {
            let w_tiles = &w.bytes[half * w.stride..];
            let mut totals = [0.0_f32; TILE_ROWS];
            if !fresh {
                for (total, sum) in totals.iter_mut().zip(&*sums) {
                    *total = f32::from_bits(*sum as u32);
                }
            }
            for step in 0..steps {
                let line = &x_tiles[step * TILE + row % TILE_ROWS * STEP..][..STEP];
                let tile = &w_tiles[step * TILE..][..TILE];
                for (x, w) in line.chunks_exact(4).zip(tile.chunks_exact(STEP)) {
                    let x = pair(x);
                    for (total, w) in totals.iter_mut().zip(w.chunks_exact(4)) {
                        let w = pair(w);
                        *total += x[0] * w[0];
                        *total += x[1] * w[1];
                    }
                }
            }
            for (sum, total) in sums.iter_mut().zip(totals) {
                *sum = total.to_bits() as i32;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::multiply_512;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::super::quad_of;
    use super::{Block, Tiles, PANEL, STEP, TILE, TILE_ROWS};

    /// # Safety
    /// The CPU has AVX-512 BF16; the tiles of `rows` rows and of two features are readable for `steps`
    /// steps.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(in super::super) unsafe fn multiply_512(
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
                    1 => some_rows::<1>(x, row, w, steps, block, fresh),
                    2 => some_rows::<2>(x, row, w, steps, block, fresh),
                    3 | 4 => some_rows::<4>(x, row, w, steps, block, fresh),
                    _ => some_rows::<8>(x, row, w, steps, block, fresh),
                };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn as_bf16(bits: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits, of which every pattern is a value of either.
        unsafe { std::mem::transmute(bits) }
    }

    /// `R` rows by 32 features.
    ///
    /// # Safety
    /// As for [`multiply_512`]; rows `row` to `row + R` lie in one tile.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn some_rows<const R: usize>(
        x: Tiles<'_>,
        row: usize,
        w: Tiles<'_>,
        steps: usize,
        block: &mut Block,
        fresh: bool,
    ) -> usize {
        let sums = block[row * PANEL..][..R * PANEL].as_mut_ptr().cast::<f32>();
        let mut totals: [[__m512; 2]; R] = [[_mm512_setzero_ps(); 2]; R];
        // SAFETY: R rows of 32 sums are in bounds (sliced above; f32 has the size of i32, and takes any
        // bits); x and w as the caller says.
        unsafe {
            if !fresh {
                for (r, total) in totals.iter_mut().enumerate() {
                    for (half, total) in total.iter_mut().enumerate() {
                        *total = _mm512_loadu_ps(sums.add(r * PANEL + 16 * half));
                    }
                }
            }
            let x = x.bytes.as_ptr().add(row / TILE_ROWS * x.stride);
            let (low, high) = (w.bytes.as_ptr(), w.bytes.as_ptr().add(w.stride));
            for step in 0..steps {
                for quad in 0..STEP / 4 {
                    let at = step * TILE + quad * STEP;
                    let low = as_bf16(_mm512_loadu_si512(low.add(at).cast()));
                    let high = as_bf16(_mm512_loadu_si512(high.add(at).cast()));
                    for (r, total) in totals.iter_mut().enumerate() {
                        let at = x.add(quad_of(row % TILE_ROWS + r, step, quad));
                        let two = as_bf16(_mm512_set1_epi32(at.cast::<i32>().read_unaligned()));
                        total[0] = _mm512_dpbf16_ps(total[0], low, two);
                        total[1] = _mm512_dpbf16_ps(total[1], high, two);
                    }
                }
            }
            for (r, total) in totals.iter().enumerate() {
                for (half, total) in total.iter().enumerate() {
                    _mm512_storeu_ps(sums.add(r * PANEL + 16 * half), *total);
                }
            }
        }
        R
    }
}
