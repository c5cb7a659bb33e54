use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::simd::Level;

struct Case {
    step: Step,
    slots: Vec<i64>,
    rows: Vec<f32>,
    absorbed: Vec<f32>,
    query: Vec<f32>,
    cache: Vec<f32>,
}

/// Numbers that look random, by a multiplicative generator.
fn noise(count: usize, seed: &mut u64) -> Vec<f32> {
    let mut next = || {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((*seed >> 40) as f32 / 8_388_608.0 - 1.0) * 2.0
    };
    (0..count).map(|_| next()).collect()
}

fn case(step: Step, lengths: &[usize], mut seed: u64) -> Case {
    let tokens = lengths.len() * step.new;
    let slots = lengths
        .iter()
        .flat_map(|&first| (0..step.new).map(move |new| (first + new) as i64));
    Case {
        step,
        slots: slots.collect(),
        rows: noise(tokens * step.width, &mut seed),
        absorbed: noise(tokens * step.heads * step.rank, &mut seed),
        query: noise(tokens * step.heads * step.head, &mut seed),
        cache: noise(lengths.len() * step.capacity * step.width, &mut seed),
    }
}

fn cast<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|&value| E::from_f32(value)).collect()
}

/// The definition in f64, from what E keeps of the numbers.
fn defined(case: &Case, rows: &[f32], absorbed: &[f32], query: &[f32], cache: &[f32]) -> Vec<f64> {
    let Step {
        heads,
        new,
        rank,
        width,
        head,
        scale,
        capacity,
    } = case.step;
    let tokens = case.slots.len();
    let mut mixed = vec![0.0; heads * tokens * rank];
    for token in 0..tokens {
        let key = |slot: usize, at: usize| {
            let own = (token / new) * new..(token / new + 1) * new;
            let fresh = own
                .into_iter()
                .find(|&other| case.slots[other] as usize == slot);
            f64::from(match fresh {
                Some(other) => rows[other * width + at],
                None => cache[((token / new) * capacity + slot) * width + at],
            })
        };
        for one in 0..heads {
            let asked = |at: usize| {
                f64::from(if at < rank {
                    absorbed[(one * tokens + token) * rank + at]
                } else {
                    query[(token * heads + one) * head + head + at - width]
                })
            };
            let seen = case.slots[token] as usize + 1;
            let scores: Vec<f64> = (0..seen)
                .map(|slot| (0..width).map(|at| asked(at) * key(slot, at)).sum::<f64>())
                .map(|score| (score * f64::from(scale)).exp())
                .collect();
            let total: f64 = scores.iter().sum();
            for at in 0..rank {
                let sum: f64 = (0..seen).map(|slot| scores[slot] * key(slot, at)).sum();
                mixed[(one * tokens + token) * rank + at] = sum / total;
            }
        }
    }
    mixed
}

fn check<E: Element>(case: &Case, tolerance: f64) {
    let (rows, absorbed) = (cast::<E>(&case.rows), cast::<E>(&case.absorbed));
    let (query, cache) = (cast::<E>(&case.query), cast::<E>(&case.cache));
    let wide = |values: &[E]| values.iter().map(|v| v.to_f32()).collect::<Vec<_>>();
    let expected = defined(
        case,
        &wide(&rows),
        &wide(&absorbed),
        &wide(&query),
        &wide(&cache),
    );
    for level in Level::ALL.into_iter().filter_map(Simd::new) {
        let mut alone = None;
        for threads in [1, 3] {
            let mut cache = cache.clone();
            let mut output = vec![E::from_f32(f32::NAN); expected.len()];
            let tensors = Tensors {
                rows: &rows,
                absorbed: &absorbed,
                query: &query,
                slots: &case.slots,
                cache: &mut cache,
                output: &mut output,
            };
            attend(case.step, tensors, level, threads).unwrap();
            let found = wide(&output);
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    (f64::from(*found) - expected).abs() <= tolerance,
                    "{found} {expected}"
                );
            }
            assert_eq!(*alone.get_or_insert_with(|| found.clone()), found);
            let width = case.step.width;
            for (token, &slot) in case.slots.iter().enumerate() {
                let at = (token / case.step.new * case.step.capacity + slot as usize) * width;
                assert_eq!(
                    wide(&cache[at..at + width]),
                    wide(&rows[token * width..][..width])
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn attention_is_its_definition(
        heads in 1_usize..10,
        new in 1_usize..4,
        rank in prop::sample::select(vec![1, 16, 63, 123, 128]),
        rotary in prop::sample::select(vec![0, 2, 8]),
        lengths in prop::collection::vec(0_usize..70, 0..6),
        seed in any::<u64>(),
    ) {
        let step = Step {
            heads,
            new,
            capacity: 75,
            rank,
            width: rank + rotary,
            head: rotary + 5,
            scale: 0.3 / (rank as f32).sqrt(),
        };
        let case = case(step, &lengths, seed);
        // Mixtures of numbers below 2: rounding of the scores, and for bf16 of the result.
        check::<f32>(&case, 2e-5);
        check::<bf16>(&case, 2.0_f64.powi(-8) + 2e-5);
    }
}

#[test]
fn what_does_not_fit_is_refused_and_a_nan_stays() {
    let step = Step {
        heads: 1,
        new: 1,
        capacity: 4,
        rank: 2,
        width: 3,
        head: 1,
        scale: 1.0,
    };
    let run = |step: Step, slot: i64, missing: usize, first: f32| {
        let rows = [first; 3];
        let (mut cache, mut output) = (vec![0.0_f32; 12], vec![0.0_f32; 2 - missing]);
        let tensors = Tensors {
            rows: &rows,
            absorbed: &[1.0, 1.0],
            query: &[1.0],
            slots: &[slot],
            cache: &mut cache,
            output: &mut output,
        };
        attend(step, tensors, Simd::best(), 1).map(|()| output)
    };
    assert_eq!(run(step, 0, 0, 0.5).unwrap(), [0.5, 0.5]);
    assert!(run(step, 3, 0, f32::NAN)
        .unwrap()
        .iter()
        .all(|value| value.is_nan()));
    for slot in [-1, 4, i64::MAX, i64::MIN] {
        let error = run(step, slot, 0, 0.0).unwrap_err().to_string();
        assert!(error.contains(&slot.to_string()), "{error}");
    }
    assert!(run(step, 0, 1, 0.0).is_err());
    for other in [
        Step { heads: 0, ..step },
        Step { new: 0, ..step },
        Step { rank: 4, ..step },
        Step { head: 0, ..step },
        Step {
            capacity: 5,
            ..step
        },
    ] {
        assert!(run(other, 0, 0, 0.0).is_err());
    }
}
