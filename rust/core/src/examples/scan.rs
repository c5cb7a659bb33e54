//! One thread's part of a pass: what it has counted since it was last settled, and what it puts
//! aside until there is enough of it. An ordinary activation touches half a line of the cache.

use std::ops::Range;

use super::codes::{CodesView, Index, Seen, Value};
use super::kept::{Entry, Kept, BLOCK};
use super::lines::{class_of, stamped, Line, Lines, CLASS, ONE};
use super::queue::{Queue, AT_ONCE, ROOM, WRAPPED};
use super::samples::Ranking;
#[cfg(target_arch = "x86_64")]
use super::scatter::{Scatter, Stop, WIDTH};
use super::stage::{Layout, Staged, BEYOND, CHUNK, FIRST, LINE, OUTSIDE, SUM, SUM_TERMS};
use crate::shard::{Indices, Values};
use crate::simd::{self, Simd};
use crate::{Cancel, Error, Result};

/// Entries that a thread collects for a block before it adds them: enough that their number pays
/// for bringing the block into the cache, and few enough that what is kept rises soon.
const LOG: usize = 512;
/// How many entries ahead of the one that is added the CPU is told to fetch what it needs, and twice
/// as many where that lies.
const AHEAD: usize = 12;
/// Rows that are scanned at a time.
const ROWS: usize = 1024;

/// What a thread counts, and puts aside until it is added to what is kept. What an activation must
/// reach to be put aside rises with what is kept, a little later than that: what is kept decides.
#[derive(Debug, Clone)]
pub(super) struct Scan {
    walker: Walker,
    d_sae: usize,
    ranking: Ranking,
    /// Whether rows are sampled.
    samples: bool,
    /// Of the last row.
    stamp: u16,
    lines: Lines,
    /// What the lines' sums must add up to.
    added: u64,
    /// Whether they did so far.
    sound: bool,
    /// `[blocks]`.
    logs: Vec<Vec<Entry>>,
    staged: Option<Box<Staged>>,
    /// Of the rows that are being scanned.
    earliness: Vec<u8>,
    queue: Queue,
    /// What of the queue has wrapped, and what needs more.
    wrapped: Vec<u32>,
    need: Vec<u32>,
}

/// How codes are counted.
#[derive(Debug, Clone, Copy)]
pub(super) enum Walker {
    /// One at a time, staged before.
    Staged(Simd),
    #[cfg(target_arch = "x86_64")]
    /// By vectors.
    Scattered(Scatter),
}

impl Walker {
    /// The fastest of this CPU, unless someone has chosen another instruction set.
    pub fn active() -> Result<Self> {
        let simd = Simd::active()?;
        #[cfg(target_arch = "x86_64")]
        if let (simd::Level::Avx512, Some(scatter)) = (simd.level(), Scatter::fast()) {
            return Ok(Self::Scattered(scatter));
        }
        Ok(Self::Staged(simd))
    }

    /// All that this CPU can do.
    #[cfg(test)]
    pub fn all() -> Vec<Self> {
        let levels = simd::Level::ALL.into_iter().filter_map(Simd::new);
        let staged = levels.map(Self::Staged);
        #[cfg(target_arch = "x86_64")]
        let staged = staged.chain(Scatter::possible().map(Self::Scattered));
        staged.collect()
    }
}

/// Some rows and their codes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch<'a, V, I> {
    pub values: &'a [V],
    pub indices: &'a [I],
    /// One more than rows; they rise, and lie within values and indices.
    pub offsets: &'a [i64],
    /// Of each row.
    pub earliness: &'a [u8],
    /// Of the first row; those of the others follow.
    pub stamp: u16,
    /// The id of the first row.
    pub first_row: i64,
}

/// How far a batch is done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    /// Counted from the batch's first.
    pub row: usize,
    /// The next code.
    pub at: usize,
}

/// What is wrong with codes of which something was refused that is not there when looked for.
pub(super) fn changed() -> Error {
    let words = "codes changed while they were read; collect the examples again";
    Error::InvalidArgument(words.to_owned())
}

impl Scan {
    /// Has counted nothing. `base` is the window's first bin.
    pub fn new(walker: Walker, kept: &Kept, base: usize) -> Self {
        let (d_sae, keep) = (kept.d_sae(), kept.keep());
        let samples = keep.samples > 0;
        let lines = Lines::new(d_sae, samples, Layout::new(base));
        Self {
            walker,
            d_sae,
            ranking: Ranking { seed: keep.seed },
            samples,
            stamp: 0,
            lines,
            added: 0,
            sound: true,
            logs: vec![Vec::new(); kept.blocks()],
            staged: None,
            earliness: Vec::with_capacity(ROWS),
            queue: Queue::new(),
            wrapped: vec![0; ROOM],
            need: vec![0; ROOM],
        }
    }

    /// The window's first bin.
    pub fn base(&self) -> usize {
        self.lines.layout().base()
    }

    /// Learns what an activation must reach to enter what is kept.
    pub fn learn(&mut self, kept: &Kept) {
        self.lines.learn(kept);
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
        codes.span(rows.clone())?;
        let sound = match (codes.values(), codes.indices()) {
            (Values::F32(v), Indices::U16(i)) => self.walk(codes, &rows, v, i, kept, cancel)?,
            (Values::F32(v), Indices::U32(i)) => self.walk(codes, &rows, v, i, kept, cancel)?,
            (Values::Bf16(v), Indices::U16(i)) => self.walk(codes, &rows, v, i, kept, cancel)?,
            (Values::Bf16(v), Indices::U32(i)) => self.walk(codes, &rows, v, i, kept, cancel)?,
        };
        if sound {
            return Ok(());
        }
        // Which one it is, in words.
        codes.check(rows, &mut Seen::new(self.d_sae))?;
        Err(changed())
    }

    /// [`Scan::add`] once the offsets of the rows are known to rise within the codes. False if some
    /// code must be refused.
    fn walk<V: Value, I: Index>(
        &mut self,
        codes: &CodesView<'_>,
        rows: &Range<usize>,
        values: &[V],
        indices: &[I],
        kept: &Kept,
        cancel: &Cancel,
    ) -> Result<bool> {
        for start in rows.clone().step_by(ROWS) {
            cancel.check()?;
            let end = rows.end.min(start + ROWS);
            if usize::from(u16::MAX - self.stamp) < end - start {
                // A feature is active once a row, so its sum has lost nothing.
                const { assert!(SUM_TERMS > u16::MAX as usize) };
                self.settle_sums(kept);
            }
            let mut earliness = std::mem::take(&mut self.earliness);
            earliness.clear();
            match self.samples {
                true => self
                    .ranking
                    .earliness_of(codes.row_id(start), end - start, &mut earliness),
                false => earliness.resize(end - start, 0),
            }
            let batch = Batch {
                values,
                indices,
                offsets: &codes.row_offsets()[start..=end],
                earliness: &earliness,
                stamp: self.stamp + 1,
                first_row: codes.row_id(start),
            };
            let sound = self.count_batch(&batch, kept);
            self.work_off(&batch, kept);
            self.stamp += (end - start) as u16;
            self.earliness = earliness;
            if !sound {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Counts a batch. False if some code must be refused.
    fn count_batch<V: Value, I: Index>(&mut self, batch: &Batch<'_, V, I>, kept: &Kept) -> bool {
        let mut cursor = Cursor {
            row: 0,
            at: batch.offsets[0] as usize,
        };
        match self.walker {
            Walker::Staged(simd) => {
                let mut staged = self
                    .staged
                    .take()
                    .unwrap_or_else(|| Box::new(Staged::new()));
                let sound = self.count_staged(batch, &mut cursor, simd, &mut staged, kept);
                self.staged = Some(staged);
                sound
            }
            #[cfg(target_arch = "x86_64")]
            Walker::Scattered(scatter) => loop {
                let (lines, queue) = (&mut self.lines, &mut self.queue);
                match scatter.scan(lines, batch, &mut cursor, queue, &mut self.added) {
                    Stop::End => return true,
                    Stop::Full => self.work_off(batch, kept),
                    Stop::Twice => return false,
                    Stop::Unusual => {
                        let end = batch.offsets[cursor.row + 1] as usize;
                        let part = cursor.at..end.min(cursor.at + WIDTH);
                        if !self.count_any(batch, cursor.row, part.clone(), kept) {
                            return false;
                        }
                        cursor.at = part.end;
                    }
                }
            },
        }
    }

    /// Counts a batch one code at a time. False if some code must be refused.
    fn count_staged<V: Value, I: Index>(
        &mut self,
        batch: &Batch<'_, V, I>,
        cursor: &mut Cursor,
        simd: Simd,
        staged: &mut Staged,
        kept: &Kept,
    ) -> bool {
        let rows = batch.earliness.len();
        let span = cursor.at..batch.offsets[rows] as usize;
        for start in span.clone().step_by(CHUNK) {
            let stop = span.end.min(start + CHUNK);
            let (v, i) = (&batch.values[start..stop], &batch.indices[start..stop]);
            let ordinary = staged.fill(simd, v, i, self.d_sae, self.lines.layout());
            while cursor.at < stop {
                let end = batch.offsets[cursor.row + 1] as usize;
                let part = cursor.at..end.min(stop);
                let sound = if ordinary {
                    self.count(
                        batch,
                        cursor.row,
                        staged,
                        part.start - start..part.end - start,
                    )
                } else {
                    self.count_any(batch, cursor.row, part.clone(), kept)
                };
                if !sound {
                    return false;
                }
                cursor.at = part.end;
                cursor.row += usize::from(end == part.end);
            }
            if self.queue.is_full() {
                self.work_off(batch, kept);
            }
        }
        true
    }

    /// Counts codes of a row, which lie at `span` of what is staged. False if one of their features
    /// was active in the row before.
    #[inline(never)]
    fn count<V, I>(
        &mut self,
        batch: &Batch<'_, V, I>,
        row: usize,
        staged: &Staged,
        span: Range<usize>,
    ) -> bool {
        const { assert!(CHUNK <= AT_ONCE) };
        let layout = self.lines.layout();
        let class = class_of(batch.earliness[row]);
        let stamp = stamped(batch.stamp + row as u16);
        let lines = self.lines.as_mut_ptr().cast::<u8>();
        let places = &staged.places[span.clone()];
        let later = &staged.places[span.start + BEYOND..span.end + BEYOND];
        let terms = &staged.terms[span.clone()];
        let bits = &staged.bits[span];
        for (((&place, &later), &term), &bits) in places.iter().zip(later).zip(terms).zip(bits) {
            simd::fetch_from(lines.wrapping_add(later as usize));
            let at = place as usize;
            debug_assert!(at / LINE < self.d_sae && (at % LINE >= FIRST || at % LINE == OUTSIDE));
            // SAFETY: `Staged::fill` has made places within the lines of features below d_sae, of
            // which there are as many. The reference is not used once the cell's is made.
            let line = unsafe { &mut *lines.add(at & !(LINE - 1)).cast::<Line>() };
            if line.sum & !SUM == stamp {
                return false;
            }
            line.sum = (line.sum & SUM | stamp).wrapping_add(term.into());
            self.added = self.added.wrapping_add(term.into());
            if at % LINE == OUTSIDE {
                self.queue.push(place, bits, row as u32);
                continue;
            }
            let strong = layout.coarse(bits) >= line.floor.into();
            // SAFETY: places are those of cells, and nothing else refers to it now.
            let cell = unsafe { &mut *lines.add(at) };
            let early = *cell & CLASS <= class;
            *cell = cell.wrapping_add(ONE);
            let wrapped = *cell < ONE;
            if strong | early | wrapped {
                let mark = if wrapped { WRAPPED } else { 0 };
                self.queue.push(place | mark, bits, row as u32);
            }
        }
        true
    }

    /// Counts any codes of a row, one at a time. False if one must be refused.
    #[cold]
    fn count_any<V: Value, I: Index>(
        &mut self,
        batch: &Batch<'_, V, I>,
        row: usize,
        span: Range<usize>,
        kept: &Kept,
    ) -> bool {
        let stamp = stamped(batch.stamp + row as u16);
        for at in span {
            let (Some(value), Some(index)) = (batch.values.get(at), batch.indices.get(at)) else {
                return false;
            };
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
            if line.sum & !SUM == stamp {
                return false;
            }
            line.sum = line.sum & SUM | stamp;
            let entry = Entry::whole(feature, strength, batch.first_row + row as i64);
            self.log(feature, entry, kept);
        }
        true
    }

    /// Does what is queued of a batch.
    fn work_off<V, I>(&mut self, batch: &Batch<'_, V, I>, kept: &Kept) {
        let mut queue = std::mem::take(&mut self.queue);
        let (mut wrapped, mut need) = (0, 0);
        // Lists without branches: what comes next can't be foreseen.
        for at in 0..queue.len() {
            if let Some((later, ..)) = queue.get(at + 2 * AHEAD) {
                self.lines
                    .fetch_limits((later & !WRAPPED) as usize, later & WRAPPED != 0);
            }
            let Some((marked, bits, row)) = queue.get(at) else {
                break;
            };
            let place = (marked & !WRAPPED) as usize;
            let (strong, early) = self.lines.look(place, bits, batch.earliness[row]);
            let outside = place % LINE == OUTSIDE;
            self.wrapped[wrapped] = place as u32;
            wrapped += usize::from(marked != place as u32);
            let marks = u32::from(strong) << 31 | u32::from(early) << 30;
            self.need[need] = at as u32 | marks;
            need += usize::from(strong | early | outside);
        }
        for at in 0..wrapped {
            self.lines.wrap(self.wrapped[at] as usize);
        }
        for at in 0..need {
            let marks = self.need[at];
            let (mut strong, mut early) = (marks >> 31 == 1, marks >> 30 & 1 == 1);
            let Some((marked, bits, row)) = queue.get((marks << 2 >> 2) as usize) else {
                break;
            };
            let place = (marked & !WRAPPED) as usize;
            let (feature, strength) = (place / LINE, f32::from_bits(bits));
            let id = batch.first_row + row as i64;
            if place % LINE == OUTSIDE {
                match self.lines.look_above(place, bits, batch.earliness[row]) {
                    Some(found) => (strong, early) = found,
                    None => {
                        self.log(feature, Entry::whole(feature, strength, id), kept);
                        continue;
                    }
                }
                if !strong && !early {
                    continue;
                }
            }
            let entry = Entry::candidate(feature, strength, id, strong, early);
            self.log(feature, entry, kept);
        }
        queue.clear();
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
        let mut all = 0_u64;
        for block in 0..kept.blocks() {
            let features = kept.features(block);
            let more = self.lines.settle_sums(features, &mut kept.lock(block));
            all = all.wrapping_add(more);
        }
        self.sound &= all == std::mem::take(&mut self.added);
        self.stamp = 0;
    }

    /// Adds all that was counted and put aside to what is kept, and counts from 0 again. False if a
    /// feature was active twice in some row, so that a part was lost: the scan and `kept` must be
    /// thrown away.
    #[must_use]
    pub fn settle(&mut self, kept: &Kept) -> bool {
        self.settle_sums(kept);
        for block in 0..kept.blocks() {
            self.hand_over(block, kept);
            let features = kept.features(block);
            self.lines.settle_counts(features, &mut kept.lock(block));
        }
        self.sound
    }
}
