//! One pass over codes, on several threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::accumulator::Accumulator;
use super::codes::{CodesView, Seen};
use super::histogram::{bin_of, BINS};
use super::kept::Kept;
use super::scan::{changed, Scan};
use super::shards::{OpenShards, ShardFile};
use super::stage::WINDOW;
use crate::shard::Values;
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
pub(super) fn collect_on(
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
    let scan_unit = |scan: &mut Scan, kept: &Kept, unit: &Unit| {
        scan.add(&views[unit.part], unit.rows.clone(), kept, cancel)
    };
    let d_sae = accumulator.d_sae();
    run(accumulator, &units, threads, base, scan_unit, |unit| {
        cancel.check()?;
        let view = &views[unit.part];
        view.check(unit.rows.clone(), &mut Seen::new(d_sae))
            .map(drop)
    })
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
    let shards = OpenShards::new(files, UNIT_ROWS);
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
    let scan_unit = |scan: &mut Scan, kept: &Kept, unit: &Unit| {
        cancel.check()?;
        let shard = shards.get(unit.part)?;
        shards.fetch(unit.part + 1);
        let view = CodesView::of_shard(&shard, files[unit.part].first_row)?;
        view.map(unit.rows.clone());
        scan.add(&view, unit.rows.clone(), kept, cancel)?;
        shards.done(unit.part);
        Ok(())
    };
    let d_sae = accumulator.d_sae();
    run(accumulator, &units, threads, base, scan_unit, |unit| {
        cancel.check()?;
        let shard = shards.get(unit.part)?;
        let view = CodesView::of_shard(&shard, files[unit.part].first_row)?;
        view.check(unit.rows.clone(), &mut Seen::new(d_sae))?;
        if unit.rows.end == files[unit.part].rows {
            shards.close(unit.part);
        }
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
    check_unit: impl Fn(&Unit) -> Result<()> + Sync,
) -> Result<()> {
    let mut scans = accumulator.take_scans(threads, base)?;
    // Apart from what was there before, which an error leaves as it was.
    let kept = Kept::new(accumulator.d_sae(), accumulator.keep());
    let next = AtomicUsize::new(0);
    let before = &accumulator.kept;
    let work = |scan: &mut Scan| -> Result<()> {
        scan.learn(before);
        while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = scan_unit(scan, &kept, unit) {
                // The others need not finish what will be thrown away.
                next.store(units.len(), Ordering::Relaxed);
                return Err(error);
            }
        }
        if scan.settle(&kept) {
            return Ok(());
        }
        // Which row it was, in words.
        units.iter().try_for_each(&check_unit)?;
        Err(changed())
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
