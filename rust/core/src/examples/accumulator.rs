//! Everything that is kept of each feature.

use super::histogram::BINS;
use super::kept::Kept;
use super::samples::MAX_PER_BIN;
use super::scan::{Scan, Walker};
use super::stage::LINE;
use crate::{Error, Result};

/// The largest n: far beyond any display, small enough to keep sizes in range.
const MAX_N: usize = 65_535;

/// Strongest rows, samples, histogram and sum of strengths of every feature.
///
/// Memory: `d_sae * (12 n + 8 BINS + 24)` bytes and `16 samples + 5` for each bin of a feature
/// that has been active, however many rows are added; up to as much again while a large batch is
/// added, which must be all or nothing; and for each thread that adds `128 d_sae` bytes and 8 KB of
/// activations put aside for every 128 features.
#[derive(Debug)]
pub struct Accumulator {
    pub(super) kept: Kept,
    /// How many rows were scanned, those without codes too.
    pub(super) scanned: u64,
    /// What threads work on, kept from one call to the next.
    scans: Vec<Scan>,
    /// Whether `scans` have counted what is not yet in the rest.
    unsettled: bool,
    /// How scans count, if it isn't the way that is fastest here.
    pub(super) walker: Option<Walker>,
}

/// What to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// Strongest rows of each feature.
    pub n: usize,
    /// Sampled rows of each bin of each feature; 0 for none.
    pub samples: usize,
    /// Which rows are sampled.
    pub seed: u64,
}

impl Accumulator {
    /// One that has seen no rows.
    pub fn new(d_sae: usize, keep: Keep) -> Result<Self> {
        let Keep { n, samples, .. } = keep;
        if n == 0 || n > MAX_N {
            return Err(Error::InvalidArgument(format!(
                "n, the examples kept of each feature, must lie in 1..={MAX_N}, found {n}"
            )));
        }
        if samples > MAX_PER_BIN {
            return Err(Error::InvalidArgument(format!(
                "samples, the rows sampled of each bin of a feature's histogram, must lie in \
                 0..={MAX_PER_BIN}, found {samples}"
            )));
        }
        // Ask before taking: a failed allocation further down would abort the process. Cells are
        // numbered in 32 bits, and so are the bytes of a scan's lines.
        let bytes = d_sae.checked_mul(12 * n + 8 * BINS + 24);
        let cells = d_sae
            .checked_mul(BINS.max(LINE))
            .filter(|&cells| u32::try_from(cells).is_ok());
        if cells.is_none()
            || bytes.is_none_or(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_err())
        {
            return Err(Error::InvalidArgument(format!(
                "d_sae = {d_sae} with n = {n} examples of each feature needs more memory than this \
                 machine gives; ask for fewer examples"
            )));
        }
        Ok(Self {
            kept: Kept::new(d_sae, keep),
            scanned: 0,
            scans: Vec::new(),
            unsettled: false,
            walker: None,
        })
    }

    /// How many features.
    pub fn d_sae(&self) -> usize {
        self.kept.d_sae()
    }

    /// Slots of each feature.
    pub fn n(&self) -> usize {
        self.keep().n
    }

    /// What is kept.
    pub fn keep(&self) -> Keep {
        self.kept.keep()
    }

    /// How many rows were scanned, those without codes too.
    pub fn scanned(&self) -> u64 {
        self.scanned
    }

    /// `[d_sae, n]` strengths and rows by falling strength, ties by rising row;
    /// unused slots hold 0 and -1.
    pub fn examples(&mut self) -> (Vec<f32>, Vec<i64>) {
        self.settle();
        let slots = self.d_sae() * self.n();
        let mut found = (Vec::with_capacity(slots), Vec::with_capacity(slots));
        for block in self.kept.each() {
            let (strengths, rows) = block.heaps.sorted();
            found.0.extend(strengths);
            found.1.extend(rows);
        }
        found
    }

    /// `[d_sae, BINS]` counts; see [`super::histogram::edges`].
    pub fn histogram(&mut self) -> Vec<u64> {
        self.settle();
        let mut found = Vec::with_capacity(self.d_sae() * BINS);
        for block in self.kept.each() {
            found.extend_from_slice(&block.histogram);
        }
        found
    }

    /// `[d_sae]` sums of strengths in units of 2^-64.
    pub fn sums(&mut self) -> Vec<u128> {
        self.settle();
        let mut found = Vec::with_capacity(self.d_sae());
        for block in self.kept.each() {
            found.extend_from_slice(&block.sums);
        }
        found
    }

    /// The sampled rows: `[d_sae + 1]` offsets, and strengths and rows of each feature by rising
    /// bin, within a bin in the order of their rank.
    pub fn samples(&mut self) -> (Vec<i64>, Vec<f32>, Vec<i64>) {
        self.settle();
        let mut found = (vec![0], Vec::new(), Vec::new());
        for block in self.kept.each() {
            let (offsets, strengths, rows) = block.samples.sorted(block.sums.len());
            let before = found.1.len() as i64;
            found.0.extend(offsets[1..].iter().map(|end| before + end));
            found.1.extend(strengths);
            found.2.extend(rows);
        }
        found
    }

    /// As many scans as threads, for work that may fail: they are taken out (and should learn what
    /// is [kept](Self::kept)), and only
    /// [`Accumulator::put_back`] makes what they count a part of this. `base` is the first bin of
    /// their window.
    pub(super) fn take_scans(
        &mut self,
        threads: usize,
        base: impl FnOnce() -> usize,
    ) -> Result<Vec<Scan>> {
        self.settle();
        self.make_scans(threads, base)?;
        let mut scans = std::mem::take(&mut self.scans);
        scans.truncate(threads);
        Ok(scans)
    }

    /// The counterpart of [`Accumulator::take_scans`]: the scans, settled with `kept`, and what
    /// that holds now.
    pub(super) fn put_back(&mut self, scans: Vec<Scan>, mut kept: Kept) {
        self.kept.merge(&mut kept, scans.len().max(1));
        self.scans = scans;
    }

    /// A scan for work that can't fail, and what it adds to; it is settled when something is asked
    /// for.
    pub(super) fn scan(
        &mut self,
        base: impl FnOnce() -> usize,
    ) -> Result<(Option<&mut Scan>, &Kept)> {
        let fresh = self.scans.is_empty();
        self.make_scans(1, base)?;
        if let (true, Some(scan)) = (fresh, self.scans.first_mut()) {
            scan.learn(&self.kept);
        }
        self.unsettled = true;
        Ok((self.scans.first_mut(), &self.kept))
    }

    /// For when what is kept has changed by other ways than the scans.
    pub(super) fn forget_scans(&mut self) {
        self.scans.clear();
    }

    fn make_scans(&mut self, threads: usize, base: impl FnOnce() -> usize) -> Result<()> {
        if self.scans.len() >= threads {
            return Ok(());
        }
        self.settle();
        let walker = self.walker.map_or_else(Walker::active, Ok)?;
        let base = match self.scans.first() {
            Some(scan) => scan.base(),
            None => base(),
        };
        while self.scans.len() < threads {
            self.scans.push(Scan::new(walker, &self.kept, base));
        }
        Ok(())
    }

    /// Makes what the scans have counted a part of this.
    pub(super) fn settle(&mut self) {
        if self.unsettled {
            for scan in &mut self.scans {
                // What it has counted was checked before.
                let _ = scan.settle(&self.kept);
            }
            self.unsettled = false;
        }
    }
}
