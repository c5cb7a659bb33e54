//! What of the scan can be done for many codes at once: checks, bins and fixed-point strengths.
//!
//! One loop without branches, which the compiler turns into vector instructions for each
//! instruction set below; the scalar twin is the same loop for the baseline CPU.

use super::codes::{Index, Value};
use super::histogram::{self, BINS};
use crate::simd::{Level, Simd};

/// Codes that are staged at a time: few, so that the CPU fetches the next while it counts these.
pub(super) const CHUNK: usize = 256;
/// Places beyond those that are staged, which may be looked at and mean nothing.
pub(super) const BEYOND: usize = 32;

/// The sum is in a line's upper bits.
pub(super) const SUM_SHIFT: u32 = 16;
/// So many strengths add up without a carry: each is below 2^24 * 2^6 units, as a window may lie in
/// seven octaves.
pub(super) const SUM_TERMS: usize = 1 << (u64::BITS - SUM_SHIFT - 24 - 6);

const MANTISSA_BITS: i32 = 23;

/// Where and how the scan counts an activation. Bins `base..base + WINDOW` of feature `f` are at
/// byte `f * LINE + FIRST` of its memory and after, [`CELL`] bytes each; the cell that follows them
/// stands for all others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    base: u32,
    /// The biased exponent of the smallest strengths inside.
    lowest: u32,
}

/// Neighbouring bins that lie in a feature's line: six octaves and a quarter, which hold nearly all
/// strengths of a trained SAE.
pub(super) const WINDOW: usize = 25;
/// Bytes of a bin's cell.
pub(super) const CELL: usize = 2;
/// Bytes of a feature's line: one line of the cache.
pub(super) const LINE: usize = 64;
/// Where in a line the window begins.
pub(super) const FIRST: usize = LINE - (WINDOW + 1) * CELL;
/// Where in a line the place for all other bins is.
pub(super) const OUTSIDE: usize = LINE - CELL;

impl Layout {
    /// A window from bin `base`.
    pub fn new(base: usize) -> Self {
        let base = base.min(BINS - WINDOW);
        let exponent = histogram::exponent_of(base);
        Self {
            base: base as u32,
            lowest: (127 + exponent) as u32,
        }
    }

    /// The window's first bin.
    pub fn base(self) -> usize {
        self.base as usize
    }

    /// A mantissa's last bit is 2^-23 of the exponent: the base-2 logarithm of the smallest unit.
    fn unit(self) -> i32 {
        self.lowest as i32 - 127 - MANTISSA_BITS
    }

    /// How many units make 1.
    fn per_unit(self) -> f64 {
        f64::from_bits(((1023 - self.unit()) as u64) << (f64::MANTISSA_DIGITS - 1))
    }

    /// The sum in a line's upper bits in units of 2^-64 (see [`super::sum`]).
    pub fn fixed(self, line: u64) -> u128 {
        u128::from(line >> SUM_SHIFT) << (64 + self.unit())
    }

    /// What a strength inside adds to a line's sum.
    #[inline(always)]
    fn term(self, strength: f32) -> u64 {
        ((f64::from(strength) * self.per_unit()) as u64) << SUM_SHIFT
    }

    /// A code's place; whether its bin is inside the window. What is smaller than the first bin or
    /// larger than the last counts as outside.
    #[inline(always)]
    fn place(self, feature: u32, bits: u32) -> (u32, bool) {
        let bin = histogram::unbounded_bin_of(bits) as u32;
        let inside = bin.wrapping_sub(self.base).min(WINDOW as u32);
        let place = feature
            .wrapping_mul(LINE as u32)
            .wrapping_add(FIRST as u32 + CELL as u32 * inside);
        (place, inside < WINDOW as u32)
    }
}

/// Some codes.
#[derive(Debug, Clone)]
pub(super) struct Staged {
    /// Of each the cell that counts it, by its place from the first byte of the lines.
    pub places: [u32; CHUNK + BEYOND],
    /// What to add to its line's sum: nothing if its place is the one for all other bins.
    pub terms: [u64; CHUNK],
    /// The bits of its strength.
    pub bits: [u32; CHUNK],
}

impl Staged {
    pub fn new() -> Self {
        Self {
            places: [0; CHUNK + BEYOND],
            terms: [0; CHUNK],
            bits: [0; CHUNK],
        }
    }

    /// Stages at most [`CHUNK`] codes. False if one of them is not an ordinary activation (its id
    /// is not below `d_sae`, or its strength is not positive and finite): then nothing in here may
    /// be used.
    #[inline]
    pub fn fill<V: Value, I: Index>(
        &mut self,
        simd: Simd,
        values: &[V],
        indices: &[I],
        d_sae: usize,
        layout: Layout,
    ) -> bool {
        match simd.level() {
            Level::Scalar => self.body(values, indices, d_sae, layout),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a Simd of this level is only made after AVX2 was detected.
            Level::Avx2 => unsafe { self.avx2(values, indices, d_sae, layout) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a Simd of this level is only made after AVX-512F (and, as all CPUs with it
            // have, AVX2) was detected.
            Level::Avx512 => unsafe { self.avx512(values, indices, d_sae, layout) },
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512 => self.body(values, indices, d_sae, layout),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn avx2<V: Value, I: Index>(
        &mut self,
        values: &[V],
        indices: &[I],
        d_sae: usize,
        layout: Layout,
    ) -> bool {
        self.body(values, indices, d_sae, layout)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn avx512<V: Value, I: Index>(
        &mut self,
        values: &[V],
        indices: &[I],
        d_sae: usize,
        layout: Layout,
    ) -> bool {
        use std::arch::x86_64::*;
        const WIDTH: usize = 16;
        // How many codes ahead the CPU is told to fetch.
        const FAR: usize = 512;
        let length = values.len().min(indices.len()).min(CHUNK);
        let whole = length / WIDTH * WIDTH;
        let all = |number: u32| _mm512_set1_epi32(number as i32);
        let last = all(last_feature(d_sae));
        let [first, second, third] = histogram::QUARTERS.map(all);
        let zero_bin = all(histogram::OFFSET as u32 + layout.base);
        let one = all(1);
        let per_unit = _mm512_set1_pd(layout.per_unit());
        let magic = _mm512_set1_pd((1_u64 << (f64::MANTISSA_DIGITS - 1)) as f64);
        let mut sound: __mmask16 = if d_sae > 0 { !0 } else { 0 };
        for at in (0..whole).step_by(WIDTH) {
            // The hardware fetches ahead, but not beyond a page.
            _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().wrapping_add(at + FAR).cast());
            _mm_prefetch::<_MM_HINT_T0>(indices.as_ptr().wrapping_add(at + FAR).cast());
            // SAFETY: both slices hold WIDTH more numbers from here.
            let (bits, features) = unsafe {
                (
                    V::load(values.as_ptr().add(at)),
                    I::load(indices.as_ptr().add(at)),
                )
            };
            // Zeros wrap around; negative and infinite strengths are larger to begin with.
            let most = all(f32::INFINITY.to_bits() - 2);
            sound = _mm512_mask_cmple_epu32_mask(sound, _mm512_sub_epi32(bits, one), most);
            sound = _mm512_mask_cmple_epu32_mask(sound, features, last);
            let mantissa = _mm512_and_si512(bits, all(histogram::MANTISSA));
            let octave = _mm512_slli_epi32::<2>(_mm512_srli_epi32::<23>(bits));
            let mut bin = _mm512_sub_epi32(octave, zero_bin);
            for quarter in [first, second, third] {
                let beyond = _mm512_cmpge_epu32_mask(mantissa, quarter);
                bin = _mm512_mask_add_epi32(bin, beyond, bin, one);
            }
            let inside = _mm512_cmplt_epu32_mask(bin, all(WINDOW as u32));
            let bin = _mm512_min_epu32(bin, all(WINDOW as u32));
            let line = _mm512_slli_epi32::<6>(features);
            let cell = _mm512_slli_epi32::<1>(bin);
            const { assert!(LINE == 1 << 6 && CELL == 1 << 1) };
            let places = _mm512_add_epi32(_mm512_add_epi32(line, all(FIRST as u32)), cell);
            let low = _mm512_castps512_ps256(_mm512_castsi512_ps(bits));
            let high = _mm512_extracti64x4_epi64::<1>(bits);
            let low = _mm512_maskz_cvtps_pd(inside as __mmask8, low);
            let high = _mm512_maskz_cvtps_pd((inside >> 8) as __mmask8, _mm256_castsi256_ps(high));
            // With 2^52 added, a double's mantissa is the integer.
            let integer = |strengths: __m512d| {
                let sum = _mm512_add_pd(_mm512_mul_pd(strengths, per_unit), magic);
                let integer =
                    _mm512_sub_epi64(_mm512_castpd_si512(sum), _mm512_castpd_si512(magic));
                _mm512_slli_epi64::<SUM_SHIFT>(integer)
            };
            // SAFETY: there is room for CHUNK, of which WIDTH are left from here.
            unsafe {
                _mm512_storeu_si512(self.places.as_mut_ptr().add(at).cast(), places);
                _mm512_storeu_si512(self.bits.as_mut_ptr().add(at).cast(), bits);
                _mm512_storeu_si512(self.terms.as_mut_ptr().add(at).cast(), integer(low));
                _mm512_storeu_si512(
                    self.terms.as_mut_ptr().add(at + WIDTH / 2).cast(),
                    integer(high),
                );
            }
        }
        let (values, indices) = (&values[whole..length], &indices[whole..length]);
        sound == !0 && self.rest(whole, values, indices, d_sae, layout)
    }

    #[inline(always)]
    fn body<V: Value, I: Index>(
        &mut self,
        values: &[V],
        indices: &[I],
        d_sae: usize,
        layout: Layout,
    ) -> bool {
        self.rest(0, values, indices, d_sae, layout)
    }

    /// Stages codes one at a time, behind the first `start`.
    #[inline(always)]
    fn rest<V: Value, I: Index>(
        &mut self,
        start: usize,
        values: &[V],
        indices: &[I],
        d_sae: usize,
        layout: Layout,
    ) -> bool {
        let last = last_feature(d_sae);
        let mut sound = d_sae > 0;
        let codes = values.iter().zip(indices);
        let staged = self.places[start..]
            .iter_mut()
            .zip(&mut self.terms[start..])
            .zip(&mut self.bits[start..]);
        for ((value, index), ((place, term), kept_bits)) in codes.zip(staged) {
            let bits = value.bits();
            // Zeros wrap around; negative and infinite strengths are larger to begin with.
            sound &= bits.wrapping_sub(1) < f32::INFINITY.to_bits() - 1;
            let feature = index.feature() as u32;
            sound &= feature <= last;
            let inside;
            (*place, inside) = layout.place(feature, bits);
            *kept_bits = bits;
            *term = layout.term(f32::from_bits(if inside { bits } else { 0 }));
        }
        sound
    }
}

/// An id is at most `u32::MAX`, so a larger `d_sae` asks nothing of it.
fn last_feature(d_sae: usize) -> u32 {
    d_sae.saturating_sub(1).min(u32::MAX as usize) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples::histogram::bin_of;
    use crate::examples::sum;
    use proptest::prelude::*;

    fn simds() -> impl Iterator<Item = Simd> {
        Level::ALL.into_iter().filter_map(Simd::new)
    }

    proptest! {
        #[test]
        fn every_level_stages_what_one_code_at_a_time_gives(
            codes in prop::collection::vec((1u32..0x7f80_0000, 0u32..1000), 0..CHUNK),
            base in 0usize..BINS,
        ) {
            let layout = Layout::new(base);
            let values: Vec<f32> = codes.iter().map(|code| f32::from_bits(code.0)).collect();
            let indices: Vec<u32> = codes.iter().map(|code| code.1).collect();
            let narrow: Vec<u16> = codes.iter().map(|code| code.1 as u16).collect();
            for simd in simds() {
                let mut staged = Staged::new();
                prop_assert!(staged.fill(simd, &values, &indices, 1000, layout));
                let mut other = Staged::new();
                prop_assert!(other.fill(simd, &values, &narrow, 1000, layout));
                prop_assert_eq!(&staged.places[..], &other.places[..]);
                prop_assert_eq!(&staged.terms[..], &other.terms[..]);
                prop_assert_eq!(&staged.bits[..], &other.bits[..]);
                for (at, &value) in values.iter().enumerate() {
                    let (place, term) = (staged.places[at] as usize, staged.terms[at]);
                    let (feature, inside) = (place / LINE, place % LINE);
                    prop_assert_eq!(staged.bits[at], value.to_bits());
                    prop_assert_eq!(feature as u32, indices[at]);
                    if inside == OUTSIDE {
                        prop_assert_eq!(term, 0);
                        let bin = bin_of(value).wrapping_sub(layout.base());
                        prop_assert!(bin >= WINDOW || [0, BINS - 1].contains(&bin_of(value)));
                        continue;
                    }
                    prop_assert_eq!(inside, FIRST + (bin_of(value) - layout.base()) * CELL);
                    prop_assert_eq!(term % (1 << SUM_SHIFT), 0);
                    prop_assert_eq!(layout.fixed(term), sum::to_fixed(value));
                }
            }
        }

        #[test]
        fn sums_of_a_line_are_exact(
            base in 0usize..=BINS - WINDOW,
            bins in prop::collection::vec((0..WINDOW, 0u32..1 << 20), 1..50),
        ) {
            let layout = Layout::new(base);
            // The most terms, the largest of which have all their bits set.
            let mut terms: Vec<f32> = bins
                .iter()
                .map(|&(bin, more)| f32::from_bits(histogram::edges()[base + bin].to_bits() + more))
                .filter(|&term| layout.place(0, term.to_bits()).1)
                .collect();
            terms.push(histogram::edges()[base + WINDOW].next_down());
            let times = SUM_TERMS / terms.len() - 1;
            let (mut sum, mut exact) = (0_u64, 0);
            for term in &terms {
                let part = layout.term(*term).checked_mul(times as u64);
                sum = part.and_then(|part| sum.checked_add(part)).unwrap();
                exact += sum::to_fixed(*term) * times as u128;
            }
            prop_assert_eq!(layout.fixed(sum), exact);
        }

        #[test]
        fn strengths_of_the_window_are_inside(base in 0usize..=BINS - WINDOW, bin in 0..WINDOW) {
            let value = histogram::edges()[base + bin];
            let mut staged = Staged::new();
            prop_assert!(staged.fill(Simd::best(), &[value], &[0u32], 1, Layout::new(base)));
            prop_assert_eq!(staged.places[0] as usize % LINE, FIRST + bin * CELL);
        }

        #[test]
        fn one_unusual_code_is_noticed(
            length in 1usize..100,
            at in any::<prop::sample::Index>(),
            strength in prop::sample::select(vec![
                0.0f32, -0.0, -1.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY,
                            ]),
        ) {
            let at = at.index(length);
            for simd in simds() {
                let mut values = vec![1.0f32; length];
                let mut indices = vec![4u32; length];
                let good = Staged::new().fill(simd, &values, &indices, 5, Layout::new(40));
                prop_assert!(good);
                values[at] = strength;
                prop_assert!(!Staged::new().fill(simd, &values, &indices, 5, Layout::new(40)));
                values[at] = 1.0;
                for id in [5, 6, u32::MAX] {
                    indices[at] = id;
                    prop_assert!(!Staged::new().fill(simd, &values, &indices, 5, Layout::new(40)));
                }
            }
        }
    }

    #[test]
    fn no_features_no_codes() {
        for simd in simds() {
            assert!(!Staged::new().fill(simd, &[1.0f32], &[0u32], 0, Layout::new(40)));
        }
    }
}
