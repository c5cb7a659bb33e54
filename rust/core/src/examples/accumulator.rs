//! Everything that is kept of each feature.

use super::heap::TopHeaps;
use super::histogram::BINS;
use super::samples::{Samples, MAX_PER_BIN};
use super::scan::Scan;
use crate::simd::Simd;
use crate::{Error, Result};

/// The largest n: far beyond any display, small enough to keep sizes in range.
const MAX_N: usize = 65_535;

/// Strongest rows, samples, histogram and sum of strengths of every feature.
///
/// Memory: `d_sae * (12 n + 8 BINS + 24)` bytes and `12 samples + 5` for each bin of a feature
/// that has been active, however many rows are added; and for each thread that adds,
/// `d_sae * (12 n + 2 BINS + 56)` bytes besides its own samples.
#[derive(Debug, Clone)]
pub struct Accumulator {
    d_sae: usize,
    pub(super) heaps: TopHeaps,
    /// `[d_sae, BINS]`; a feature's bins add up to its count.
    pub(super) histogram: Vec<u64>,
    /// `[d_sae]`, in units of 2^-64 (see [`super::sum`]).
    pub(super) sums: Vec<u128>,
    pub(super) samples: Samples,
    /// How many rows were scanned, those without codes too.
    pub(super) scanned: u64,
    /// What threads work on, kept from one call to the next.
    scans: Vec<Scan>,
    /// Whether `scans` have counted what is not yet in the rest.
    unsettled: bool,
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
        let Keep { n, samples, seed } = keep;
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
        // numbered in 32 bits, and so are the bytes of a scan's lines and cells.
        let bytes = d_sae.checked_mul(12 * n + 8 * BINS + 24);
        let cells = d_sae
            .checked_mul(BINS + 32)
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
            d_sae,
            heaps: TopHeaps::new(d_sae, n),
            histogram: vec![0; d_sae * BINS],
            sums: vec![0; d_sae],
            samples: Samples::new(d_sae, samples, seed),
            scanned: 0,
            scans: Vec::new(),
            unsettled: false,
        })
    }

    /// How many features.
    pub fn d_sae(&self) -> usize {
        self.d_sae
    }

    /// Slots of each feature.
    pub fn n(&self) -> usize {
        self.heaps.n()
    }

    /// What is kept.
    pub fn keep(&self) -> Keep {
        Keep {
            n: self.n(),
            samples: self.samples.per_bin(),
            seed: self.samples.ranking().seed,
        }
    }

    /// How many rows were scanned, those without codes too.
    pub fn scanned(&self) -> u64 {
        self.scanned
    }

    /// `[d_sae, n]` strengths and rows by falling strength, ties by rising row;
    /// unused slots hold 0 and -1.
    pub fn examples(&mut self) -> (Vec<f32>, Vec<i64>) {
        self.settle();
        self.heaps.sorted()
    }

    /// `[d_sae, BINS]` counts; see [`super::histogram::edges`].
    pub fn histogram(&mut self) -> &[u64] {
        self.settle();
        &self.histogram
    }

    /// `[d_sae]` sums of strengths in units of 2^-64.
    pub fn sums(&mut self) -> &[u128] {
        self.settle();
        &self.sums
    }

    /// The sampled rows: `[d_sae + 1]` offsets, and strengths and rows of each feature by rising
    /// bin, within a bin in the order of their rank.
    pub fn samples(&mut self) -> (Vec<i64>, Vec<f32>, Vec<i64>) {
        self.settle();
        self.samples.sorted(self.d_sae)
    }

    /// As many scans as threads, for work that may fail: they are taken out, and only
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

    /// The counterpart of [`Accumulator::take_scans`].
    pub(super) fn put_back(&mut self, scans: Vec<Scan>) {
        self.scans = scans;
        self.unsettled = true;
        self.settle();
    }

    /// A scan for work that can't fail; it is settled when something is asked for.
    pub(super) fn scan(&mut self, base: impl FnOnce() -> usize) -> Result<Option<&mut Scan>> {
        self.make_scans(1, base)?;
        self.unsettled = true;
        Ok(self.scans.first_mut())
    }

    /// For when the heaps or samples have changed by other ways than the scans.
    pub(super) fn forget_scans(&mut self) {
        self.scans.clear();
    }

    fn make_scans(&mut self, threads: usize, base: impl FnOnce() -> usize) -> Result<()> {
        if self.scans.len() >= threads {
            return Ok(());
        }
        self.settle();
        let simd = Simd::active()?;
        let base = match self.scans.first() {
            Some(scan) => scan.base(),
            None => base(),
        };
        while self.scans.len() < threads {
            let Keep { n, samples, seed } = self.keep();
            let (heaps, samples) = (
                TopHeaps::new(self.d_sae, n),
                Samples::new(self.d_sae, samples, seed),
            );
            let mut scan = Scan::new(simd, self.d_sae, heaps, samples, base);
            for feature in 0..self.d_sae {
                scan.set_floor(feature, self.heaps.floor(feature));
            }
            for &cell in self.samples.cells() {
                scan.set_level(cell as usize, self.samples.level(cell as usize));
            }
            self.scans.push(scan);
        }
        Ok(())
    }

    /// Makes what the scans have counted a part of this.
    pub(super) fn settle(&mut self) {
        if !self.unsettled {
            return;
        }
        let mut sampled = Vec::new();
        for scan in &mut self.scans {
            scan.settle(&mut self.histogram, &mut self.sums);
            let rare = scan.rare();
            for feature in 0..self.d_sae {
                if !rare.heaps.is_empty(feature) {
                    for (strength, row) in rare.heaps.entries(feature) {
                        self.heaps.offer(feature, strength, row);
                    }
                    rare.heaps.clear(feature);
                }
            }
            self.samples.merge(&rare.samples);
            sampled.extend_from_slice(rare.samples.cells());
            rare.samples.clear();
        }
        // The next activations need not look at what can't enter any more.
        for scan in &mut self.scans {
            for feature in 0..self.d_sae {
                scan.set_floor(feature, self.heaps.floor(feature));
            }
            for &cell in &sampled {
                scan.set_level(cell as usize, self.samples.level(cell as usize));
            }
        }
        self.unsettled = false;
    }
}
