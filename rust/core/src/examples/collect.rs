//! One pass over codes, on several threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::accumulator::Accumulator;
use super::codes::{CodesView, Seen};
use crate::{Cancel, Result};

/// Rows that a thread takes at a time.
const UNIT_ROWS: usize = 4096;
/// Below this many codes for each thread, a thread's own accumulator costs more
/// than it saves.
const MIN_NNZ_PER_THREAD: usize = 1 << 20;
/// Up to this many codes (a fraction of a second) one thread needs no accumulator
/// of its own at all.
const DIRECT_NNZ: usize = 1 << 24;
/// Codes that are checked and scanned at a time: they stay in the nearest cache
/// between the two, and a look at the cancel flag each time costs nothing.
const BLOCK_NNZ: i64 = 1 << 14;

/// Adds all codes of all views to `accumulator`, on up to `threads` threads, each
/// of which needs an accumulator of its own for the time. On an error, or when
/// cancelled, `accumulator` is as it was.
pub fn collect(
    accumulator: &mut Accumulator,
    views: &[CodesView<'_>],
    threads: usize,
    cancel: &Cancel,
) -> Result<()> {
    let nnz: usize = views.iter().map(CodesView::nnz).sum();
    let wanted = threads.clamp(1, (nnz / MIN_NNZ_PER_THREAD).max(1));
    collect_on(accumulator, views, wanted, cancel)
}

/// Checks everything before adding anything; the second walk can't fail and is
/// short, so it needs no look at the cancel flag.
fn add_directly(
    accumulator: &mut Accumulator,
    views: &[CodesView<'_>],
    cancel: &Cancel,
) -> Result<()> {
    let mut seen = Seen::new(accumulator.d_sae());
    for (view, rows) in units(views) {
        for block in blocks(view, rows)? {
            cancel.check()?;
            view.check(block, &mut seen)?;
        }
    }
    for view in views {
        accumulator.add_checked(view, 0..view.rows());
    }
    Ok(())
}

/// [`collect`] on exactly this many threads.
fn collect_on(
    accumulator: &mut Accumulator,
    views: &[CodesView<'_>],
    threads: usize,
    cancel: &Cancel,
) -> Result<()> {
    let nnz: usize = views.iter().map(CodesView::nnz).sum();
    if threads == 1 && nnz <= DIRECT_NNZ {
        return add_directly(accumulator, views, cancel);
    }
    let units = units(views);
    let next = AtomicUsize::new(0);
    let work = || -> Result<Accumulator> {
        let mut own = Accumulator::new(accumulator.d_sae(), accumulator.n())?;
        let mut seen = Seen::new(accumulator.d_sae());
        while let Some((view, rows)) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = add_unit(&mut own, &mut seen, view, rows.clone(), cancel) {
                // The others need not finish what will be thrown away.
                next.store(units.len(), Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(own)
    };
    let parts: Vec<Result<Accumulator>> = std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut parts = vec![work()];
        for helper in helpers {
            match helper.join() {
                Ok(part) => parts.push(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        parts
    });
    let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
    parts.iter().try_for_each(|part| accumulator.merge(part))
}

/// Cuts the views into ranges of rows.
fn units<'v, 'a>(views: &'v [CodesView<'a>]) -> Vec<(&'v CodesView<'a>, Range<usize>)> {
    let cut = |view: &'v CodesView<'a>| {
        (0..view.rows())
            .step_by(UNIT_ROWS)
            .map(move |start| (view, start..view.rows().min(start + UNIT_ROWS)))
    };
    views.iter().flat_map(cut).collect()
}

/// Cuts a unit into blocks of rows: as many as make `BLOCK_NNZ` codes, at least one.
fn blocks<'v>(
    view: &'v CodesView<'_>,
    rows: Range<usize>,
) -> Result<impl Iterator<Item = Range<usize>> + 'v> {
    // Cutting by search needs offsets that rise.
    view.span(rows.clone())?;
    let mut start = rows.start;
    Ok(std::iter::from_fn(move || {
        if start == rows.end {
            return None;
        }
        let limit = view.row_offsets()[start] + BLOCK_NNZ;
        let later = &view.row_offsets()[start + 1..=rows.end];
        let block = start..start + later.partition_point(|&end| end <= limit).max(1);
        start = block.end;
        Some(block)
    }))
}

/// Checks and adds a unit, block by block.
fn add_unit(
    own: &mut Accumulator,
    seen: &mut Seen,
    view: &CodesView<'_>,
    rows: Range<usize>,
    cancel: &Cancel,
) -> Result<()> {
    for block in blocks(view, rows)? {
        cancel.check()?;
        view.check(block.clone(), seen)?;
        own.add_checked(view, block);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples::histogram::{bin_of, BINS};
    use crate::examples::sum;
    use crate::shard::{Indices, Values};
    use crate::Error;
    use proptest::prelude::*;

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

    type Parts = ((Vec<f32>, Vec<i64>), Vec<u64>, Vec<u128>, u64);

    fn parts(accumulator: &Accumulator) -> Parts {
        (
            accumulator.examples(),
            accumulator.histogram().to_vec(),
            accumulator.sums().to_vec(),
            accumulator.scanned(),
        )
    }

    /// Sorts everything; keeps nothing bounded.
    fn naive(rows: &[Vec<(u32, f32)>], n: usize) -> Parts {
        let mut all: Vec<Vec<(f32, i64)>> = vec![vec![]; D_SAE];
        let mut histogram = vec![0; D_SAE * BINS];
        let mut sums = vec![0; D_SAE];
        for (codes, row) in rows.iter().zip(0..) {
            for &(feature, strength) in codes.iter().filter(|code| code.1 != 0.0) {
                let feature = feature as usize;
                all[feature].push((strength, row));
                histogram[feature * BINS + bin_of(strength)] += 1;
                sums[feature] += sum::to_fixed(strength);
            }
        }
        for entries in &mut all {
            entries.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            entries.resize(n, super::super::heap::UNUSED);
        }
        let (strengths, ids) = all.concat().into_iter().unzip();
        ((strengths, ids), histogram, sums, rows.len() as u64)
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

            let mut at_once = Accumulator::new(D_SAE, n).unwrap();
            collect_on(&mut at_once, &views, threads, &Cancel::new()).unwrap();
            let mut merged = Accumulator::new(D_SAE, n).unwrap();
            for view in &views {
                let mut one = Accumulator::new(D_SAE, n).unwrap();
                collect(&mut one, &[*view], 1, &Cancel::new()).unwrap();
                merged.check_disjoint(&one).unwrap();
                merged.merge(&one).unwrap();
            }
            let expected = naive(&rows, n);
            prop_assert_eq!(parts(&at_once), expected.clone());
            prop_assert_eq!(parts(&merged), expected);

            let ((strengths, ids), histogram, sums, scanned) = parts(&merged);
            let restored =
                Accumulator::from_parts(D_SAE, n, &strengths, &ids, &histogram, &sums, scanned).unwrap();
            prop_assert_eq!(parts(&restored), parts(&merged));
            let overlap = histogram.iter().any(|&bin| bin > 0);
            prop_assert_eq!(restored.check_disjoint(&merged).is_err(), overlap);
        }
    }

    fn message(rows: &[Vec<(u32, f32)>], threads: usize) -> String {
        let owned = Owned::new(rows, 100);
        let mut accumulator = Accumulator::new(D_SAE, 2).unwrap();
        let before = parts(&accumulator);
        let error = collect_on(&mut accumulator, &[owned.view()], threads, &Cancel::new());
        assert_eq!(
            parts(&accumulator),
            before,
            "something of a refused batch was added"
        );
        error.unwrap_err().to_string()
    }

    #[test]
    fn bad_codes_are_refused_whole_and_by_row() {
        for threads in [1, 2] {
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
            let mut accumulator = Accumulator::new(D_SAE, 2).unwrap();
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
            let mut accumulator = Accumulator::new(D_SAE, 2).unwrap();
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
            let mut accumulator = Accumulator::new(D_SAE, 2).unwrap();
            let result = collect_on(&mut accumulator, &[owned.view()], threads, &cancel);
            assert!(matches!(result, Err(Error::Interrupted)));
            assert_eq!(
                parts(&accumulator),
                parts(&Accumulator::new(D_SAE, 2).unwrap())
            );
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
                let mut accumulator = Accumulator::new(D_SAE, 2).unwrap();
                collect(&mut accumulator, &[view], 1, &Cancel::new()).unwrap();
                found.push(parts(&accumulator));
            }
        }
        assert_eq!(found[0].0 .0[12..], [2.0, 1.0]);
        assert!(found.iter().all(|parts| *parts == found[0]));
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        for (d_sae, n) in [(8, 0), (8, 65_536), (usize::MAX / 2, 20), (1 << 50, 20)] {
            assert!(Accumulator::new(d_sae, n).is_err(), "{d_sae} {n}");
        }
        let mut a = Accumulator::new(8, 2).unwrap();
        assert!(a.merge(&Accumulator::new(8, 3).unwrap()).is_err());
        assert!(a.merge(&Accumulator::new(9, 2).unwrap()).is_err());
    }
}
