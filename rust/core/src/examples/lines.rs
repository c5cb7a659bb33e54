//! What a thread counts of each feature, and what an activation must reach to need more than
//! counting: what each activation touches in half a line of the cache, since features come in no
//! order, the rest in tables that few look at.

use std::ops::Range;

use super::histogram::BINS;
use super::kept::{Block, Entry, Kept};
use super::stage::{Layout, FIRST, LINE, OUTSIDE, STAMP_SHIFT, SUM, WINDOW};

/// The level of a bin that has no sample. Rows have an earliness of 0 then.
const NEVER: u8 = u8::MAX;
/// Levels from which a bin is of classes 1, 2 and 3: only one row of 16, 64 or 256 is as early.
const CLASSES: [u8; 3] = [8 * 4, 8 * 6, 8 * 8];
/// Bits of a cell that are its class; the others are its count.
pub(super) const CLASS: u8 = 3;
/// What counts one in a cell.
pub(super) const ONE: u8 = CLASS + 1;
/// What a cell has counted when its count wraps to 0, as a power of 2.
const WRAP_BITS: u32 = ONE.leading_zeros() + 1;

/// The class of a level, or of how early a row is: a row may enter only samples of its class and
/// lower ones.
#[inline]
pub(super) fn class_of(level: u8) -> u8 {
    CLASSES.iter().map(|&from| u8::from(level >= from)).sum()
}

/// A feature.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Line {
    /// In the bits of [`SUM`] the strengths of what was counted inside the window (see
    /// [`Layout::fixed`]); above them the row (counted by the scan) that showed the feature last.
    pub sum: u64,
    /// What a strength inside must reach to enter the heap, in 16 bits (see [`Layout::coarse`]); 0
    /// while that has room. Rounded down, as the cells' classes are, so that more passes than must
    /// be looked at; precise numbers are kept apart.
    pub floor: u16,
    unused: u8,
    /// Bins `base..base + WINDOW`: the class in the lowest bits; above it the activations since the
    /// cell was settled or last wrapped to 0.
    cells: [u8; WINDOW],
}

/// Where in a line the floor is.
pub(super) const FLOOR: usize = 8;

const _: () = assert!(
    size_of::<Line>() == LINE
        && std::mem::offset_of!(Line, cells) == FIRST
        && std::mem::offset_of!(Line, floor) == FLOOR
);

/// Bins above the window, for the tail of the strengths.
const ABOVE: usize = 7;
/// Neighbouring bins of which a thread knows how early rows must be.
const REACH: usize = WINDOW + ABOVE;

/// What decides, of a feature, whether an activation that its line lets pass is put aside.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
struct Limits {
    /// The bits of what a strength must reach to enter the heap; 0 while that has room.
    floor: u32,
    /// How early a row must be to enter the sample of a bin; 0 while that has room.
    levels: [u8; REACH],
}

/// What is counted of a feature now and then.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
struct Rest {
    /// The strengths above the window, in the units of the lines.
    sum: u64,
    /// How often the counts of the window's bins have wrapped.
    wraps: [u16; WINDOW],
    /// The activations of the bins above it.
    above: [u16; ABOVE],
}

impl Rest {
    /// Whether 2^16 rows more could be too much for a number.
    fn is_large(&self) -> bool {
        let wraps = self.wraps.iter().fold(0, |all, wraps| all | wraps);
        wraps >= 1 << 15 || self.sum >= 1 << 62
    }
}

/// All features.
#[derive(Debug, Clone)]
pub(super) struct Lines {
    layout: Layout,
    lines: Vec<Line>,
    limits: Vec<Limits>,
    rest: Vec<Rest>,
}

impl Lines {
    /// Nothing is counted, and everything that may be kept is asked for.
    pub fn new(d_sae: usize, samples: bool, layout: Layout) -> Self {
        let level = if samples { 0 } else { NEVER };
        let line = Line {
            sum: 0,
            floor: 0,
            unused: 0,
            cells: [class_of(level); WINDOW],
        };
        Self {
            layout,
            lines: vec![line; d_sae],
            limits: vec![
                Limits {
                    floor: 0,
                    levels: [level; REACH],
                };
                d_sae
            ],
            rest: vec![Rest::default(); d_sae],
        }
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// How many features.
    #[cfg(target_arch = "x86_64")]
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    pub fn get_mut(&mut self, feature: usize) -> Option<&mut Line> {
        self.lines.get_mut(feature)
    }

    pub fn as_mut_ptr(&mut self) -> *mut Line {
        self.lines.as_mut_ptr()
    }

    /// Has the CPU fetch what changes when more is learnt of a feature.
    #[inline]
    pub fn fetch(&self, feature: usize) {
        crate::simd::fetch(&self.lines, feature);
        crate::simd::fetch(&self.limits, feature);
    }

    /// Has the CPU fetch what [`Lines::look`] looks at.
    #[inline]
    pub fn fetch_limits(&self, place: usize, wrapped: bool) {
        let feature = place / LINE;
        crate::simd::fetch(&self.limits, feature);
        if wrapped || place % LINE == OUTSIDE {
            crate::simd::fetch(&self.rest, feature);
        }
    }

    /// Looks closer at an activation inside the window: whether it may enter the heap, and whether
    /// it may enter its bin's sample.
    #[inline]
    pub fn look(&self, place: usize, bits: u32, earliness: u8) -> (bool, bool) {
        let limits = &self.limits[place / LINE];
        let level = limits.levels[(place % LINE).wrapping_sub(FIRST).min(WINDOW)];
        (bits >= limits.floor, earliness >= level)
    }

    /// [`Lines::look`] at one outside; if it is above the window, it is counted now. None if that
    /// can't be.
    pub fn look_above(&mut self, place: usize, bits: u32, earliness: u8) -> Option<(bool, bool)> {
        let feature = place / LINE;
        let bin = self.layout.bin_above(bits).filter(|&bin| bin < REACH)?;
        let rest = &mut self.rest[feature];
        let count = &mut rest.above[bin - WINDOW];
        *count = count.checked_add(1)?;
        rest.sum += self.layout.term_above(bits);
        let limits = &self.limits[feature];
        Some((bits >= limits.floor, earliness >= limits.levels[bin]))
    }

    /// A cell has wrapped to 0.
    #[inline]
    pub fn wrap(&mut self, place: usize) {
        self.rest[place / LINE].wraps[place % LINE - FIRST] += 1;
    }

    /// Raises what an entry's like must reach; `kept` has it now, of a block whose first feature is
    /// `first`.
    #[inline]
    pub fn learn_of(&mut self, first: usize, kept: &Block, entry: &Entry) {
        if entry.is_sampled() {
            self.learn_level(first, kept, entry.cell());
        }
        if entry.is_strong() {
            self.learn_floor(first, kept, entry.feature());
        }
    }

    /// Learns what is kept, in whole.
    pub fn learn(&mut self, kept: &Kept) {
        for block in 0..kept.blocks() {
            let first = kept.features(block).start;
            let block = kept.lock(block);
            for feature in 0..block.sums.len() {
                self.learn_floor(first, &block, feature);
            }
            for &cell in block.samples.cells() {
                self.learn_level(first, &block, cell as usize);
            }
        }
    }

    #[inline]
    fn learn_level(&mut self, first: usize, kept: &Block, cell: usize) {
        let bin = (cell % BINS).wrapping_sub(self.layout.base());
        if bin >= REACH {
            return;
        }
        let feature = first + cell / BINS;
        // What is kept of this pass alone may ask less than what was known before it.
        let known = &mut self.limits[feature].levels[bin];
        let level = kept.samples.level(cell);
        if level > *known {
            *known = level;
            if let Some(cell) = self.lines[feature].cells.get_mut(bin) {
                *cell = *cell & !CLASS | class_of(level);
            }
        }
    }

    #[inline]
    fn learn_floor(&mut self, first: usize, kept: &Block, feature: usize) {
        // Strengths aren't negative, so their bits order as they do.
        let floor = kept.heaps.floor(feature).to_bits();
        let known = &mut self.limits[first + feature].floor;
        if floor > *known {
            *known = floor;
            self.lines[first + feature].floor = self.layout.coarse_floor(floor);
        }
    }

    /// Adds the sums of a block's features to what is kept of it, and forgets rows. Returns what was
    /// added, in the units of the lines.
    pub fn settle_sums(&mut self, features: Range<usize>, kept: &mut Block) -> u64 {
        let mut all = 0_u64;
        for (at, feature) in features.enumerate() {
            let added = std::mem::take(&mut self.lines[feature].sum) & SUM;
            all = all.wrapping_add(added);
            kept.sums[at] = kept.sums[at].saturating_add(self.layout.fixed(added.into()));
            if self.rest[feature].is_large() {
                self.settle_rest(feature, at, kept);
            }
        }
        all
    }

    /// Adds the counts of a block's features to what is kept of it.
    pub fn settle_counts(&mut self, features: Range<usize>, kept: &mut Block) {
        let base = self.layout.base();
        for (at, feature) in features.enumerate() {
            let line = &mut self.lines[feature];
            let bins = &mut kept.histogram[at * BINS + base..][..WINDOW];
            for (bin, cell) in bins.iter_mut().zip(&mut line.cells) {
                *bin += u64::from(*cell / ONE);
                *cell &= CLASS;
            }
            self.settle_rest(feature, at, kept);
        }
    }

    /// Adds what is counted of a feature besides its line to what is kept of it, at `at`.
    fn settle_rest(&mut self, feature: usize, at: usize, kept: &mut Block) {
        let rest = std::mem::take(&mut self.rest[feature]);
        kept.sums[at] = kept.sums[at].saturating_add(self.layout.fixed(rest.sum.into()));
        let wraps = rest.wraps.map(|wraps| u64::from(wraps) << WRAP_BITS);
        let counts = wraps.into_iter().chain(rest.above.map(u64::from));
        let bins = &mut kept.histogram[at * BINS + self.layout.base()..(at + 1) * BINS];
        for (bin, count) in bins.iter_mut().zip(counts) {
            *bin += count;
        }
    }
}

/// The stamp of a row, where a line's first word has it.
#[inline]
pub(super) fn stamped(stamp: u16) -> u64 {
    u64::from(stamp) << STAMP_SHIFT
}
