//! Code shards, counted and scattered into a [`Spill`].

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::spill::{Record, Spill};
use crate::examples::ShardFile;
use crate::shard::{CodeShardReader, Indices, Values};
use crate::{Cancel, Error, Result};

/// Rows that a thread takes at a time.
const UNIT_ROWS: usize = 8192;
/// The same where what they hold is written together: rows then rise over long parts of a bucket.
const WRITTEN_ROWS: usize = 1 << 16;
/// What each thread may hold back before it writes.
const WRITER_BYTES: usize = 16 << 20;

/// How often each feature is active in these shards, added to `counts`.
pub fn count_shards(
    files: &[ShardFile],
    counts: &mut [u64],
    threads: usize,
    cancel: &Cancel,
) -> Result<()> {
    let d_sae = counts.len();
    let make = || vec![0_u64; d_sae];
    let each = (UNIT_ROWS, threads);
    let found = each_unit(files, each, cancel, make, |counts, shard, _, rows| {
        each_code(shard, rows, |_, feature, bits| {
            if bits << 1 == 0 {
                return Ok(());
            }
            match counts.get_mut(feature as usize) {
                Some(count) => *count += 1,
                None => {
                    return Err(shard.bad(format!(
                        "feature index {feature} is not below d_sae = {d_sae}"
                    )))
                }
            }
            Ok(())
        })
    })?;
    for thread in found {
        for (count, more) in counts.iter_mut().zip(thread) {
            *count += more;
        }
    }
    Ok(())
}

/// Adds all activations of these shards. `ranks`: of each row (counted over all shards of the
/// folder) its number in the order of places; None: the same.
pub fn scatter_shards(
    spill: &Spill,
    files: &[ShardFile],
    ranks: Option<&[u32]>,
    threads: usize,
    cancel: &Cancel,
) -> Result<()> {
    let make = || spill.writer(WRITER_BYTES);
    each_unit(
        files,
        (WRITTEN_ROWS, threads),
        cancel,
        make,
        |writer, shard, first, rows| {
            each_code(shard, rows, |row, feature, bits| {
                if row % UNIT_ROWS == 0 {
                    cancel.check()?;
                }
                if bits << 1 == 0 {
                    return Ok(()); // a stored zero is no activation
                }
                let row = first + row as i64;
                let row = match ranks {
                    None => u32::try_from(row).ok(),
                    Some(ranks) => usize::try_from(row)
                        .ok()
                        .and_then(|row| ranks.get(row).copied()),
                };
                let Some(row) = row else {
                    return Err(shard.bad("holds rows that have no place".to_owned()));
                };
                writer.push(Record { feature, row, bits })
            })?;
            writer.flush()
        },
    )?;
    Ok(())
}

/// Calls `work(state, shard, its first row, rows)` on units of at most so many rows of all files,
/// each of so many threads with a state of its own; returns the states.
pub(super) fn each_unit<S: Send>(
    files: &[ShardFile],
    (unit, threads): (usize, usize),
    cancel: &Cancel,
    make: impl Fn() -> S,
    work: impl Fn(&mut S, &CodeShardReader, i64, Range<usize>) -> Result<()> + Sync,
) -> Result<Vec<S>> {
    let units: Vec<(usize, Range<usize>)> = files
        .iter()
        .enumerate()
        .flat_map(|(part, file)| {
            let cut = move |start| (part, start..file.rows.min(start + unit));
            (0..file.rows).step_by(unit).map(cut)
        })
        .collect();
    let next = AtomicUsize::new(0);
    let run = |state: &mut S| -> Result<()> {
        let mut open: Option<(usize, CodeShardReader)> = None;
        while let Some((part, rows)) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            cancel.check()?;
            let file = &files[*part];
            if open.as_ref().is_none_or(|(opened, _)| opened != part) {
                let shard = CodeShardReader::open(&file.path)?;
                if shard.rows() != file.rows {
                    return Err(shard.bad(format!(
                        "holds {} rows, but its manifest line says {}",
                        shard.rows(),
                        file.rows
                    )));
                }
                open = Some((*part, shard));
            }
            if let Some((_, shard)) = &open {
                work(state, shard, file.first_row, rows.clone()).inspect_err(|_| {
                    // The others need not finish what will be thrown away.
                    next.store(units.len(), Ordering::Relaxed);
                })?;
            }
        }
        Ok(())
    };
    let mut states: Vec<S> = (0..threads.clamp(1, units.len().max(1)))
        .map(|_| make())
        .collect();
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let run = &run;
        let helpers: Vec<_> = states
            .iter_mut()
            .map(|state| scope.spawn(move || run(state)))
            .collect();
        let join = |helper: std::thread::ScopedJoinHandle<'_, Result<()>>| match helper.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        helpers.into_iter().map(join).collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    Ok(states)
}

/// Calls `work(row of the shard, feature, bits of the strength)` for each code of `rows`.
pub(super) fn each_code(
    shard: &CodeShardReader,
    rows: Range<usize>,
    mut work: impl FnMut(usize, u32, u32) -> Result<()>,
) -> Result<()> {
    let view = shard.view();
    for row in rows {
        let span = view
            .span(row..row + 1)
            .map_err(|problem| shard.bad(problem))?;
        for at in span {
            let feature = match view.indices {
                Indices::U16(indices) => u32::from(indices[at]),
                Indices::U32(indices) => indices[at],
            };
            let bits = match view.values {
                Values::F32(values) => values[at].to_bits(),
                Values::Bf16(values) => u32::from(values[at]) << 16,
            };
            work(row, feature, bits)?;
        }
    }
    Ok(())
}

/// Rows are numbered in 32 bits here.
pub fn require_rows(rows: u64) -> Result<()> {
    if rows > u64::from(u32::MAX) {
        return Err(Error::InvalidArgument(format!(
            "{rows} tokens, expected at most {}: build several databases",
            u32::MAX
        )));
    }
    Ok(())
}
