//! Everything that is kept of each feature, and the scan that fills it.

use std::ops::Range;

use super::codes::{CodesView, Index, Value};
use super::heap::TopHeaps;
use super::histogram::{bin_of, BINS};
use super::sum;
use crate::shard::{Indices, Values};
use crate::{Error, Result};

/// The largest n: far beyond any display, small enough to keep sizes in range.
const MAX_N: usize = 65_535;
/// Strongest rows, histogram and sum of strengths of every feature.
///
/// Memory: `d_sae * (12 n + 8 BINS + 24)` bytes, however many rows are added.
#[derive(Debug, Clone)]
pub struct Accumulator {
    pub(super) d_sae: usize,
    pub(super) heaps: TopHeaps,
    /// `[d_sae, BINS]`; a feature's bins add up to its count.
    pub(super) histogram: Vec<u64>,
    /// `[d_sae]`, in units of 2^-64 (see [`sum`]).
    pub(super) sums: Vec<u128>,
    /// How many rows were scanned, those without codes too.
    pub(super) scanned: u64,
}

impl Accumulator {
    /// One that has seen no rows and keeps the `n` strongest of each feature.
    pub fn new(d_sae: usize, n: usize) -> Result<Self> {
        if n == 0 || n > MAX_N {
            return Err(Error::InvalidArgument(format!(
                "n, the examples kept of each feature, must lie in 1..={MAX_N}, found {n}"
            )));
        }
        // Ask before taking: a failed allocation further down would abort the process.
        let bytes = d_sae.checked_mul(12 * n + 8 * BINS + 24);
        if bytes.is_none_or(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_err()) {
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
            scanned: 0,
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

    /// How many rows were scanned, those without codes too.
    pub fn scanned(&self) -> u64 {
        self.scanned
    }

    /// `[d_sae, n]` strengths and rows by falling strength, ties by rising row;
    /// unused slots hold 0 and -1.
    pub fn examples(&self) -> (Vec<f32>, Vec<i64>) {
        self.heaps.sorted()
    }

    /// `[d_sae, BINS]` counts; see [`super::histogram::edges`].
    pub fn histogram(&self) -> &[u64] {
        &self.histogram
    }

    /// `[d_sae]` sums of strengths in units of 2^-64.
    pub fn sums(&self) -> &[u128] {
        &self.sums
    }

    /// Adds the codes of `rows`, for which [`CodesView::check`] has vouched.
    pub(super) fn add_checked(&mut self, codes: &CodesView<'_>, rows: Range<usize>) {
        self.scanned += rows.len() as u64;
        match (codes.values(), codes.indices()) {
            (Values::F32(v), Indices::U16(i)) => self.scan(codes, rows, v, i),
            (Values::F32(v), Indices::U32(i)) => self.scan(codes, rows, v, i),
            (Values::Bf16(v), Indices::U16(i)) => self.scan(codes, rows, v, i),
            (Values::Bf16(v), Indices::U32(i)) => self.scan(codes, rows, v, i),
        }
    }

    /// The inner loop.
    fn scan<V: Value, I: Index>(
        &mut self,
        codes: &CodesView<'_>,
        rows: Range<usize>,
        values: &[V],
        indices: &[I],
    ) {
        let offsets = &codes.row_offsets()[rows.start..=rows.end];
        for (row, ends) in rows.zip(offsets.windows(2)) {
            let row = codes.row_id(row);
            let span = ends[0] as usize..ends[1] as usize;
            for (value, index) in values[span.clone()].iter().zip(&indices[span]) {
                let (strength, feature) = (value.strength(), index.feature());
                // A stored zero is no activation.
                if strength > 0.0 {
                    self.heaps.offer(feature, strength, row);
                    self.histogram[feature * BINS + bin_of(strength)] += 1;
                    self.sums[feature] = sum::add(self.sums[feature], strength);
                }
            }
        }
    }
}
