//! A bucket of a [`Spill`], sorted, as columns.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::columns::{zeroed, Activations, Columns, Room};
use super::page::{Options, Pages, Texts};
use super::spill::{Record, Spill, STRETCH};
use crate::{Cancel, Error, Result};

/// Parts into which a bucket is cut for each thread.
const PARTS: usize = 8;
/// Runs of fewer records on average are not put in order.
const SHORT_RUN: usize = 64;

/// How [`gather`] goes about it.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// What is kept of each feature.
    pub options: Options,
    /// Whether the activations are wanted too.
    pub activations: bool,
    /// At most so many; they don't change the result.
    pub threads: usize,
}

/// The columns of a bucket.
pub fn gather(
    spill: &Spill,
    bucket: usize,
    texts: Texts<'_>,
    work: Work,
    cancel: &Cancel,
) -> Result<Columns> {
    let Work {
        options,
        activations,
        threads,
    } = work;
    if bucket >= spill.buckets() {
        return Err(Error::InvalidArgument(format!(
            "there is no bucket {bucket} of {}",
            spill.buckets()
        )));
    }
    let features = spill.features(bucket);
    let (mut keys, ends) = by_feature(spill, bucket, cancel)?;
    let mut all = Columns::default();
    if activations {
        all.activations = Activations::zeroed(keys.len())
            .ok_or_else(|| spill.too_large(bucket, keys.len() as u64))?;
    }
    let next = AtomicUsize::new(0);
    let parts = cut(&mut keys, &ends, threads * PARTS, all.activations.rest());
    let slots: Vec<Mutex<(Part<'_>, Columns)>> = parts
        .into_iter()
        .map(|part| Mutex::new((part, Columns::default())))
        .collect();
    let rows = texts.places.rows();
    let work = || -> Result<()> {
        let mut pages = Pages::new(texts, options);
        while let Some(slot) = slots.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            let (part, columns) = &mut *slot;
            let (mut rest, mut room) = (&mut *part.keys, part.room.rest());
            for (at, &size) in part.sizes.iter().enumerate() {
                cancel.check()?;
                let (keys, others) = rest.split_at_mut(size);
                rest = others;
                let feature = features.start + (part.first + at) as u32;
                let page = if activations {
                    let written = room.take(size);
                    pages.make(feature, keys, cancel, |number, spot, strength| {
                        written.feature[number] = feature as i32;
                        written.sequence[number] = spot.sequence;
                        written.position[number] = spot.position;
                        written.strength[number] = strength;
                    })
                } else {
                    pages.make(feature, keys, cancel, |_, _, _| ())
                };
                columns.push(feature, &page?, rows);
            }
        }
        Ok(())
    };
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let helpers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let join = |helper: std::thread::ScopedJoinHandle<'_, Result<()>>| match helper.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        helpers.into_iter().map(join).collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    let made: Vec<Columns> = slots
        .into_iter()
        .map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner).1)
        .collect();
    for columns in made {
        all.append(columns);
    }
    Ok(all)
}

/// The records of a bucket as keys `row << 32 | bits`, feature after feature, and where each
/// feature's end.
fn by_feature(spill: &Spill, bucket: usize, cancel: &Cancel) -> Result<(Vec<u64>, Vec<usize>)> {
    let features = spill.features(bucket);
    let records = spill.read(bucket, cancel)?;
    let mut ends = vec![0_usize; features.len()];
    for (at, record) in records.iter().enumerate() {
        if at % STRETCH == 0 {
            cancel.check()?;
        }
        match ends.get_mut(record.feature.wrapping_sub(features.start) as usize) {
            Some(count) => *count += 1,
            None => {
                return Err(Error::InvalidArgument(format!(
                    "bucket {bucket} holds feature {}, expected {features:?}: the file was \
                     damaged; begin anew",
                    record.feature
                )))
            }
        }
    }
    let mut start = 0;
    for end in &mut ends {
        let count = *end;
        *end = start;
        start += count;
    }
    let mut keys =
        zeroed(records.len()).ok_or_else(|| spill.too_large(bucket, records.len() as u64))?;
    for run in runs(&records) {
        for some in records[run].chunks(STRETCH) {
            cancel.check()?;
            for record in some {
                let at = &mut ends[(record.feature - features.start) as usize];
                keys[*at] = u64::from(record.row) << 32 | u64::from(record.bits);
                *at += 1;
            }
        }
    }
    Ok((keys, ends))
}

/// Parts within which rows rise, in the order of their first rows. What was written together is of
/// neighbouring rows, so that mostly they don't overlap and the keys of each feature come out sorted.
fn runs(records: &[Record]) -> Vec<Range<usize>> {
    let most = records.len() / SHORT_RUN;
    let whole = std::iter::once(0..records.len());
    let mut starts = vec![0];
    for (at, pair) in records.windows(2).enumerate() {
        if pair[1].row < pair[0].row {
            starts.push(at + 1);
            if starts.len() > most {
                return whole.collect(); // too many to be worth sorting
            }
        }
    }
    let row = |at: &usize| records.get(*at).map(|record| record.row);
    let mut firsts: Vec<_> = starts.iter().filter_map(row).collect();
    firsts.sort_unstable();
    // A run goes on over the next writing if that is of later rows: others may lie between them.
    let mut runs = Vec::with_capacity(starts.len());
    let ends = starts[1..].iter().copied().chain([records.len()]);
    for (mut start, end) in starts.iter().copied().zip(ends) {
        let inside = firsts.partition_point(|&first| Some(first) <= row(&start));
        for &first in &firsts[inside..] {
            let cut = start + records[start..end].partition_point(|record| record.row < first);
            if cut == end {
                break;
            }
            if cut > start {
                runs.push(start..cut);
                start = cut;
            }
        }
        runs.push(start..end);
        if runs.len() > most {
            return whole.collect();
        }
    }
    runs.sort_by_key(|run| row(&run.start));
    runs
}

/// Consecutive features.
struct Part<'k> {
    first: usize,
    sizes: Vec<usize>,
    keys: &'k mut [u64],
    /// Where their activations are written to, if at all.
    room: Room<'k>,
}

fn cut<'k>(
    mut keys: &'k mut [u64],
    ends: &[usize],
    parts: usize,
    mut room: Room<'k>,
) -> Vec<Part<'k>> {
    let wanted = keys.len().div_ceil(parts.max(1)).max(1);
    let mut made = Vec::new();
    let (mut start, mut first, mut sizes) = (0, 0, Vec::new());
    for (feature, &end) in ends.iter().enumerate() {
        let before: usize = sizes.iter().sum();
        sizes.push(end - start);
        start = end;
        if before + sizes[sizes.len() - 1] >= wanted || feature + 1 == ends.len() {
            let taken: usize = sizes.iter().sum();
            let (head, rest) = keys.split_at_mut(taken);
            keys = rest;
            made.push(Part {
                first,
                sizes: std::mem::take(&mut sizes),
                keys: head,
                room: room.take(taken),
            });
            first = feature + 1;
        }
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(row: u32) -> Record {
        Record {
            feature: 0,
            row,
            bits: 1,
        }
    }

    #[test]
    fn runs_are_all_records_by_their_first_rows() {
        let rows = |first: u32| (first..first + 300).map(record);
        let records: Vec<_> = [900, 300, 1200, 0].into_iter().flat_map(rows).collect();
        let found: Vec<u32> = runs(&records)
            .into_iter()
            .flat_map(|run| records[run].iter().map(|record| record.row))
            .collect();
        let sorted: Vec<u32> = (0..600).chain(900..1500).collect();
        assert_eq!(found, sorted);
    }

    #[test]
    fn short_runs_stay_as_they_are() {
        for size in [0, 1, 2, 500] {
            let records: Vec<_> = (0..size).rev().map(record).collect();
            assert_eq!(runs(&records), vec![0..size as usize; 1]);
        }
    }
}
