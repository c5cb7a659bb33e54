//! One thread's part of a pass: what it has counted since it was last settled with the
//! accumulator, laid out so that an ordinary activation touches one line of the cache.

use std::ops::Range;

use super::codes::{CodesView, Index, Seen, Value};
use super::heap::TopHeaps;
use super::histogram::{bin_of, BINS};
use super::samples::Samples;
use super::stage::{
    Entry, Layout, Staged, CHUNK, FIRST, LINE, OUTSIDE, SUM_SHIFT, SUM_TERMS, WINDOW,
};
use super::sum;
use crate::shard::{Indices, Values};
use crate::simd::{self, Simd};
use crate::{Cancel, Error, Result};

/// A cell counts in its lower 6 bits; its upper 2 hold the class of its bin's sample.
const CLASS_SHIFT: u32 = 6;
/// What a cell has counted when its count wraps to 0.
const WRAP: u8 = 1 << CLASS_SHIFT;
const COUNT: u8 = WRAP - 1;
/// The levels (see [`Samples::level`]) at which a cell's class rises.
const CLASS_LEVELS: [u8; 3] = [3, 6, 10];
/// The highest class: only rows of very early rank are samples.
const LAST_CLASS: u8 = CLASS_LEVELS.len() as u8;

/// What an activation of a feature needs. 28,672 of them take half of a core's second cache, whose
/// other half is for what passes through.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
struct Line {
    /// In the upper 48 bits the sum, in units that [`Layout::shift`] tells; in the lower 16 the row
    /// (counted by [`Scan::stamp`]) that showed the feature last.
    sum: u64,
    /// The upper half of the bits of what a strength must reach to enter the heap.
    floor: u16,
    /// Bins `base..base + WINDOW`.
    cells: [u8; WINDOW],
    /// Takes the place of all other bins, and is always 0.
    outside: u8,
}

const _: () = assert!(size_of::<Line>() == LINE && std::mem::offset_of!(Line, cells) == FIRST);

/// The part of a strength's bits that is compared with a [`Line`]'s floor. Rounds down.
#[inline]
const fn upper(bits: u32) -> u16 {
    (bits >> 16) as u16
}

/// The number of `CLASS_LEVELS` that a level reaches.
fn class_of(level: u8) -> u8 {
    CLASS_LEVELS
        .iter()
        .map(|&step| u8::from(level >= step))
        .sum()
}

/// What a thread counts. Counts and sums are those since the last settlement; heaps and samples
/// hold what may have to enter the accumulator's.
#[derive(Debug, Clone)]
pub(super) struct Scan {
    simd: Simd,
    d_sae: usize,
    layout: Layout,
    stamp: u16,
    lines: Vec<Line>,
    /// `[d_sae, BINS]`; those inside the window are never touched.
    cells: Vec<u8>,
    rare: Rare,
    staged: Box<Staged>,
    /// Activations that need more than counting: dealt with together, so that the system fetches
    /// what one needs while another is at work.
    queue: Vec<Activation>,
}

/// What few activations touch.
#[derive(Debug, Clone)]
pub(super) struct Rare {
    pub heaps: TopHeaps,
    pub samples: Samples,
    /// `[d_sae, BINS]`: a row enters a cell's sample only if its rank has so many leading zeros.
    levels: Vec<u8>,
    /// Cells (`feature * BINS + bin`) that have wrapped, once each time.
    wrapped: Vec<u32>,
    /// `[d_sae]` in units of 2^-64: what the lines don't hold.
    sums: Vec<u128>,
}

/// An activation that needs more than counting.
#[derive(Debug, Clone, Copy)]
struct Activation {
    feature: u32,
    strength: f32,
    row: i64,
    rank: u64,
    /// Whether it is to be counted and added up, as its bin is outside the window.
    outside: bool,
    /// Whether it may enter the heap.
    strong: bool,
    /// Whether it may enter the sample.
    sampled: bool,
}

/// The row that is being scanned.
#[derive(Clone, Copy)]
struct Row {
    id: i64,
    rank: u64,
    stamp: u16,
    /// The row may be a sample of cells up to this class.
    class: u8,
}

impl Scan {
    /// Has counted nothing. `base` is the window's first bin.
    pub fn new(simd: Simd, d_sae: usize, heaps: TopHeaps, samples: Samples, base: usize) -> Self {
        // Without samples, nothing is looked at for their sake.
        let (levels, class) = match samples.per_bin() {
            0 => (0, LAST_CLASS),
            _ => (d_sae * BINS, 0),
        };
        let line = Line {
            sum: 0,
            floor: 0,
            cells: [class << CLASS_SHIFT; WINDOW],
            outside: 0,
        };
        Self {
            simd,
            d_sae,
            layout: Layout::new(base),
            stamp: 0,
            lines: vec![line; d_sae],
            cells: vec![0; d_sae * BINS],
            rare: Rare {
                heaps,
                samples,
                levels: vec![0; levels],
                wrapped: Vec::new(),
                sums: vec![0; d_sae],
            },
            staged: Box::new(Staged::new()),
            queue: Vec::with_capacity(CHUNK),
        }
    }

    /// The window's first bin.
    pub fn base(&self) -> usize {
        self.layout.base()
    }

    /// Checks and adds `rows`. On an error part of them has been added: the scan must be thrown
    /// away.
    pub fn add(
        &mut self,
        codes: &CodesView<'_>,
        rows: Range<usize>,
        cancel: &Cancel,
    ) -> Result<()> {
        let span = codes.span(rows.clone())?;
        let sound = match (codes.values(), codes.indices()) {
            (Values::F32(v), Indices::U16(i)) => self.walk(codes, &rows, span, v, i, cancel)?,
            (Values::F32(v), Indices::U32(i)) => self.walk(codes, &rows, span, v, i, cancel)?,
            (Values::Bf16(v), Indices::U16(i)) => self.walk(codes, &rows, span, v, i, cancel)?,
            (Values::Bf16(v), Indices::U32(i)) => self.walk(codes, &rows, span, v, i, cancel)?,
        };
        if sound {
            return Ok(());
        }
        // Which one it is, in words.
        codes.check(rows, &mut Seen::new(self.d_sae))?;
        Err(Error::InvalidArgument(
            "codes changed while they were read; collect the examples again".to_owned(),
        ))
    }

    /// [`Scan::add`] once the offsets of `rows` are known to rise within `span`. False if some
    /// code must be refused.
    fn walk<V: Value, I: Index>(
        &mut self,
        codes: &CodesView<'_>,
        rows: &Range<usize>,
        span: Range<usize>,
        values: &[V],
        indices: &[I],
        cancel: &Cancel,
    ) -> Result<bool> {
        let offsets = codes.row_offsets();
        // The row before the first; its end is where the first begins.
        let (mut next, mut end) = (rows.start, span.start);
        let mut row = self.next_row(0);
        for start in span.clone().step_by(CHUNK) {
            cancel.check()?;
            let stop = span.end.min(start + CHUNK);
            let (v, i) = (&values[start..stop], &indices[start..stop]);
            let ordinary = self.staged.fill(self.simd, v, i, self.d_sae, self.layout);
            let mut at = start;
            while at < stop {
                while end <= at {
                    end = offsets[next + 1] as usize;
                    row = self.next_row(codes.row_id(next));
                    next += 1;
                }
                let to = end.min(stop);
                let part = at - start..to - start;
                let sound = if ordinary {
                    self.count(row, part.clone(), &v[part])
                } else {
                    self.count_any(row, &v[part.clone()], &i[part])
                };
                if !sound {
                    return Ok(false);
                }
                at = to;
            }
            self.work_off();
        }
        Ok(true)
    }

    fn next_row(&mut self, id: i64) -> Row {
        if self.stamp == u16::MAX {
            // A feature is active once a row, so its sum has not overflowed.
            const { assert!(SUM_TERMS > u16::MAX as usize) };
            self.clear_sums();
        }
        self.stamp += 1;
        let rank = self.rare.samples.ranking().rank(id);
        let class = match self.rare.samples.per_bin() {
            0 => 0,
            _ => class_of(rank.leading_zeros() as u8),
        };
        Row {
            id,
            rank,
            stamp: self.stamp,
            class,
        }
    }

    /// Moves the lines' sums to where there is more room, and counts rows from 0 again.
    fn clear_sums(&mut self) {
        for (line, sum) in self.lines.iter_mut().zip(&mut self.rare.sums) {
            let fixed = u128::from(std::mem::take(&mut line.sum) >> SUM_SHIFT);
            *sum = sum.saturating_add(fixed << self.layout.shift());
        }
        self.stamp = 0;
    }

    /// Counts codes of a row, which lie at `span` of what is staged. False if one of their features
    /// was active in the row before.
    #[inline(never)]
    fn count<V: Value>(&mut self, row: Row, span: Range<usize>, values: &[V]) -> bool {
        let lines = self.lines.as_mut_ptr().cast::<u8>();
        // A cell below this may take the row as a sample.
        let limit = u16::from(row.class + 1) << CLASS_SHIFT;
        for (&Entry { place, sum }, value) in self.staged.0[span].iter().zip(values) {
            let (at, upper) = (place as u32 as usize, (place >> 32) as u16);
            debug_assert!(at / LINE < self.d_sae && at % LINE >= FIRST);
            // SAFETY: `Staged::fill` has made places within the lines of features below d_sae, of
            // which there are as many. The reference is not used once the cell's is made.
            let line = unsafe { &mut *lines.add(at / LINE * LINE).cast::<Line>() };
            let before = line.sum;
            if before as u16 == row.stamp {
                return false;
            }
            line.sum = (before & !u64::from(u16::MAX)).wrapping_add(sum + u64::from(row.stamp));
            let strong = upper >= line.floor;
            // SAFETY: places are those of bytes (`cells` and `outside`) of a line, and nothing else
            // refers to it now.
            let cell = unsafe { &mut *lines.add(at) };
            let before = *cell;
            let after = before.wrapping_add(1);
            *cell = after;
            let sampled = u16::from(before) < limit;
            if strong || sampled || after & COUNT == 0 {
                let (queue, wrapped) = (&mut self.queue, &mut self.rare.wrapped);
                note(
                    queue,
                    wrapped,
                    row,
                    (at, value.strength()),
                    cell,
                    strong,
                    sampled,
                );
            }
        }
        true
    }

    /// Counts any codes of a row, one at a time. False if one must be refused.
    #[cold]
    fn count_any<V: Value, I: Index>(&mut self, row: Row, values: &[V], indices: &[I]) -> bool {
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
            self.queue.push(Activation {
                feature: feature as u32,
                strength,
                row: row.id,
                rank: row.rank,
                // Whether it is or not, it is to be counted.
                outside: true,
                strong: true,
                sampled: false,
            });
        }
        true
    }

    /// Does what is queued.
    fn work_off(&mut self) {
        if self.queue.is_empty() {
            return;
        }
        for activation in &self.queue {
            if activation.outside {
                simd::fetch(&self.cells, activation.cell());
            }
            self.rare.fetch(activation);
        }
        for activation in self.queue.iter().filter(|activation| activation.sampled) {
            self.rare.samples.fetch(activation.cell());
        }
        let mut queue = std::mem::take(&mut self.queue);
        for activation in queue.drain(..) {
            let (feature, cell) = (activation.feature as usize, activation.cell());
            let mut sampled = activation.sampled;
            if activation.outside {
                let (count, wraps) = match self.cell(cell) {
                    count if *count & COUNT == COUNT => (count, true),
                    count => (count, false),
                };
                sampled = *count >> CLASS_SHIFT <= class_of(activation.rank.leading_zeros() as u8);
                *count = if wraps { *count & !COUNT } else { *count + 1 };
                if wraps {
                    self.rare.wrapped.push(cell as u32);
                }
                let sum = &mut self.rare.sums[feature];
                *sum = sum::add(*sum, activation.strength);
            }
            if activation.strong {
                self.rare
                    .heaps
                    .offer(feature, activation.strength, activation.row);
                // Of a heap that is not full, nothing; then what the accumulator's asks stays.
                let floor = upper(self.rare.heaps.floor(feature).to_bits());
                let line = &mut self.lines[feature];
                line.floor = line.floor.max(floor);
            }
            if sampled && !self.rare.levels.is_empty() {
                if let Some(level) = self.rare.sample(activation) {
                    self.set_level(cell, level);
                }
            }
        }
        self.queue = queue;
    }

    /// The count of cell `feature * BINS + bin`.
    fn cell(&mut self, cell: usize) -> &mut u8 {
        let inside = (cell % BINS).wrapping_sub(self.base());
        match self.lines[cell / BINS].cells.get_mut(inside) {
            Some(count) => count,
            None => &mut self.cells[cell],
        }
    }

    /// Adds what was counted to a histogram `[d_sae, BINS]` and to sums, and counts from 0 again.
    pub fn settle(&mut self, histogram: &mut [u64], sums: &mut [u128]) {
        self.clear_sums();
        for (total, sum) in sums.iter_mut().zip(&mut self.rare.sums) {
            *total = total.saturating_add(std::mem::take(sum));
        }
        for cell in self.rare.wrapped.drain(..) {
            histogram[cell as usize] += u64::from(WRAP);
        }
        let base = self.layout.base();
        let counted = self.lines.iter_mut().zip(self.cells.chunks_exact_mut(BINS));
        for (bins, (line, cells)) in histogram.chunks_exact_mut(BINS).zip(counted) {
            settle_cells(&mut bins[base..base + WINDOW], &mut line.cells);
            settle_cells(&mut bins[..base], &mut cells[..base]);
            settle_cells(&mut bins[base + WINDOW..], &mut cells[base + WINDOW..]);
        }
    }

    /// The heaps and samples since the last settlement.
    pub fn rare(&mut self) -> &mut Rare {
        &mut self.rare
    }

    /// Sets what a strength must reach to enter a feature's heap.
    pub fn set_floor(&mut self, feature: usize, floor: f32) {
        self.lines[feature].floor = upper(floor.to_bits());
    }

    /// Sets the level (see [`Samples::level`]) of cell `feature * BINS + bin`.
    pub fn set_level(&mut self, cell: usize, level: u8) {
        self.rare.levels[cell] = level;
        let count = self.cell(cell);
        *count = *count & COUNT | class_of(level) << CLASS_SHIFT;
    }
}

/// Puts aside an activation, given as its place and strength, that has been counted in `cell` and
/// needs more.
#[cold]
#[inline(never)]
fn note(
    queue: &mut Vec<Activation>,
    wrapped: &mut Vec<u32>,
    row: Row,
    (place, strength): (usize, f32),
    cell: &mut u8,
    strong: bool,
    sampled: bool,
) {
    let outside = place % LINE == OUTSIDE;
    let activation = Activation {
        feature: (place / LINE) as u32,
        strength,
        row: row.id,
        rank: row.rank,
        outside,
        strong,
        sampled: sampled && !outside,
    };
    if outside {
        *cell = 0;
    } else if *cell & COUNT == 0 {
        // The count has gone over into the class.
        *cell = cell.wrapping_sub(WRAP);
        wrapped.push(activation.cell() as u32);
    }
    if activation.outside || activation.strong || activation.sampled {
        queue.push(activation);
    }
}

/// Adds the counts of cells to bins, and counts from 0 again.
fn settle_cells(bins: &mut [u64], cells: &mut [u8]) {
    // Most features are never active in most bins.
    if cells.iter().fold(0, |all, cell| all | cell) & COUNT == 0 {
        return;
    }
    for (bin, cell) in bins.iter_mut().zip(cells) {
        *bin += u64::from(*cell & COUNT);
        *cell &= !COUNT;
    }
}

impl Rare {
    /// Has the CPU fetch what [`Rare::sample`] and the heap will look at first.
    #[inline]
    fn fetch(&self, activation: &Activation) {
        if activation.strong {
            self.heaps.fetch(activation.feature as usize);
        }
        if activation.sampled {
            simd::fetch(&self.levels, activation.cell());
            self.samples.fetch_slot(activation.cell());
        }
    }

    /// Enters an activation into its bin's sample; returns the bin's level if it has changed.
    fn sample(&mut self, activation: Activation) -> Option<u8> {
        let cell = activation.cell();
        let before = self.levels[cell];
        if (activation.rank.leading_zeros() as u8) < before {
            return None;
        }
        self.samples
            .offer(cell, activation.rank, activation.strength);
        // Of a sample that is not full, 0; then what the accumulator's sample asks stays.
        let level = self.samples.level(cell);
        (level > before).then_some(level)
    }
}

impl Activation {
    fn cell(self) -> usize {
        self.feature as usize * BINS + bin_of(self.strength)
    }
}
