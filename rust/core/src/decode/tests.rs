//! Decoding and its gradients against dense sums in f64.

use half::{bf16, f16};
use proptest::prelude::*;

use super::{decode, SparseRows};
use crate::grad::{
    gradient_of_values, gradient_of_values_by_feature, gradient_of_weight, FeatureLists,
};
use crate::rows::Matrix;
use crate::simd::{Element, Level, Simd, Stored};
use crate::{Cancel, Error};

#[derive(Clone, Debug)]
struct Problem {
    d_in: usize,
    d_sae: usize,
    /// Per row: feature and value.
    rows: Vec<Vec<(usize, f32)>>,
    w_dec: Vec<f32>,
    b_dec: Vec<f32>,
    gradient: Vec<f32>,
}

fn problem() -> impl Strategy<Value = Problem> {
    let d_in = prop::sample::select(vec![1, 7, 16, 63, 123, 200]);
    (d_in, 1_usize..40).prop_flat_map(|(d_in, d_sae)| {
        let code = (0..d_sae, -2.0_f32..2.0);
        let rows = prop::collection::vec(prop::collection::vec(code, 0..12), 0..6);
        rows.prop_flat_map(move |rows| {
            let n = rows.len();
            let floats = |count| prop::collection::vec(-2.0_f32..2.0, count);
            (
                Just(rows),
                floats(d_sae * d_in),
                floats(d_in),
                floats(n * d_in),
            )
                .prop_map(move |(rows, w_dec, b_dec, gradient)| Problem {
                    d_in,
                    d_sae,
                    rows,
                    w_dec,
                    b_dec,
                    gradient,
                })
        })
    })
}

fn cast<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|value| E::from_f32(*value)).collect()
}

/// Each result within `unit` roundings of its type and a few of f32, relative to the sum of
/// the magnitudes of its terms.
fn assert_close<E: Element>(found: &[E], exact: &[(f64, f64)], unit: f64) {
    assert_eq!(found.len(), exact.len());
    for (found, (sum, size)) in found.iter().zip(exact) {
        let allowed = unit * sum.abs() + 250.0 * f64::from(f32::EPSILON) * size;
        assert!(
            (f64::from(found.to_f32()) - sum).abs() <= allowed,
            "{} {sum}",
            found.to_f32()
        );
    }
}

fn check<E: Element>(problem: &Problem, unit: f64) {
    let Problem {
        d_in, d_sae, rows, ..
    } = problem;
    let (d_in, d_sae) = (*d_in, *d_sae);
    let w_dec: Vec<E> = cast(&problem.w_dec);
    let b_dec: Vec<E> = cast(&problem.b_dec);
    let gradient: Vec<E> = cast(&problem.gradient);
    let values: Vec<E> = cast(&rows.iter().flatten().map(|code| code.1).collect::<Vec<_>>());
    let indices: Vec<i32> = rows.iter().flatten().map(|code| code.0 as i32).collect();
    let mut offsets = vec![0_i64];
    offsets.extend(rows.iter().scan(0, |end, row| {
        *end += row.len() as i64;
        Some(*end)
    }));
    let row_of: Vec<usize> = (0..rows.len())
        .flat_map(|row| vec![row; rows[row].len()])
        .collect();
    let at = |data: &[E], index: usize| f64::from(data[index].to_f32());

    let mut output: Vec<(f64, f64)> = (0..rows.len() * d_in)
        .map(|i| (at(&b_dec, i % d_in), at(&b_dec, i % d_in).abs()))
        .collect();
    let mut of_values = vec![(0.0, 0.0); values.len()];
    let mut of_weight = vec![(0.0, 0.0); d_sae * d_in];
    let add = |slot: &mut (f64, f64), term: f64| *slot = (slot.0 + term, slot.1 + term.abs());
    for (code, row) in row_of.iter().enumerate() {
        for column in 0..d_in {
            let weight = indices[code] as usize * d_in + column;
            let place = row * d_in + column;
            add(&mut output[place], at(&values, code) * at(&w_dec, weight));
            add(
                &mut of_values[code],
                at(&gradient, place) * at(&w_dec, weight),
            );
            add(
                &mut of_weight[weight],
                at(&gradient, place) * at(&values, code),
            );
        }
    }
    let codes = SparseRows::new(&indices, &offsets, d_sae).unwrap();
    let w_dec = Matrix::new(&w_dec, d_sae, d_in).unwrap();
    let gradient = Matrix::new(&gradient, rows.len(), d_in).unwrap();
    for simd in Level::ALL.into_iter().filter_map(Simd::new) {
        assert_close(
            &decode(&values, codes, w_dec, Some(&b_dec), simd, 2, &Cancel::new()).unwrap(),
            &output,
            unit,
        );
        let found = gradient_of_values(gradient, codes, w_dec, simd, 2, &Cancel::new()).unwrap();
        assert_close(&found, &of_values, unit);
        let found = gradient_of_weight(gradient, &values, codes, simd, 2, &Cancel::new()).unwrap();
        assert_close(&found, &of_weight, unit);
    }
}

/// The two orders of going through the codes.
fn check_orders(problem: &Problem) {
    let indices: Vec<i32> = problem
        .rows
        .iter()
        .flatten()
        .map(|code| code.0 as i32)
        .collect();
    let mut offsets = vec![0_i64];
    for row in &problem.rows {
        offsets.push(offsets[offsets.len() - 1] + row.len() as i64);
    }
    let codes = SparseRows::new(&indices, &offsets, problem.d_sae).unwrap();
    let lists = FeatureLists::new(codes, &Cancel::new()).unwrap();
    let w_dec = Matrix::new(&problem.w_dec, problem.d_sae, problem.d_in).unwrap();
    let gradient = Matrix::new(&problem.gradient, problem.rows.len(), problem.d_in).unwrap();
    for simd in Level::ALL.into_iter().filter_map(Simd::new) {
        let cancel = Cancel::new();
        let by_row = gradient_of_values(gradient, codes, w_dec, simd, 2, &cancel).unwrap();
        let by_feature =
            gradient_of_values_by_feature(gradient, &lists, w_dec, simd, 2, &cancel).unwrap();
        assert_eq!(by_row, by_feature);
    }
}

proptest! {
    #[test]
    fn decoding_and_gradients_equal_dense_sums(problem in problem()) {
        check::<f32>(&problem, 0.0);
        check_orders(&problem);
        // Half a unit in the last of 8 bits.
        check::<bf16>(&problem, 1.0 / 256.0);
    }
}

/// Large enough to be shared out.
#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (rows, d_sae, d_in, k) = (300, 1000, 333, 20);
    let number = |at: usize| ((at * 7919) % 1013) as f32 / 500.0 - 1.0;
    let w_dec: Vec<f32> = (0..d_sae * d_in).map(number).collect();
    let gradient: Vec<f32> = (0..rows * d_in).map(|at| number(at + 3)).collect();
    let values: Vec<f32> = (0..rows * k).map(|at| number(at + 5)).collect();
    let indices: Vec<i32> = (0..rows * k).map(|at| ((at * 37) % d_sae) as i32).collect();
    let offsets: Vec<i64> = (0..=rows).map(|row| (row * k) as i64).collect();
    let codes = SparseRows::new(&indices, &offsets, d_sae).unwrap();
    let w_dec = Matrix::new(&w_dec, d_sae, d_in).unwrap();
    let gradient = Matrix::new(&gradient, rows, d_in).unwrap();
    let lists = FeatureLists::new(codes, &Cancel::new()).unwrap();
    for simd in Level::ALL.into_iter().filter_map(Simd::new) {
        let run = |threads| {
            let cancel = Cancel::new();
            (
                gradient_of_values_by_feature(gradient, &lists, w_dec, simd, threads, &cancel)
                    .unwrap(),
                decode(&values, codes, w_dec, None, simd, threads, &Cancel::new()).unwrap(),
                gradient_of_values(gradient, codes, w_dec, simd, threads, &Cancel::new()).unwrap(),
                gradient_of_weight(gradient, &values, codes, simd, threads, &Cancel::new())
                    .unwrap(),
            )
        };
        assert!(run(1) == run(3));
    }
}

#[test]
fn damaged_codes_are_refused() {
    let text = |indices: &[i32], offsets: &[i64]| {
        SparseRows::new(indices, offsets, 4)
            .unwrap_err()
            .to_string()
    };
    assert!(text(&[], &[]).contains("empty"));
    assert!(text(&[0], &[0, 2]).contains("from 0 to 2"));
    assert!(text(&[0], &[1, 1]).contains("from 1 to 1"));
    assert!(text(&[0], &[0, -1]).contains("from 0 to -1"));
    assert!(text(&[0, 0], &[0, 2, 1, 2]).contains("after row 1"));
    assert!(text(&[0, 4], &[0, 0, 1, 2]).contains("row 2 names feature 4"));
    assert!(text(&[-1], &[0, 1]).contains("row 0 names feature -1"));
}

#[test]
fn shapes_that_disagree_are_refused() {
    let simd = Simd::best();
    let weight = [0.0_f32; 8];
    let w_dec = Matrix::new(&weight, 4, 2).unwrap();
    let codes = SparseRows::new(&[0, 1], &[0, 2], 4).unwrap();
    let error = decode(&[1.0], codes, w_dec, None, simd, 1, &Cancel::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("values: found 1, expected 2"), "{error}");
    let error = decode(
        &[1.0, 2.0],
        codes,
        w_dec,
        Some(&[0.0]),
        simd,
        1,
        &Cancel::new(),
    )
    .unwrap_err()
    .to_string();
    assert!(error.contains("b_dec: found 1, expected 2"), "{error}");
    let other = Matrix::new(&weight, 2, 4).unwrap();
    let error = decode(&[1.0, 2.0], codes, other, None, simd, 1, &Cancel::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("w_dec: found 2, expected 4"), "{error}");
    let gradient = Matrix::new(&weight, 4, 2).unwrap();
    let error = gradient_of_values(gradient, codes, w_dec, simd, 1, &Cancel::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("found 4, expected 1"), "{error}");
    let nothing = Matrix::new(&[], 4, 0).unwrap();
    assert!(
        decode::<f32, f32>(&[1.0, 2.0], codes, nothing, None, simd, 1, &Cancel::new())
            .unwrap()
            .is_empty()
    );
}

/// Weights in fewer bits give what the same weights in f32 give, to the bit: each bit pattern of theirs
/// is read once.
#[test]
fn weights_kept_in_16_bits_are_read_exactly() {
    let (d_in, d_sae) = (1 << 11, 1 << 5);
    fn check<W: Stored>(kept: &[W], (d_in, d_sae): (usize, usize)) {
        let wide: Vec<f32> = kept.iter().map(|value| value.to_f32()).collect();
        let kept = Matrix::new(kept, d_sae, d_in).unwrap();
        let wide = Matrix::new(&wide, d_sae, d_in).unwrap();
        let gradient: Vec<f32> = (0..3 * d_in).map(|at| (at % 7) as f32 - 3.0).collect();
        let gradient = Matrix::new(&gradient, 3, d_in).unwrap();
        let b_dec = vec![0.5_f32; d_in];
        // All features, singly and in fours.
        let indices: Vec<i32> = (0..d_sae as i32).collect();
        let row_offsets = [0, 1, 12, d_sae as i64];
        let codes = SparseRows::new(&indices, &row_offsets, d_sae).unwrap();
        let values: Vec<f32> = indices.iter().map(|index| *index as f32 - 9.0).collect();
        let bits = |values: Vec<f32>| -> Vec<u32> {
            // Every NaN is alike.
            let one = |value: f32| if value.is_nan() { f32::NAN } else { value };
            values
                .into_iter()
                .map(|value| one(value).to_bits())
                .collect()
        };
        for simd in Level::ALL.into_iter().filter_map(Simd::new) {
            let cancel = Cancel::new();
            let found = decode(&values, codes, kept, Some(&b_dec), simd, 2, &cancel);
            let expected = decode(&values, codes, wide, Some(&b_dec), simd, 2, &cancel);
            assert_eq!(bits(found.unwrap()), bits(expected.unwrap()));
            let found = gradient_of_values(gradient, codes, kept, simd, 2, &cancel);
            let expected = gradient_of_values(gradient, codes, wide, simd, 2, &cancel);
            assert_eq!(bits(found.unwrap()), bits(expected.unwrap()));
        }
    }
    let all = || (0..=u16::MAX).map(|bits| if bits == 0 { 1 } else { bits });
    let halves: Vec<f16> = all().map(f16::from_bits).collect();
    check(&halves, (d_in, d_sae));
    // Finite ones, so that dot products tell.
    let tame = |half: &f16| if half.is_finite() { *half } else { f16::ONE };
    check(&halves.iter().map(tame).collect::<Vec<_>>(), (d_in, d_sae));
    let coarse: Vec<bf16> = all().map(|bits| bf16::from_bits(bits & 0xBFFF)).collect();
    check(&coarse, (d_in, d_sae));
}

#[test]
fn decoding_and_its_gradients_stop_when_cancelled() {
    let weight = [1.0_f32; 6];
    let w_dec = Matrix::new(&weight, 3, 2).unwrap();
    let gradient = Matrix::new(&weight[..4], 2, 2).unwrap();
    let codes = SparseRows::new(&[0, 2], &[0, 1, 2], 3).unwrap();
    let cancel = Cancel::new();
    cancel.cancel();
    let simd = Simd::best();
    for result in [
        decode(&[1.0, 2.0], codes, w_dec, None, simd, 1, &cancel),
        gradient_of_values(gradient, codes, w_dec, simd, 1, &cancel),
        gradient_of_weight(gradient, &[1.0, 2.0], codes, simd, 1, &cancel),
    ] {
        assert!(matches!(result, Err(Error::Interrupted)), "{result:?}");
    }
}
