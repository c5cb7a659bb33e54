//! What a thread counts of each feature, and what an activation must reach to need more than
//! counting: all in one line of the cache, since features come in no order.

use std::ops::Range;

use super::histogram::BINS;
use super::kept::{Block, Entry, Kept, BLOCK};
use super::stage::{Layout, CELL, FIRST, LINE, OUTSIDE, WINDOW};

/// The level of a cell that has no sample. Rows have an earliness of 0 then.
const NEVER: u8 = u8::MAX;

/// A bin of a feature.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Cell {
    /// Its activations since it was settled or last wrapped to 0.
    pub count: u8,
    /// How early a row must be to enter its sample; 0 while that has room.
    pub level: u8,
}

/// A feature.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line {
    /// In the upper 48 bits the strengths of what was counted inside the window (see
    /// [`Layout::fixed`]); in the lower 16 the row (counted by the scan) that showed the feature
    /// last. One store for both: stores are what bounds the loop.
    pub sum: u64,
    /// The bits of what a strength must reach to enter the heap; 0 while that has room.
    pub floor: u32,
    /// Bins `base..base + WINDOW`.
    cells: [Cell; WINDOW],
    /// Takes the place of all other bins. Its level stays 0 and its count means nothing, as each of
    /// its activations is looked at.
    outside: Cell,
}

const _: () = assert!(
    size_of::<Line>() == LINE
        && size_of::<Cell>() == CELL
        && std::mem::offset_of!(Line, cells) == FIRST
        && std::mem::offset_of!(Line, outside) == OUTSIDE
);

/// All features.
#[derive(Debug, Clone)]
pub(super) struct Lines {
    layout: Layout,
    lines: Vec<Line>,
}

impl Lines {
    /// Nothing is counted, and everything that may be kept is asked for.
    pub fn new(d_sae: usize, samples: bool, layout: Layout) -> Self {
        let level = if samples { 0 } else { NEVER };
        let line = Line {
            sum: 0,
            floor: 0,
            cells: [Cell { count: 0, level }; WINDOW],
            outside: Cell { count: 0, level: 0 },
        };
        Self {
            layout,
            lines: vec![line; d_sae],
        }
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    pub fn get_mut(&mut self, feature: usize) -> Option<&mut Line> {
        self.lines.get_mut(feature)
    }

    pub fn as_mut_ptr(&mut self) -> *mut Line {
        self.lines.as_mut_ptr()
    }

    /// Has the CPU fetch a feature's line.
    #[inline]
    pub fn fetch(&self, feature: usize) {
        crate::simd::fetch(&self.lines, feature);
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
    pub fn learn(&mut self, kept: &mut Kept) {
        for (number, block) in kept.each().enumerate() {
            let first = number * BLOCK;
            for feature in 0..block.sums.len() {
                self.learn_floor(first, block, feature);
            }
            for &cell in block.samples.cells() {
                self.learn_level(first, block, cell as usize);
            }
        }
    }

    #[inline]
    fn learn_level(&mut self, first: usize, kept: &Block, cell: usize) {
        let inside = (cell % BINS).wrapping_sub(self.layout.base());
        if inside < WINDOW {
            // What is kept of this pass alone may ask less than what was known before it.
            let known = &mut self.lines[first + cell / BINS].cells[inside].level;
            *known = kept.samples.level(cell).max(*known);
        }
    }

    #[inline]
    fn learn_floor(&mut self, first: usize, kept: &Block, feature: usize) {
        // Strengths aren't negative, so their bits order as they do.
        let known = &mut self.lines[first + feature].floor;
        *known = kept.heaps.floor(feature).to_bits().max(*known);
    }

    /// Adds the sums of a block's features to what is kept of it, and forgets rows.
    pub fn settle_sums(&mut self, features: Range<usize>, kept: &mut Block) {
        for (line, sum) in self.lines[features].iter_mut().zip(&mut kept.sums) {
            let fixed = self.layout.fixed(std::mem::take(&mut line.sum));
            *sum = sum.saturating_add(fixed);
        }
    }

    /// Adds the counts of a block's features to what is kept of it.
    pub fn settle_counts(&mut self, features: Range<usize>, kept: &mut Block) {
        let histograms = kept.histogram.chunks_exact_mut(BINS);
        for (line, bins) in self.lines[features].iter_mut().zip(histograms) {
            for (cell, bin) in line.cells.iter_mut().zip(&mut bins[self.layout.base()..]) {
                *bin += u64::from(std::mem::take(&mut cell.count));
            }
        }
    }
}
