use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::simd::Level;

fn levels() -> impl Iterator<Item = Simd> {
    Level::ALL.into_iter().filter_map(Simd::new)
}

fn bf16s(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

/// The plain definition, in f64.
fn norm_of(values: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64;
    let scale = 1.0 / (mean + eps).sqrt();
    values
        .iter()
        .zip(weight)
        .map(|(value, weight)| value * scale * weight)
        .collect()
}

fn wide<E: Element>(values: &[E]) -> Vec<f64> {
    values
        .iter()
        .map(|value| f64::from(value.to_f32()))
        .collect()
}

fn close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let allowed = tolerance * expected.abs().max(1e-3);
        assert!(
            (found - expected).abs() <= allowed,
            "{found} is not {expected}"
        );
    }
}

fn check_norm<E: Element>(values: &[E], weight: &[E], tolerance: f64) {
    let width = weight.len();
    let matrix = Matrix::new(values, values.len() / width, width).unwrap();
    let mut first = None;
    for simd in levels() {
        for threads in [1, 3] {
            let mut output = vec![E::from_f32(f32::NAN); values.len()];
            rms_norm(matrix, weight, 1e-6, &mut output, simd, threads).unwrap();
            for (row, output) in output.chunks(width).enumerate() {
                let expected = norm_of(&wide(matrix.row(row)), &wide(weight), 1e-6);
                close(&wide(output), &expected, tolerance);
            }
            let bits = wide(&output);
            assert_eq!(
                *first.get_or_insert_with(|| bits.clone()),
                bits,
                "levels differ"
            );
        }
    }
}

proptest! {
    #[test]
    fn norms_are_their_definition(
        rows in 0_usize..5,
        weight in proptest::collection::vec(-2.0_f32..2.0, 1..200),
        seed in proptest::collection::vec(-100.0_f32..100.0, 1000),
    ) {
        let values = &seed[..rows * weight.len()];
        check_norm(values, &weight, 1e-6);
        // Two roundings of half a last place each, 2^-8.
        check_norm(&bf16s(values), &bf16s(&weight), 0.008);
    }

    #[test]
    fn turns_are_complex_products(
        tokens in 1_usize..4,
        repeats in 1_usize..3,
        heads in 1_usize..4,
        plain in 0_usize..40,
        pairs in 0_usize..40,
        seed in proptest::collection::vec(-3.0_f32..3.0, 3 * 3 * 120 + 240),
    ) {
        let head = plain + 2 * pairs;
        prop_assume!(head > 0);
        let (table, values) = seed.split_at(240);
        let table = Matrix::new(&table[..tokens * 2 * pairs], tokens, 2 * pairs).unwrap();
        let width = heads * head;
        let values = &values[..(tokens * repeats * width).min(values.len() / width * width)];
        let count = values.len() / width / tokens * tokens;
        let values = &values[..count * width];
        let mut expected = values.to_vec();
        for (place, token) in expected.chunks_mut(width).enumerate() {
            for head in token.chunks_mut(head) {
                for (pair, turn) in head[plain..].chunks_mut(2).zip(table.row(place % tokens).chunks(2)) {
                    let (a, b) = (pair[0], pair[1]);
                    pair[0] = a * turn[0] - b * turn[1];
                    pair[1] = b * turn[0] + a * turn[1];
                }
            }
        }
        for simd in levels() {
            let mut turned = values.to_vec();
            rotate(&mut turned, width, head, table, simd, 2).unwrap();
            prop_assert_eq!(&turned, &expected);
        }
        let mut half = bf16s(values);
        rotate(&mut half, width, head, table, Simd::best(), 1).unwrap();
        let mut wide_half: Vec<f32> = bf16s(values).iter().map(|value| value.to_f32()).collect();
        rotate(&mut wide_half, width, head, table, Simd::best(), 1).unwrap();
        prop_assert_eq!(half, bf16s(&wide_half));
    }

    #[test]
    fn experts_are_those_of_the_definition(
        (groups, size, kept, experts) in (1_usize..5, 1_usize..6)
            .prop_flat_map(|(groups, size)| (Just(groups), Just(size), 1..=groups))
            .prop_flat_map(|(groups, size, kept)| {
                (Just(groups), Just(size), Just(kept), 1..=(kept * size).min(8))
            }),
        normalise: bool,
        seed in proptest::collection::vec(-40_i32..40, 4 * 20 + 20),
    ) {
        let count = groups * size;
        // Quarters, so that there are ties.
        let (bias, logits) = seed.split_at(count);
        let bias: Vec<f32> = bias.iter().map(|&value| value as f32 / 64.0).collect();
        let logits: Vec<f32> = logits[..4 * count].iter().map(|&value| value as f32 / 4.0).collect();
        let routing = Routing { groups, kept_groups: kept, experts, normalise, scale: 2.5 };
        let mut chosen = vec![-1; 4 * experts];
        let mut weights = vec![f32::NAN; 4 * experts];
        let matrix = Matrix::new(&logits, 4, count).unwrap();
        route(matrix, &bias, routing, &mut chosen, &mut weights, 2).unwrap();
        for token in 0..4 {
            let scores: Vec<f32> =
                matrix.row(token).iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
            let choice: Vec<f32> = scores.iter().zip(&bias).map(|(score, bias)| score + bias).collect();
            let by_falling = |values: &[f32], mut ids: Vec<usize>| {
                ids.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
                ids
            };
            let strength: Vec<f32> = choice
                .chunks(size)
                .map(|group| {
                    let order = by_falling(group, (0..size).collect());
                    order.iter().take(2).map(|&at| group[at]).sum()
                })
                .collect();
            let mut open = by_falling(&strength, (0..groups).collect());
            open.truncate(kept);
            let inside = (0..count).filter(|id| open.contains(&(id / size))).collect();
            let mut expected = by_falling(&choice, inside);
            expected.truncate(experts);
            let found: Vec<usize> =
                chosen[token * experts..][..experts].iter().map(|&id| id as usize).collect();
            prop_assert_eq!(&found, &expected);
            let total: f32 = expected.iter().map(|&id| scores[id]).sum();
            for (&id, &weight) in expected.iter().zip(&weights[token * experts..]) {
                let share = if normalise { scores[id] / total } else { scores[id] };
                prop_assert!((weight - 2.5 * share).abs() <= 1e-6 * weight.abs());
            }
        }
    }
}

#[test]
fn latents_are_normed_and_turned() {
    let weight: Vec<f32> = (0..40).map(|at| 1.0 + at as f32 / 100.0).collect();
    let turns: Vec<f32> = (0..2 * 8).map(|at| (at as f32).sin()).collect();
    let table = Matrix::new(&turns, 2, 8).unwrap();
    let rows: Vec<f32> = (0..4 * 48).map(|at| (at as f32 * 0.7).cos()).collect();
    for simd in levels() {
        let mut found = rows.clone();
        latents(&mut found, &weight, 1e-6, table, simd, 2).unwrap();
        for (token, (found, given)) in found.chunks(48).zip(rows.chunks(48)).enumerate() {
            let mut expected = vec![0.0; 40];
            let matrix = Matrix::new(&given[..40], 1, 40).unwrap();
            rms_norm(matrix, &weight, 1e-6, &mut expected, simd, 1).unwrap();
            let mut key = given[40..].to_vec();
            let row = Matrix::new(table.row(token % 2), 1, 8).unwrap();
            rotate(&mut key, 8, 8, row, simd, 1).unwrap();
            assert_eq!(found, [expected, key].concat());
        }
    }
    // A key without position, and no tokens at all.
    let bare = Matrix::new(&turns[..0], 1, 0).unwrap();
    latents(
        &mut rows.clone()[..40],
        &weight,
        1e-6,
        bare,
        Simd::best(),
        1,
    )
    .unwrap();
    latents::<f32>(&mut [], &weight, 1e-6, table, Simd::best(), 1).unwrap();
}

#[test]
fn numbers_that_are_none_show() {
    let values = [1.0, f32::NAN, 2.0, 3.0];
    let mut output = [0.0; 4];
    let matrix = Matrix::new(&values, 2, 2).unwrap();
    rms_norm(matrix, &[1.0, 1.0], 1e-6, &mut output, Simd::best(), 1).unwrap();
    assert!(output[0].is_nan() && output[1].is_nan() && output[2..].iter().all(|v| v.is_finite()));
    let routing = Routing {
        groups: 2,
        kept_groups: 1,
        experts: 2,
        normalise: true,
        scale: 1.0,
    };
    let (mut chosen, mut weights) = ([-1; 2], [0.0; 2]);
    let logits = [3.0, 4.0, f32::NAN, f32::NAN];
    let matrix = Matrix::new(&logits, 1, 4).unwrap();
    route(matrix, &[0.0; 4], routing, &mut chosen, &mut weights, 1).unwrap();
    assert_eq!(chosen, [2, 3]);
    assert!(weights.iter().all(|weight| weight.is_nan()));
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let values = [0.0_f32; 12];
    let simd = Simd::best();
    let matrix = Matrix::new(&values, 3, 4).unwrap();
    assert!(rms_norm(matrix, &[1.0; 3], 0.0, &mut [0.0; 12], simd, 1).is_err());
    assert!(rms_norm(matrix, &[1.0; 4], 0.0, &mut [0.0; 11], simd, 1).is_err());
    let mut own = values;
    for (width, head, pairs, rows) in [
        (4, 4, 3, 1),
        (4, 0, 2, 1),
        (4, 3, 2, 1),
        (4, 2, 4, 1),
        (0, 4, 2, 1),
        (5, 5, 2, 1),
        (4, 4, 2, 2),
    ] {
        let turns = vec![0.0; pairs * rows];
        let table = Matrix::new(&turns, rows, pairs).unwrap();
        assert!(
            rotate(&mut own, width, head, table, simd, 1).is_err(),
            "{width} {head} {pairs}"
        );
    }
    let table = Matrix::new(&values[..2], 1, 2).unwrap();
    assert!(latents(&mut own[..11], &[1.0; 2], 0.0, table, simd, 1).is_err());
    let none = Matrix::new(&values[..0], 0, 2).unwrap();
    assert!(latents(&mut own, &[1.0; 2], 0.0, none, simd, 1).is_err());
    let routing = Routing {
        groups: 2,
        kept_groups: 1,
        experts: 2,
        normalise: true,
        scale: 1.0,
    };
    let (mut chosen, mut weights) = ([0; 6], [0.0; 6]);
    assert!(route(matrix, &[0.0; 4], routing, &mut chosen, &mut weights, 1).is_ok());
    assert!(route(matrix, &[0.0; 3], routing, &mut chosen, &mut weights, 1).is_err());
    assert!(route(
        matrix,
        &[0.0; 4],
        routing,
        &mut chosen[..5],
        &mut weights,
        1
    )
    .is_err());
    assert!(route(
        matrix,
        &[0.0; 4],
        routing,
        &mut chosen,
        &mut weights[..5],
        1
    )
    .is_err());
    for other in [
        Routing {
            groups: 0,
            ..routing
        },
        Routing {
            groups: 3,
            ..routing
        },
        Routing {
            groups: 5,
            ..routing
        },
        Routing {
            kept_groups: 0,
            ..routing
        },
        Routing {
            kept_groups: 3,
            ..routing
        },
        Routing {
            experts: 0,
            ..routing
        },
        Routing {
            experts: 3,
            ..routing
        },
    ] {
        assert!(route(matrix, &[0.0; 4], other, &mut chosen, &mut weights, 1).is_err());
    }
}
