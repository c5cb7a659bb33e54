//! Lists of features that may be codes, kept short while the scan goes on.
//!
//! The k-th largest lower bound seen so far is not above the one of all features, so what doesn't
//! reach it can be dropped at once: a list is cut whenever it has grown by some hundreds.

use std::sync::atomic::{AtomicU32, Ordering};

use super::certificate::FeatureBounds;
use super::layout::PANEL;
use crate::select::not_above_kth;
use crate::simd::Simd;

/// Which features must be kept.
#[derive(Clone, Copy)]
pub(super) enum Wanted<'a> {
    /// The k largest of each row.
    EachRow(usize),
    /// So many of all rows together; the bound, as bits, rises as rows are seen.
    AllRows(usize, &'a AtomicU32),
    /// All above their floors.
    All,
}

impl Wanted<'_> {
    /// Entries above which a row's list is given up: the bounds tell so little (all numbers tiny, all
    /// features alike) that computing the row whole costs little more, and takes no memory. Where
    /// a row may have any number of codes, only beyond half of all features.
    pub(super) fn most_entries(self, d_sae: usize) -> usize {
        match self {
            Self::EachRow(k) => (d_sae / 8).max(4 * k + GROWTH),
            Self::AllRows(..) | Self::All => (d_sae / 2).max(GROWTH),
        }
    }
}

/// Features of one row that may be codes.
#[derive(Clone, Debug, Default)]
pub(super) struct List {
    pub features: Vec<u32>,
    /// Upper scores.
    pub scores: Vec<f32>,
    /// Squared margins.
    pub margins2: Vec<f32>,
    /// The row's k-th largest pre-activation is not below this.
    pub bound: f32,
    /// Given up: there were so many that the row is better computed whole. Holds none any more.
    pub is_over: bool,
    /// Entries at which the list is cut.
    full: usize,
}

/// Entries by which a list may grow before it is cut again.
const GROWTH: usize = 256;

impl List {
    pub(super) fn len(&self) -> usize {
        self.features.len()
    }

    /// Makes room for a panel's entries.
    #[inline]
    pub(super) fn reserve(&mut self) {
        if self.features.capacity() - self.features.len() < PANEL {
            let more = PANEL.max(self.features.len());
            self.features.reserve(more);
            self.scores.reserve(more);
            self.margins2.reserve(more);
        }
    }

    /// Adds what `mask` marks of a panel.
    #[inline]
    pub(super) fn push(&mut self, mut mask: u32, first: usize, scores: &[f32], margins2: &[f32]) {
        while mask != 0 {
            let lane = mask.trailing_zeros() as usize;
            self.features.push((first + lane) as u32);
            self.scores.push(scores[lane]);
            self.margins2.push(margins2[lane]);
            mask &= mask - 1;
        }
    }

    /// Gives the list up if it has more than `most` entries.
    pub(super) fn close_above(&mut self, most: usize) {
        if self.len() > most {
            self.close();
        }
    }

    fn close(&mut self) {
        *self = Self {
            is_over: true,
            ..Self::default()
        };
    }

    pub(super) fn append(&mut self, other: &Self) {
        if self.is_over || other.is_over {
            return self.close();
        }
        self.bound = self.bound.max(other.bound);
        self.features.extend_from_slice(&other.features);
        self.scores.extend_from_slice(&other.scores);
        self.margins2.extend_from_slice(&other.margins2);
    }

    /// Whether it is worth cutting.
    #[inline]
    pub(super) fn is_full(&self, k: usize) -> bool {
        self.len() > self.full.max(k + GROWTH)
    }

    /// Raises the bound to what k entries are not below, and drops what doesn't reach it.
    pub(super) fn cut(&mut self, k: usize, cut: &Cut<'_>, lowers: &mut Vec<f32>) {
        lowers.clear();
        cut.add_lowers(self, lowers);
        if let Some(kth) = cut.not_above_kth(lowers, k) {
            self.bound = self.bound.max(kth);
        }
        self.drop_below(self.bound);
        self.full = 2 * self.len();
    }

    /// Drops what doesn't reach `bound`.
    pub(super) fn drop_below(&mut self, bound: f32) {
        let mut kept = 0;
        for at in 0..self.features.len() {
            let (score, margin2) = (self.scores[at], self.margins2[at]);
            self.features[kept] = self.features[at];
            self.scores[kept] = score;
            self.margins2[kept] = margin2;
            let short = (bound - score).max(0.0);
            // An overflow of both sides keeps the entry.
            kept += usize::from(short * short <= margin2);
        }
        self.features.truncate(kept);
        self.scores.truncate(kept);
        self.margins2.truncate(kept);
    }
}

/// What cutting needs to know.
#[derive(Clone, Copy)]
pub(super) struct Cut<'a> {
    pub bounds: &'a FeatureBounds,
    /// The part of a value that its last roundings may take away.
    pub rounding: f32,
    pub simd: Simd,
}

impl Cut<'_> {
    /// Adds the lower bounds of a list's entries: 0 where not positive.
    fn add_lowers(&self, list: &List, lowers: &mut Vec<f32>) {
        let start = lowers.len();
        let pairs = list.scores.iter().zip(&list.margins2);
        lowers.extend(pairs.map(|(score, margin2)| {
            let margin = margin2.sqrt();
            (score - margin) - (score.abs() + margin) * 1e-6
        }));
        if self.bounds.has_bias {
            for (lower, feature) in lowers[start..].iter_mut().zip(&list.features) {
                *lower -= self.bounds.slack[*feature as usize];
            }
        }
        for lower in &mut lowers[start..] {
            // False for NaN (an infinite margin's) too.
            *lower = if *lower > 0.0 { *lower } else { 0.0 };
        }
    }

    /// A little below the k-th largest, so that no rounding lifts a smaller value past it; None where
    /// there are fewer.
    fn not_above_kth(&self, lowers: &[f32], k: usize) -> Option<f32> {
        if k == 0 || k > lowers.len() {
            return None;
        }
        Some(not_above_kth(lowers, k, self.simd) * (1.0 - self.rounding))
    }
}

/// The lower bounds of all rows together, as far as they can still be among the largest.
#[derive(Default)]
pub(super) struct Pool(Vec<f32>);

impl Pool {
    /// Adds some rows', and raises `shared` to what so many are not below.
    pub(super) fn add(&mut self, lists: &[List], wanted: usize, cut: &Cut<'_>, shared: &AtomicU32) {
        for list in lists {
            cut.add_lowers(list, &mut self.0);
        }
        if let Some(kth) = cut.not_above_kth(&self.0, wanted) {
            // Floats that aren't negative order as their bits do.
            shared.fetch_max(kth.to_bits(), Ordering::Relaxed);
            self.0.retain(|lower| *lower >= kth);
        }
    }
}
