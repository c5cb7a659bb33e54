//! What a pass keeps, in blocks of features, each behind a lock of its own: threads add to them as
//! they go, and what one adds raises what the others must reach.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::accumulator::Keep;
use super::heap::TopHeaps;
use super::histogram::{bin_of, BINS};
use super::samples::Samples;
use super::sum;

/// Features of a block: as many as leave what is kept of them in a core's second cache.
pub(super) const BLOCK: usize = 128;

/// Strongest rows, samples, histogram and sums of some neighbouring features, counted from the
/// block's first.
#[derive(Debug, Clone)]
pub(super) struct Block {
    pub heaps: TopHeaps,
    pub samples: Samples,
    /// `[features, BINS]`; a feature's bins add up to its count.
    pub histogram: Vec<u64>,
    /// `[features]`, in units of 2^-64 (see [`super::sum`]).
    pub sums: Vec<u128>,
}

/// An activation, or what is to be counted of many.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// The lowest bits are the feature, counted from the block's first; then what it is.
    what: u32,
    pub strength: f32,
    pub row: i64,
}

impl Entry {
    /// It is to be counted and added up.
    const COUNT: u32 = 1 << 16;
    /// It may enter the heap.
    const STRONG: u32 = 1 << 17;
    /// It may enter its bin's sample.
    const SAMPLED: u32 = 1 << 18;

    /// An activation that may enter the heap, the sample or both; it has been counted.
    #[inline]
    pub fn candidate(feature: usize, strength: f32, row: i64, strong: bool, sampled: bool) -> Self {
        let strong = if strong { Self::STRONG } else { 0 };
        let sampled = if sampled { Self::SAMPLED } else { 0 };
        Self {
            what: (feature % BLOCK) as u32 | strong | sampled,
            strength,
            row,
        }
    }

    /// An activation of which nothing has been done.
    #[inline]
    pub fn whole(feature: usize, strength: f32, row: i64) -> Self {
        Self {
            what: (feature % BLOCK) as u32 | Self::COUNT | Self::STRONG | Self::SAMPLED,
            strength,
            row,
        }
    }

    /// It may enter the heap.
    #[inline]
    pub fn is_strong(&self) -> bool {
        self.what & Self::STRONG != 0
    }

    /// It may enter its bin's sample.
    #[inline]
    pub fn is_sampled(&self) -> bool {
        self.what & Self::SAMPLED != 0
    }

    /// Counted from the block's first.
    #[inline]
    pub fn feature(&self) -> usize {
        self.what as usize % BLOCK
    }

    /// `feature * BINS + bin`, counted from the block's first.
    #[inline]
    pub fn cell(&self) -> usize {
        self.feature() * BINS + bin_of(self.strength)
    }
}

impl Block {
    fn new(features: usize, keep: Keep) -> Self {
        Self {
            heaps: TopHeaps::new(features, keep.n),
            samples: Samples::new(features, keep.samples, keep.seed),
            histogram: vec![0; features * BINS],
            sums: vec![0; features],
        }
    }

    /// Adds what an entry tells.
    #[inline]
    pub fn add(&mut self, entry: &Entry) {
        let (feature, cell) = (entry.feature(), entry.cell());
        if entry.what & Entry::COUNT != 0 {
            self.histogram[cell] += 1;
            self.sums[feature] = sum::add(self.sums[feature], entry.strength);
        }
        if entry.is_strong() {
            self.heaps.offer(feature, entry.strength, entry.row);
        }
        if entry.is_sampled() {
            let rank = self.samples.ranking().rank(entry.row);
            self.samples.offer(cell, rank, entry.strength);
        }
    }

    /// Has the CPU fetch what [`Block::fetch`] looks at.
    #[inline]
    pub fn fetch_places(&self, entry: &Entry) {
        if entry.is_sampled() {
            self.samples.fetch_slot(entry.cell());
        }
    }

    /// Has the CPU fetch what [`Block::add`] looks at first.
    #[inline]
    pub fn fetch(&self, entry: &Entry) {
        if entry.is_strong() {
            self.heaps.fetch(entry.feature());
        }
        if entry.is_sampled() {
            self.samples.fetch(entry.cell());
        }
    }

    /// Adds all that `other` holds.
    fn merge(&mut self, other: &Self) {
        for feature in 0..self.sums.len() {
            for (strength, row) in other.heaps.entries(feature) {
                self.heaps.offer(feature, strength, row);
            }
        }
        for (mine, theirs) in self.histogram.iter_mut().zip(&other.histogram) {
            *mine += theirs;
        }
        for (mine, theirs) in self.sums.iter_mut().zip(&other.sums) {
            *mine = mine.saturating_add(*theirs);
        }
        self.samples.merge(&other.samples);
    }
}

/// All blocks.
#[derive(Debug)]
pub(super) struct Kept {
    d_sae: usize,
    keep: Keep,
    blocks: Vec<Mutex<Block>>,
}

impl Kept {
    /// Nothing yet. The caller has checked that there is memory for it.
    pub fn new(d_sae: usize, keep: Keep) -> Self {
        let features = |start| d_sae.min(start + BLOCK) - start;
        let starts = (0..d_sae).step_by(BLOCK);
        Self {
            d_sae,
            keep,
            blocks: starts
                .map(|start| Mutex::new(Block::new(features(start), keep)))
                .collect(),
        }
    }

    pub fn keep(&self) -> Keep {
        self.keep
    }

    pub fn d_sae(&self) -> usize {
        self.d_sae
    }

    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The features of a block.
    pub fn features(&self, block: usize) -> Range<usize> {
        block * BLOCK..self.d_sae.min((block + 1) * BLOCK)
    }

    /// Block `block`, while nobody else is at it.
    pub fn lock(&self, block: usize) -> MutexGuard<'_, Block> {
        // A thread that panicked takes its pass with it, and that pass is thrown away.
        self.blocks[block]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// All blocks, of which there is no other user.
    pub fn each(&mut self) -> impl Iterator<Item = &mut Block> {
        self.blocks
            .iter_mut()
            .map(|block| block.get_mut().unwrap_or_else(PoisonError::into_inner))
    }

    /// The block of a feature, of which there is no other user.
    pub fn of(&mut self, feature: usize) -> &mut Block {
        self.blocks[feature / BLOCK]
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing was ever added.
    fn is_empty(&mut self) -> bool {
        self.each()
            .all(|block| (0..block.sums.len()).all(|feature| block.heaps.is_empty(feature)))
    }

    /// Adds all that `other` holds, on so many threads; leaves it with anything.
    pub fn merge(&mut self, other: &mut Self, threads: usize) {
        if self.is_empty() {
            std::mem::swap(&mut self.blocks, &mut other.blocks);
            return;
        }
        let next = AtomicUsize::new(0);
        let work = || loop {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= self.blocks.len() {
                return;
            }
            self.lock(block).merge(&other.lock(block));
        };
        std::thread::scope(|scope| {
            (1..threads).for_each(|_| drop(scope.spawn(work)));
            work();
        });
    }

    /// Adds all that `other` holds, which stays as it is.
    pub fn merge_all(&mut self, other: &mut Self) {
        for (mine, theirs) in self.each().zip(other.each()) {
            mine.merge(theirs);
        }
    }
}
