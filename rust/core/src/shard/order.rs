//! A shuffled order of rows that takes no memory: a keyed bijection.
//!
//! [`Permutation::get`] maps place `i` of an epoch to a row. It is a Feistel network
//! over the smallest power of two that holds all rows, restricted to them by walking
//! the cycle (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), so
//! every row comes exactly once, any place can be asked for alone (exact resumption
//! is free), and the order depends on (rows, seed, epoch) and nothing else.

use std::ops::Range;

use crate::{Cancel, Result};

/// At least this many bits: with fewer, the halves of the network are too small to
/// mix well. Few rows then cost some walking, at most 2^12 steps an epoch in all.
const MIN_BITS: u32 = 12;
/// Each half is mixed six times.
const ROUNDS: usize = 12;
/// Places worked out between two looks at the cancel flag.
const BLOCK_PLACES: u64 = 4096;

/// The order of `rows` rows in one epoch.
#[derive(Debug, Clone)]
pub struct Permutation {
    rows: u64,
    high_bits: u32,
    low_bits: u32,
    keys: [u64; ROUNDS],
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64 bits.
pub(crate) const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Undoes [`mix`].
pub(crate) const fn unmix(mut x: u64) -> u64 {
    x ^= (x >> 31) ^ (x >> 62);
    x = x.wrapping_mul(inverse(0x94D0_49BB_1331_11EB));
    x ^= (x >> 27) ^ (x >> 54);
    x = x.wrapping_mul(inverse(0xBF58_476D_1CE4_E5B9));
    x ^ (x >> 30) ^ (x >> 60)
}

/// The inverse of an odd number modulo 2^64, by Newton's iteration: each step doubles the
/// number of right bits, of which an odd number itself has three.
const fn inverse(odd: u64) -> u64 {
    let mut x = odd;
    let mut step = 0;
    while step < 5 {
        x = x.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(x)));
        step += 1;
    }
    x
}

/// SplitMix64's increment: the golden ratio.
pub(crate) const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Permutation {
    /// The order of `rows` rows in epoch `epoch` under `seed`.
    pub fn new(rows: u64, seed: u64, epoch: u64) -> Self {
        let bits = (u64::BITS - rows.saturating_sub(1).leading_zeros()).max(MIN_BITS);
        let mut state = mix(seed.wrapping_add(GOLDEN)) ^ epoch;
        let keys = std::array::from_fn(|_| {
            state = state.wrapping_add(GOLDEN);
            mix(mix(state))
        });
        Self {
            rows,
            high_bits: bits / 2,
            low_bits: bits - bits / 2,
            keys,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The row at place `index`, which must be below `rows`.
    pub fn get(&self, index: u64) -> u64 {
        debug_assert!(index < self.rows);
        let mut row = index;
        loop {
            row = self.encrypt(row);
            // Ends: following a bijection from a place inside comes back inside.
            if row < self.rows {
                return row;
            }
        }
    }

    /// The rows at the places `places`, all below `rows`.
    ///
    /// # Errors
    /// `cancel`.
    pub fn get_range(&self, places: Range<u64>, cancel: &Cancel) -> Result<Vec<u64>> {
        let mut rows = Vec::with_capacity((places.end.saturating_sub(places.start)) as usize);
        for place in places {
            if place % BLOCK_PLACES == 0 {
                cancel.check()?;
            }
            rows.push(self.get(place));
        }
        Ok(rows)
    }

    fn encrypt(&self, value: u64) -> u64 {
        let low_mask = (1 << self.low_bits) - 1;
        let high_mask = (1 << self.high_bits) - 1;
        let (mut high, mut low) = (value >> self.low_bits, value & low_mask);
        for keys in self.keys.chunks_exact(2) {
            high ^= mix(low.wrapping_add(keys[0])) & high_mask;
            low ^= mix(high.wrapping_add(keys[1])) & low_mask;
        }
        high << self.low_bits | low
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_row_once(rows in 0_u64..5000, seed: u64, epoch: u64) {
            let order = Permutation::new(rows, seed, epoch);
            let mut seen = vec![false; rows as usize];
            for index in 0..rows {
                let row = order.get(index) as usize;
                prop_assert!(!seen[row]);
                seen[row] = true;
            }
        }

        #[test]
        fn a_bijection_of_large_domains(rows in 1_u64 << 40..1 << 62, seed: u64) {
            // Distinct neighbours and the ends stay distinct and inside.
            let order = Permutation::new(rows, seed, 0);
            let mut found: Vec<_> =
                (0..100).chain(rows - 100..rows).map(|index| order.get(index)).collect();
            prop_assert!(found.iter().all(|&row| row < rows));
            found.sort_unstable();
            found.dedup();
            prop_assert_eq!(found.len(), 200);
        }
    }

    proptest! {
        #[test]
        fn mixing_is_undone(x: u64) {
            prop_assert_eq!(unmix(mix(x)), x);
        }
    }

    #[test]
    fn places_are_uniform_over_seeds() {
        // 7 rows, 3500 seeds: each (place, row) cell expects 500; chi-square over 36
        // degrees of freedom exceeds 90 with probability below 1e-6.
        let mut counts = [[0_u32; 7]; 7];
        for seed in 0..3500 {
            let order = Permutation::new(7, seed, 0);
            for (place, counts) in counts.iter_mut().enumerate() {
                counts[order.get(place as u64) as usize] += 1;
            }
        }
        let chi2: f64 = counts
            .iter()
            .flatten()
            .map(|&count| (f64::from(count) - 500.0).powi(2) / 500.0)
            .sum();
        assert!(chi2 < 90.0, "{chi2}");
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let first: Vec<_> = (0..1000)
            .map(|i| Permutation::new(1000, 1, 0).get(i))
            .collect();
        for (seed, epoch) in [(1, 1), (2, 0), (0, 1)] {
            let order = Permutation::new(1000, seed, epoch);
            let same = first
                .iter()
                .zip(0..)
                .filter(|&(&row, i)| row == order.get(i))
                .count();
            assert!(same < 12, "{same} of 1000 places agree, 1 expected");
        }
    }
}
