//! The scan: products panel by panel, each looked at while it is in the cache.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::candidates::{Cut, List, Pool, Wanted};
use super::certificate::RowBound;
use super::dither::Dither;
use super::kernel::{Block, Kernel, Tiles, FETCHED};
use super::layout::{PANEL, TILE};
use super::rows::{Rounder, Rows};
use super::scan::{add_passing, PanelBounds};
use super::spread::Spread;
use super::weights::Weights;
use super::Shape;
use crate::lines::Lines;
use crate::rows::{map_ranges_mut, Matrix};
use crate::select::Options;
use crate::simd::Element;
use crate::{pool, Cancel, Error, Result};

/// Bytes of rounded rows that should stay in a core's second-level cache, beside what streams by. CPUs
/// with AMX have 2 MiB, and it pays to fill them: weights are read once for all rows of a chunk.
const CACHED_ROWS: usize = 900_000;
const CACHED_ROWS_OF_AMX: usize = 1_900_000;
/// Rows of a chunk at most.
const MOST_ROWS: usize = 512;
/// Steps between two rounds over the rows of a chunk: 16 KiB of weights stay in the first-level cache.
const STEPS: usize = 8;
/// Entries of a thread, beyond those wanted of all rows, at which it looks for a better bound.
const MANY: usize = 1 << 15;

/// Joining and cutting a row's lists takes microseconds: as much as this many products.
pub(super) const COST: usize = 1 << 13;

/// What the scan reads.
pub(super) struct Search<'a> {
    pub shape: Shape,
    pub weights: &'a Weights,
    pub spread: &'a Spread,
    pub dither: &'a Dither,
    pub kernel: Kernel,
    /// What a pre-activation must exceed, a feature each; infinite for padding.
    pub floor: &'a [f32],
    pub cut: Cut<'a>,
    pub wanted: Wanted<'a>,
    pub options: Options,
}

/// What may be codes, row by row.
#[derive(Default)]
pub(super) struct Found {
    pub lists: Vec<List>,
    pub bounds: Vec<RowBound>,
}

impl Search<'_> {
    /// Scans all rows of `x`.
    pub(super) fn run<E: Element>(&self, x: Matrix<'_, E>, cancel: &Cancel) -> Result<Found> {
        let row_bytes = (self.shape.steps() + 1) * super::layout::STEP;
        let cached = match self.kernel {
            Kernel::Amx | Kernel::AmxBf16 => CACHED_ROWS_OF_AMX,
            _ => CACHED_ROWS,
        };
        let most = (cached / row_bytes / PANEL * PANEL).clamp(PANEL, MOST_ROWS);
        // Chunks of about the same size: a small one costs nearly as much as a large one.
        let chunks = x.rows().div_ceil(most).max(1);
        let chunk = x.rows().div_ceil(chunks).next_multiple_of(PANEL).max(PANEL);
        let mut rows = Rows::new(self.shape, chunk)?;
        let rounder = Rounder {
            shape: self.shape,
            spread: self.spread,
            dither: self.dither,
            levels: self.kernel.levels(),
            simd: self.options.simd,
            threads: self.options.threads,
        };
        let mut found = Found::default();
        let mut pool = Pool::default();
        for first in (0..x.rows()).step_by(chunk) {
            cancel.check()?;
            let count = chunk.min(x.rows() - first);
            for (row, bound) in rows.fill(x, first, count, &rounder).into_iter().enumerate() {
                let bound = match bound {
                    Some(bound) => bound,
                    None if self.options.check_finite => {
                        return Err(Error::NonFinite {
                            what: "x",
                            row: first + row,
                        })
                    }
                    None => RowBound::exact(),
                };
                found.bounds.push(bound);
            }
            let bounds = &found.bounds[first..];
            let lists = self.chunk(&rows, bounds, cancel)?;
            for (bound, list) in found.bounds[first..].iter_mut().zip(&lists) {
                if list.is_over {
                    *bound = RowBound::exact();
                }
            }
            if let Wanted::AllRows(wanted, shared) = self.wanted {
                pool.add(&lists, wanted, &self.cut, shared);
            }
            found.lists.extend(lists);
        }
        if let Wanted::AllRows(_, shared) = self.wanted {
            let bound = f32::from_bits(shared.load(Ordering::Relaxed));
            map_ranges_mut(
                &mut found.lists,
                1,
                COST,
                self.options.threads,
                |_, lists| {
                    lists.iter_mut().for_each(|list| list.drop_below(bound));
                },
            );
        }
        Ok(found)
    }

    fn most_entries(&self) -> usize {
        self.wanted.most_entries(self.shape.d_sae)
    }

    /// Scans one chunk of rows: each thread takes some of the panels.
    fn chunk(&self, rows: &Rows, bounds: &[RowBound], cancel: &Cancel) -> Result<Vec<List>> {
        let panels = self.shape.blocks() / 2;
        let work = bounds.len().max(16) * self.shape.d_in * self.shape.d_sae;
        let tasks = self.options.threads.min(work >> 22).min(panels).max(1);
        let ranges = (0..tasks).map(|task| panels * task / tasks..panels * (task + 1) / tasks);
        let parts = pool::map(ranges.collect(), |panels| {
            self.panels(rows, bounds, panels, cancel)
        });
        let mut parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
        let mut lists = parts.pop().unwrap_or_default();
        map_ranges_mut(&mut lists, 1, COST, self.options.threads, |rows, lists| {
            let mut scratch = Vec::new();
            for (row, list) in rows.zip(lists) {
                parts.iter().for_each(|part| list.append(&part[row]));
                if let Wanted::EachRow(k) = self.wanted {
                    list.cut(k, &self.cut, &mut scratch);
                }
                if !matches!(self.wanted, Wanted::AllRows(..)) {
                    list.close_above(self.most_entries());
                }
            }
        });
        Ok(lists)
    }

    /// Scans some panels for all rows of a chunk.
    fn panels(
        &self,
        rows: &Rows,
        bounds: &[RowBound],
        panels: Range<usize>,
        cancel: &Cancel,
    ) -> Result<Vec<List>> {
        let Some(session) = self.kernel.begin() else {
            return Err(Error::InvalidArgument(format!(
                "this CPU has no {}; choose another kernel",
                self.kernel.name()
            )));
        };
        let mut lists = vec![List::default(); bounds.len()];
        let mut blocks = Lines::new(0_i32, bounds.len().div_ceil(PANEL) * PANEL * PANEL);
        let blocks: &mut [Block] = blocks.as_chunks_mut().0;
        let mut scan = Scan {
            search: self,
            bounds,
            scratch: Vec::new(),
            entries: 0,
            many: MANY,
            most: self.most_entries(),
        };
        let (steps, row_steps) = (self.shape.steps(), rows.steps());
        let tiles = self.weights.tiles.bytes();
        for panel in panels {
            cancel.check()?;
            let weights = &tiles[panel * 2 * steps * TILE..][..2 * steps * TILE];
            let further = &self.spread.tiles.bytes()[panel * 2 * TILE..][..2 * TILE];
            // A block of rows alone keeps its sums in registers.
            let round = if blocks.len() == 1 { steps } else { STEPS };
            let starts = (0..steps).step_by(round.max(1));
            for (start, is_further) in starts.map(|start| (start, false)).chain([(steps, true)]) {
                let (w, stride, count) = if is_further {
                    (further, TILE, 1)
                } else {
                    let weights = &weights[start * TILE..];
                    (weights, steps * TILE, round.min(steps - start))
                };
                if is_further && self.spread.dimensions.is_empty() {
                    continue;
                }
                for (at, block) in blocks.iter_mut().enumerate() {
                    let x = &rows.tiles()[(2 * at * row_steps + start) * TILE..];
                    let x = Tiles {
                        bytes: x,
                        stride: row_steps * TILE,
                        ahead: &[],
                    };
                    let next = match start + round < steps {
                        true => panel * 2 * steps + start + round,
                        false => (panel + 1) * 2 * steps,
                    };
                    let w = Tiles {
                        bytes: w,
                        stride,
                        ahead: share_of_next(&tiles[(next * TILE).min(tiles.len())..], steps, at),
                    };
                    let left = (bounds.len() - at * PANEL).min(PANEL);
                    session.multiply(x, left, w, count, block, start == 0);
                }
            }
            scan.panel(panel, blocks, &mut lists);
        }
        Ok(lists)
    }
}

/// What the block `at` has fetched of the next round's weights, which begin `tiles`: two tiles' worth of
/// [`STEPS`] steps, `steps` steps apart. All at once they would keep rows from coming out of the
/// second-level cache; so each block takes a share, and eight blocks all of it.
fn share_of_next(tiles: &[u8], steps: usize, at: usize) -> &[u8] {
    let shares = TILE / FETCHED;
    let start = (at / shares * steps * TILE) + at % shares * STEPS * FETCHED;
    let wanted = at < 2 * shares;
    tiles.get(start..).filter(|_| wanted).unwrap_or_default()
}

/// One thread's part of the scan.
struct Scan<'a> {
    search: &'a Search<'a>,
    bounds: &'a [RowBound],
    scratch: Vec<f32>,
    /// In all lists of this thread.
    entries: usize,
    many: usize,
    /// Of one list.
    most: usize,
}

impl Scan<'_> {
    /// Adds to the lists what reaches the rows' bounds.
    fn panel(&mut self, panel: usize, blocks: &[Block], lists: &mut [List]) {
        let search = self.search;
        let (cut, wanted, kind) = (&search.cut, search.wanted, search.shape.kind);
        let Some(bounds) = PanelBounds::new(cut.bounds, search.floor, panel) else {
            return;
        };
        let shared = match wanted {
            Wanted::AllRows(_, shared) => f32::from_bits(shared.load(Ordering::Relaxed)),
            _ => 0.0,
        };
        let rows = blocks.iter().flat_map(|block| block.as_chunks::<PANEL>().0);
        for ((sums, row), list) in rows.zip(self.bounds).zip(lists.iter_mut()) {
            if row.is_exact || list.is_over {
                continue;
            }
            let before = list.len();
            let bound = list.bound.max(shared);
            add_passing(sums, &bounds, row, bound, list, kind, search.options.simd);
            match wanted {
                Wanted::EachRow(k) if list.is_full(k) => {
                    list.cut(k, cut, &mut self.scratch);
                    list.close_above(self.most);
                }
                Wanted::All => list.close_above(self.most),
                _ => self.entries += list.len() - before,
            }
        }
        if let Wanted::AllRows(wanted, shared) = wanted {
            if self.entries > self.many.saturating_add(wanted) {
                self.cut_all(wanted, shared, lists);
            }
        }
    }

    fn cut_all(&mut self, wanted: usize, shared: &AtomicU32, lists: &mut [List]) {
        Pool::default().add(lists, wanted, &self.search.cut, shared);
        let bound = f32::from_bits(shared.load(Ordering::Relaxed));
        self.entries = 0;
        for list in lists {
            list.drop_below(bound);
            list.close_above(self.most);
            self.entries += list.len();
        }
        // Seldom enough where nothing can be dropped.
        self.many = self.entries + MANY.max(self.entries / 4);
    }
}
