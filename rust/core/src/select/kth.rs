//! The k-th largest of many non-negative floats, by their bits (which order as they do).

use crate::simd::Simd;
use crate::{Cancel, Result};

/// Above this many, selection is by counting, which can look at the cancel flag as it goes
/// (selection in place is one call, of seconds for hundreds of millions).
const MANY: usize = 1 << 22;
/// Elements counted between two looks at the cancel flag.
const BLOCK: usize = 1 << 20;

/// The largest bound that keeps all values that could be among the k largest, to be
/// exceeded: just below the k-th largest of `bits` (of floats that aren't negative).
pub(super) fn bound_below_kth(bits: &mut [u32], k: usize, cancel: &Cancel) -> Result<f32> {
    if k == 0 || k > bits.len() {
        return Ok(0.0);
    }
    Ok(just_below(f32::from_bits(kth_largest(bits, k, cancel)?)))
}

/// Halvings of the range that holds the k-th largest: it is found to 1 in 2^14.
const HALVINGS: u32 = 14;

/// A little below the k-th largest of values that aren't negative, or that itself: for a few hundred
/// values, counting again and again is faster than putting them in order. `k` is from 1 to their number.
pub(crate) fn not_above_kth(values: &[f32], k: usize, simd: Simd) -> f32 {
    let (mut low, mut high) = (
        0.0_f32,
        values.iter().fold(0.0_f32, |left, right| left.max(*right)),
    );
    for _ in 0..HALVINGS {
        let middle = low + (high - low) / 2.0;
        let count = simd.count_reaching(values, middle);
        if count < k {
            high = middle;
            continue;
        }
        low = middle;
        if count == k {
            // The k-th is the smallest of those: a screen wants a bound as high as can be.
            let reaching = values.iter().filter(|value| **value >= low);
            return reaching.fold(f32::INFINITY, |left, right| left.min(*right));
        }
    }
    low
}

/// The float just below one that isn't negative; 0 has none.
pub(super) fn just_below(value: f32) -> f32 {
    // Positive floats order as their bits do.
    f32::from_bits(value.to_bits().saturating_sub(1))
}

/// The k-th largest of `bits`, which may be reordered; `k` is from 1 to their number.
pub(super) fn kth_largest(bits: &mut [u32], k: usize, cancel: &Cancel) -> Result<u32> {
    if bits.len() > MANY {
        return count_down(bits, k, cancel);
    }
    let (_, kth, _) = bits.select_nth_unstable_by(k - 1, |left, right| right.cmp(left));
    Ok(*kth)
}

/// Finds the upper half of the k-th largest, then its lower half among those that share it.
fn count_down(bits: &[u32], k: usize, cancel: &Cancel) -> Result<u32> {
    let mut counts = vec![0_usize; 1 << 16];
    for block in bits.chunks(BLOCK) {
        cancel.check()?;
        for bits in block {
            counts[(bits >> 16) as usize] += 1;
        }
    }
    let (upper, k) = from_the_top(&counts, k);
    counts.fill(0);
    for block in bits.chunks(BLOCK) {
        cancel.check()?;
        for bits in block.iter().filter(|bits| **bits >> 16 == upper) {
            counts[(bits & 0xFFFF) as usize] += 1;
        }
    }
    Ok(upper << 16 | from_the_top(&counts, k).0)
}

/// Which bin holds the k-th when counting from the last one down, and its rank within.
fn from_the_top(counts: &[usize], k: usize) -> (u32, usize) {
    let mut left = k;
    for (bin, count) in (0..1_u32 << 16).zip(counts).rev() {
        if left <= *count {
            return (bin, left);
        }
        left -= count;
    }
    (0, left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;
    use crate::Error;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counting_finds_what_sorting_finds(
            // Few upper halves and few lower ones, so that ties and shared bins abound.
            bits in prop::collection::vec((0_u32..4, 0_u32..5), 1..60),
            place in any::<prop::sample::Index>(),
        ) {
            let mut bits: Vec<u32> = bits.iter().map(|(up, low)| up << 16 | low).collect();
            let k = place.index(bits.len()) + 1;
            let cancel = Cancel::new();
            let counted = count_down(&bits, k, &cancel).unwrap();
            prop_assert_eq!(kth_largest(&mut bits.clone(), k, &cancel).unwrap(), counted);
            bits.sort_unstable_by(|left, right| right.cmp(left));
            prop_assert_eq!(bits[k - 1], counted);
            // Numbers that halving doesn't run out of bits for.
            let values: Vec<f32> = bits.iter().map(|bits| *bits as f32).collect();
            for simd in Level::ALL.into_iter().filter_map(Simd::new) {
                let bound = not_above_kth(&values, k, simd);
                prop_assert!(bound <= values[k - 1]);
                prop_assert!(values[k - 1] - bound <= values[0] / 8192.0);
            }
        }
    }

    #[test]
    fn many_are_counted_and_that_can_be_cancelled() {
        let mut bits: Vec<u32> = (0..MANY as u32 + 7).rev().collect();
        let cancel = Cancel::new();
        assert_eq!(kth_largest(&mut bits, 1, &cancel).unwrap(), MANY as u32 + 6);
        assert_eq!(kth_largest(&mut bits, MANY + 7, &cancel).unwrap(), 0);
        cancel.cancel();
        let result = kth_largest(&mut bits, 5, &cancel);
        assert!(matches!(result, Err(Error::Interrupted)));
    }
}
