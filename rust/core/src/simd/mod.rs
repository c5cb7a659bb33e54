//! The few inner loops of selection and decoding, one twin per instruction set.
//!
//! The scalar one is the truth; the x86 twins must agree with it to the bit where
//! they select, and within rounding where they add. The level is detected once,
//! and a [`Simd`] of a level exists only on a CPU that has it, so that its
//! methods are safe. On other architectures the scalar loops are what the
//! compiler vectorises for the baseline (NEON on aarch64).

use std::sync::atomic::{AtomicU8, Ordering};

use crate::{Error, Result};

mod element;
mod every_level;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use element::key_of;
pub use element::{two_sum, value_of, Element, Stored};
pub(crate) use every_level::for_every_level;

/// Environment variable that forces a level, read at first use.
pub const ENV: &str = "R1SAE_SIMD";

/// An instruction set that has its own twin of the loops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Level {
    /// Plain Rust, on any CPU.
    Scalar = 1,
    /// AVX2, FMA and F16C (no CPU has the first without the others): 8 floats at a time.
    Avx2 = 2,
    /// AVX-512F: 16 floats at a time.
    Avx512 = 3,
}

impl Level {
    /// Every level, slowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// The name that users type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this CPU has it.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    fn from_u8(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|level| *level as u8 == code)
    }
}

/// The process's choice: 0 until first asked for, else a `Level`.
static CHOSEN: AtomicU8 = AtomicU8::new(0);

/// Proof that this CPU has a level's instructions; carries the loops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simd(Level);

impl Simd {
    /// The loops of `level`, if this CPU has it.
    pub fn new(level: Level) -> Option<Self> {
        level.is_supported().then_some(Self(level))
    }

    /// The widest level of this CPU.
    pub fn best() -> Self {
        Level::ALL
            .into_iter()
            .rev()
            .find_map(Self::new)
            .unwrap_or(Self(Level::Scalar))
    }

    /// The process's level: what [`set_active`] chose, else `R1SAE_SIMD`, else the widest.
    ///
    /// # Errors
    /// `R1SAE_SIMD` names no level, or one that this CPU lacks.
    pub fn active() -> Result<Self> {
        if let Some(level) = Level::from_u8(CHOSEN.load(Ordering::Relaxed)) {
            return Ok(Self(level));
        }
        let simd = match std::env::var(ENV) {
            Ok(name) if !name.is_empty() => {
                parse(&name).map_err(|error| Error::InvalidArgument(format!("{ENV}: {error}")))?
            }
            _ => Self::best(),
        };
        CHOSEN.store(simd.0 as u8, Ordering::Relaxed);
        Ok(simd)
    }

    /// Which instruction set this is.
    pub const fn level(self) -> Level {
        self.0
    }
}

/// Sets the process's level by name: `scalar`, `avx2`, `avx512`, or `auto` for the widest.
///
/// # Errors
/// An unknown name, or a level that this CPU lacks.
pub fn set_active(name: &str) -> Result<Simd> {
    let simd = parse(name)?;
    CHOSEN.store(simd.0 as u8, Ordering::Relaxed);
    Ok(simd)
}

fn parse(name: &str) -> Result<Simd> {
    if name == "auto" {
        return Ok(Simd::best());
    }
    let Some(level) = Level::ALL.into_iter().find(|level| level.name() == name) else {
        return Err(Error::InvalidArgument(format!(
            "unknown SIMD level {name:?}; expected auto, scalar, avx2 or avx512"
        )));
    };
    Simd::new(level).ok_or_else(|| {
        Error::InvalidArgument(format!(
            "this CPU lacks {name}; its widest level is {}",
            Simd::best().level().name()
        ))
    })
}

/// Has the CPU fetch what is at an address, which may be any.
#[inline(always)]
pub(crate) fn fetch_from<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is part of SSE, which every x86-64 has; it is a hint, which reads
    // nothing that the program could see and does nothing at addresses that aren't mapped.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Has the CPU fetch `items[at]`, if there is such an item, while other work goes on. A hint.
#[inline]
pub(crate) fn fetch<T>(items: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(item) = items.get(at) {
        // SAFETY: the instruction is part of SSE, which every x86-64 has; it reads nothing that
        // the program could see, and the address is that of a live item.
        unsafe {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(item).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (items, at);
}

/// As many keys are put in order faster by comparing each with all others than by sorting.
#[cfg(target_arch = "x86_64")]
const MOST_RANKED: usize = 192;

/// Calls the twin of `self.0`.
macro_rules! dispatch {
    ($self:ident, $name:ident ( $($argument:expr),* )) => {
        match $self.0 {
            Level::Scalar => scalar::$name($($argument),*),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a Simd of this level is only made after AVX2, FMA and F16C were detected.
            Level::Avx2 => unsafe { x86::avx2::$name($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a Simd of this level is only made after AVX-512F was detected.
            Level::Avx512 => unsafe { x86::avx512::$name($($argument),*) },
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512 => scalar::$name($($argument),*),
        }
    };
}

impl Simd {
    /// Raises `maxima[i]` to the largest of `row[i], row[i + g], row[i + 2 g]...`, `g = maxima.len()`.
    /// NaN is passed over. Returns whether the whole row is finite.
    #[inline]
    pub fn group_maxima<E: Element>(self, row: &[E], maxima: &mut [f32]) -> bool {
        dispatch!(self, group_maxima(row, maxima))
    }

    /// Whether no value of the row is NaN or infinite.
    #[inline]
    pub fn all_finite<E: Element>(self, row: &[E]) -> bool {
        dispatch!(self, all_finite(row))
    }

    /// Appends the keys of all values above `bound` (never NaN), in rising index.
    /// `bound` must not be negative: keys order positive values only.
    #[inline]
    pub fn collect_above<E: Element>(self, row: &[E], bound: f32, keys: &mut Vec<u64>) {
        dispatch!(self, collect_above(row, bound, keys))
    }

    /// As [`Simd::collect_above`]; returns whether the whole row is finite.
    #[inline]
    pub fn collect_finite_above<E: Element>(
        self,
        row: &[E],
        bound: f32,
        keys: &mut Vec<u64>,
    ) -> bool {
        dispatch!(self, collect_finite_above(row, bound, keys))
    }

    /// Keeps the `keep` smallest of keys that all differ (as [`key_of`] makes them), in rising order.
    #[inline]
    pub(crate) fn keep_smallest(self, keys: &mut Vec<u64>, keep: usize, scratch: &mut Vec<u64>) {
        #[cfg(target_arch = "x86_64")]
        if self.0 == Level::Avx512 && keys.len() <= MOST_RANKED {
            // SAFETY: a Simd of this level is only made after AVX-512F was detected.
            unsafe { x86::avx512::keep_smallest(keys, keep, scratch) };
            return;
        }
        let _ = scratch;
        if keep < keys.len() {
            keys.select_nth_unstable(keep);
            keys.truncate(keep);
        }
        keys.sort_unstable();
    }

    /// How many values are not below `bound`.
    #[inline]
    pub fn count_reaching(self, values: &[f32], bound: f32) -> usize {
        dispatch!(self, count_reaching(values, bound))
    }

    /// As [`Simd::collect_above`] with a bound for each index, none negative.
    #[inline]
    pub fn collect_above_each<E: Element>(self, row: &[E], bounds: &[f32], keys: &mut Vec<u64>) {
        dispatch!(self, collect_above_each(row, bounds, keys))
    }

    /// `sum[i] += scale * row[i]`, over the shorter length.
    #[inline]
    pub fn add_scaled<E: Stored>(self, sum: &mut [f32], scale: f32, row: &[E]) {
        dispatch!(self, add_scaled(sum, scale, row))
    }

    /// Four [`Simd::add_scaled`] in order, in one pass over `sum`.
    #[inline]
    pub fn add_scaled_4<E: Stored>(self, sum: &mut [f32], scales: [f32; 4], rows: [&[E]; 4]) {
        dispatch!(self, add_scaled_4(sum, scales, rows))
    }

    /// The inner product, over the shorter length, added up in f32.
    #[inline]
    pub fn dot<E: Stored>(self, left: &[f32], right: &[E]) -> f32 {
        dispatch!(self, dot(left, right))
    }

    /// Four inner products with the same vector, over its length; no left one may be shorter.
    #[inline]
    pub fn dot_4<E: Stored>(self, left: [&[f32]; 4], right: &[E]) -> [f32; 4] {
        dispatch!(self, dot_4(left, right))
    }

    /// `sums[i][j] += weights[i][row] * rows[row * stride + j]` for all rows: four mixtures of the
    /// same rows. Goes over the weights' length; panics where `rows` or a slice is too short.
    #[inline]
    pub fn mix_4<E: Element>(
        self,
        sums: [&mut [f32]; 4],
        weights: [&[f32]; 4],
        rows: &[E],
        stride: usize,
    ) {
        let (width, count) = (sums[0].len(), weights[0].len());
        let last = count.checked_sub(1).map(|last| last * stride + width);
        assert!(
            sums.iter().all(|sum| sum.len() == width)
                && weights.iter().all(|weights| weights.len() == count)
                && last.is_none_or(|last| last <= rows.len()),
            "a mixture of too little"
        );
        dispatch!(self, mix_4(sums, weights, rows, stride))
    }
}

/// Asks for a slice's cache lines, a few thousand bytes at most; only a hint.
#[inline(always)]
pub(crate) fn prefetch<T>(slice: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for offset in (0..size_of_val(slice).min(4096)).step_by(64) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        // SAFETY: a prefetch reads nothing that the program sees, and never faults; SSE is part of
        // x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(slice.as_ptr().cast::<i8>().wrapping_add(offset)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}

#[cfg(test)]
mod tests;
