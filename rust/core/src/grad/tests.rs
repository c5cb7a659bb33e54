//! Lists, norms and bounds against sums in f64. The two gradients are tested with decoding.

use proptest::prelude::*;

use super::{gradient_rows, norm_bound, squared_norm, FeatureLists, Source, Term};
use crate::decode::SparseRows;
use crate::rows::Matrix;
use crate::simd::{Level, Simd};
use crate::{Cancel, Error};

/// Rows of codes (feature, coefficient), features may repeat.
fn rows(d_sae: usize) -> impl Strategy<Value = Vec<Vec<(usize, f32)>>> {
    let code = (0..d_sae, -2.0_f32..2.0);
    prop::collection::vec(prop::collection::vec(code, 0..9), 0..9)
}

fn crs(rows: &[Vec<(usize, f32)>]) -> (Vec<i32>, Vec<i64>, Vec<f32>) {
    let indices = rows.iter().flatten().map(|code| code.0 as i32).collect();
    let values = rows.iter().flatten().map(|code| code.1).collect();
    let mut offsets = vec![0];
    for row in rows {
        offsets.push(offsets[offsets.len() - 1] + row.len() as i64);
    }
    (indices, offsets, values)
}

proptest! {
    #[test]
    fn lists_hold_every_code_once_in_rising_row(rows in rows(7)) {
        let (indices, offsets, values) = crs(&rows);
        let codes = SparseRows::new(&indices, &offsets, 7).unwrap();
        let lists = FeatureLists::new(codes, &Cancel::new()).unwrap();
        assert_eq!((lists.d_sae(), lists.nnz(), lists.rows()), (7, indices.len(), rows.len()));
        let sums = lists.sums(&values).unwrap();
        let mut seen = Vec::new();
        for (feature, sum) in sums.iter().enumerate() {
            let (of_rows, codes) = lists.of(feature);
            assert_eq!(lists.count(feature), codes.len());
            assert!(codes.windows(2).all(|pair| pair[0] < pair[1]));
            for (row, code) in of_rows.iter().zip(codes) {
                let code = *code as usize;
                assert_eq!(indices[code] as usize, feature);
                let range = offsets[*row as usize]..offsets[*row as usize + 1];
                assert!(range.contains(&(code as i64)));
                seen.push(code);
            }
            let exact: f64 = codes.iter().map(|code| f64::from(values[*code as usize])).sum();
            assert_eq!(*sum, exact as f32);
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..indices.len()).collect::<Vec<_>>());
    }

    #[test]
    fn the_norm_is_that_of_the_dense_gradient_and_within_its_bound(
        first in rows(11), second in rows(11), d_in in prop::sample::select(vec![1_usize, 16, 63, 123]),
    ) {
        let (d_sae, number) = (11, |at: usize| ((at * 7919) % 1013) as f32 / 500.0 - 1.0);
        let matrix = |rows: usize, seed: usize| -> Vec<f32> {
            (0..rows * d_in).map(|at| number(at + seed)).collect()
        };
        let mut weight = matrix(d_sae, 5);
        for row in weight.chunks_exact_mut(d_in) {
            let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            row.iter_mut().for_each(|v| *v /= norm);
        }
        let batches = [crs(&first), crs(&second)];
        let data: Vec<[Vec<f32>; 2]> = [first.len(), second.len()]
            .map(|rows| [matrix(rows, 1), matrix(rows, 3)])
            .into();
        let mut dense = vec![0.0_f64; d_sae * d_in];
        let mut lists = Vec::new();
        for ((indices, offsets, values), [x, e]) in batches.iter().zip(&data) {
            let codes = SparseRows::new(indices, offsets, d_sae).unwrap();
            lists.push(FeatureLists::new(codes, &Cancel::new()).unwrap());
            for row in 0..offsets.len() - 1 {
                for code in offsets[row] as usize..offsets[row + 1] as usize {
                    for column in 0..d_in {
                        let at = row * d_in + column;
                        dense[indices[code] as usize * d_in + column] +=
                            f64::from(values[code]) * (f64::from(x[at]) + f64::from(e[at]));
                    }
                }
            }
        }
        let terms: Vec<[Term<'_>; 2]> = batches.iter().zip(&data).map(|((_, offsets, values), data)| {
            [0, 1].map(|term| Term {
                coefficients: values,
                rows: Matrix::new(&data[term], offsets.len() - 1, d_in).unwrap(),
            })
        }).collect();
        let sources: Vec<Source<'_>> = lists.iter().zip(&terms)
            .map(|(lists, terms)| Source { lists, terms }).collect();
        let exact: f64 = dense.iter().map(|v| v * v).sum();
        let turning: f64 = dense.chunks_exact(d_in).zip(weight.chunks_exact(d_in)).map(|(g, w)| {
            let along: f64 = g.iter().zip(w).map(|(g, w)| g * f64::from(*w)).sum();
            g.iter().zip(w).map(|(g, w)| (g - along * f64::from(*w)).powi(2)).sum::<f64>()
        }).sum();
        let weight = Matrix::new(&weight, d_sae, d_in).unwrap();
        for simd in Level::ALL.into_iter().filter_map(Simd::new) {
            let bound = norm_bound(&sources, d_sae, d_in, simd, 2).unwrap();
            // The terms' magnitudes are what rounding is relative to; the bound is their sum.
            let allowed = 1e-5 * bound;
            let norm = |unit_rows| {
                squared_norm(&sources, d_sae, d_in, unit_rows, simd, 2, &Cancel::new()).unwrap()
            };
            assert!((norm(None) - exact).abs() <= allowed);
            assert!((norm(Some(weight)) - turning).abs() <= allowed);
            assert!(norm(None) <= bound * (1.0 + 1e-5));
            let features = [9, 0, 3, 9];
            let rows =
                gradient_rows(&sources, &features, d_sae, d_in, simd, 2, &Cancel::new()).unwrap();
            for (feature, row) in features.iter().zip(rows.chunks_exact(d_in)) {
                let exact = &dense[*feature as usize * d_in..][..d_in];
                for (found, exact) in row.iter().zip(exact) {
                    assert!((f64::from(*found) - exact).abs() <= 1e-5 * bound.sqrt());
                }
            }
            let far = gradient_rows(&sources, &[11], d_sae, d_in, simd, 2, &Cancel::new());
            assert!(far.unwrap_err().to_string().contains("feature 11; expected 0 to 11 - 1"));
        }
    }
}

#[test]
fn shapes_that_disagree_are_refused() {
    let (indices, offsets, values) = crs(&[vec![(0, 1.0), (2, 2.0)], vec![]]);
    let codes = SparseRows::new(&indices, &offsets, 3).unwrap();
    let lists = FeatureLists::new(codes, &Cancel::new()).unwrap();
    let data = [0.0; 8];
    let text = |coefficients: &[f32], rows: usize, d_sae: usize, d_in: usize| {
        let terms = [Term {
            coefficients,
            rows: Matrix::new(&data[..rows * 2], rows, 2).unwrap(),
        }];
        let sources = [Source {
            lists: &lists,
            terms: &terms,
        }];
        let simd = Simd::best();
        squared_norm(&sources, d_sae, d_in, None, simd, 1, &Cancel::new())
            .unwrap_err()
            .to_string()
    };
    assert!(text(&values[..1], 2, 3, 2).contains("1 values; expected 2"));
    assert!(text(&values, 3, 3, 2).contains("number of rows: found 3, expected 2"));
    assert!(text(&values, 2, 4, 2).contains("number of features: found 3, expected 4"));
    assert!(text(&values, 2, 3, 1).contains("width of a row: found 2, expected 1"));
    assert!(lists.sums(&values[..1]).is_err());
    let cancel = Cancel::new();
    cancel.cancel();
    let stopped = FeatureLists::new(codes, &cancel);
    assert!(matches!(stopped, Err(Error::Interrupted)));
}
