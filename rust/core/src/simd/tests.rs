//! Every twin that this CPU has, against scalar.

use half::bf16;
use proptest::prelude::*;

use super::{Element, Level, Simd};

/// Few distinct values (ties), odd lengths, and every kind of odd float.
fn row() -> impl Strategy<Value = Vec<f32>> {
    let odd = prop::sample::select(vec![
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        f32::MAX,
        f32::MIN,
    ]);
    let tie = (-8_i8..8).prop_map(|n| f32::from(n) / 2.0);
    let value = prop_oneof![6 => tie, 3 => -4.0_f32..4.0, 1 => odd];
    prop::collection::vec(value, 0..300)
}

fn twins() -> Vec<Simd> {
    Level::ALL.into_iter().filter_map(Simd::new).collect()
}

fn cast<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|value| E::from_f32(*value)).collect()
}

fn scalar() -> Simd {
    Simd(Level::Scalar)
}

fn check_selection<E: Element>(values: &[f32], bound: f32, groups: usize) {
    let row: Vec<E> = cast(values);
    let bounds: Vec<f32> = values.iter().rev().map(|v| v.abs().max(0.0)).collect();
    for simd in twins() {
        let (mut maxima, mut expected) = (vec![0.0; groups], vec![0.0; groups]);
        let finite = simd.group_maxima(&row, &mut maxima);
        assert_eq!(
            finite,
            scalar().group_maxima(&row, &mut expected),
            "{simd:?}"
        );
        assert_eq!(maxima, expected, "{simd:?}");
        assert_eq!(finite, row.iter().all(|value| value.to_f32().is_finite()));
        assert_eq!(simd.all_finite(&row), finite, "{simd:?}");
        let (mut keys, mut expected) = (vec![7], vec![7]);
        simd.collect_above(&row, bound, &mut keys);
        scalar().collect_above(&row, bound, &mut expected);
        assert_eq!(keys, expected, "{simd:?}");
        simd.collect_above_each(&row, &bounds, &mut keys);
        scalar().collect_above_each(&row, &bounds, &mut expected);
        assert_eq!(keys, expected, "{simd:?}");
    }
}

fn check_sums<E: Element>(left: &[f32], rows: &[Vec<f32>; 4], scales: [f32; 4]) {
    let rows: Vec<Vec<E>> = rows.iter().map(|row| cast(row)).collect();
    let rows = [&rows[0][..], &rows[1][..], &rows[2][..], &rows[3][..]];
    // 7 roundings of sums whose terms are at most 4 * 4.
    let tolerance = 8.0 * 64.0 * f32::EPSILON;
    for simd in twins() {
        let mut four = left.to_vec();
        simd.add_scaled_4(&mut four, scales, rows);
        let shortest = rows.iter().fold(left.len(), |len, row| len.min(row.len()));
        let mut exact: Vec<f64> = left.iter().map(|v| f64::from(*v)).collect();
        for (scale, row) in scales.iter().zip(rows) {
            for (sum, value) in exact.iter_mut().zip(&row[..shortest]) {
                *sum += f64::from(*scale) * f64::from(value.to_f32());
            }
        }
        let mut one_by_one = left.to_vec();
        for (scale, row) in scales.iter().zip(rows) {
            simd.add_scaled(&mut one_by_one[..shortest], *scale, &row[..shortest]);
        }
        assert_eq!(four, one_by_one, "{simd:?}");
        for (sum, exact) in four.iter().zip(&exact) {
            assert!(
                (f64::from(*sum) - exact).abs() <= f64::from(tolerance),
                "{simd:?}"
            );
        }
        let product = f64::from(simd.dot(left, rows[0]));
        let terms = left
            .iter()
            .zip(rows[0])
            .map(|(l, r)| f64::from(*l) * f64::from(r.to_f32()));
        let (exact, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
        assert!(
            (product - exact).abs() <= 300.0 * f64::from(f32::EPSILON) * size,
            "{simd:?}"
        );
    }
}

fn check_mixtures<E: Element>(values: &[f32], width: usize, stride: usize, count: usize) {
    let rows: Vec<E> = cast(&values[..count * stride]);
    let left = [0, 1, 2, 3].map(|at| &values[at * 7..at * 7 + width]);
    let weights = [0, 1, 2, 3].map(|at| &values[at * 11..at * 11 + count]);
    // At most 40 + 1 terms of at most 4 * 4, or `width` of them.
    let tolerance = f64::from(f32::EPSILON) * 16.0 * 64.0 * width.max(41) as f64;
    for simd in twins() {
        if let Some(row) = rows.get(..width) {
            for (product, left) in simd.dot_4(left, row).into_iter().zip(left) {
                let one = f64::from(simd.dot(left, row));
                assert!((f64::from(product) - one).abs() <= tolerance, "{simd:?}");
            }
        }
        let mut sums = left.map(<[f32]>::to_vec);
        let [a, b, c, d] = &mut sums;
        simd.mix_4([a, b, c, d], weights, &rows, stride);
        for ((sum, left), weights) in sums.iter().zip(left).zip(weights) {
            let mut one_by_one = left.to_vec();
            for (row, weight) in weights.iter().enumerate() {
                simd.add_scaled(&mut one_by_one, *weight, &rows[row * stride..]);
            }
            for (sum, expected) in sum.iter().zip(one_by_one) {
                assert!((sum - expected).abs() <= tolerance as f32, "{simd:?}");
            }
        }
    }
}

proptest! {
    #[test]
    fn twins_select_as_scalar(values in row(), bound in 0.0_f32..2.0, groups in 1_usize..140) {
        check_selection::<f32>(&values, bound, groups);
        check_selection::<bf16>(&values, bound, groups);
    }

    #[test]
    fn twins_add_within_rounding(
        left in prop::collection::vec(-4.0_f32..4.0, 0..200),
        a in prop::collection::vec(-4.0_f32..4.0, 0..200),
        b in prop::collection::vec(-4.0_f32..4.0, 0..200),
        c in prop::collection::vec(-4.0_f32..4.0, 100..200),
        scales in prop::array::uniform4(-4.0_f32..4.0),
    ) {
        let rows = [a, b, c.clone(), c];
        check_sums::<f32>(&left, &rows, scales);
        check_sums::<bf16>(&left, &rows, scales);
    }
}

proptest! {
    #[test]
    fn four_at_once_are_one_by_one(
        values in prop::collection::vec(-4.0_f32..4.0, 40 * 200),
        width in 0_usize..180,
        more in 0_usize..20,
        count in 0_usize..40,
    ) {
        check_mixtures::<f32>(&values, width, width + more, count);
        check_mixtures::<bf16>(&values, width, width + more, count);
    }
}

#[test]
#[should_panic(expected = "a mixture of too little")]
fn a_mixture_beyond_the_rows_is_refused() {
    let (mut a, mut b, mut c, mut d) = ([0.0; 4], [0.0; 4], [0.0; 4], [0.0; 4]);
    let weights = [1.0; 3];
    let sums = [&mut a[..], &mut b, &mut c, &mut d];
    Simd::best().mix_4(sums, [&weights; 4], &[0.0_f32; 11], 4);
}

#[test]
fn keys_order_by_falling_value_then_rising_index() {
    let mut keys = vec![
        super::key_of(1.0, 0),
        super::key_of(2.0, 9),
        super::key_of(2.0, 3),
    ];
    keys.sort_unstable();
    let decoded: Vec<_> = keys.into_iter().map(super::value_of).collect();
    assert_eq!(decoded, [(2.0, 3), (2.0, 9), (1.0, 0)]);
}

#[test]
fn unknown_levels_are_refused() {
    let error = super::parse("sse9").unwrap_err().to_string();
    assert!(
        error.contains("sse9") && error.contains("avx512"),
        "{error}"
    );
    assert_eq!(super::parse("auto").unwrap(), Simd::best());
    assert_eq!(super::parse("scalar").unwrap().level(), Level::Scalar);
}

proptest! {
    #[test]
    fn the_smallest_keys_in_order(
        keys in prop::collection::hash_set(any::<u64>().prop_map(|key| key >> 1), 0..260),
        keep in 0..300_usize,
    ) {
        let keys: Vec<u64> = keys.into_iter().collect();
        let mut expected = keys.clone();
        expected.sort_unstable();
        expected.truncate(keep);
        for simd in twins() {
            let (mut found, mut scratch) = (keys.clone(), vec![7; 3]);
            simd.keep_smallest(&mut found, keep, &mut scratch);
            prop_assert_eq!(&found, &expected, "{:?}", simd);
        }
    }
}
