//! Copies of rows that pass the caches by.
//!
//! A batch larger than a core's cache is read from memory whatever is done, and an ordinary store
//! first fetches the line that it overwrites: a third of the traffic. A streaming store does not.

#[cfg(any(test, target_arch = "x86_64"))]
use crate::simd::Level;
use crate::simd::Simd;

/// Outputs below this stay in the cache, where the next reader finds them.
pub(super) const STREAM_BYTES: usize = 4 << 20;
/// Pieces shorter than this are copied as usual.
const LEAST: usize = 512;
/// What a streaming store is aligned to.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// How rows are copied.
#[derive(Debug, Clone, Copy)]
pub(super) enum Copy {
    /// Through the cache.
    Ordinary,
    /// Past it; the copying thread must call [`Copy::finish`] before another one reads.
    Streaming(Simd),
}

impl Copy {
    /// The way for an output of that many bytes.
    pub fn of(bytes: usize) -> Self {
        match Simd::active() {
            Ok(simd) if bytes >= STREAM_BYTES => Self::Streaming(simd),
            _ => Self::Ordinary,
        }
    }

    /// Copies `from` to `to`, which is as long.
    pub fn copy(self, from: &[u8], to: &mut [u8]) {
        match self {
            Self::Streaming(simd) if from.len() >= LEAST => stream(simd, from, to),
            _ => to.copy_from_slice(from),
        }
    }

    /// Orders what was streamed before what this thread does next.
    pub fn finish(self) {
        #[cfg(target_arch = "x86_64")]
        if matches!(self, Self::Streaming(_)) {
            // SAFETY: part of SSE, which every x86-64 has.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn stream(simd: Simd, from: &[u8], to: &mut [u8]) {
    let head = to.as_ptr().align_offset(LINE).min(to.len());
    let whole = (to.len() - head) / LINE * LINE;
    to[..head].copy_from_slice(&from[..head]);
    to[head + whole..].copy_from_slice(&from[head + whole..]);
    let (from, to) = (&from[head..head + whole], &mut to[head..head + whole]);
    match simd.level() {
        // SAFETY: a `Simd` of this level exists only on a CPU that has it; the slices are equally
        // long, whole lines, and `to` starts at one.
        Level::Avx512 => unsafe { x86::lines_avx512(from, to) },
        // SAFETY: SSE2 is part of x86-64; the slices are as above.
        Level::Avx2 | Level::Scalar => unsafe { x86::lines_sse2(from, to) },
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn stream(_simd: Simd, from: &[u8], to: &mut [u8]) {
    to.copy_from_slice(from);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::LINE;
    use std::arch::x86_64::{
        __m128i, __m512i, _mm512_loadu_si512, _mm512_stream_si512, _mm_loadu_si128,
        _mm_stream_si128,
    };

    /// # Safety
    /// The CPU has AVX-512F; `to` is as long as `from`, of whole lines, and aligned to one.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn lines_avx512(from: &[u8], to: &mut [u8]) {
        for (from, to) in from.chunks_exact(LINE).zip(to.chunks_exact_mut(LINE)) {
            // SAFETY: both are one line long, `to` is aligned (the caller's word).
            unsafe {
                let line = _mm512_loadu_si512(from.as_ptr().cast::<__m512i>());
                _mm512_stream_si512(to.as_mut_ptr().cast::<__m512i>(), line);
            }
        }
    }

    /// # Safety
    /// `to` is as long as `from`, of whole lines, and aligned to one.
    pub unsafe fn lines_sse2(from: &[u8], to: &mut [u8]) {
        for (from, to) in from.chunks_exact(LINE).zip(to.chunks_exact_mut(LINE)) {
            for at in (0..LINE).step_by(16) {
                // SAFETY: 16 bytes from `at` lie within the line; `to` is aligned (the caller's
                // word), and so is every 16th byte of it.
                unsafe {
                    let part = _mm_loadu_si128(from.as_ptr().add(at).cast::<__m128i>());
                    _mm_stream_si128(to.as_mut_ptr().add(at).cast::<__m128i>(), part);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_length_at_any_address(length in 0_usize..3000, from in 0_usize..70, to in 0_usize..70) {
            let source: Vec<u8> = (0..from + length).map(|at| (at * 7 % 251) as u8).collect();
            for level in Level::ALL {
                let Some(simd) = Simd::new(level) else { continue };
                let mut target = vec![255; to + length + 70];
                let way = Copy::Streaming(simd);
                way.copy(&source[from..], &mut target[to..to + length]);
                way.finish();
                prop_assert_eq!(&target[to..to + length], &source[from..]);
                prop_assert!(target[..to].iter().chain(&target[to + length..]).all(|&b| b == 255));
            }
        }
    }
}
