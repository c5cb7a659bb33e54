//! What of the scan can be done for many codes at once: checks, bins and fixed-point strengths.
//!
//! One loop without branches, which the compiler turns into vector instructions for each
//! instruction set below; the scalar twin is the same loop for the baseline CPU. (CPUs that scatter
//! fast need none of it: see [`super::scatter`].)

use super::codes::{Index, Value};
use super::histogram::{self, BINS};
use crate::simd::{Level, Simd};

/// Codes that are staged at a time: few, so that the CPU fetches the next while it counts these.
pub(super) const CHUNK: usize = 256;
/// Places beyond those that are staged, which may be looked at and mean nothing.
pub(super) const BEYOND: usize = 32;

/// The sum is in these bits of a line's first word.
pub(super) const SUM: u64 = (1 << STAMP_SHIFT) - 1;
/// The row that showed the feature last is in the others.
pub(super) const STAMP_SHIFT: u32 = 48;
/// So many strengths add up without a carry: each is below 2^24 * 2^7 units, as a window may lie in
/// six octaves, and two more are above it.
pub(super) const SUM_TERMS: usize = 1 << (STAMP_SHIFT - 24 - 7);

pub(super) const MANTISSA_BITS: u32 = 23;
/// Bits that a strength loses where it is compared in 16 bits.
pub(super) const COARSE_SHIFT: u32 = MANTISSA_BITS - 13;

/// Where and how the scan counts an activation. Bins `base..base + WINDOW` of feature `f` are at
/// byte `f * LINE + FIRST` of its memory and after; the place [`OUTSIDE`] stands for all others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    base: u32,
    /// The biased exponent of the smallest strengths inside.
    lowest: u32,
}

/// Neighbouring bins that lie in a feature's line: five octaves and a quarter, which hold nearly all
/// strengths of a trained SAE.
pub(super) const WINDOW: usize = 21;
/// Bytes of a feature's line: half of one of the cache, so that the second cache holds all lines
/// of 28,672 features and what streams past them.
pub(super) const LINE: usize = 32;
/// Where in a line the window begins.
pub(super) const FIRST: usize = LINE - WINDOW;
/// Where in a line the place for all other bins is: before the window, where nothing is counted.
pub(super) const OUTSIDE: usize = 0;

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

    /// The biased exponent of the smallest strengths inside.
    #[cfg(target_arch = "x86_64")]
    pub fn lowest(self) -> u32 {
        self.lowest
    }

    /// A sum of a line in units of 2^-64 (see [`super::sum`]).
    pub fn fixed(self, sum: u128) -> u128 {
        // A mantissa's last bit is 2^-23 of the exponent: that is the smallest unit.
        let unit = self.lowest as i32 - 127 - MANTISSA_BITS as i32;
        sum << (64 + unit)
    }

    /// What a strength inside adds to a line's sum, or one that is less than two octaves above.
    #[inline(always)]
    fn term(self, bits: u32) -> u32 {
        let mantissa = bits & histogram::MANTISSA | 1 << MANTISSA_BITS;
        mantissa.wrapping_shl((bits >> MANTISSA_BITS).wrapping_sub(self.lowest))
    }

    /// A code's place; whether its bin is inside the window. What is smaller than the first bin or
    /// larger than the last counts as outside.
    #[inline(always)]
    fn place(self, feature: u32, bits: u32) -> (u32, bool) {
        let bin = (histogram::unbounded_bin_of(bits) as u32).wrapping_sub(self.base);
        let inside = bin < WINDOW as u32;
        let within = if inside {
            FIRST as u32 + bin
        } else {
            OUTSIDE as u32
        };
        (
            feature.wrapping_mul(LINE as u32).wrapping_add(within),
            inside,
        )
    }

    /// The bin of a strength that isn't inside, if it is above, counted from the window's first.
    pub fn bin_above(self, bits: u32) -> Option<usize> {
        let bin = histogram::unbounded_bin_of(bits) as usize;
        (bin < BINS).then(|| bin.wrapping_sub(self.base()))
    }

    /// What it adds to a sum, if its bin is less than two octaves above the window.
    pub fn term_above(self, bits: u32) -> u64 {
        self.term(bits).into()
    }

    /// A strength inside in 16 bits, rounded down: never less for a larger one.
    #[inline(always)]
    pub fn coarse(self, bits: u32) -> u32 {
        bits.wrapping_sub(self.lowest << MANTISSA_BITS) >> COARSE_SHIFT
    }

    /// What [`Layout::coarse`] is at least for strengths inside that are not below this one.
    pub fn coarse_floor(self, bits: u32) -> u16 {
        let above = bits.saturating_sub(self.lowest << MANTISSA_BITS);
        u16::try_from(above >> COARSE_SHIFT).unwrap_or(u16::MAX)
    }

    /// What to add to a strength's bits so that bits 21 and above are its bin, counted from the
    /// window's first: by the mantissa's first four bits, as no 16th of an octave has two edges.
    #[cfg(target_arch = "x86_64")]
    pub fn to_bins(self) -> [u32; 16] {
        const BUCKET: u32 = 1 << (MANTISSA_BITS - 4);
        let first = (histogram::OFFSET as u32 + self.base) << BIN_SHIFT;
        std::array::from_fn(|bucket| {
            let start = bucket as u32 * BUCKET;
            let quarters = |end: u32| histogram::QUARTERS.iter().filter(|&&e| e < end).count();
            let (before, after) = (quarters(start + 1), quarters(start + BUCKET));
            // Where the bin `after` would have begun.
            let edge = match before == after {
                true => start,
                false => histogram::QUARTERS[before],
            };
            ((after as u32) << BIN_SHIFT)
                .wrapping_sub(edge)
                .wrapping_sub(first)
        })
    }
}

/// See [`Layout::to_bins`].
#[cfg(target_arch = "x86_64")]
pub(super) const BIN_SHIFT: u32 = MANTISSA_BITS - 2;

/// Some codes.
#[derive(Debug, Clone)]
pub(super) struct Staged {
    /// Of each the place that counts it, from the first byte of the lines.
    pub places: [u32; CHUNK + BEYOND],
    /// What to add to its line's sum: nothing if its place is the one for all other bins.
    pub terms: [u32; CHUNK],
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
            // SAFETY: a Simd of this level is only made after AVX-512F was detected.
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
        let last = last_feature(d_sae);
        let mut sound = d_sae > 0;
        let codes = values.iter().zip(indices);
        let staged = self.places.iter_mut().zip(&mut self.terms);
        for ((value, index), ((place, term), kept_bits)) in codes.zip(staged.zip(&mut self.bits)) {
            let bits = value.bits();
            // Zeros wrap around; negative and infinite strengths are larger to begin with.
            sound &= bits.wrapping_sub(1) < f32::INFINITY.to_bits() - 1;
            let feature = index.feature() as u32;
            sound &= feature <= last;
            let inside;
            (*place, inside) = layout.place(feature, bits);
            *kept_bits = bits;
            *term = if inside { layout.term(bits) } else { 0 };
        }
        sound
    }
}

/// An id is at most `u32::MAX`, so a larger `d_sae` asks nothing of it.
pub(super) fn last_feature(d_sae: usize) -> u32 {
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

    #[cfg(target_arch = "x86_64")]
    proptest! {
        #[test]
        fn one_addition_makes_a_bin(bits in 1u32..0x7f80_0000, base in 0usize..BINS, edge in 0usize..=BINS, near in -2i32..3) {
            let layout = Layout::new(base);
            let table = layout.to_bins();
            let beside = histogram::edges()[edge].to_bits().wrapping_add_signed(near);
            for bits in [bits, beside] {
                let bucket = (bits >> (MANTISSA_BITS - 4)) as usize % 16;
                let bin = bits.wrapping_add(table[bucket]) >> BIN_SHIFT;
                let (place, inside) = layout.place(0, bits);
                prop_assert_eq!(bin < WINDOW as u32, inside);
                prop_assert!(!inside || bin + FIRST as u32 == place);
            }
        }
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
                    prop_assert_eq!(inside, FIRST + bin_of(value) - layout.base());
                    prop_assert_eq!(layout.fixed(term.into()), sum::to_fixed(value));
                    // Floors in 16 bits keep out none that reaches them.
                    for &other in &values {
                        let floor = layout.coarse_floor(other.to_bits());
                        prop_assert!(value < other || layout.coarse(value.to_bits()) >= floor.into());
                    }
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
                let part = u64::from(layout.term(term.to_bits())).checked_mul(times as u64);
                sum = part.and_then(|part| sum.checked_add(part)).unwrap();
                exact += sum::to_fixed(*term) * times as u128;
            }
            prop_assert!(sum <= SUM);
            prop_assert_eq!(layout.fixed(sum.into()), exact);
        }

        #[test]
        fn strengths_of_the_window_are_inside(base in 0usize..=BINS - WINDOW, bin in 0..WINDOW) {
            let value = histogram::edges()[base + bin];
            let mut staged = Staged::new();
            prop_assert!(staged.fill(Simd::best(), &[value], &[0u32], 1, Layout::new(base)));
            prop_assert_eq!(staged.places[0] as usize % LINE, FIRST + bin);
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
