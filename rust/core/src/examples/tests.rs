//! Whole passes beside sorting everything.

use proptest::prelude::*;

use super::collect::collect_on;
use super::histogram::{bin_of, BINS};
use super::samples::Ranking;
use super::scan::Walker;
use super::{collect, sum, Accumulator, CodesView, Keep, Parts};
use crate::shard::{Indices, Values};
use crate::{Cancel, Error};

const D_SAE: usize = 7;

/// Codes as one would write them down.
#[derive(Debug, Clone)]
struct Owned {
    values: Vec<f32>,
    indices: Vec<u32>,
    row_offsets: Vec<i64>,
    first_row: i64,
}

impl Owned {
    fn new(rows: &[Vec<(u32, f32)>], first_row: i64) -> Self {
        let mut row_offsets = vec![0];
        row_offsets.extend(rows.iter().scan(0, |end, row| {
            *end += row.len() as i64;
            Some(*end)
        }));
        let codes = rows.concat();
        Self {
            values: codes.iter().map(|code| code.1).collect(),
            indices: codes.iter().map(|code| code.0).collect(),
            row_offsets,
            first_row,
        }
    }

    fn view(&self) -> CodesView<'_> {
        let (values, indices) = (Values::F32(&self.values), Indices::U32(&self.indices));
        CodesView::new(values, indices, &self.row_offsets, self.first_row).unwrap()
    }
}

type Samples = (Vec<i64>, Vec<f32>, Vec<i64>);
type Found = ((Vec<f32>, Vec<i64>), Vec<u64>, Vec<u128>, Samples, u64);

const SAMPLES: usize = 2;
const SEED: u64 = 5;

fn accumulator(n: usize) -> Accumulator {
    accumulator_of(D_SAE, n)
}

fn accumulator_of(d_sae: usize, n: usize) -> Accumulator {
    let keep = Keep {
        n,
        samples: SAMPLES,
        seed: SEED,
    };
    Accumulator::new(d_sae, keep).unwrap()
}

fn parts(accumulator: &mut Accumulator) -> Found {
    (
        accumulator.examples(),
        accumulator.histogram(),
        accumulator.sums(),
        accumulator.samples(),
        accumulator.scanned(),
    )
}

fn naive(rows: &[Vec<(u32, f32)>], n: usize) -> Found {
    naive_of(D_SAE, rows, n)
}

/// Sorts everything; keeps nothing bounded.
fn naive_of(d_sae: usize, rows: &[Vec<(u32, f32)>], n: usize) -> Found {
    let mut all: Vec<Vec<(f32, i64)>> = vec![vec![]; d_sae];
    let mut histogram = vec![0; d_sae * BINS];
    let mut sums = vec![0; d_sae];
    for (codes, row) in rows.iter().zip(0..) {
        for &(feature, strength) in codes.iter().filter(|code| code.1 != 0.0) {
            let feature = feature as usize;
            all[feature].push((strength, row));
            histogram[feature * BINS + bin_of(strength)] += 1;
            sums[feature] += sum::to_fixed(strength);
        }
    }
    let ranking = Ranking { seed: SEED };
    let mut samples: Samples = (vec![0], vec![], vec![]);
    for entries in &all {
        for bin in 0..BINS {
            let mut held: Vec<_> = entries.iter().filter(|e| bin_of(e.0) == bin).collect();
            held.sort_by_key(|entry| ranking.rank(entry.1));
            samples
                .1
                .extend(held.iter().take(SAMPLES).map(|entry| entry.0));
            samples
                .2
                .extend(held.iter().take(SAMPLES).map(|entry| entry.1));
        }
        samples.0.push(samples.1.len() as i64);
    }
    for entries in &mut all {
        entries.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        entries.resize(n, super::heap::UNUSED);
    }
    let (strengths, ids) = all.concat().into_iter().unzip();
    (
        (strengths, ids),
        histogram,
        sums,
        samples,
        rows.len() as u64,
    )
}

fn restored(saved: &mut Accumulator) -> Accumulator {
    let ((strengths, rows), histogram, sums, samples, scanned) = parts(saved);
    let parts = Parts {
        strengths: &strengths,
        rows: &rows,
        histogram: &histogram,
        sums: &sums,
        sample_offsets: &samples.0,
        sample_strengths: &samples.1,
        sample_rows: &samples.2,
        scanned,
    };
    Accumulator::from_parts(D_SAE, saved.keep(), &parts).unwrap()
}

fn some_rows() -> impl Strategy<Value = Vec<Vec<(u32, f32)>>> {
    // Few strengths, so that ties abound; zeros are stored but are no activations.
    let strength = prop::sample::select(vec![0.0f32, 0.25, 0.3, 1.0, 1.5, 9e-6, 1e5]);
    let row = prop::collection::btree_map(0..D_SAE as u32, strength, 0..D_SAE)
        .prop_map(|row| row.into_iter().collect());
    prop::collection::vec(row, 0..40)
}

proptest! {
    #[test]
    fn shards_threads_and_merging_do_not_show(
        rows in some_rows(),
        n in 1usize..6,
        threads in 1usize..4,
        cuts in prop::collection::vec(0usize..41, 0..4),
        reverse in any::<bool>(),
    ) {
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(rows.len())).collect();
        cuts.extend([0, rows.len()]);
        cuts.sort_unstable();
        let mut owned: Vec<_> = cuts
            .windows(2)
            .map(|cut| Owned::new(&rows[cut[0]..cut[1]], cut[0] as i64))
            .collect();
        if reverse {
            owned.reverse();
        }
        let views: Vec<_> = owned.iter().map(Owned::view).collect();

        let mut at_once = accumulator(n);
        collect_on(&mut at_once, &views, threads, &Cancel::new()).unwrap();
        // One after the other, by either way, with and without looks at the result.
        let mut in_turn = accumulator(n);
        let mut merged = accumulator(n);
        for (at, view) in views.iter().enumerate() {
            match at % 3 {
                0 => collect_on(&mut in_turn, &[*view], threads, &Cancel::new()).unwrap(),
                1 => collect(&mut in_turn, &[*view], threads, &Cancel::new()).unwrap(),
                _ => {
                    let mut again = restored(&mut in_turn);
                    collect(&mut again, &[*view], threads, &Cancel::new()).unwrap();
                    in_turn = again;
                }
            }
            let mut one = accumulator(n);
            collect(&mut one, &[*view], 1, &Cancel::new()).unwrap();
            merged.merge(&mut one).unwrap();
        }
        let expected = naive(&rows, n);
        prop_assert_eq!(parts(&mut at_once), expected.clone());
        prop_assert_eq!(parts(&mut in_turn), expected.clone());
        prop_assert_eq!(parts(&mut restored(&mut merged)), expected.clone());
        prop_assert_eq!(parts(&mut merged), expected);
    }
}

/// Rows of many codes, most of them alike as a trained SAE's are.
fn long_rows(d_sae: u32) -> impl Strategy<Value = Vec<Vec<(u32, f32)>>> {
    // Most lie in a window of neighbouring bins, some above it or elsewhere.
    let strength = prop_oneof![
        60 => 0.3f32..4.0,
        20 => prop::sample::select(vec![0.3f32, 1.0, 1.5, 2.0]),
        3 => 4.0f32..40.0,
        1 => 1e-6f32..0.3,
        1 => 40f32..1e6,
        1 => Just(0.0f32),
    ];
    let row = prop::collection::btree_map(0..d_sae, strength, 0..90)
        .prop_map(|row| row.into_iter().collect::<Vec<_>>())
        .prop_shuffle();
    prop::collection::vec(row, 1..16)
}

#[test]
fn without_features_there_is_nothing_to_count() {
    let no_codes = Owned::new(&vec![vec![]; 3], 0);
    let one_code = Owned::new(&[vec![], vec![(0, 1.0)]], 0);
    for walker in Walker::all() {
        let mut accumulator = accumulator_of(0, 2);
        accumulator.walker = Some(walker);
        collect_on(&mut accumulator, &[no_codes.view()], 1, &Cancel::new()).unwrap();
        assert_eq!(parts(&mut accumulator).4, 3, "{walker:?}");
        let refused = collect_on(&mut accumulator, &[one_code.view()], 1, &Cancel::new());
        assert!(refused.is_err(), "{walker:?}");
    }
}

/// Fewer features than a row of [`long_rows`] may ask for, or two blocks of them.
const WIDTHS: [usize; 2] = [37, 200];

proptest! {
    #[test]
    fn every_way_of_counting_agrees(
        (d_sae, rows) in prop::sample::select(&WIDTHS[..])
            .prop_flat_map(|d_sae| (Just(d_sae), long_rows(d_sae as u32))),
        n in 1usize..6,
        cut in any::<prop::sample::Index>(),
        threads in 1usize..3,
    ) {
        let cut = cut.index(rows.len() + 1);
        let parts_of = [Owned::new(&rows[..cut], 0), Owned::new(&rows[cut..], cut as i64)];
        let expected = naive_of(d_sae, &rows, n);
        for walker in Walker::all() {
            let mut at_once = accumulator_of(d_sae, n);
            at_once.walker = Some(walker);
            let views = parts_of.each_ref().map(Owned::view);
            collect_on(&mut at_once, &views, threads, &Cancel::new()).unwrap();
            prop_assert_eq!(parts(&mut at_once), expected.clone(), "{:?}", walker);
            let mut in_turn = accumulator_of(d_sae, n);
            in_turn.walker = Some(walker);
            for view in views {
                collect(&mut in_turn, &[view], threads, &Cancel::new()).unwrap();
            }
            prop_assert_eq!(parts(&mut in_turn), expected.clone(), "{:?}", walker);
        }
    }

    #[test]
    fn features_active_twice_are_found_wherever_they_are(
        mut rows in long_rows(200),
        at in any::<prop::sample::Index>(),
        strengths in prop::array::uniform2(prop::sample::select(
            // Of the same bin and another, above the window and beyond reach.
            vec![0.5f32, 0.5001, 1.5, 30.0, 1e6, 1e-5],
        )),
        places in prop::array::uniform2(any::<prop::sample::Index>()),
    ) {
        let bad = at.index(rows.len());
        let row = &mut rows[bad];
        row.retain(|code| code.0 != 199);
        for (strength, place) in strengths.into_iter().zip(places) {
            row.insert(place.index(row.len() + 1), (199, strength));
        }
        let owned = Owned::new(&rows, 100);
        let words = format!("feature 199 is active twice in row {}", 100 + bad);
        for walker in Walker::all() {
            let mut accumulator = accumulator_of(200, 2);
            accumulator.walker = Some(walker);
            for threads in [1, 2] {
                let result = collect_on(&mut accumulator, &[owned.view()], threads, &Cancel::new());
                let error = result.unwrap_err().to_string();
                prop_assert!(error.contains(&words), "{:?}: {}", walker, error);
            }
            prop_assert_eq!(parts(&mut accumulator), naive_of(200, &[], 2));
        }
    }
}

#[test]
fn long_runs_fill_samples_and_wrap_counts() {
    // Two blocks of features; one that is always active, with one strength, so that its count wraps
    // again and again, and more rows than stamps. The others are ever rarer.
    let d_sae = 150;
    let row = |row: u32| {
        let strength = |salt: u32| {
            let mixed = (row ^ salt << 20).wrapping_mul(0x9e37_79b9);
            (1.0 + (mixed >> 27) as f32) * 0.125
        };
        let mut codes = vec![(149, if row.is_multiple_of(64) { 1e6 } else { 1.5 })];
        for (feature, every) in [(0, 2), (1, 16), (127, 100), (128, 3000)] {
            if row.is_multiple_of(every) {
                codes.push((feature, strength(feature)));
            }
        }
        codes
    };
    let rows: Vec<_> = (0..70_000).map(row).collect();
    let half = rows.len() / 2;
    let owned = [
        Owned::new(&rows[..half], 0),
        Owned::new(&rows[half..], half as i64),
    ];
    let expected = naive_of(d_sae, &rows, 3);
    for (walker, threads) in Walker::all()
        .into_iter()
        .flat_map(|all| [(all, 1), (all, 2)])
    {
        let mut at_once = accumulator_of(d_sae, 3);
        at_once.walker = Some(walker);
        let views = owned.each_ref().map(Owned::view);
        collect_on(&mut at_once, &views, threads, &Cancel::new()).unwrap();
        assert!(
            parts(&mut at_once) == expected,
            "{walker:?}, {threads} threads"
        );
        let mut in_turn = accumulator_of(d_sae, 3);
        for view in views {
            collect_on(&mut in_turn, &[view], threads, &Cancel::new()).unwrap();
        }
        assert!(
            parts(&mut in_turn) == expected,
            "{threads} threads, in turn"
        );
    }
    let mut directly = accumulator_of(d_sae, 3);
    for one in &owned {
        collect(&mut directly, &[one.view()], 1, &Cancel::new()).unwrap();
    }
    assert!(parts(&mut directly) == expected, "without threads");
}

fn message(rows: &[Vec<(u32, f32)>], threads: usize) -> String {
    let owned = Owned::new(rows, 100);
    let first = Owned::new(&[vec![(0, 1.0)]], 0);
    let mut accumulator = accumulator(2);
    collect(&mut accumulator, &[first.view()], 1, &Cancel::new()).unwrap();
    let before = parts(&mut accumulator);
    let error = match threads {
        0 => collect(&mut accumulator, &[owned.view()], 1, &Cancel::new()),
        _ => collect_on(&mut accumulator, &[owned.view()], threads, &Cancel::new()),
    };
    assert_eq!(
        parts(&mut accumulator),
        before,
        "something of a refused batch was added"
    );
    error.unwrap_err().to_string()
}

#[test]
fn bad_codes_are_refused_whole_and_by_row() {
    for threads in [0, 1, 2] {
        let good = vec![(0, 1.0), (3, 2.0)];
        for (code, words) in [
            ((2, f32::NAN), "infinite value in row 102"),
            ((2, f32::INFINITY), "infinite value in row 102"),
            ((2, -0.5), "strength -0.5 in row 102"),
            ((D_SAE as u32, 1.0), "feature id 7 in row 102"),
            ((1, 0.5), "feature 1 is active twice in row 102"),
        ] {
            let rows = [good.clone(), vec![], vec![(1, 1.0), code], good.clone()];
            let found = message(&rows, threads);
            assert!(found.contains(words), "{found:?} lacks {words:?}");
        }
    }
}

#[test]
fn zeros_may_pad_a_row() {
    let owned = Owned::new(&[vec![(0, 0.0), (0, 1.0), (0, 0.0)], vec![(0, 2.0)]], 0);
    for threads in [1, 2] {
        let mut accumulator = accumulator(2);
        collect_on(&mut accumulator, &[owned.view()], threads, &Cancel::new()).unwrap();
        assert_eq!(accumulator.examples().0[..2], [2.0, 1.0]);
    }
}

#[test]
fn offsets_that_fall_or_point_outside_are_refused() {
    let (values, indices) = ([1.0f32; 4], [0u32, 1, 2, 3]);
    for offsets in [&[0i64, 3, 2, 4][..], &[0, 9, 4], &[0, -1, 4]] {
        let (v, i) = (Values::F32(&values), Indices::U32(&indices));
        let view = CodesView::new(v, i, offsets, 0).unwrap();
        let mut accumulator = accumulator(2);
        for threads in [1, 2] {
            let result = collect_on(&mut accumulator, &[view], threads, &Cancel::new());
            assert!(
                matches!(result, Err(Error::InvalidArgument(_))),
                "{offsets:?}"
            );
        }
    }
    for (offsets, first_row) in [
        (&[][..], 0),
        (&[1i64, 4], 0),
        (&[0, 3], 0),
        (&[0, -1], 0),
        (&[0, 4], -1),
        (&[0, 4], i64::MAX),
    ] {
        let (v, i) = (Values::F32(&values), Indices::U32(&indices));
        assert!(
            CodesView::new(v, i, offsets, first_row).is_err(),
            "{offsets:?} {first_row}"
        );
    }
}

#[test]
fn a_cancelled_collection_adds_nothing() {
    let owned = Owned::new(&[vec![(0, 1.0)]], 0);
    let cancel = Cancel::new();
    cancel.cancel();
    for threads in [1, 2] {
        let mut accumulator = accumulator(2);
        let result = collect_on(&mut accumulator, &[owned.view()], threads, &cancel);
        assert!(matches!(result, Err(Error::Interrupted)));
        assert_eq!(parts(&mut accumulator), parts(&mut self::accumulator(2)));
    }
}

#[test]
fn stored_widths_agree() {
    // Strengths that bf16 holds exactly.
    let strengths = [0.5f32, 1.0, 1.5, 2.0];
    let bits: Vec<u16> = strengths
        .iter()
        .map(|&s| half::bf16::from_f32(s).to_bits())
        .collect();
    let mut found = vec![];
    for values in [Values::F32(&strengths), Values::Bf16(&bits)] {
        for indices in [Indices::U32(&[0, 6, 1, 6]), Indices::U16(&[0, 6, 1, 6])] {
            let view = CodesView::new(values, indices, &[0, 2, 2, 4], 5).unwrap();
            let mut accumulator = accumulator(2);
            collect(&mut accumulator, &[view], 1, &Cancel::new()).unwrap();
            found.push(parts(&mut accumulator));
        }
    }
    assert_eq!(found[0].0 .0[12..], [2.0, 1.0]);
    assert!(found.iter().all(|parts| *parts == found[0]));
}

#[test]
fn sizes_out_of_range_are_refused() {
    for (d_sae, n) in [(8, 0), (8, 65_536), (usize::MAX / 2, 20), (1 << 50, 20)] {
        let keep = Keep {
            n,
            samples: 0,
            seed: 0,
        };
        assert!(Accumulator::new(d_sae, keep).is_err(), "{d_sae} {n}");
    }
    let keep = Keep {
        n: 2,
        samples: 3,
        seed: 4,
    };
    assert!(Accumulator::new(
        8,
        Keep {
            samples: 256,
            ..keep
        }
    )
    .is_err());
    let mut a = Accumulator::new(8, keep).unwrap();
    for (d_sae, other) in [
        (9, keep),
        (8, Keep { n: 3, ..keep }),
        (8, Keep { samples: 2, ..keep }),
        (8, Keep { seed: 5, ..keep }),
    ] {
        assert!(a
            .merge(&mut Accumulator::new(d_sae, other).unwrap())
            .is_err());
    }
}
