//! One thread's part of a pass: what it has counted since it was last settled, laid out so that an
//! ordinary activation touches one line of the cache and takes a dozen instructions.

use std::ops::Range;

use super::codes::{CodesView, Index, Seen, Value};
use super::histogram::BINS;
use super::kept::{Block, Entry, Kept, BLOCK};
use super::samples::Ranking;
use super::stage::{Layout, Staged, CHUNK, FIRST, LINE, OUTSIDE, SUM_TERMS, WINDOW};
use crate::shard::{Indices, Values};
use crate::simd::{self, Simd};
use crate::{Cancel, Error, Result};

/// What a closed cell has counted when it wraps to 0; it is looked at then.
const WRAP: u16 = 1 << 8;
/// What a cell's second count reaches at most, less a wrap.
const FULL: u16 = u16::MAX - WRAP;
/// What a cell holds, one less than a wrap, that asks for a look at each of its activations.
const OPEN: u8 = u8::MAX;
/// The level of a cell that has no sample.
const NEVER: u8 = u8::MAX;
/// Rows whose rank begins with so many zeros are early, at first and at last. A cell is closed once
/// its sample takes early rows alone: of those each activation is looked at, of the others only
/// those of open cells, of which there are ever fewer.
const EARLY: std::ops::RangeInclusive<u8> = 3..=6;
/// So many codes a cell of the lines are seen before early rows are half as many.
const SEEN_A_LEVEL: u64 = 128;

/// Entries that a thread collects for a block before it adds them: enough that their number pays
/// for bringing the block into the cache.
const LOG: usize = 128;
/// How many entries ahead of the one that is added the CPU is told to fetch what it needs, and twice
/// as many where that lies.
const AHEAD: usize = 12;

/// What an activation of a feature needs. 28,672 of them take half of a core's second cache, whose
/// other half is for what passes through.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
struct Line {
    /// In the upper 48 bits the strengths of what was counted inside the window (see
    /// [`Layout::fixed`]); in the lower 16 the row (counted by [`Scan::stamp`]) that showed the
    /// feature last. One store for both: stores are what bounds the loop.
    sum: u64,
    /// The upper half of the bits of what a strength must reach to enter the heap.
    floor: u16,
    /// Bins `base..base + WINDOW`.
    cells: [u8; WINDOW],
    /// Takes the place of all other bins, and is always open.
    outside: u8,
}

const _: () = assert!(size_of::<Line>() == LINE && std::mem::offset_of!(Line, cells) == FIRST);

/// What a thread counts, and puts aside until it is added to what is kept. What an activation must
/// reach to be put aside rises with what is kept, a little later than that: what is kept decides.
#[derive(Debug, Clone)]
pub(super) struct Scan {
    simd: Simd,
    d_sae: usize,
    layout: Layout,
    ranking: Ranking,
    stamp: u16,
    lines: Vec<Line>,
    /// `[d_sae]`, a bit for each of a line's cells: whether it is open.
    open: Vec<u32>,
    /// `[d_sae]`: what a strength must reach to enter the heap; 0 while that has room.
    floors: Vec<f32>,
    /// `[d_sae, LINE]`, by place: a row enters the cell's sample only if its rank has so many leading
    /// zeros.
    levels: Vec<u8>,
    /// `[d_sae, LINE]`, by place: what open cells have counted, and closed ones each time they
    /// wrapped.
    counts: Vec<u16>,
    /// The zeros of an early row's rank; more than there are if there are no samples.
    early: u8,
    /// Codes that were scanned.
    seen: u64,
    /// `[blocks]`.
    logs: Vec<Vec<Entry>>,
    staged: Box<Staged>,
    /// Activations that need more than counting: dealt with together, so that the system fetches
    /// what one needs while another is at work.
    queue: Vec<Noted>,
}

/// A staged code that needs more than counting.
#[derive(Debug, Clone, Copy)]
struct Noted {
    /// Which of those that are staged.
    at: u32,
    what: What,
    /// The leading zeros of the row's rank.
    zeros: u8,
    row: i64,
}

/// What has been done of a code that needs more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// Its cell is open, and has not counted it; or its bin is outside the window.
    Open,
    /// Its cell has counted it.
    Counted,
    /// Its cell has counted it and wrapped.
    Wrapped,
}

/// The row that is being scanned.
#[derive(Clone, Copy)]
struct Row {
    id: i64,
    stamp: u16,
    /// The leading zeros of the row's rank.
    zeros: u8,
}

impl Scan {
    /// Has counted nothing. `base` is the window's first bin.
    pub fn new(simd: Simd, kept: &mut Kept, base: usize) -> Self {
        let d_sae = kept.d_sae();
        let keep = kept.keep();
        let (level, early) = match keep.samples {
            0 => (NEVER, NEVER),
            _ => (0, *EARLY.start()),
        };
        let line = Line {
            sum: 0,
            floor: 0,
            cells: [OPEN; WINDOW],
            outside: OPEN,
        };
        let mut scan = Self {
            simd,
            d_sae,
            layout: Layout::new(base),
            ranking: Ranking { seed: keep.seed },
            stamp: 0,
            lines: vec![line; d_sae],
            open: vec![u32::MAX; d_sae],
            floors: vec![0.0; d_sae],
            levels: vec![level; d_sae * LINE],
            counts: vec![0; d_sae * LINE],
            early,
            seen: 0,
            logs: vec![Vec::new(); kept.blocks()],
            staged: Box::new(Staged::new()),
            queue: Vec::with_capacity(CHUNK),
        };
        scan.learn(kept);
        scan
    }

    /// The window's first bin.
    pub fn base(&self) -> usize {
        self.layout.base()
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
        self.seen += span.len() as u64;
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
            let ordinary = self.staged.fill(self.simd, v, i, self.d_sae, self.layout);
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
                    let queued = self.queue.len();
                    let sound = self.count(row, part.clone());
                    if sound && row.zeros >= self.early {
                        self.look(row, part, queued);
                    }
                    sound
                } else {
                    self.count_any(row, &v[part.clone()], &i[part], kept)
                };
                if !sound {
                    return Ok(false);
                }
                at = to;
            }
            self.work_off(v, kept);
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
            zeros: self.ranking.rank(id).leading_zeros() as u8,
        }
    }

    /// Counts codes of a row, which lie at `span` of what is staged. False if one of their features
    /// was active in the row before.
    #[inline(never)]
    fn count(&mut self, row: Row, span: Range<usize>) -> bool {
        let lines = self.lines.as_mut_ptr().cast::<u8>();
        let places = &self.staged.places[span.clone()];
        let terms = &self.staged.terms[span.clone()];
        let uppers = &self.staged.uppers[span.clone()];
        let staged = places.iter().zip(terms).zip(uppers);
        for (((&place, &term), &upper), at) in staged.zip(span.start as u32..) {
            let place = place as usize;
            debug_assert!(place / LINE < self.open.len() && place % LINE >= FIRST);
            // SAFETY: `Staged::fill` has made places within the lines of features below d_sae, of
            // which there are as many. The reference is not used once the cell's is made.
            let line = unsafe { &mut *lines.add(place & !(LINE - 1)).cast::<Line>() };
            let before = line.sum;
            if before as u16 == row.stamp {
                return false;
            }
            line.sum = (before & !u64::from(u16::MAX)).wrapping_add(term + u64::from(row.stamp));
            let strong = upper >= line.floor;
            // SAFETY: places are those of bytes (`cells` and `outside`) of a line, and nothing else
            // refers to it now.
            let cell = unsafe { &mut *lines.add(place) };
            *cell = cell.wrapping_add(1);
            if *cell == 0 || strong {
                note(&mut self.queue, &self.open, row, at, place, cell);
            }
        }
        true
    }

    /// Looks at codes of an early row, which have been counted, for cells whose samples may take
    /// them. Those that are queued from `queued` on are looked at anyway.
    #[inline(never)]
    fn look(&mut self, row: Row, span: Range<usize>, queued: usize) {
        let (mut next, end) = (queued, self.queue.len());
        for at in span {
            if next < end && self.queue[next].at as usize == at {
                next += 1;
            } else if row.zeros >= self.levels[self.staged.places[at] as usize] {
                self.queue.push(Noted {
                    at: at as u32,
                    what: What::Counted,
                    zeros: row.zeros,
                    row: row.id,
                });
            }
        }
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
            self.log(feature / BLOCK, entry, kept);
        }
        true
    }

    /// Does what is queued, of codes with these values.
    #[inline]
    fn work_off<V: Value>(&mut self, values: &[V], kept: &Kept) {
        if !self.queue.is_empty() {
            self.work_off_some(values, kept);
        }
    }

    #[inline(never)]
    fn work_off_some<V: Value>(&mut self, values: &[V], kept: &Kept) {
        let mut queue = std::mem::take(&mut self.queue);
        for noted in &queue {
            let place = self.staged.places[noted.at as usize] as usize;
            simd::fetch(&self.floors, place / LINE);
            simd::fetch(&self.counts, place);
            simd::fetch(&self.levels, place);
        }
        for noted in queue.drain(..) {
            let place = self.staged.places[noted.at as usize] as usize;
            let strength = values[noted.at as usize].strength();
            let feature = place / LINE;
            if place % LINE == OUTSIDE {
                let entry = Entry::whole(feature, strength, noted.row);
                self.log(feature / BLOCK, entry, kept);
                continue;
            }
            let times = match noted.what {
                What::Open => 1,
                What::Counted => 0,
                What::Wrapped => WRAP,
            };
            let count = &mut self.counts[place];
            *count += times;
            if *count >= FULL {
                let entry = Entry::counts(feature, strength, std::mem::take(count));
                self.log(feature / BLOCK, entry, kept);
            }
            let sampled = noted.zeros >= self.levels[place];
            let strong = strength >= self.floors[feature];
            if strong || sampled {
                let entry = Entry::candidate(feature, strength, noted.row, strong, sampled);
                self.log(feature / BLOCK, entry, kept);
            }
        }
        self.queue = queue;
    }

    #[inline]
    fn log(&mut self, block: usize, entry: Entry, kept: &Kept) {
        self.logs[block].push(entry);
        if self.logs[block].len() >= LOG {
            self.hand_over(block, kept);
        }
    }

    /// Adds a block's entries to what is kept of it.
    #[inline(never)]
    fn hand_over(&mut self, block: usize, kept: &Kept) {
        let mut log = std::mem::take(&mut self.logs[block]);
        let features = kept.features(block);
        let mut kept = kept.lock(block);
        for (at, entry) in log.iter().enumerate() {
            if let Some(later) = log.get(at + 2 * AHEAD) {
                kept.fetch_places(later);
                simd::fetch(&self.levels, (features.start + later.feature()) * LINE);
            }
            if let Some(later) = log.get(at + AHEAD) {
                kept.fetch(later);
            }
            kept.add(entry);
            self.learn_of(&features, &kept, entry);
        }
        drop(kept);
        log.clear();
        self.logs[block] = log;
    }

    /// Raises what an entry's like must reach.
    #[inline]
    fn learn_of(&mut self, features: &Range<usize>, kept: &Block, entry: &Entry) {
        let feature = features.start + entry.feature();
        let inside = (entry.cell() % BINS).wrapping_sub(self.base());
        // What is kept of this pass alone may ask less than what was known before it.
        if entry.is_sampled() && inside < WINDOW {
            let known = &mut self.levels[feature * LINE + FIRST + inside];
            let before = *known;
            *known = kept.samples.level(entry.cell()).max(before);
            if before < self.early && *known >= self.early {
                self.close(feature, inside);
            }
        }
        if entry.is_strong() {
            self.raise_floor(feature, kept.heaps.floor(entry.feature()));
        }
    }

    /// Raises what a strength must reach to enter a heap.
    #[inline]
    fn raise_floor(&mut self, feature: usize, floor: f32) {
        let known = &mut self.floors[feature];
        *known = floor.max(*known);
        self.lines[feature].floor = (known.to_bits() >> 16) as u16;
    }

    /// Learns what is kept, in whole.
    pub fn learn(&mut self, kept: &mut Kept) {
        for (number, block) in kept.each().enumerate() {
            let start = number * BLOCK;
            for feature in 0..block.sums.len() {
                self.raise_floor(start + feature, block.heaps.floor(feature));
            }
            for &cell in block.samples.cells() {
                let level = block.samples.level(cell as usize);
                let feature = start + cell as usize / BINS;
                let inside = (cell as usize % BINS).wrapping_sub(self.base());
                if inside < WINDOW {
                    self.levels[feature * LINE + FIRST + inside] = level;
                }
            }
        }
        self.close_all();
    }

    fn close_all(&mut self) {
        for feature in 0..self.d_sae {
            for inside in 0..WINDOW {
                self.close(feature, inside);
            }
        }
    }

    /// Lets a cell, given by its place in its line, count without a look at each activation, unless
    /// its sample takes many.
    #[inline]
    fn close(&mut self, feature: usize, inside: usize) {
        let bit = 1 << inside;
        let level = self.levels[feature * LINE + FIRST + inside];
        if level >= self.early && self.open[feature] & bit != 0 {
            self.open[feature] &= !bit;
            self.lines[feature].cells[inside] = 0;
        }
    }

    /// Adds the lines' sums to what is kept, and counts rows from 0 again.
    fn settle_sums(&mut self, kept: &Kept) {
        for block in 0..kept.blocks() {
            let lines = &mut self.lines[kept.features(block)];
            let mut kept = kept.lock(block);
            for (line, sum) in lines.iter_mut().zip(&mut kept.sums) {
                let fixed = self.layout.fixed(std::mem::take(&mut line.sum));
                *sum = sum.saturating_add(fixed);
            }
        }
        self.stamp = 0;
    }

    /// Adds all that was counted and put aside to what is kept, and counts from 0 again.
    pub fn settle(&mut self, kept: &Kept) {
        self.settle_sums(kept);
        let base = self.base();
        for block in 0..kept.blocks() {
            self.hand_over(block, kept);
            let features = kept.features(block);
            let mut kept = kept.lock(block);
            let counted = features.clone().zip(kept.histogram.chunks_exact_mut(BINS));
            for (feature, bins) in counted {
                let counts = &mut self.counts[feature * LINE + FIRST..][..WINDOW];
                let cells = self.lines[feature].cells.iter_mut().zip(counts);
                for ((inside, (cell, count)), bin) in cells.enumerate().zip(&mut bins[base..]) {
                    *bin += u64::from(std::mem::take(count));
                    if self.open[feature] >> inside & 1 == 0 {
                        *bin += u64::from(std::mem::take(cell));
                    }
                }
            }
        }
    }

    /// Between two parts of a pass: calls fewer rows early, which opens cells, if so much has been
    /// seen that this is less work.
    pub fn adapt(&mut self, kept: &Kept) {
        if self.early == NEVER {
            return;
        }
        // Each further level takes a cell twice as many activations.
        let usual = self.seen / (self.d_sae.max(1) * WINDOW) as u64;
        let early = (usual / SEEN_A_LEVEL).max(1).ilog2() as u8 + EARLY.start();
        let early = early.min(*EARLY.end());
        if early > self.early {
            self.early = early;
            self.settle(kept);
            self.open.fill(u32::MAX);
            for line in &mut self.lines {
                line.cells = [OPEN; WINDOW];
            }
            self.close_all();
        }
    }
}

/// Puts aside staged code `at`, which has been counted in `cell` and needs more.
#[cold]
#[inline(never)]
fn note(queue: &mut Vec<Noted>, open: &[u32], row: Row, at: u32, place: usize, cell: &mut u8) {
    // The place outside is always open, as no bit of it is ever cleared.
    let open = open[place / LINE] >> (place % LINE - FIRST) & 1 != 0;
    let what = match (open, *cell) {
        (true, _) => {
            *cell = OPEN;
            What::Open
        }
        (false, 0) => What::Wrapped,
        (false, _) => What::Counted,
    };
    queue.push(Noted {
        at,
        what,
        zeros: row.zeros,
        row: row.id,
    });
}
