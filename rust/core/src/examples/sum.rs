//! Sums that do not depend on the order of their terms.

/// Bits right of the point: a sum counts units of 2^-64.
const FRACTION_BITS: i32 = 64;

/// A non-negative finite strength in units of 2^-64. What lies below a unit is
/// cut off (of each term alike, so order still can't show); strengths of 2^64 and
/// more saturate.
#[inline]
pub fn to_fixed(strength: f32) -> u128 {
    let bits = strength.to_bits();
    let exponent = (bits >> 23) as i32;
    // Subnormals lie far below a unit.
    if exponent == 0 {
        return 0;
    }
    let mantissa = u128::from(bits & 0x7f_ffff | 0x80_0000);
    // The strength is mantissa * 2^(exponent - 150).
    let shift = exponent - 150 + FRACTION_BITS;
    match shift {
        0..=104 => mantissa << shift,
        105.. => u128::MAX,
        -127..=-1 => mantissa >> -shift,
        _ => 0,
    }
}

/// Adds one strength. Saturating addition of non-negative numbers is associative.
#[inline]
pub fn add(sum: u128, strength: f32) -> u128 {
    sum.saturating_add(to_fixed(strength))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn to_f64(fixed: u128) -> f64 {
        fixed as f64 * (-64f64).exp2()
    }

    #[test]
    fn the_ends_of_the_range() {
        assert_eq!(to_fixed(0.0), 0);
        assert_eq!(to_fixed(f32::from_bits(1)), 0);
        assert_eq!(to_fixed((-64f32).exp2()), 1);
        assert_eq!(to_fixed(1.0), 1 << 64);
        assert_eq!(to_fixed((63f32).exp2()), 1 << 127);
        assert_eq!(to_fixed((64f32).exp2().next_down()), 0xff_ffff << 104);
        assert_eq!(to_fixed((64f32).exp2()), u128::MAX);
        assert_eq!(to_fixed(f32::MAX), u128::MAX);
    }

    proptest! {
        #[test]
        fn exact_where_f64_is(strength in 1e-6f32..1e9) {
            prop_assert_eq!(to_f64(to_fixed(strength)), f64::from(strength));
        }

        #[test]
        fn the_order_of_terms_does_not_show(mut terms in prop::collection::vec(0f32..f32::MAX, 0..50)) {
            let forwards = terms.iter().fold(0, |sum, &term| add(sum, term));
            terms.reverse();
            prop_assert_eq!(forwards, terms.iter().fold(0, |sum, &term| add(sum, term)));
        }
    }
}
