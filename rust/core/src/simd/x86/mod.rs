//! The x86-64 twins. Each function needs the CPU features that its module names.

use std::arch::x86_64::{
    __m256, __m512, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_slli_epi32, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_loadu_ps, _mm512_slli_epi32, _mm_loadu_si128, _mm_prefetch,
    _MM_HINT_T0,
};

use half::{bf16, f16};

pub(super) mod avx2;
pub(super) mod avx512;

/// Loads consecutive elements as f32 lanes.
pub trait Load: Sized {
    /// Loads 8.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C, and `at` is readable for 8 elements.
    unsafe fn load_8(at: *const Self) -> __m256;

    /// Loads 16.
    ///
    /// # Safety
    /// The CPU has AVX-512F, and `at` is readable for 16 elements.
    unsafe fn load_16(at: *const Self) -> __m512;
}

impl Load for f32 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_8(at: *const Self) -> __m256 {
        // SAFETY: the caller says that 8 elements are readable; no alignment is needed.
        unsafe { _mm256_loadu_ps(at) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_16(at: *const Self) -> __m512 {
        // SAFETY: the caller says that 16 elements are readable; no alignment is needed.
        unsafe { _mm512_loadu_ps(at) }
    }
}

/// Bytes between what is read and what is fetched: the CPU's own foresight ends with each page.
const AHEAD: usize = 4096;

/// Has the CPU fetch `items` items, some way after `row[start]` (in a matrix, of the next row). A hint.
#[inline(always)]
fn fetch_ahead<E>(row: &[E], start: usize, items: usize) {
    let from = row.as_ptr().wrapping_add(start).cast::<i8>();
    for offset in (0..items * size_of::<E>()).step_by(64) {
        // SAFETY: a prefetch reads nothing that the program sees, and never faults; SSE is part of
        // x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD + offset)) };
    }
}

/// A bf16 is the upper half of an f32.
impl Load for bf16 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_8(at: *const Self) -> __m256 {
        // SAFETY: 8 bf16 are the 16 bytes that the caller says are readable (bf16 is a
        // transparent u16); no alignment is needed.
        let half = unsafe { _mm_loadu_si128(at.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_16(at: *const Self) -> __m512 {
        // SAFETY: 16 bf16 are the 32 bytes that the caller says are readable (bf16 is a
        // transparent u16); no alignment is needed.
        let half = unsafe { _mm256_loadu_si256(at.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
    }
}

impl Load for f16 {
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load_8(at: *const Self) -> __m256 {
        // SAFETY: 8 f16 are the 16 bytes that the caller says are readable (f16 is a transparent
        // u16); no alignment is needed.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_16(at: *const Self) -> __m512 {
        // SAFETY: 16 f16 are the 32 bytes that the caller says are readable (f16 is a transparent
        // u16); no alignment is needed.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
    }
}
