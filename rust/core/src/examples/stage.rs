//! What of the scan can be done for many codes at once: checks, bins and fixed-point strengths.
//!
//! One loop without branches, which the compiler turns into vector instructions for each
//! instruction set below; the scalar twin is the same loop for the baseline CPU.

use super::codes::{Index, Value};
use super::histogram::{self, bin_of, BINS};
use crate::simd::{Level, Simd};

/// Codes that are staged at a time: few, so that the CPU fetches the next while it counts these.
pub(super) const CHUNK: usize = 128;

/// Octaves whose strengths are added up in the lines, and how many of them lie below the window.
const OCTAVES: u32 = 8;
const OCTAVES_BELOW: i32 = 1;
/// The sum is in a line's upper bits.
pub(super) const SUM_SHIFT: u32 = 16;
/// So many strengths add up without a carry: each is below 2^24 * 2^7.
pub(super) const SUM_TERMS: usize = 1 << (u64::BITS - SUM_SHIFT - 24 - (OCTAVES - 1));

const MANTISSA_BITS: u32 = 23;
const MANTISSA: u32 = (1 << MANTISSA_BITS) - 1;

/// Where and how the scan counts an activation. Bins `base..base + WINDOW` of feature `f` are at
/// byte `f * LINE + FIRST` of its memory and after; the byte that follows them stands for all others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    base: u32,
    /// The biased exponent of the smallest strengths that lines add up.
    lowest: u32,
}

/// Neighbouring bins that lie in a feature's line: five octaves, which hold 99% of the strengths of
/// a trained SAE.
pub(super) const WINDOW: usize = 21;
/// Bytes of a feature's line.
pub(super) const LINE: usize = 32;
/// Where in a line the window begins.
pub(super) const FIRST: usize = LINE - WINDOW - 1;
/// Where in a line the place for all other bins is.
pub(super) const OUTSIDE: usize = LINE - 1;

impl Layout {
    /// A window from bin `base`.
    pub fn new(base: usize) -> Self {
        let base = base.min(BINS - WINDOW);
        let exponent = histogram::exponent_of(base);
        Self {
            base: base as u32,
            lowest: (127 + exponent - OCTAVES_BELOW) as u32,
        }
    }

    /// The window's first bin.
    pub fn base(self) -> usize {
        self.base as usize
    }

    /// A line's sum shifted left by this is in units of 2^-64.
    pub fn shift(self) -> u32 {
        // A mantissa's last bit is 2^-23 of the exponent.
        64 + self.lowest - 127 - MANTISSA_BITS
    }

    #[inline(always)]
    fn place(self, feature: u32, bits: u32) -> u32 {
        let bin = bin_of(f32::from_bits(bits)) as u32;
        let inside = bin.wrapping_sub(self.base).min(WINDOW as u32);
        // Clamped bins may hold strengths that the sum can't.
        let summed = (bits >> MANTISSA_BITS).wrapping_sub(self.lowest) < OCTAVES;
        let inside = if summed { inside } else { WINDOW as u32 };
        feature * LINE as u32 + FIRST as u32 + inside
    }

    #[inline(always)]
    fn fixed(self, bits: u32) -> u64 {
        let shift = (bits >> MANTISSA_BITS).wrapping_sub(self.lowest);
        let mantissa = u64::from(bits & MANTISSA | 1 << MANTISSA_BITS);
        let fixed = mantissa << (shift.wrapping_add(SUM_SHIFT) & 63);
        if shift < OCTAVES {
            fixed
        } else {
            0
        }
    }
}

/// What counting a code needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// From the lowest bit: 32 bits of the place, 16 of the upper half of the strength's bits.
    pub place: u64,
    /// What to add to a line's sum: nothing if the place is the one for all other bins.
    pub sum: u64,
}

/// Some codes.
#[derive(Debug, Clone)]
pub(super) struct Staged(pub [Entry; CHUNK]);

impl Staged {
    pub fn new() -> Self {
        Self([Entry { place: 0, sum: 0 }; CHUNK])
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
        self.body(values, indices, d_sae, layout)
    }

    #[inline(always)]
    fn body<V: Value, I: Index>(
        &mut self,
        values: &[V],
        indices: &[I],
        d_sae: usize,
        layout: Layout,
    ) -> bool {
        // An id is at most u32::MAX, so a larger d_sae asks nothing of it.
        let last = d_sae.saturating_sub(1).min(u32::MAX as usize) as u32;
        let mut sound = d_sae > 0;
        let codes = values.iter().zip(indices);
        for ((value, index), entry) in codes.zip(&mut self.0) {
            let bits = value.bits();
            // Zeros wrap around; negative and infinite strengths are larger to begin with.
            sound &= bits.wrapping_sub(1) < f32::INFINITY.to_bits() - 1;
            let feature = index.feature() as u32;
            sound &= feature <= last;
            let place = layout.place(feature.min(last), bits);
            let (sum, inside) = (layout.fixed(bits), place % LINE as u32 != OUTSIDE as u32);
            *entry = Entry {
                place: u64::from(place) | u64::from(bits >> 16) << 32,
                sum: if inside { sum } else { 0 },
            };
        }
        sound
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
                prop_assert_eq!(&staged.0[..], &other.0[..]);
                for (at, &value) in values.iter().enumerate() {
                    let Entry { place, sum } = staged.0[at];
                    prop_assert_eq!(place >> 32, u64::from(value.to_bits() >> 16));
                    let (feature, inside) = (place as u32 as usize / LINE, place as usize % LINE);
                    prop_assert_eq!(feature as u32, indices[at]);
                    if inside == OUTSIDE {
                        prop_assert_eq!(sum, 0);
                        continue;
                    }
                    prop_assert_eq!(inside, FIRST + bin_of(value) - layout.base());
                    prop_assert_eq!(sum % (1 << SUM_SHIFT), 0);
                    let exact = u128::from(sum >> SUM_SHIFT) << layout.shift();
                    prop_assert_eq!(exact, sum::to_fixed(value));
                    prop_assert!(sum.checked_mul(SUM_TERMS as u64 - 1).is_some());
                }
            }
        }

        #[test]
        fn strengths_of_the_window_are_inside(base in 0usize..=BINS - WINDOW, bin in 0..WINDOW) {
            let value = histogram::edges()[base + bin];
            let mut staged = Staged::new();
            prop_assert!(staged.fill(Simd::best(), &[value], &[0u32], 1, Layout::new(base)));
            prop_assert_eq!(staged.0[0].place as usize % LINE, FIRST + bin);
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
