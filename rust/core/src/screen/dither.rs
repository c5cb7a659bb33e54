//! The random numbers of rounding.
//!
//! The certificate asks that, within one product, the roundings of the dimensions be independent of
//! one another and of the data; it says nothing about two products, because their failures are added up
//! whether or not they are independent. So one number a dimension serves all features, another all rows,
//! and what they add to a product is a sum of one term a feature and one a row.

/// One number a dimension for features, and one for rows.
#[derive(Debug)]
pub(super) struct Dither {
    pub of_weights: Vec<f32>,
    pub of_rows: Vec<f32>,
    /// The sum of the products of what each leaves to be taken off.
    pub constant: f32,
}

impl Dither {
    /// `seed`: 64 bits for each table, whose streams differ where the bits are the same, too.
    pub(super) fn new(seed: u128, d_in: usize) -> Self {
        let of_weights = table(seed as u64, d_in);
        let of_rows = table(!((seed >> 64) as u64), d_in);
        let pairs = of_weights.iter().zip(&of_rows);
        let products =
            pairs.map(|(left, right)| (0.5 - f64::from(*left)) * (0.5 - f64::from(*right)));
        let constant = products.sum::<f64>() as f32;
        Self {
            of_weights,
            of_rows,
            constant,
        }
    }
}

/// Independent numbers of `[0, 1)`, one a dimension.
fn table(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    (0..len).map(|_| unit(next(&mut state))).collect()
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// The upper 24 bits: every value is an f32.
fn unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1_u32 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_fill_the_unit_interval_evenly() {
        let numbers = table(7, 100_000);
        assert!(numbers.iter().all(|number| (0.0..1.0).contains(number)));
        let mean: f64 = numbers.iter().map(|n| f64::from(*n)).sum::<f64>() / 1e5;
        let square: f64 = numbers.iter().map(|n| f64::from(*n).powi(2)).sum::<f64>() / 1e5;
        // Within five standard deviations.
        assert!((mean - 0.5).abs() < 5.0 * (1.0_f64 / 12.0 / 1e5).sqrt());
        assert!((square - 1.0 / 3.0).abs() < 5.0 * (4.0_f64 / 45.0 / 1e5).sqrt());
        assert_ne!(numbers[..9], table(8, 9)[..]);
    }
}
