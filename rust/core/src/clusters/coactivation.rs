//! How often each pair of features is active on the same row, exactly.
//!
//! Adding one to a cell of a large table for each pair of each row would wait for memory each time.
//! So rows are taken in blocks, and a block feature by feature: those active together with one
//! feature are counted in one short row of numbers that stays in the cache, which then is added to
//! the table. A pair is counted at its larger feature: features come in rising order, and each one's
//! rows already list the smaller ones.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::scatter::each_code;
use crate::examples::ShardFile;
use crate::shard::CodeShardReader;
use crate::simd::fetch;
use crate::{Cancel, Error, Result};

/// Rows of the table that one lock guards.
const STRIPE: usize = 64;
/// The lists of a feature's rows lie anywhere: they are fetched so many rows before they are read.
const AHEAD: usize = 6;
/// Entries of a cache line.
const LINE: usize = 16;

/// Counts of pairs (a, b), b < a, for the features a of a range.
#[derive(Debug)]
pub struct Coactivation {
    d_sae: usize,
    range: Range<usize>,
    /// Of each [`STRIPE`] features: rows of as many cells as the feature's number.
    stripes: Vec<Mutex<Stripe>>,
}

#[derive(Debug, Default)]
struct Stripe {
    /// The lower 16 bits.
    low: Vec<u16>,
    /// What is above them, where anything is: by cell.
    high: HashMap<u32, u32>,
}

/// How many cells the rows of features `range` have.
pub fn cells(range: &Range<usize>) -> usize {
    range.clone().sum()
}

/// Ranges of features whose tables take at most `bytes` each (or hold one [`STRIPE`]).
pub fn tiles(d_sae: usize, bytes: usize) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut start = 0;
    while start < d_sae {
        let mut end = start;
        while end < d_sae {
            let next = (end + STRIPE).min(d_sae);
            if end > start && cells(&(start..next)) * 2 > bytes {
                break;
            }
            end = next;
        }
        found.push(start..end);
        start = end;
    }
    found
}

impl Coactivation {
    /// Has counted nothing.
    pub fn new(d_sae: usize, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > d_sae || d_sae > i32::MAX as usize {
            return Err(Error::InvalidArgument(format!(
                "features {range:?} are not of d_sae = {d_sae}"
            )));
        }
        let mut stripes = Vec::new();
        for first in range.clone().step_by(STRIPE) {
            let size = cells(&(first..range.end.min(first + STRIPE)));
            let mut low: Vec<u16> = Vec::new();
            if u32::try_from(size).is_err() || low.try_reserve_exact(size).is_err() {
                return Err(Error::InvalidArgument(format!(
                    "counting pairs of features {range:?} needs more memory than this machine \
                     gives; ask for less at a time"
                )));
            }
            low.resize(size, 0);
            stripes.push(Mutex::new(Stripe {
                low,
                high: HashMap::new(),
            }));
        }
        Ok(Self {
            d_sae,
            range,
            stripes,
        })
    }

    /// The features whose rows are counted.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// How many features.
    pub fn d_sae(&self) -> usize {
        self.d_sae
    }

    /// Adds the codes of shards, blocks of at most `block` rows. On an error part of them has been
    /// added: throw this away.
    pub fn add_shards(
        &self,
        files: &[ShardFile],
        block: usize,
        threads: usize,
        cancel: &Cancel,
    ) -> Result<()> {
        let block = block.clamp(1, 1 << 24);
        let blocks: Vec<(PathBuf, Range<usize>)> = files
            .iter()
            .flat_map(|file| {
                let cut = move |start| (file.path.clone(), start..file.rows.min(start + block));
                (0..file.rows).step_by(block).map(cut)
            })
            .collect();
        let next = std::sync::atomic::AtomicUsize::new(0);
        let work = || -> Result<()> {
            let mut scratch = Scratch::new(self.d_sae);
            loop {
                let at = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let Some((path, rows)) = blocks.get(at) else {
                    return Ok(());
                };
                let shard = CodeShardReader::open(path)?;
                self.add_block(&shard, rows.clone(), &mut scratch, cancel)?;
            }
        };
        let results: Vec<Result<()>> = std::thread::scope(|scope| {
            let count = threads.clamp(1, blocks.len().max(1));
            let helpers: Vec<_> = (0..count).map(|_| scope.spawn(work)).collect();
            let join = |helper: std::thread::ScopedJoinHandle<'_, Result<()>>| match helper.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            helpers.into_iter().map(join).collect()
        });
        results.into_iter().collect()
    }

    fn add_block(
        &self,
        shard: &CodeShardReader,
        rows: Range<usize>,
        scratch: &mut Scratch,
        cancel: &Cancel,
    ) -> Result<()> {
        scratch.load(shard, rows, self.range.end, cancel)?;
        let Scratch {
            starts,
            places,
            begins,
            ends,
            lists,
            counts,
        } = scratch;
        let mut stripe_cell = 0;
        for feature in 0..self.range.end {
            let at = feature.wrapping_sub(self.range.start);
            if feature >= self.range.start && at % STRIPE == 0 {
                cancel.check()?;
                stripe_cell = 0;
            }
            let active = &places[starts[feature]..starts[feature + 1]];
            if feature < self.range.start {
                for &row in active {
                    let row = row as usize;
                    lists[ends[row] as usize] = feature as u32;
                    ends[row] += 1;
                }
                continue;
            }
            for (number, &row) in active.iter().enumerate() {
                if let Some(&soon) = active.get(number + AHEAD) {
                    let soon = soon as usize;
                    let (mut at, end) = (begins[soon] as usize, ends[soon] as usize);
                    while at <= end {
                        fetch(lists, at);
                        at += LINE;
                    }
                    fetch(lists, end);
                }
                let row = row as usize;
                let (start, end) = (begins[row] as usize, ends[row] as usize);
                for &other in &lists[start..end] {
                    // SAFETY: lists hold features that came before, so they are below `feature`,
                    // and there are as many counts as features.
                    unsafe { *counts.get_unchecked_mut(other as usize) += 1 };
                }
                lists[end] = feature as u32;
                ends[row] += 1;
            }
            if !active.is_empty() {
                self.settle(at / STRIPE, stripe_cell, &mut counts[..feature]);
            }
            stripe_cell += feature;
        }
        Ok(())
    }

    /// Adds the counts of one feature to its row, which begins at `cell` of its stripe.
    fn settle(&self, stripe: usize, cell: usize, counts: &mut [u32]) {
        let mut stripe = self.stripes[stripe]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Stripe { low, high } = &mut *stripe;
        let row = &mut low[cell..cell + counts.len()];
        let mut over = 0;
        for (total, count) in row.iter_mut().zip(&*counts) {
            let sum = u32::from(*total) + count;
            over |= sum >> 16;
            *total = sum as u16;
        }
        if over != 0 {
            for (at, (total, &count)) in row.iter().zip(&*counts).enumerate() {
                // What was there before, by the sum's lower bits.
                let before = u32::from(total.wrapping_sub(count as u16));
                let above = (before + count) >> 16;
                if above > 0 {
                    *high.entry((cell + at) as u32).or_default() += above;
                }
            }
        }
        counts.fill(0);
    }

    /// Copies the counts of feature `a` with those below it to `row`, which has `a` places.
    pub fn row(&self, a: usize, row: &mut Vec<u32>) {
        row.clear();
        if !self.range.contains(&a) {
            return;
        }
        let at = a - self.range.start;
        let first = a - at % STRIPE;
        let cell = cells(&(first..a));
        let stripe = self.stripes[at / STRIPE]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        row.extend(stripe.low[cell..cell + a].iter().map(|&n| u32::from(n)));
        if !stripe.high.is_empty() {
            for (b, total) in row.iter_mut().enumerate() {
                if let Some(above) = stripe.high.get(&((cell + b) as u32)) {
                    *total += above << 16;
                }
            }
        }
    }
}

/// What one thread needs to turn a block on its side.
#[derive(Debug)]
struct Scratch {
    /// `[features + 1]`: the places of each feature's rows.
    starts: Vec<usize>,
    /// The rows of each feature.
    places: Vec<u32>,
    /// Where the list of each row begins, and where it ends so far.
    begins: Vec<u32>,
    ends: Vec<u32>,
    /// The features of each row that have come so far.
    lists: Vec<u32>,
    counts: Vec<u32>,
}

impl Scratch {
    fn new(d_sae: usize) -> Self {
        Self {
            starts: Vec::new(),
            places: Vec::new(),
            begins: Vec::new(),
            ends: Vec::new(),
            lists: Vec::new(),
            counts: vec![0; d_sae],
        }
    }

    /// Takes the features below `limit` of a block's rows.
    fn load(
        &mut self,
        shard: &CodeShardReader,
        rows: Range<usize>,
        limit: usize,
        cancel: &Cancel,
    ) -> Result<()> {
        let d_sae = self.counts.len();
        self.starts.clear();
        self.starts.resize(limit + 1, 0);
        self.begins.clear();
        let mut total = 0_u32;
        for row in rows.clone() {
            if row % 4096 == 0 {
                cancel.check()?;
            }
            self.begins.push(total);
            each_code(shard, row..row + 1, |_, feature, bits| {
                if feature as usize >= d_sae {
                    return Err(shard.bad(format!(
                        "feature index {feature} is not below d_sae = {d_sae}"
                    )));
                }
                if (feature as usize) < limit && bits << 1 != 0 {
                    self.starts[feature as usize + 1] += 1;
                    total = total.checked_add(1).ok_or_else(|| {
                        Error::InvalidArgument(
                            "a block of rows holds 2^32 codes; ask for smaller ones".to_owned(),
                        )
                    })?;
                }
                Ok(())
            })?;
        }
        for feature in 0..limit {
            self.starts[feature + 1] += self.starts[feature];
        }
        self.ends.clone_from(&self.begins);
        self.lists.clear();
        self.lists.resize(total as usize, 0);
        self.places.clear();
        self.places.resize(total as usize, 0);
        let (mut next, starts, places) = (self.starts.clone(), &self.starts, &mut self.places);
        for (at, row) in rows.enumerate() {
            each_code(shard, row..row + 1, |_, feature, bits| {
                let feature = feature as usize;
                if feature >= limit || bits << 1 == 0 {
                    return Ok(());
                }
                let place = next[feature];
                if place > starts[feature] && places[place - 1] == at as u32 {
                    return Err(
                        shard.bad(format!("row {row} names feature {feature} more than once"))
                    );
                }
                places[place] = at as u32;
                next[feature] = place + 1;
                Ok(())
            })?;
        }
        Ok(())
    }
}
