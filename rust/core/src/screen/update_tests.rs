//! A screen that follows Adam is that of the weights as Adam leaves them.

use proptest::prelude::*;

use super::*;
use crate::adam::{self, Idle, State, Step};
use crate::decode::SparseRows;
use crate::grad::{FeatureLists, Source, Term};
use crate::simd::{Level, Simd};

const STEP: Step = Step {
    number: 30,
    learning_rate: 0.01,
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-8,
    scale: 1.0,
    unit_rows: false,
    idle: Idle::Decay,
    wake: false,
};

fn number(at: usize) -> f32 {
    ((at * 7919) % 1013) as f32 / 500.0 - 1.0
}

/// Steps with a screen that follows, and with one that is rounded after it: all must agree.
fn check_step(
    (d_sae, d_in): (usize, usize),
    codes: &[usize],
    threads: usize,
    unit_rows: bool,
    infinite: bool,
) {
    let indices: Vec<i32> = codes.iter().map(|code| (code % d_sae) as i32).collect();
    let offsets = [0, indices.len() as i64];
    let rows = SparseRows::new(&indices, &offsets, d_sae).unwrap();
    let lists = FeatureLists::new(rows, &Cancel::new()).unwrap();
    let coefficients: Vec<f32> = (0..indices.len()).map(|at| number(at + 5)).collect();
    let x: Vec<f32> = (0..d_in).map(number).collect();
    let terms = [Term {
        coefficients: &coefficients,
        rows: Matrix::new(&x, 1, d_in).unwrap(),
    }];
    let sources = [Source {
        lists: &lists,
        terms: &terms,
    }];
    let before: Vec<f32> = (0..d_sae * d_in).map(|at| number(at + 11)).collect();
    let step = Step { unit_rows, ..STEP };
    for kernel in Kernel::ALL
        .into_iter()
        .filter(|kernel| kernel.is_supported())
    {
        let options = Options {
            simd: Simd::new(Level::Scalar).unwrap(),
            threads,
            check_finite: true,
        };
        let old_bias: Vec<f32> = (0..d_sae).map(|at| number(at + 3)).collect();
        let mut bias: Vec<f32> = (0..d_sae).map(|at| number(at + 4)).collect();
        if infinite {
            bias[d_sae / 2] = f32::INFINITY;
        }
        let mut runs = [true, false].map(|follows| {
            let w = before.clone();
            let m: Vec<f32> = w
                .iter()
                .map(|w| if *w > 0.5 { 0.0 } else { w / 10.0 })
                .collect();
            let v = vec![0.5; w.len()];
            let mut asleep = vec![0; d_sae];
            // Some rest, some sleep.
            asleep.iter_mut().step_by(3).for_each(|last| *last = -7);
            asleep.iter_mut().step_by(4).for_each(|last| *last = 9);
            let matrix = Matrix::new(&w, d_sae, d_in).unwrap();
            let encoder = Encoder {
                w: matrix,
                bias: &old_bias,
            };
            let screen = Screen::new(encoder, kernel, 7, options, &Cancel::new()).unwrap();
            (follows, w, m, v, asleep, screen)
        });
        for (follows, w, m, v, asleep, screen) in &mut runs {
            let state = State { w, m, v, asleep };
            if *follows {
                screen
                    .update(state, &sources, &step, &bias, options)
                    .unwrap();
            } else {
                let simd = options.simd;
                adam::update(state, d_in, &sources, None, &step, simd, 1).unwrap();
                let w = Matrix::new(w, d_sae, d_in).unwrap();
                let encoder = Encoder { w, bias: &bias };
                screen
                    .refresh(encoder, None, options, &Cancel::new())
                    .unwrap();
            }
        }
        let [one, other] = &runs;
        assert_eq!(
            (&one.1, &one.2, &one.3, &one.4),
            (&other.1, &other.2, &other.3, &other.4)
        );
        let (one, other) = (&one.5, &other.5);
        assert_eq!(one.weights.tiles.bytes(), other.weights.tiles.bytes());
        assert_eq!(
            format!("{:?}", one.weights.bounds),
            format!("{:?}", other.weights.bounds)
        );
        assert_eq!(one.spread.tiles.bytes(), other.spread.tiles.bytes());
        assert_eq!(one.first_bad_feature(), other.first_bad_feature());
        assert_eq!(one.first_bad_feature(), infinite.then_some(d_sae / 2));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_screen_follows_a_step(
        d_sae in 1_usize..150,
        d_in in prop::sample::select(vec![1_usize, 63, 64, 123]),
        codes in prop::collection::vec(0_usize..150, 0..60),
        threads in 1_usize..4,
        unit_rows in any::<bool>(),
        infinite in any::<bool>(),
    ) {
        check_step((d_sae, d_in), &codes, threads, unit_rows, infinite);
    }
}

/// Wide enough that each thread has rows: half of them sleep or rest, the others take four numbers each.
#[test]
fn a_screen_follows_a_step_on_several_threads() {
    let (d_sae, d_in) = (150, 1100);
    let codes: Vec<usize> = (0..60).map(|at| at * 7 % d_sae).collect();
    assert!(d_sae / 2 * 4 * d_in >= 4 * crate::rows::MIN_ELEMENTS);
    for threads in 2..5 {
        check_step((d_sae, d_in), &codes, threads, false, false);
    }
}

#[test]
fn a_refused_step_changes_nothing() {
    let (mut w, mut m, mut v) = (vec![1.0_f32; 6], vec![0.0; 6], vec![0.0; 6]);
    let options = Options {
        simd: Simd::best(),
        threads: 1,
        check_finite: true,
    };
    let bias = [0.0_f32; 3];
    fn encoder<'a>(w: &'a [f32], bias: &'a [f32]) -> Encoder<'a, f32> {
        let w = Matrix::new(w, 3, 2).unwrap();
        Encoder { w, bias }
    }
    let kernel = Kernel::best(Kind::Int8, options.simd);
    let cancel = Cancel::new();
    let mut screen = Screen::new(encoder(&w, &bias), kernel, 7, options, &cancel).unwrap();
    for (number, biases) in [(0, 3), (30, 2)] {
        let state = State {
            w: &mut w,
            m: &mut m,
            v: &mut v,
            asleep: &mut [0; 3],
        };
        let step = Step { number, ..STEP };
        screen
            .update(state, &[], &step, &bias[..biases], options)
            .unwrap_err();
    }
    assert_eq!(w, [1.0; 6]);
    // A refresh of some features makes it whole again.
    screen
        .refresh(encoder(&w, &bias), Some(&[1]), options, &cancel)
        .unwrap();
    let x = Matrix::new(&[1.0_f32, 1.0], 1, 2).unwrap();
    let codes = screen.encode(x, encoder(&w, &bias), Rule::TopK(1), options, &cancel);
    assert_eq!(codes.unwrap().values, [2.0]);
}
