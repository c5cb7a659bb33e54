//! One pass over codes, on several threads.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::accumulator::Accumulator;
use super::codes::{CodesView, Seen};
use super::histogram::{bin_of, BINS};
use super::kept::Kept;
use super::scan::Scan;
use super::stage::WINDOW;
use crate::shard::{CodeShardReader, Values};
use crate::{Cancel, Result};

/// Rows that a thread takes at a time.
const UNIT_ROWS: usize = 4096;
/// Below this many codes (hundredths of a second) for each thread, settling what the threads have
/// counted costs more than they save.
const MIN_NNZ_PER_THREAD: usize = 1 << 24;
/// Codes that are checked between two looks at the cancel flag.
const BLOCK_NNZ: i64 = 1 << 14;
/// Codes that are looked at to find out which strengths are usual.
const LOOK_NNZ: usize = 1 << 14;

/// Adds all codes of all views to `accumulator`, on up to `threads` threads. On an error, or when
/// cancelled, `accumulator` is as it was.
pub fn collect(
    accumulator: &mut Accumulator,
    views: &[CodesView<'_>],
    threads: usize,
    cancel: &Cancel,
) -> Result<()> {
    let nnz: usize = views.iter().map(CodesView::nnz).sum();
    let wanted = threads.clamp(1, (nnz / MIN_NNZ_PER_THREAD).max(1));
    if wanted == 1 && nnz < 2 * MIN_NNZ_PER_THREAD {
        return add_directly(accumulator, views, cancel);
    }
    collect_on(accumulator, views, wanted, cancel)
}

/// Checks everything before adding anything, so that the accumulator needs no settling on account
/// of this call: many small batches are added that way.
fn add_directly(
    accumulator: &mut Accumulator,
    views: &[CodesView<'_>],
    cancel: &Cancel,
) -> Result<()> {
    let mut seen = Seen::new(accumulator.d_sae());
    for view in views {
        for unit in cut(0, view.rows()) {
            for block in blocks(view, unit.rows)? {
                cancel.check()?;
                view.check(block, &mut seen)?;
            }
        }
    }
    let base = || views.iter().map(usual_bins).max().unwrap_or_default().1;
    if let (Some(scan), kept) = accumulator.scan(base)? {
        for view in views {
            // It was checked, so nothing fails; it is short, so nobody cancels it.
            scan.add(view, 0..view.rows(), kept, &Cancel::new())?;
        }
    }
    accumulator.scanned += views.iter().map(|view| view.rows() as u64).sum::<u64>();
    Ok(())
}

/// [`collect`] on exactly this many threads, in one walk.
fn collect_on(
    accumulator: &mut Accumulator,
    views: &[CodesView<'_>],
    threads: usize,
    cancel: &Cancel,
) -> Result<()> {
    let units: Vec<_> = views
        .iter()
        .enumerate()
        .flat_map(|(part, view)| cut(part, view.rows()))
        .collect();
    let base = || views.iter().map(usual_bins).max().unwrap_or_default().1;
    run(accumulator, &units, threads, base, |scan, kept, unit| {
        scan.add(&views[unit.part], unit.rows.clone(), kept, cancel)
    })
}

/// A code shard to be read.
#[derive(Debug, Clone)]
pub struct ShardFile {
    /// Where it is.
    pub path: PathBuf,
    /// The id of its first row.
    pub first_row: i64,
    /// How many rows the manifest lists.
    pub rows: usize,
}

/// [`collect`] from shards, of which only those are mapped that threads are at work on (and the
/// one after them, which the system is told to fetch).
pub fn collect_shards(
    accumulator: &mut Accumulator,
    files: &[ShardFile],
    threads: usize,
    cancel: &Cancel,
) -> Result<()> {
    let units: Vec<_> = files
        .iter()
        .enumerate()
        .flat_map(|(part, file)| cut(part, file.rows))
        .collect();
    let shards = OpenShards::new(files);
    // A file of no rows makes no unit, but must be there all the same.
    for (part, _) in files.iter().enumerate().filter(|(_, file)| file.rows == 0) {
        shards.get(part)?;
        shards.close(part);
    }
    let base = || {
        let first = units.first().map(|unit| shards.get(unit.part));
        match first {
            Some(Ok(shard)) => CodesView::of_shard(&shard, 0).map_or(0, |view| usual_bins(&view).1),
            _ => 0,
        }
    };
    let threads = threads.clamp(1, units.len().max(1));
    run(accumulator, &units, threads, base, |scan, kept, unit| {
        cancel.check()?;
        let shard = shards.get(unit.part)?;
        shards.fetch(unit.part + 1);
        let view = CodesView::of_shard(&shard, files[unit.part].first_row)?;
        scan.add(&view, unit.rows.clone(), kept, cancel)?;
        shards.done(unit.part);
        Ok(())
    })
}

/// Rows of a view or file, that one thread scans.
#[derive(Debug, Clone)]
struct Unit {
    part: usize,
    rows: Range<usize>,
}

/// Cuts a part of that many rows.
fn cut(part: usize, rows: usize) -> impl Iterator<Item = Unit> {
    let range = move |start| start..rows.min(start + UNIT_ROWS);
    (0..rows).step_by(UNIT_ROWS).map(move |start| Unit {
        part,
        rows: range(start),
    })
}

/// Has the threads scan all units, in no particular order; all is added or nothing.
fn run(
    accumulator: &mut Accumulator,
    units: &[Unit],
    threads: usize,
    base: impl FnOnce() -> usize,
    scan_unit: impl Fn(&mut Scan, &Kept, &Unit) -> Result<()> + Sync,
) -> Result<()> {
    let mut scans = accumulator.take_scans(threads, base)?;
    // Apart from what was there before, which an error leaves as it was.
    let kept = Kept::new(accumulator.d_sae(), accumulator.keep());
    let next = AtomicUsize::new(0);
    let work = |scan: &mut Scan| -> Result<()> {
        while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = scan_unit(scan, &kept, unit) {
                // The others need not finish what will be thrown away.
                next.store(units.len(), Ordering::Relaxed);
                return Err(error);
            }
            scan.adapt(&kept);
        }
        scan.settle(&kept);
        Ok(())
    };
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let work = &work;
        let mut rest = scans.iter_mut();
        let own = rest.next();
        let helpers: Vec<_> = rest.map(|scan| scope.spawn(move || work(scan))).collect();
        let mut results: Vec<_> = own.map(work).into_iter().collect();
        for helper in helpers {
            match helper.join() {
                Ok(result) => results.push(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    });
    results.into_iter().collect::<Result<()>>()?;
    accumulator.put_back(scans, kept);
    accumulator.scanned += units.iter().map(|unit| unit.rows.len() as u64).sum::<u64>();
    Ok(())
}

/// How many of a view's first strengths fall into the best window of bins, and its first bin.
fn usual_bins(view: &CodesView<'_>) -> (usize, usize) {
    let mut counts = [0_usize; BINS];
    let mut count = |strength: f32| {
        if strength > 0.0 && strength.is_finite() {
            counts[bin_of(strength)] += 1;
        }
    };
    match view.values() {
        Values::F32(values) => values.iter().take(LOOK_NNZ).for_each(|&value| count(value)),
        Values::Bf16(values) => values
            .iter()
            .take(LOOK_NNZ)
            .for_each(|&bits| count(f32::from_bits(u32::from(bits) << 16))),
    }
    (0..=BINS - WINDOW)
        .map(|base| (counts[base..base + WINDOW].iter().sum(), base))
        .max()
        .unwrap_or_default()
}

/// Shards, each mapped while there is work on it.
struct OpenShards<'f> {
    files: &'f [ShardFile],
    shards: Vec<Mutex<Option<Arc<CodeShardReader>>>>,
    /// Units of each that are yet to be done.
    left: Vec<AtomicUsize>,
}

impl<'f> OpenShards<'f> {
    fn new(files: &'f [ShardFile]) -> Self {
        let units = |file: &ShardFile| AtomicUsize::new(file.rows.div_ceil(UNIT_ROWS));
        Self {
            files,
            shards: files.iter().map(|_| Mutex::new(None)).collect(),
            left: files.iter().map(units).collect(),
        }
    }

    /// Shard `part`, opened by the first who asks.
    fn get(&self, part: usize) -> Result<Arc<CodeShardReader>> {
        let mut slot = self.shards[part]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(shard) = &*slot {
            return Ok(Arc::clone(shard));
        }
        let file = &self.files[part];
        let shard = CodeShardReader::open(&file.path)?;
        if shard.rows() != file.rows {
            return Err(shard.bad(format!(
                "holds {} rows, but its manifest line says {}",
                shard.rows(),
                file.rows
            )));
        }
        shard.will_be_read();
        let shard = Arc::new(shard);
        *slot = Some(Arc::clone(&shard));
        Ok(shard)
    }

    /// Opens shard `part` early, so that the system fetches it meanwhile. What is wrong with it is
    /// told when its turn comes.
    fn fetch(&self, part: usize) {
        if part < self.files.len() && self.left[part].load(Ordering::Relaxed) > 0 {
            let _ = self.get(part);
        }
    }

    /// A unit of shard `part` is done.
    fn done(&self, part: usize) {
        if self.left[part].fetch_sub(1, Ordering::AcqRel) == 1 {
            self.close(part);
        }
    }

    fn close(&self, part: usize) {
        *self.shards[part]
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::examples::samples::Ranking;
    use crate::examples::{sum, Keep, Parts};
    use crate::shard::Indices;
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
            entries.resize(n, super::super::heap::UNUSED);
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

    #[test]
    fn long_runs_close_cells_and_overflow_counters() {
        // Two blocks of features; one that is always active, with one strength more often than a
        // second count holds, and more rows than stamps. The others are ever rarer.
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
        for threads in [1, 2] {
            let mut at_once = accumulator_of(d_sae, 3);
            let views = owned.each_ref().map(Owned::view);
            collect_on(&mut at_once, &views, threads, &Cancel::new()).unwrap();
            assert!(parts(&mut at_once) == expected, "{threads} threads");
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
}
