//! Updates against Adam in f64 on the dense gradient; twins and threads to the bit.

use proptest::prelude::*;

use super::{update, Idle, State, Step};
use crate::decode::SparseRows;
use crate::grad::{FeatureLists, Source, Term};
use crate::rows::Matrix;
use crate::simd::{Level, Simd};
use crate::Cancel;

const STEP: Step = Step {
    number: 3,
    learning_rate: 0.01,
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-8,
    scale: 0.5,
    unit_rows: false,
    idle: Idle::Decay,
    wake: false,
};

fn number(at: usize) -> f32 {
    ((at * 7919) % 1013) as f32 / 500.0 - 1.0
}

/// Codes of `batch` rows over `d_sae` features, `k` a row; a third of the features have none.
struct Problem {
    d_sae: usize,
    d_in: usize,
    values: Vec<f32>,
    lists: FeatureLists,
    x: Vec<f32>,
    w: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl Problem {
    fn new(d_sae: usize, d_in: usize, batch: usize, k: usize, seed: usize) -> Self {
        let alive = (d_sae - d_sae / 3).max(1);
        let indices: Vec<i32> = (0..batch * k)
            .map(|at| (((at + seed) * 37 + at * at) % alive) as i32)
            .collect();
        let offsets: Vec<i64> = (0..=batch).map(|row| (row * k) as i64).collect();
        let codes = SparseRows::new(&indices, &offsets, d_sae).unwrap();
        let many = |salt: usize| (0..d_sae * d_in).map(move |at| number(at + salt + seed));
        Self {
            d_sae,
            d_in,
            values: (0..indices.len()).map(|at| number(at + 5)).collect(),
            lists: FeatureLists::new(codes, &Cancel::new()).unwrap(),
            x: (0..batch * d_in).map(|at| number(at + 3)).collect(),
            w: many(11).collect(),
            m: many(13).map(|value| value / 10.0).collect(),
            // A mean square is no smaller than the square of the mean, or the step would be huge.
            v: many(17).map(|value| 0.02 + value * value / 10.0).collect(),
        }
    }

    /// Rows of the weight with norm 1 (rows of zeros stay), as [`Step::unit_rows`] asks for.
    fn with_unit_rows(mut self) -> Self {
        for row in self.w.chunks_mut(self.d_in) {
            let norm = row.iter().map(|w| w * w).sum::<f32>().sqrt();
            row.iter_mut().for_each(|w| *w /= norm.max(1e-12));
        }
        self
    }

    /// The weight and moments after one step, resting rows told of what they missed.
    fn after(
        &self,
        step: &Step,
        features: Option<&[i64]>,
        simd: Simd,
        threads: usize,
    ) -> [Vec<f32>; 3] {
        let [mut w, mut m, mut v] = [self.w.clone(), self.m.clone(), self.v.clone()];
        let mut asleep = vec![0; self.d_sae];
        let state = State {
            w: &mut w,
            m: &mut m,
            v: &mut v,
            asleep: &mut asleep,
        };
        let rows = Matrix::new(&self.x, self.lists.rows(), self.d_in).unwrap();
        let terms = [Term {
            coefficients: &self.values,
            rows,
        }];
        let sources = [Source {
            lists: &self.lists,
            terms: &terms,
        }];
        update(state, self.d_in, &sources, features, step, simd, threads).unwrap();
        for (feature, last) in asleep
            .into_iter()
            .enumerate()
            .filter(|(_, last)| *last != 0)
        {
            let missed = (step.number - i64::unsigned_abs(last)) as f64;
            let here = feature * self.d_in..(feature + 1) * self.d_in;
            for (moment, beta) in [(&mut m, step.beta1), (&mut v, step.beta2)] {
                let lost = beta.powf(missed) as f32;
                moment[here.clone()]
                    .iter_mut()
                    .for_each(|value| *value *= lost);
            }
        }
        [w, m, v]
    }

    /// The same in f64, from the dense gradient.
    fn exact(&self, step: &Step, features: &[usize]) -> [Vec<f64>; 3] {
        let d_in = self.d_in;
        let [mut w, mut m, mut v] = [&self.w, &self.m, &self.v]
            .map(|row| row.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
        for &feature in features {
            let here = feature * d_in..(feature + 1) * d_in;
            let (rows, codes) = self.lists.of(feature);
            if rows.is_empty() && step.idle == Idle::Freeze {
                continue;
            }
            let mut gradient = vec![0.0_f64; d_in];
            for (row, code) in rows.iter().zip(codes) {
                for (column, sum) in gradient.iter_mut().enumerate() {
                    *sum += f64::from(self.values[*code as usize])
                        * f64::from(self.x[*row as usize * d_in + column]);
                }
            }
            let weight = &mut w[here.clone()];
            if step.unit_rows {
                let along: f64 = gradient.iter().zip(&*weight).map(|(g, w)| g * w).sum();
                gradient
                    .iter_mut()
                    .zip(&*weight)
                    .for_each(|(g, w)| *g -= along * w);
            }
            let steps = step.number as f64;
            for (at, g) in here.clone().zip(&gradient) {
                let g = g * step.scale;
                m[at] = step.beta1 * m[at] + (1.0 - step.beta1) * g;
                v[at] = step.beta2 * v[at] + (1.0 - step.beta2) * g * g;
                let mean = m[at] / (1.0 - step.beta1.powf(steps));
                let square = v[at] / (1.0 - step.beta2.powf(steps));
                w[at] -= step.learning_rate * mean / (square.sqrt() + step.eps);
            }
            if step.unit_rows {
                let norm = w[here.clone()].iter().map(|w| w * w).sum::<f64>().sqrt();
                w[here].iter_mut().for_each(|w| *w /= norm);
            }
        }
        [w, m, v]
    }
}

proptest! {
    #[test]
    fn a_step_is_adams_on_the_dense_gradient(
        d_sae in 1_usize..20,
        d_in in prop::sample::select(vec![1_usize, 7, 16, 63, 123]),
        batch in 0_usize..9,
        k in 0_usize..5,
        seed in 0_usize..1000,
        unit_rows in any::<bool>(),
        freeze in any::<bool>(),
        every in 1_usize..4,
    ) {
        let problem = Problem::new(d_sae, d_in, batch, k, seed);
        let problem = if unit_rows { problem.with_unit_rows() } else { problem };
        let idle = if freeze { Idle::Freeze } else { Idle::Decay };
        let step = Step { unit_rows, idle, ..STEP };
        let chosen: Vec<usize> = (0..d_sae).step_by(every).collect();
        let listed: Vec<i64> = chosen.iter().map(|feature| *feature as i64).collect();
        let exact = problem.exact(&step, &chosen);
        let features = (every > 1).then_some(&listed[..]);
        let first = problem.after(&step, features, Simd::new(Level::Scalar).unwrap(), 1);
        for simd in Level::ALL.into_iter().filter_map(Simd::new) {
            let found = problem.after(&step, features, simd, 2);
            for ((found, first), exact) in found.iter().zip(&first).zip(&exact) {
                for ((found, first), exact) in found.iter().zip(first).zip(exact) {
                    // A gradient is of at most 8 * 4 terms below 1; the step's size is 0.01.
                    let bound = 2e-5 * exact.abs().max(1.0);
                    assert!((f64::from(*found) - exact).abs() <= bound, "{found} {exact}");
                    assert!(f64::from((found - first).abs()) <= bound);
                }
            }
        }
    }
}

#[test]
fn steps_do_not_depend_on_the_number_of_threads() {
    let problem = Problem::new(900, 333, 300, 20, 1);
    for simd in Level::ALL.into_iter().filter_map(Simd::new) {
        for unit_rows in [false, true] {
            let step = Step { unit_rows, ..STEP };
            let one = problem.after(&step, None, simd, 1);
            assert!(one == problem.after(&step, None, simd, 3));
            assert!(one.iter().flatten().all(|value| value.is_finite()));
        }
    }
}

/// Where nothing is added up, every instruction set gives the same bits.
#[test]
fn twins_agree_to_the_bit_where_no_order_of_sums_matters() {
    let problem = Problem::new(50, 123, 12, 1, 1);
    let scalar = problem.after(&STEP, None, Simd::new(Level::Scalar).unwrap(), 1);
    let touched = (0..50).filter(|f| problem.lists.count(*f) == 0).count();
    assert!((1..50).contains(&touched));
    for simd in Level::ALL.into_iter().filter_map(Simd::new) {
        let found = problem.after(&STEP, None, simd, 1);
        for feature in (0..50).filter(|feature| problem.lists.count(*feature) == 0) {
            let here = feature * 123..(feature + 1) * 123;
            for (found, scalar) in found.iter().zip(&scalar) {
                assert!(found[here.clone()] == scalar[here.clone()]);
            }
        }
    }
}

#[test]
fn rows_that_are_not_chosen_keep_their_bits() {
    let mut problem = Problem::new(30, 16, 9, 4, 2);
    problem.w[16..32].fill(f32::NAN);
    let features: Vec<i64> = (0..30).filter(|feature| feature % 3 == 0).collect();
    let found = problem.after(&STEP, Some(&features), Simd::best(), 2);
    for feature in (0..30).filter(|feature| feature % 3 != 0) {
        let here = feature * 16..(feature + 1) * 16;
        let bits = |row: &[f32]| {
            row[here.clone()]
                .iter()
                .map(|v| v.to_bits())
                .collect::<Vec<_>>()
        };
        for (found, before) in found.iter().zip([&problem.w, &problem.m, &problem.v]) {
            assert_eq!(bits(found), bits(before));
        }
    }
    assert!(found
        .iter()
        .zip([&problem.w, &problem.m, &problem.v])
        .all(|(a, b)| a[..16] != b[..16]));
}

/// One step may be taken in parts: a row that falls asleep in the first is no obstacle to the second.
#[test]
fn parts_of_one_step_follow_one_another() {
    let (w, m, v) = (&mut [1.0_f32; 6], &mut [0.0; 6], &mut [0.0; 6]);
    let mut asleep = [0_i64; 3];
    for number in 1..3 {
        for features in [&[0_i64, 1][..], &[2]] {
            let asleep = &mut asleep;
            let state = State { w, m, v, asleep };
            let step = Step { number, ..STEP };
            update(state, 2, &[], Some(features), &step, Simd::best(), 1).unwrap();
        }
    }
    assert_eq!(asleep, [1, 1, 1]);
    assert_eq!(w, &[1.0; 6]);
}

/// Rows that rest go to sleep once they don't move; woken, they are what they would have been.
#[test]
fn sleeping_rows_wake_as_if_they_had_not_slept() {
    let (d_sae, d_in) = (3, 123);
    let lists = |feature: i32| {
        let codes = [feature];
        let rows = SparseRows::new(&codes, &[0, 1], d_sae).unwrap();
        FeatureLists::new(rows, &Cancel::new()).unwrap()
    };
    let lists = [lists(0), lists(1), lists(2)];
    let x: Vec<f32> = (0..d_in).map(number).collect();
    for simd in Level::ALL.into_iter().filter_map(Simd::new) {
        // One of the two is woken before every step.
        let mut runs = [false, true].map(|wake| {
            let w: Vec<f32> = (0..d_sae * d_in).map(|at| number(at + 11)).collect();
            let zeros = vec![0.0_f32; w.len()];
            (wake, w, zeros.clone(), zeros, vec![0_i64; d_sae])
        });
        let mut slept = Vec::new();
        for number in 1..=700 {
            // Feature 0 has codes nearly always, 1 until step 30 and at 601, 2 never.
            let feature = if number < 30 || number == 601 {
                number % 2
            } else {
                0
            };
            for (wake, w, m, v, asleep) in &mut runs {
                let state = State { w, m, v, asleep };
                let terms = [Term {
                    coefficients: &[0.5],
                    rows: Matrix::new(&x, 1, d_in).unwrap(),
                }];
                let sources = [Source {
                    lists: &lists[feature],
                    terms: &terms,
                }];
                let step = Step {
                    number: number as u64,
                    wake: *wake,
                    beta2: 0.999,
                    ..STEP
                };
                update(state, d_in, &sources, None, &step, simd, 1).unwrap();
            }
            slept.push(runs[0].4.clone());
        }
        let asleep = |step: usize| &slept[step - 1];
        // Never moved, so asleep from the start; the other fell asleep in between.
        assert_eq!(asleep(19), &[-18, 0, 1]);
        let fell = slept.iter().position(|asleep| asleep[1] > 0);
        assert!(fell.is_some_and(|at| (100..500).contains(&at)), "{fell:?}");
        assert_eq!(asleep(600)[1], 29);
        assert_eq!(asleep(601), &[-600, 0, 1]);
        let [(_, w, m, v, _), (_, w_awake, m_awake, v_awake, _)] = &runs;
        for (found, expected) in [(w, w_awake), (m, m_awake), (v, v_awake)] {
            for (found, expected) in found.iter().zip(expected) {
                let close = 2e-5 * expected.abs() + 1e-30;
                assert!((found - expected).abs() <= close, "{found} {expected}");
            }
        }
        assert!(w[2 * d_in..] == w_awake[2 * d_in..]);
    }
}

#[test]
fn rows_asleep_in_the_future_are_refused() {
    let mut rows = [vec![0.0_f32; 2], vec![0.0; 2], vec![0.0; 2]];
    let [w, m, v] = &mut rows;
    let asleep = &mut [3, 0];
    let state = State { w, m, v, asleep };
    let error = update(state, 1, &[], None, &STEP, Simd::best(), 1).unwrap_err();
    assert!(
        error.to_string().contains("know of step 3; this is step 3"),
        "{error}"
    );
}

#[test]
fn bad_settings_are_refused_and_nothing_changes() {
    let problem = Problem::new(6, 4, 3, 2, 3);
    let refused = |step: &Step, features: Option<&[i64]>, width: usize, short: usize| {
        let [mut w, mut m, mut v] = [problem.w.clone(), problem.m.clone(), problem.v.clone()];
        v.truncate(v.len() - short);
        let state = State {
            w: &mut w,
            m: &mut m,
            v: &mut v,
            asleep: &mut [0; 6],
        };
        let terms = [Term {
            coefficients: &problem.values,
            rows: Matrix::new(&problem.x, 3, 4).unwrap(),
        }];
        let sources = [Source {
            lists: &problem.lists,
            terms: &terms,
        }];
        let error = update(state, width, &sources, features, step, Simd::best(), 1).unwrap_err();
        assert_eq!((&w, &m), (&problem.w, &problem.m));
        error.to_string()
    };
    let bad = |change: fn(&mut Step)| {
        let mut step = STEP;
        change(&mut step);
        refused(&step, None, 4, 0)
    };
    assert!(bad(|step| step.beta1 = 1.0).contains("beta1 is 1"));
    assert!(bad(|step| step.beta2 = -0.5).contains("beta2 is -0.5"));
    assert!(bad(|step| step.eps = f64::NAN).contains("eps is NaN"));
    assert!(bad(|step| step.learning_rate = -1.0).contains("learning_rate is -1"));
    assert!(bad(|step| step.number = 0).contains("number of a step is 0"));
    assert!(refused(&STEP, None, 4, 1).contains("v has 23 elements; expected 6 rows of 4"));
    assert!(refused(&STEP, None, 5, 0).contains("w has 24 elements; expected 6 rows of 5"));
    assert!(refused(&STEP, None, 0, 0).contains("w has 24 elements"));
    assert!(refused(&STEP, Some(&[1, 6]), 4, 0).contains("feature 6; expected 0 to 6 - 1"));
    assert!(refused(&STEP, Some(&[-1]), 4, 0).contains("feature -1"));
    assert!(refused(&STEP, Some(&[2, 2]), 4, 0).contains("feature 2 follows 2"));
}
