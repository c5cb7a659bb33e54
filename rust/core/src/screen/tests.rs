//! Screens against the definition: every product, in f64.

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::simd::two_sum;
use crate::simd::{Level, Simd};

/// Exact values of a row's features.
fn values_of<E: Element>(x: &[E], w: Matrix<'_, E>, bias: &[E]) -> Vec<f32> {
    let value = |feature: usize| {
        let pairs = x.iter().zip(w.row(feature));
        let products = pairs.map(|(x, w)| f64::from(x.to_f32()) * f64::from(w.to_f32()));
        let (sum, rest) = products.fold((0.0, 0.0), |(sum, rest), product| {
            let (sum, missed) = two_sum(sum, product);
            (sum, rest + missed)
        });
        E::exact_pre_activation(sum, rest, bias[feature]).to_f32()
    };
    (0..w.rows()).map(value).collect()
}

/// (row, feature, value) of the codes, by the definition.
fn expected<E: Element>(
    x: Matrix<'_, E>,
    encoder: Encoder<'_, E>,
    rule: Rule<'_>,
) -> Vec<(usize, i32, f32)> {
    let mut all = Vec::new();
    for row in 0..x.rows() {
        let values = values_of(x.row(row), encoder.w, encoder.bias);
        let mut codes: Vec<_> = (0..).zip(values).map(|(f, v)| (row, f, v)).collect();
        codes.retain(|code| code.2 > 0.0);
        codes.sort_by(|left, right| right.2.total_cmp(&left.2));
        match rule {
            Rule::TopK(k) => codes.truncate(k),
            Rule::Threshold(Threshold::Shared(theta)) => codes.retain(|code| code.2 > theta),
            Rule::Threshold(Threshold::Each(theta)) => {
                codes.retain(|code| code.2 > theta[code.1 as usize]);
            }
            Rule::BatchTopK(_) => {}
        }
        all.extend(codes);
    }
    if let Rule::BatchTopK(k) = rule {
        all.sort_by(|left, right| right.2.total_cmp(&left.2).then(left.0.cmp(&right.0)));
        all.truncate(k * x.rows());
        all.sort_by_key(|code| code.0);
    }
    all
}

fn flatten<E: Element>(codes: &Codes<E>) -> Vec<(usize, i32, f32)> {
    let rows = codes.row_offsets.windows(2).enumerate();
    rows.flat_map(|(row, ends)| {
        (ends[0] as usize..ends[1] as usize)
            .map(move |at| (row, codes.indices[at], codes.values[at].to_f32()))
    })
    .collect()
}

fn options(simd: Simd, threads: usize) -> Options {
    Options {
        simd,
        threads,
        check_finite: true,
    }
}

/// Every kernel of this CPU, each with a level of the other loops.
fn variants() -> Vec<(Kernel, Simd)> {
    let levels: Vec<Simd> = Level::ALL.into_iter().filter_map(Simd::new).collect();
    let kernels = Kernel::ALL
        .into_iter()
        .filter(|kernel| kernel.is_supported());
    kernels
        .enumerate()
        .map(|(at, kernel)| (kernel, levels[(at + levels.len() - 1) % levels.len()]))
        .collect()
}

/// A small deterministic generator of roughly normal numbers.
struct Normal(u64);

impl Normal {
    fn next(&mut self) -> f32 {
        let mut sum = -6.0;
        for _ in 0..12 {
            self.0 = self
                .0
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            sum += (self.0 >> 40) as f32 / (1_u32 << 24) as f32;
        }
        sum
    }

    fn take(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }
}

/// Compares all variants and rules with the definition; returns the last variant's counts.
fn check_all<E: Element>(x: &[f32], w: &[f32], bias: &[f32], k: usize, theta: f32) -> Counts {
    let cast = |values: &[f32]| values.iter().map(|v| E::from_f32(*v)).collect::<Vec<E>>();
    let (x, w, bias) = (cast(x), cast(w), cast(bias));
    let d_sae = bias.len();
    let d_in = w.len() / d_sae;
    let x = Matrix::new(&x, x.len() / d_in, d_in).unwrap();
    let encoder = Encoder {
        w: Matrix::new(&w, d_sae, d_in).unwrap(),
        bias: &bias,
    };
    let thetas: Vec<f32> = (0..d_sae)
        .map(|feature| theta * (feature % 3) as f32)
        .collect();
    let rules = [
        Rule::TopK(k),
        Rule::BatchTopK(k),
        Rule::Threshold(Threshold::Shared(theta)),
        Rule::Threshold(Threshold::Each(&thetas)),
    ];
    let mut counts = Counts::default();
    for rule in rules {
        let expected = expected(x, encoder, rule);
        for (kernel, simd) in variants() {
            for threads in [1, 3] {
                let (options, cancel) = (options(simd, threads), Cancel::new());
                let mut screen = Screen::new(encoder, kernel, 5, options, &cancel).unwrap();
                let codes = screen.encode(x, encoder, rule, options, &cancel).unwrap();
                assert_eq!(flatten(&codes), expected, "{kernel:?} {simd:?} {rule:?}");
                counts = screen.counts();
                assert_eq!(counts.rows, x.rows() as u64);
                assert_eq!(counts.violations, 0);
            }
        }
    }
    counts
}

#[test]
fn codes_of_normal_numbers_are_those_of_the_definition() {
    for (rows, d_in, d_sae, k) in [
        (40, 123, 300, 7),
        (3, 63, 65, 1),
        (1, 1, 1, 1),
        (17, 70, 31, 31),
    ] {
        let mut normal = Normal(3);
        let (x, w) = (normal.take(rows * d_in), normal.take(d_sae * d_in));
        let bias: Vec<f32> = normal.take(d_sae).iter().map(|b| b * 0.3).collect();
        check_all::<f32>(&x, &w, &bias, k, (d_in as f32).sqrt() * 1.5);
        check_all::<bf16>(&x, &w, &bias, k, (d_in as f32).sqrt() * 1.5);
    }
}

/// Sums whose last bits, lost in f64, decide how they are rounded.
#[test]
fn values_are_rounded_as_if_sums_were_exact() {
    let unit = 2.0_f32.powi(-23);
    // Halfway between two numbers, and a little more or less: to even, up, down; where up is even: down.
    let little = 2.0_f32.powi(-90);
    let rows = [
        ([1.0, unit / 2.0, 0.0], 1.0),
        ([1.0, unit / 2.0, little], 1.0 + unit),
        ([1.0, unit / 2.0, -little], 1.0),
        ([1.0 + unit, unit / 2.0, 0.0], 1.0 + 2.0 * unit),
        ([1.0 + unit, unit / 2.0, little], 1.0 + 2.0 * unit),
        ([1.0 + unit, unit / 2.0, -little], 1.0 + unit),
    ];
    let x: Vec<f32> = rows.iter().flat_map(|row| row.0).collect();
    let x = Matrix::new(&x, rows.len(), 3).unwrap();
    let w = [1.0_f32; 6];
    // Of the second feature, the bias brings the sum to the edge.
    for (bias, shift) in [([0.0, -5.0], 0.0), ([4.0, -5.0], 4.0)] {
        let encoder = Encoder {
            w: Matrix::new(&w, 2, 3).unwrap(),
            bias: &bias,
        };
        for (kernel, simd) in variants() {
            let (options, cancel) = (options(simd, 1), Cancel::new());
            let mut screen = Screen::new(encoder, kernel, 5, options, &cancel).unwrap();
            let codes = screen.encode(x, encoder, Rule::TopK(1), options, &cancel);
            let values = codes.unwrap().values;
            if shift == 0.0 {
                assert_eq!(values, rows.map(|row| row.1));
            } else {
                // Of numbers from 4 to 8 the unit is four times as large: nothing is halfway.
                assert_eq!(values, rows.map(|row| 4.0 + row.0[0] + row.0[1]));
            }
        }
    }
}

#[test]
fn few_features_are_computed_exactly() {
    let (rows, d_in, d_sae) = (8, 512, 4096);
    let mut normal = Normal(4);
    let (x, w) = (normal.take(rows * d_in), normal.take(d_sae * d_in));
    let (x, w) = (
        Matrix::new(&x, rows, d_in).unwrap(),
        Matrix::new(&w, d_sae, d_in).unwrap(),
    );
    let bias = vec![0.0; d_sae];
    let encoder = Encoder { w, bias: &bias };
    for (kernel, simd) in variants() {
        let (options, cancel) = (options(simd, 1), Cancel::new());
        let mut screen = Screen::new(encoder, kernel, 5, options, &cancel).unwrap();
        for rule in [Rule::TopK(16), Rule::BatchTopK(16)] {
            let before = screen.counts().candidates;
            screen.encode(x, encoder, rule, options, &cancel).unwrap();
            let each = (screen.counts().candidates - before) / rows as u64;
            assert!(
                (16..200).contains(&each),
                "{kernel:?}: {each} candidates a row"
            );
        }
        assert_eq!(screen.counts().exact_rows, 0);
    }
}

#[test]
fn outlier_dimensions_cost_little() {
    let (rows, d_in, d_sae) = (64, 512, 2048);
    let mut normal = Normal(4);
    let mut x = normal.take(rows * d_in);
    let w = normal.take(d_sae * d_in);
    for row in x.chunks_exact_mut(d_in) {
        row[17] *= 22.0;
        row[300] = 17.0;
    }
    let (x, w) = (
        Matrix::new(&x, rows, d_in).unwrap(),
        Matrix::new(&w, d_sae, d_in).unwrap(),
    );
    let bias = vec![0.0; d_sae];
    let encoder = Encoder { w, bias: &bias };
    let (kernel, simd) = (Kernel::best(Kind::Int8, Simd::best()), Simd::best());
    let (options, cancel) = (options(simd, 1), Cancel::new());
    let mut screen = Screen::new(encoder, kernel, 5, options, &cancel).unwrap();
    let rule = Rule::TopK(16);
    let codes = screen.encode(x, encoder, rule, options, &cancel).unwrap();
    assert_eq!(flatten(&codes), expected(x, encoder, rule));
    assert!(
        screen.counts().candidates < 100 * rows as u64,
        "{:?}",
        screen.counts()
    );
    // The places are refreshed with the weights.
    let other: Vec<f32> = normal.take(d_sae * d_in);
    let encoder = Encoder {
        w: Matrix::new(&other, d_sae, d_in).unwrap(),
        bias: &bias,
    };
    screen.refresh(encoder, None, options, &cancel).unwrap();
    let codes = screen.encode(x, encoder, rule, options, &cancel).unwrap();
    assert_eq!(flatten(&codes), expected(x, encoder, rule));
    assert_eq!(screen.counts().violations, 0);
}

/// Rows and features whose roundings to bf16 all have one sign and leave the most: the deterministic
/// margins hold, and are not far from what is needed.
#[test]
fn margins_of_bf16_hold_at_their_worst() {
    let (rows, d_in, d_sae) = (9, 320, 600);
    // Halfway between two bf16, and rounded down, to even.
    let worst = 1.0_f32 + 1.0 / 256.0;
    let mut x = vec![worst; rows * d_in];
    let mut w = vec![worst; d_sae * d_in];
    // Features that differ by less than their roundings; the later the larger.
    for (feature, w) in w.chunks_exact_mut(d_in).enumerate() {
        w[feature % d_in] += 1e-6 * feature as f32;
        if feature % 2 == 1 {
            // Rounded up.
            w.fill(worst + 1e-6);
        }
    }
    for (row, x) in x.chunks_exact_mut(d_in).enumerate() {
        x[row] *= 1.0 + row as f32;
    }
    let bias = vec![0.0; d_sae];
    for k in [1, 30, 299, 301] {
        check_all::<f32>(&x, &w, &bias, k, 320.0);
        check_all::<bf16>(&x, &w, &bias, k, 320.0);
    }
}

#[test]
fn hostile_rows_and_features() {
    let (rows, d_in, d_sae) = (20, 80, 200);
    let mut normal = Normal(11);
    let (mut x, mut w) = (normal.take(rows * d_in), normal.take(d_sae * d_in));
    let bias = vec![0.0; d_sae];
    let mut set = |row: usize, value: &dyn Fn(usize) -> f32| {
        for (at, x) in x[row * d_in..(row + 1) * d_in].iter_mut().enumerate() {
            *x = value(at);
        }
    };
    set(0, &|_| 0.0);
    set(1, &|at| if at == 7 { 1.0 } else { 0.0 });
    set(2, &|at| 1e-40 * (at % 5) as f32);
    set(3, &|at| 1e-20 * (at as f32 - 30.0));
    set(4, &|at| 1e12 * ((at % 7) as f32 - 2.5));
    set(5, &|at| if at == 3 { 3e5 } else { 1e-3 });
    set(6, &|_| 1.0);
    // Identical features, near twins, a zero feature, tiny and huge ones.
    for feature in 1..60 {
        let (first, rest) = w.split_at_mut(feature * d_in);
        rest[..d_in].copy_from_slice(&first[..d_in]);
        rest[feature % d_in] *= 1.0 + (feature / 20) as f32 * 1e-7;
    }
    w[70 * d_in..71 * d_in].fill(0.0);
    w[71 * d_in..72 * d_in].fill(1e-30);
    w[72 * d_in..73 * d_in].fill(1e-42);
    for (at, w) in w[73 * d_in..74 * d_in].iter_mut().enumerate() {
        *w = 1e11 * ((at % 3) as f32 - 1.0);
    }
    for k in [0, 1, 16, 61, d_sae] {
        check_all::<f32>(&x, &w, &bias, k, 3.0);
    }
    check_all::<bf16>(&x, &w, &bias, 16, 3.0);
    let counts = check_all::<f32>(&x, &w, &vec![1e5; d_sae], 16, 3.0);
    assert!(counts.exact_rows >= 1);
}

#[test]
fn rows_that_no_bound_can_tell_apart_are_computed_whole() {
    let (rows, d_in, d_sae, k) = (7, 32, 1024, 3);
    let mut normal = Normal(21);
    let (mut x, w) = (normal.take(rows * d_in), normal.take(d_sae * d_in));
    // The last rows are ordinary.
    for x in &mut x[..5 * d_in] {
        *x *= 1e-12;
    }
    for x in &mut x[..2 * d_in] {
        *x *= 1e-30;
    }
    let bias = vec![0.0; d_sae];
    let (x, w) = (
        Matrix::new(&x, rows, d_in).unwrap(),
        Matrix::new(&w, d_sae, d_in).unwrap(),
    );
    let encoder = Encoder { w, bias: &bias };
    let cancel = Cancel::new();
    for (kernel, simd) in variants() {
        for threads in [1, 3] {
            let options = options(simd, threads);
            let mut screen = Screen::new(encoder, kernel, 5, options, &cancel).unwrap();
            let codes = screen.encode(x, encoder, Rule::TopK(k), options, &cancel);
            assert_eq!(
                flatten(&codes.unwrap()),
                expected(x, encoder, Rule::TopK(k))
            );
            let counts = screen.counts();
            assert_eq!((counts.exact_rows, counts.violations), (5, 0));
            assert!(
                counts.candidates < (5 * d_sae + 2 * 300) as u64,
                "{counts:?}"
            );
            // Thresholds that all features pass, and codes of all rows together.
            for rule in [
                Rule::Threshold(Threshold::Shared(0.0)),
                Rule::BatchTopK(d_sae / 2),
            ] {
                let codes = screen.encode(x, encoder, rule, options, &cancel).unwrap();
                assert_eq!(flatten(&codes), expected(x, encoder, rule));
            }
            assert_eq!(screen.counts().violations, 0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_numbers_give_the_codes_of_the_definition(
        seed in any::<u64>(),
        rows in 1_usize..40,
        d_in in 1_usize..150,
        d_sae in 1_usize..130,
        share in 0.0_f64..1.0,
        coarse in any::<bool>(),
    ) {
        let mut normal = Normal(seed | 1);
        let mut draw = |count: usize| {
            let mut numbers = normal.take(count);
            if coarse {
                // Few different numbers: ties abound.
                numbers.iter_mut().for_each(|number| *number = number.round());
            }
            numbers
        };
        let (x, w, bias) = (draw(rows * d_in), draw(d_sae * d_in), draw(d_sae));
        let k = (share * d_sae as f64) as usize;
        check_all::<f32>(&x, &w, &bias, k, 2.0);
        check_all::<bf16>(&x, &w, &bias, k, 2.0);
    }
}

#[test]
fn weights_changed_unnoticed_are_caught() {
    let (rows, d_in, d_sae) = (10, 64, 200);
    let mut normal = Normal(8);
    let (x, mut w) = (normal.take(rows * d_in), normal.take(d_sae * d_in));
    let x = Matrix::new(&x, rows, d_in).unwrap();
    let bias = vec![0.0; d_sae];
    let (options, cancel) = (options(Simd::best(), 1), Cancel::new());
    let old = w.clone();
    let encoder = Encoder {
        w: Matrix::new(&old, d_sae, d_in).unwrap(),
        bias: &bias,
    };
    let kernel = Kernel::best(Kind::Int8, Simd::best());
    let mut screen = Screen::new(encoder, kernel, 5, options, &cancel).unwrap();
    let changed = normal.take(100 * d_in);
    w[..100 * d_in].copy_from_slice(&changed);
    let encoder = Encoder {
        w: Matrix::new(&w, d_sae, d_in).unwrap(),
        bias: &bias,
    };
    let rule = Rule::TopK(20);
    let codes = screen.encode(x, encoder, rule, options, &cancel).unwrap();
    // Every row has a candidate among a hundred changed features, and is computed as a whole.
    assert_eq!(flatten(&codes), expected(x, encoder, rule));
    assert!(screen.counts().violations >= rows as u64);
    assert_eq!(screen.counts().exact_rows, rows as u64);
    // A refresh of the changed features alone makes it right again.
    let features: Vec<i64> = (0..100).collect();
    screen
        .refresh(encoder, Some(&features), options, &cancel)
        .unwrap();
    let before = screen.counts();
    let codes = screen.encode(x, encoder, rule, options, &cancel).unwrap();
    assert_eq!(flatten(&codes), expected(x, encoder, rule));
    assert_eq!(screen.counts().violations, before.violations);
    let bad = screen.refresh(encoder, Some(&[3, 200]), options, &cancel);
    assert!(matches!(bad, Err(Error::InvalidArgument(message)) if message.contains("200")));
}

#[test]
fn what_is_not_finite_is_refused_by_row() {
    let (rows, d_in, d_sae) = (5, 70, 40);
    let mut normal = Normal(8);
    let (mut x, mut w) = (normal.take(rows * d_in), normal.take(d_sae * d_in));
    x[3 * d_in + 69] = f32::NAN;
    x[4 * d_in] = f32::INFINITY;
    let bias = vec![0.0; d_sae];
    let (mut options, cancel) = (options(Simd::best(), 2), Cancel::new());
    let kernel = Kernel::best(Kind::Int8, Simd::best());
    {
        let x = Matrix::new(&x, rows, d_in).unwrap();
        let encoder = Encoder {
            w: Matrix::new(&w, d_sae, d_in).unwrap(),
            bias: &bias,
        };
        let mut screen = Screen::new(encoder, kernel, 5, options, &cancel).unwrap();
        let refused = screen.encode(x, encoder, Rule::TopK(4), options, &cancel);
        assert!(matches!(refused, Err(Error::NonFinite { row: 3, .. })));
        // Without the check NaN is no code, and an infinity the largest.
        options.check_finite = false;
        let codes = screen
            .encode(x, encoder, Rule::TopK(4), options, &cancel)
            .unwrap();
        assert_eq!(codes.row_offsets[4], codes.row_offsets[3]);
        let last = &codes.values[codes.row_offsets[4] as usize..];
        assert_eq!(last, [f32::INFINITY; 4]);
    }
    w[7 * d_in + 3] = f32::NAN;
    let encoder = Encoder {
        w: Matrix::new(&w, d_sae, d_in).unwrap(),
        bias: &bias,
    };
    let mut screen = Screen::new(encoder, kernel, 5, options, &cancel).unwrap();
    assert_eq!(screen.first_bad_feature(), Some(7));
    let x = Matrix::new(&x[..d_in], 1, d_in).unwrap();
    let refused = screen.encode(x, encoder, Rule::TopK(4), options, &cancel);
    assert!(
        matches!(refused, Err(Error::InvalidArgument(message)) if message.contains("feature 7"))
    );
}

#[test]
fn no_rows_and_cancelling() {
    let w = vec![1.0_f32; 12];
    let encoder = Encoder {
        w: Matrix::new(&w, 4, 3).unwrap(),
        bias: &[0.0; 4],
    };
    let (options, cancel) = (options(Simd::best(), 1), Cancel::new());
    let mut screen = Screen::new(encoder, Kernel::Scalar, 5, options, &cancel).unwrap();
    let none = Matrix::new(&[], 0, 3).unwrap();
    let codes = screen
        .encode(none, encoder, Rule::BatchTopK(2), options, &cancel)
        .unwrap();
    assert_eq!(codes.row_offsets, [0]);
    let too_many = screen.encode(none, encoder, Rule::TopK(5), options, &cancel);
    assert!(matches!(too_many, Err(Error::InvalidArgument(_))));
    cancel.cancel();
    let one = Matrix::new(&[1.0; 3], 1, 3).unwrap();
    let stopped = screen.encode(one, encoder, Rule::TopK(2), options, &cancel);
    assert!(matches!(stopped, Err(Error::Interrupted)));
}
