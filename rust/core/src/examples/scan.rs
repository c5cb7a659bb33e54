//! One thread's part of a pass: what it has counted since it was last settled, and what it puts
//! aside until there is enough of it. An ordinary activation touches one line of the cache and takes
//! some twenty instructions.

use std::ops::Range;

use super::codes::{CodesView, Index, Seen, Value};
use super::kept::{Entry, Kept, BLOCK};
use super::lines::{Cell, Line, Lines};
use super::samples::Ranking;
use super::stage::{Layout, Staged, BEYOND, CHUNK, FIRST, LINE, OUTSIDE, SUM_TERMS};
use crate::shard::{Indices, Values};
use crate::simd::{self, Simd};
use crate::{Cancel, Error, Result};

/// What a cell has counted when its count wraps to 0.
const WRAP: u16 = 1 << 8;

/// Entries that a thread collects for a block before it adds them: enough that their number pays
/// for bringing the block into the cache, and few enough that what is kept rises soon.
const LOG: usize = 512;
/// How many entries ahead of the one that is added the CPU is told to fetch what it needs, and twice
/// as many where that lies.
const AHEAD: usize = 12;

/// What a thread counts, and puts aside until it is added to what is kept. What an activation must
/// reach to be put aside rises with what is kept, a little later than that: what is kept decides.
#[derive(Debug, Clone)]
pub(super) struct Scan {
    simd: Simd,
    d_sae: usize,
    ranking: Ranking,
    /// Whether rows are sampled.
    samples: bool,
    stamp: u16,
    lines: Lines,
    /// `[blocks]`.
    logs: Vec<Vec<Entry>>,
    staged: Box<Staged>,
    /// Activations that need more than counting.
    queue: Vec<Noted>,
}

/// A staged code that has been counted and needs more.
#[derive(Debug, Clone, Copy)]
struct Noted {
    place: u32,
    bits: u32,
    row: i64,
    /// It may enter the heap.
    strong: bool,
    /// It may enter its bin's sample.
    early: bool,
    /// Its cell has wrapped.
    wrapped: bool,
}

/// The row that is being scanned.
#[derive(Clone, Copy)]
struct Row {
    id: i64,
    stamp: u16,
    /// Of the row's rank; 0 if no rows are sampled.
    earliness: u8,
}

impl Scan {
    /// Has counted nothing. `base` is the window's first bin.
    pub fn new(simd: Simd, kept: &mut Kept, base: usize) -> Self {
        let (d_sae, keep) = (kept.d_sae(), kept.keep());
        let samples = keep.samples > 0;
        let mut lines = Lines::new(d_sae, samples, Layout::new(base));
        lines.learn(kept);
        Self {
            simd,
            d_sae,
            ranking: Ranking { seed: keep.seed },
            samples,
            stamp: 0,
            lines,
            logs: vec![Vec::new(); kept.blocks()],
            staged: Box::new(Staged::new()),
            queue: Vec::with_capacity(CHUNK),
        }
    }

    /// The window's first bin.
    pub fn base(&self) -> usize {
        self.lines.layout().base()
    }

    /// Checks and adds `rows`; what must be kept goes to `kept`, now or when the scan is settled.
    /// On an error part of them has been added: the scan and `kept` must be thrown away.
    pub fn add(
        &mut self,
        codes: &CodesView<'_>,
        rows: Range<usize>,
        kept: &Kept,
        cancel: &Cancel,
    ) -> Result<()> {
        let span = codes.span(rows.clone())?;
        let rows = (codes, &rows, span);
        let sound = match (codes.values(), codes.indices()) {
            (Values::F32(v), Indices::U16(i)) => self.walk(rows.clone(), v, i, kept, cancel)?,
            (Values::F32(v), Indices::U32(i)) => self.walk(rows.clone(), v, i, kept, cancel)?,
            (Values::Bf16(v), Indices::U16(i)) => self.walk(rows.clone(), v, i, kept, cancel)?,
            (Values::Bf16(v), Indices::U32(i)) => self.walk(rows.clone(), v, i, kept, cancel)?,
        };
        if sound {
            return Ok(());
        }
        // Which one it is, in words.
        codes.check(rows.1.clone(), &mut Seen::new(self.d_sae))?;
        Err(Error::InvalidArgument(
            "codes changed while they were read; collect the examples again".to_owned(),
        ))
    }

    /// [`Scan::add`] once the offsets of the rows are known to rise within the span. False if some
    /// code must be refused.
    fn walk<V: Value, I: Index>(
        &mut self,
        (codes, rows, span): (&CodesView<'_>, &Range<usize>, Range<usize>),
        values: &[V],
        indices: &[I],
        kept: &Kept,
        cancel: &Cancel,
    ) -> Result<bool> {
        let offsets = codes.row_offsets();
        // The row before the first; its end is where the first begins.
        let (mut next, mut end) = (rows.start, span.start);
        let mut row = self.next_row(0, kept);
        for start in span.clone().step_by(CHUNK) {
            cancel.check()?;
            let stop = span.end.min(start + CHUNK);
            let (v, i) = (&values[start..stop], &indices[start..stop]);
            let layout = self.lines.layout();
            let ordinary = self.staged.fill(self.simd, v, i, self.d_sae, layout);
            let mut at = start;
            while at < stop {
                while end <= at {
                    end = offsets[next + 1] as usize;
                    row = self.next_row(codes.row_id(next), kept);
                    next += 1;
                }
                let to = end.min(stop);
                let part = at - start..to - start;
                let sound = if ordinary {
                    self.count(row, part)
                } else {
                    self.count_any(row, &v[part.clone()], &i[part], kept)
                };
                if !sound {
                    return Ok(false);
                }
                at = to;
            }
            self.work_off(kept);
        }
        Ok(true)
    }

    #[inline]
    fn next_row(&mut self, id: i64, kept: &Kept) -> Row {
        if self.stamp == u16::MAX {
            // A feature is active once a row, so its sum has lost nothing.
            const { assert!(SUM_TERMS > u16::MAX as usize) };
            self.settle_sums(kept);
        }
        self.stamp += 1;
        Row {
            id,
            stamp: self.stamp,
            earliness: match self.samples {
                true => Ranking::earliness(self.ranking.rank(id)),
                false => 0,
            },
        }
    }

    /// Counts codes of a row, which lie at `span` of what is staged. False if one of their features
    /// was active in the row before.
    #[inline(never)]
    fn count(&mut self, row: Row, span: Range<usize>) -> bool {
        let lines = self.lines.as_mut_ptr().cast::<u8>();
        let places = &self.staged.places[span.clone()];
        let later = &self.staged.places[span.start + BEYOND..span.end + BEYOND];
        let terms = &self.staged.terms[span.clone()];
        let bits = &self.staged.bits[span];
        for (((&place, &later), &term), &bits) in places.iter().zip(later).zip(terms).zip(bits) {
            simd::fetch_from(lines.wrapping_add(later as usize));
            let at = place as usize;
            debug_assert!(at / LINE < self.d_sae && at % LINE >= FIRST);
            // SAFETY: `Staged::fill` has made places within the lines of features below d_sae, of
            // which there are as many. The reference is not used once the cell's is made.
            let line = unsafe { &mut *lines.add(at & !(LINE - 1)).cast::<Line>() };
            let before = line.sum;
            if before as u16 == row.stamp {
                return false;
            }
            line.sum = (before & !u64::from(u16::MAX)).wrapping_add(term + u64::from(row.stamp));
            let strong = bits >= line.floor;
            // SAFETY: places are those of cells (the window's and the one outside) of a line, and
            // nothing else refers to it now.
            let cell = unsafe { &mut *lines.add(at).cast::<Cell>() };
            cell.count = cell.count.wrapping_add(1);
            let (early, wrapped) = (row.earliness >= cell.level, cell.count == 0);
            if strong | early | wrapped {
                note(
                    &mut self.queue,
                    Noted {
                        place,
                        bits,
                        row: row.id,
                        strong,
                        early,
                        wrapped,
                    },
                );
            }
        }
        true
    }

    /// Counts any codes of a row, one at a time. False if one must be refused.
    #[cold]
    fn count_any<V: Value, I: Index>(
        &mut self,
        row: Row,
        values: &[V],
        indices: &[I],
        kept: &Kept,
    ) -> bool {
        for (value, index) in values.iter().zip(indices) {
            let (strength, feature) = (value.strength(), index.feature());
            let Some(line) = self.lines.get_mut(feature) else {
                return false;
            };
            if !(0.0..f32::INFINITY).contains(&strength) {
                return false;
            }
            // A stored zero is no activation.
            if strength == 0.0 {
                continue;
            }
            if line.sum as u16 == row.stamp {
                return false;
            }
            line.sum = line.sum & !u64::from(u16::MAX) | u64::from(row.stamp);
            let entry = Entry::whole(feature, strength, row.id);
            self.log(feature, entry, kept);
        }
        true
    }

    /// Does what is queued.
    fn work_off(&mut self, kept: &Kept) {
        let mut queue = std::mem::take(&mut self.queue);
        for noted in queue.drain(..) {
            let (place, strength) = (noted.place as usize, f32::from_bits(noted.bits));
            let (feature, row) = (place / LINE, noted.row);
            if place % LINE == OUTSIDE {
                self.log(feature, Entry::whole(feature, strength, row), kept);
                continue;
            }
            if noted.wrapped {
                self.log(feature, Entry::counts(feature, strength, WRAP), kept);
            }
            if noted.strong || noted.early {
                let (strong, early) = (noted.strong, noted.early);
                let entry = Entry::candidate(feature, strength, row, strong, early);
                self.log(feature, entry, kept);
            }
        }
        self.queue = queue;
    }

    #[inline]
    fn log(&mut self, feature: usize, entry: Entry, kept: &Kept) {
        let block = feature / BLOCK;
        self.logs[block].push(entry);
        if self.logs[block].len() >= LOG {
            self.hand_over(block, kept);
        }
    }

    /// Adds a block's entries to what is kept of it.
    #[inline(never)]
    fn hand_over(&mut self, block: usize, kept: &Kept) {
        let mut log = std::mem::take(&mut self.logs[block]);
        let first = kept.features(block).start;
        let mut kept = kept.lock(block);
        for (at, entry) in log.iter().enumerate() {
            if let Some(later) = log.get(at + 2 * AHEAD) {
                kept.fetch_places(later);
                self.lines.fetch(first + later.feature());
            }
            if let Some(later) = log.get(at + AHEAD) {
                kept.fetch(later);
            }
            kept.add(entry);
            self.lines.learn_of(first, &kept, entry);
        }
        drop(kept);
        log.clear();
        self.logs[block] = log;
    }

    /// Adds the lines' sums to what is kept, and counts rows from 0 again.
    fn settle_sums(&mut self, kept: &Kept) {
        for block in 0..kept.blocks() {
            let features = kept.features(block);
            self.lines.settle_sums(features, &mut kept.lock(block));
        }
        self.stamp = 0;
    }

    /// Adds all that was counted and put aside to what is kept, and counts from 0 again.
    pub fn settle(&mut self, kept: &Kept) {
        self.settle_sums(kept);
        for block in 0..kept.blocks() {
            self.hand_over(block, kept);
            let features = kept.features(block);
            self.lines.settle_counts(features, &mut kept.lock(block));
        }
    }
}

/// Puts aside a code that needs more than counting.
#[cold]
#[inline(never)]
fn note(queue: &mut Vec<Noted>, noted: Noted) {
    queue.push(noted);
}
