//! Selection against a sort of everything.

use half::bf16;
use proptest::prelude::*;

use super::{batch_topk, threshold, topk, Codes, Options, Threshold};
use crate::rows::Matrix;
use crate::simd::{Element, Level, Simd};
use crate::{Cancel, Error, Result};

/// Every instruction set of this CPU, on one thread and on three.
fn all_options() -> Vec<Options> {
    let levels = Level::ALL.into_iter().filter_map(Simd::new);
    let with = |simd, threads| Options {
        simd,
        threads,
        check_finite: true,
    };
    levels
        .flat_map(|simd| [with(simd, 1), with(simd, 3)])
        .collect()
}

/// The positive entries as (row, index, value), by falling value, ties by lower row and index.
fn ranked<E: Element>(rows: usize, width: usize, data: &[E]) -> Vec<(usize, usize, f32)> {
    let mut entries: Vec<_> = (0..rows * width)
        .map(|flat| (flat / width, flat % width, data[flat].to_f32()))
        .filter(|entry| entry.2 > 0.0)
        .collect();
    entries.sort_by(|left, right| right.2.total_cmp(&left.2));
    entries
}

fn codes_of<E: Element>(rows: usize, mut kept: Vec<(usize, usize, f32)>) -> Codes<E> {
    kept.sort_by_key(|entry| entry.0);
    Codes {
        values: kept.iter().map(|entry| E::from_f32(entry.2)).collect(),
        indices: kept.iter().map(|entry| entry.1 as i32).collect(),
        row_offsets: (0..=rows)
            .map(|row| kept.iter().filter(|entry| entry.0 < row).count() as i64)
            .collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Rows enough for the edge to be guessed from the rows before: guesses that hold, that fail
    /// either way, and rows with hardly a positive value.
    #[test]
    fn topk_of_rows_that_are_alike_or_not(
        scales in prop::collection::vec(prop::sample::select(
            vec![1.0_f32, 1.0, 1.0, 1.0, 1.02, 0.97, 1.3, 0.2, 40.0, -1.0, 0.0, 1e-40, 1e30]), 1..60),
        k in 1_usize..9,
        coarse in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (rows, width) = (scales.len(), 400);
        let mut state = seed | 1;
        let values: Vec<f32> = (0..rows * width).map(|at| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let value = (state >> 40) as f32 / (1 << 24) as f32 - 0.3;
            let value = if coarse { (value * 20.0).round() / 20.0 } else { value * value * value };
            scales[at / width] * value
        }).collect();
        check_all::<f32>(rows, width, &values, k, 0.3);
        check_all::<bf16>(rows, width, &values, k, 0.3);
    }

    /// A row that isn't finite is named, guessed about or not.
    #[test]
    fn topk_names_bad_rows_among_guesses(
        bad in 0_usize..30, place in 0_usize..400,
        value in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        let mut values: Vec<f32> = (0..30 * 400).map(|at| ((at * 7919) % 1013) as f32 - 400.0).collect();
        values[bad * 400 + place] = value;
        let matrix = Matrix::new(&values, 30, 400).unwrap();
        for options in all_options() {
            let found = topk(matrix, 5, options, &Cancel::new());
            let is_named = matches!(found, Err(Error::NonFinite { row, .. }) if row == bad);
            prop_assert!(is_named);
            let unchecked = Options { check_finite: false, ..options };
            let found = topk(matrix, 5, unchecked, &Cancel::new()).unwrap();
            prop_assert!(found.values.iter().all(|value| !value.is_nan()));
            prop_assert_eq!(found.values.len(), 150);
        }
    }
}

fn check_all<E: Element + PartialEq + std::fmt::Debug>(
    rows: usize,
    width: usize,
    values: &[f32],
    k: usize,
    bound: f32,
) {
    let data: Vec<E> = values.iter().map(|value| E::from_f32(*value)).collect();
    let matrix = Matrix::new(&data, rows, width).unwrap();
    let entries = ranked(rows, width, &data);
    let mut left = vec![k; rows];
    let per_row = entries.iter().copied().filter(|entry| {
        let keep = left[entry.0] > 0;
        left[entry.0] -= usize::from(keep);
        keep
    });
    let per_row = codes_of::<E>(rows, per_row.collect());
    let per_batch = codes_of::<E>(rows, entries.iter().copied().take(k * rows).collect());
    let above = codes_of::<E>(
        rows,
        entries.iter().copied().filter(|e| e.2 > bound).collect(),
    );
    let bounds: Vec<f32> = (0..width).map(|i| bound * (i % 3) as f32 - 0.1).collect();
    let above_each = entries
        .iter()
        .copied()
        .filter(|e| e.2 > bounds[e.1])
        .collect();
    let above_each = codes_of::<E>(rows, above_each);
    for options in all_options() {
        assert_eq!(
            topk(matrix, k, options, &Cancel::new()).unwrap(),
            per_row,
            "{options:?}"
        );
        assert_eq!(
            batch_topk(matrix, k, options, &Cancel::new()).unwrap(),
            per_batch,
            "{options:?}"
        );
        let shared = threshold(matrix, Threshold::Shared(bound), options, &Cancel::new()).unwrap();
        assert_eq!(shared, above, "{options:?}");
        let each = threshold(matrix, Threshold::Each(&bounds), options, &Cancel::new()).unwrap();
        assert_eq!(each, above_each, "{options:?}");
    }
}

/// Rows, width, values (many ties, some rows all negative, some all equal) and k.
fn problem() -> impl Strategy<Value = (usize, usize, Vec<f32>, usize)> {
    let width = prop::sample::select(vec![1, 2, 15, 16, 63, 64, 123, 256, 300, 1024, 1031]);
    (0_usize..5, width).prop_flat_map(|(rows, width)| {
        let tie = (-6_i8..7).prop_map(|n| f32::from(n) / 2.0);
        let value = prop_oneof![tie, -3.0_f32..3.0];
        let row = prop_oneof![
            8 => prop::collection::vec(value, width),
            1 => prop::collection::vec(-3.0_f32..=0.0, width),
            1 => (-1.0_f32..3.0).prop_map(move |value| vec![value; width]),
        ];
        let rows_of = prop::collection::vec(row, rows).prop_map(|rows| rows.concat());
        let k = prop_oneof![3 => 0..=width.min(20), 1 => 0..=width, 1 => Just(width)];
        (Just(rows), Just(width), rows_of, k)
    })
}

proptest! {
    #[test]
    fn all_selections_equal_a_sort((rows, width, values, k) in problem(), bound in -1.0_f32..2.0) {
        check_all::<f32>(rows, width, &values, k, bound);
        check_all::<bf16>(rows, width, &values, k, bound);
    }
}

/// Wide enough for several threads and for groups.
#[test]
fn many_wide_rows_equal_a_sort() {
    let (rows, width) = (40, 8192);
    let mut state = 1_u64;
    let values: Vec<f32> = (0..rows * width)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // 2001 levels: many ties among 327,680 values.
            ((state >> 33) % 2001) as f32 / 500.0 - 2.0
        })
        .collect();
    check_all::<f32>(rows, width, &values, 32, 1.9);
    check_all::<bf16>(rows, width, &values, 32, 1.9);
}

#[test]
fn one_row_may_take_all_codes_of_the_batch() {
    let (rows, width, k) = (8, 512, 16);
    let mut values = vec![0.5; rows * width];
    values[3 * width..4 * width].fill(1.0);
    check_all::<f32>(rows, width, &values, k, 0.7);
}

#[test]
fn rows_that_are_not_finite_are_named() {
    let (rows, width) = (40, 8192);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![1.0; rows * width];
        values[31 * width + 5] = bad;
        values[17 * width + 8191] = bad;
        let matrix = Matrix::new(&values, rows, width).unwrap();
        for options in all_options() {
            let row_of = |result: Result<Codes<f32>>| match result {
                Err(Error::NonFinite { row, .. }) => row,
                other => panic!("{other:?}"),
            };
            for k in [0, 8, width] {
                assert_eq!(row_of(topk(matrix, k, options, &Cancel::new())), 17);
                assert_eq!(row_of(batch_topk(matrix, k, options, &Cancel::new())), 17);
            }
            assert_eq!(
                row_of(threshold(
                    matrix,
                    Threshold::Shared(0.0),
                    options,
                    &Cancel::new()
                )),
                17
            );
        }
    }
}

#[test]
fn unchecked_nan_is_passed_over_and_infinity_is_largest() {
    let values = [f32::NAN, 1.0, f32::INFINITY, f32::NEG_INFINITY, 2.0];
    let matrix = Matrix::new(&values, 1, 5).unwrap();
    for mut options in all_options() {
        options.check_finite = false;
        for codes in [
            topk(matrix, 5, options, &Cancel::new()),
            batch_topk(matrix, 5, options, &Cancel::new()),
        ] {
            assert_eq!(codes.unwrap().indices, [2, 4, 1]);
        }
    }
}

#[test]
fn bad_arguments_are_refused() {
    let matrix = Matrix::new(&[1.0_f32, 2.0], 1, 2).unwrap();
    let options = all_options()[0];
    let text = |result: Result<Codes<f32>>| result.unwrap_err().to_string();
    assert!(text(topk(matrix, 3, options, &Cancel::new())).contains("k is 3"));
    assert!(text(batch_topk(matrix, 3, options, &Cancel::new())).contains("2 features"));
    assert!(text(threshold(
        matrix,
        Threshold::Each(&[0.0]),
        options,
        &Cancel::new()
    ))
    .contains("1 thresholds"));
    // No elements, but a width that int32 can't index.
    let wide = Matrix::<f32>::new(&[], 0, 1 << 31).unwrap();
    assert!(text(topk(wide, 1, options, &Cancel::new())).contains("int32"));
}

#[test]
fn each_selection_stops_when_cancelled() {
    let data = vec![1.0_f32; 40 * 300];
    let matrix = Matrix::new(&data, 40, 300).unwrap();
    let cancel = Cancel::new();
    cancel.cancel();
    for options in all_options() {
        let shared = Threshold::Shared(0.5);
        for codes in [
            topk(matrix, 3, options, &cancel),
            topk(matrix, 200, options, &cancel),
            batch_topk(matrix, 3, options, &cancel),
            batch_topk(matrix, 200, options, &cancel),
            threshold(matrix, shared, options, &cancel),
        ] {
            assert!(matches!(codes, Err(Error::Interrupted)), "{codes:?}");
        }
    }
}

/// Rows of one kind, so that a sample tells about all; rows that fall off towards the last, so that a
/// sample misleads; few large rows; zeros.
#[test]
fn batches_of_many_rows_are_right_whatever_a_sample_says() {
    let (rows, width) = (130, 1100);
    let noise = |at: usize| ((at * 7919 + at / 13) % 10_007) as f32 / 1000.0 - 5.0;
    let scales: [&dyn Fn(usize) -> f32; 5] = [
        &|_| 1.0,
        &|row| 1.0 / (1 + row) as f32,
        &|row| if row % 5 == 0 { 100.0 } else { 1.0 },
        &|row| if row % 5 == 0 { 0.0 } else { 1.0 },
        &|row| f32::from(row == 77),
    ];
    for scale in scales {
        let values: Vec<f32> = (0..rows * width)
            .map(|at| noise(at) * scale(at / width))
            .collect();
        for k in [1, 7, 64] {
            check_all::<f32>(rows, width, &values, k, 4.0);
        }
        check_all::<bf16>(rows, width, &values, 20, 4.0);
    }
}

#[test]
fn a_bad_row_among_many_is_named() {
    let (rows, width) = (100, 1100);
    let mut values: Vec<f32> = (0..rows * width)
        .map(|at| (at * 7919 % 1009) as f32)
        .collect();
    values[93 * width + 5] = f32::NAN;
    values[71 * width + 1099] = f32::NEG_INFINITY;
    let matrix = Matrix::new(&values, rows, width).unwrap();
    for options in all_options() {
        let found = batch_topk(matrix, 5, options, &Cancel::new());
        assert!(
            matches!(found, Err(Error::NonFinite { row: 71, .. })),
            "{options:?}"
        );
    }
}
