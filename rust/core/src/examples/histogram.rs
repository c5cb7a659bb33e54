//! Log-spaced bins with the same edges in every run, so that histograms add.

/// Bins of an octave.
const PER_OCTAVE: usize = 4;
/// The first edge is 2^LOWEST; smaller strengths fall into the first bin too.
const LOWEST: i32 = -12;
/// The last edge is 2^HIGHEST; larger strengths fall into the last bin too.
const HIGHEST: i32 = 12;
/// How many bins a histogram has: quarter octaves from 2^-12 to 2^12.
pub const BINS: usize = (HIGHEST - LOWEST) as usize * PER_OCTAVE;

const MANTISSA_BITS: u32 = 23;
pub(super) const MANTISSA: u32 = (1 << MANTISSA_BITS) - 1;
/// Mantissas of 2^(1/4), 2^(2/4) and 2^(3/4) rounded to f32.
pub(super) const QUARTERS: [u32; PER_OCTAVE - 1] = [0x18_37f0, 0x35_04f3, 0x57_44fd];
/// The count of quarter octaves between the smallest exponent and the first edge.
pub(super) const OFFSET: i32 = (127 + LOWEST) * PER_OCTAVE as i32;

/// The bin of a strength, which must be positive and finite: bin `i` holds
/// `edges()[i] <= strength < edges()[i + 1]`, but for the first and the last,
/// which hold what lies outside too.
#[inline]
pub fn bin_of(strength: f32) -> usize {
    unbounded_bin_of(strength.to_bits()).clamp(0, BINS as i32 - 1) as usize
}

/// [`bin_of`] of a strength given by its bits, if there were bins without end.
#[inline(always)]
pub(super) fn unbounded_bin_of(bits: u32) -> i32 {
    let mantissa = bits & MANTISSA;
    let quarter: u32 = QUARTERS
        .iter()
        .map(|&edge| u32::from(mantissa >= edge))
        .sum();
    ((bits >> MANTISSA_BITS) * PER_OCTAVE as u32 + quarter) as i32 - OFFSET
}

/// The exponent of a bin's lower edge, rounded down.
pub(super) const fn exponent_of(bin: usize) -> i32 {
    LOWEST + (bin / PER_OCTAVE) as i32
}

/// The `BINS + 1` edges: 2^(-12 + i/4), rounded to f32.
pub fn edges() -> Vec<f32> {
    (0..=BINS)
        .map(|i| {
            let quarter = i % PER_OCTAVE;
            let exponent = (127 + LOWEST + (i / PER_OCTAVE) as i32) as u32;
            let mantissa = if quarter == 0 {
                0
            } else {
                QUARTERS[quarter - 1]
            };
            f32::from_bits(exponent << MANTISSA_BITS | mantissa)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn edges_are_rounded_powers_of_two_to_the_quarter() {
        for (i, edge) in edges().into_iter().enumerate() {
            let exact = (f64::from(LOWEST) + i as f64 / PER_OCTAVE as f64).exp2();
            assert_eq!(edge, exact as f32, "edge {i}");
        }
    }

    /// The obvious way: the last edge that is not above the strength.
    fn naive(strength: f32) -> usize {
        let not_above = edges().iter().filter(|&&edge| edge <= strength).count();
        not_above.saturating_sub(1).min(BINS - 1)
    }

    #[test]
    fn bins_agree_with_the_edges_at_and_beside_every_edge() {
        for edge in edges() {
            for strength in [edge.next_down(), edge, edge.next_up()] {
                assert_eq!(bin_of(strength), naive(strength), "{strength:e}");
            }
        }
        for strength in [f32::from_bits(1), f32::MIN_POSITIVE, f32::MAX] {
            assert_eq!(bin_of(strength), naive(strength), "{strength:e}");
        }
    }

    proptest! {
        #[test]
        fn bins_agree_with_the_edges(bits in 1u32..0x7f80_0000) {
            let strength = f32::from_bits(bits);
            prop_assert_eq!(bin_of(strength), naive(strength));
        }
    }
}
