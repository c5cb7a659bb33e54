//! Joining what was collected from different rows, exactly.

use super::accumulator::{Accumulator, Keep};
use super::heap::UNUSED;
use super::histogram::{bin_of, BINS};
use super::kept::BLOCK;
use crate::{Error, Result};

/// What is saved of an [`Accumulator`].
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// `[d_sae, n]`; see [`Accumulator::examples`].
    pub strengths: &'a [f32],
    /// `[d_sae, n]`.
    pub rows: &'a [i64],
    /// `[d_sae, BINS]`.
    pub histogram: &'a [u64],
    /// `[d_sae]`, in units of 2^-64.
    pub sums: &'a [u128],
    /// `[d_sae + 1]`; see [`Accumulator::samples`].
    pub sample_offsets: &'a [i64],
    /// As many as the last of the offsets says.
    pub sample_strengths: &'a [f32],
    /// As many as the last of the offsets says.
    pub sample_rows: &'a [i64],
    /// How many rows were scanned.
    pub scanned: u64,
}

impl Accumulator {
    /// Adds what `other` collected, as if its rows had been added to `self`. The
    /// rows of the two must differ, which the caller vouches for.
    pub fn merge(&mut self, other: &mut Self) -> Result<()> {
        self.check_same_size(other)?;
        self.settle();
        other.settle();
        self.kept.merge_all(&mut other.kept);
        self.scanned += other.scanned;
        self.forget_scans();
        Ok(())
    }

    fn check_same_size(&self, other: &Self) -> Result<()> {
        let (mine, theirs) = (self.keep(), other.keep());
        if (self.d_sae(), mine) != (other.d_sae(), theirs) {
            let words = |d_sae, keep: Keep| {
                let Keep { n, samples, seed } = keep;
                format!("d_sae = {d_sae}, n = {n}, samples = {samples} and seed = {seed}")
            };
            return Err(Error::InvalidArgument(format!(
                "examples of {} can't be merged with examples of {}: collect both with the same SAE \
                 and the same settings",
                words(self.d_sae(), mine),
                words(other.d_sae(), theirs),
            )));
        }
        Ok(())
    }

    /// An accumulator from arrays that were saved. Refuses arrays that no collection can have
    /// produced.
    pub fn from_parts(d_sae: usize, keep: Keep, parts: &Parts<'_>) -> Result<Self> {
        let mut made = Self::new(d_sae, keep)?;
        let n = keep.n;
        let sizes = [
            parts.strengths.len(),
            parts.rows.len(),
            parts.histogram.len(),
            parts.sums.len(),
            parts.sample_offsets.len(),
            parts.sample_strengths.len(),
        ];
        let samples = parts.sample_rows.len();
        let expected = [
            d_sae * n,
            d_sae * n,
            d_sae * BINS,
            d_sae,
            d_sae + 1,
            samples,
        ];
        if sizes != expected {
            return Err(Error::InvalidArgument(format!(
                "examples of d_sae = {d_sae} and n = {n} need {expected:?} strengths, rows, \
                 histogram bins, sums, sample offsets and sample strengths, found {sizes:?}"
            )));
        }
        made.scanned = parts.scanned;
        let counts = parts.histogram.chunks(BLOCK * BINS);
        for (block, (counts, sums)) in made.kept.each().zip(counts.zip(parts.sums.chunks(BLOCK))) {
            block.histogram.copy_from_slice(counts);
            block.sums.copy_from_slice(sums);
        }
        for feature in 0..d_sae {
            made.restore(feature, parts).map_err(|problem| {
                Error::InvalidArgument(format!(
                    "examples of feature {feature} are damaged: {problem}"
                ))
            })?;
        }
        Ok(made)
    }

    fn restore(&mut self, feature: usize, parts: &Parts<'_>) -> std::result::Result<(), String> {
        let n = self.n();
        let slots = feature * n..(feature + 1) * n;
        let strengths = parts.strengths[slots.clone()].iter().copied();
        let entries = strengths.zip(parts.rows[slots].iter().copied());
        let bins = &parts.histogram[feature * BINS..(feature + 1) * BINS];
        self.restore_heap(feature, entries, bins)?;
        let ends = &parts.sample_offsets[feature..feature + 2];
        let span = match (usize::try_from(ends[0]), usize::try_from(ends[1])) {
            (Ok(start), Ok(end)) if start <= end && end <= parts.sample_rows.len() => start..end,
            _ => return Err(format!("its samples span {}..{}", ends[0], ends[1])),
        };
        let strengths = &parts.sample_strengths[span.clone()];
        let samples = &mut self.kept.of(feature).samples;
        samples.restore(feature % BLOCK, strengths, &parts.sample_rows[span], bins)
    }

    fn restore_heap(
        &mut self,
        feature: usize,
        entries: impl Iterator<Item = (f32, i64)>,
        bins: &[u64],
    ) -> std::result::Result<(), String> {
        let count = bins
            .iter()
            .try_fold(0u64, |sum, &bin| sum.checked_add(bin))
            .ok_or("its histogram counts overflow")?;
        let mut seen = [0u64; BINS];
        let mut previous: Option<(f32, i64)> = None;
        let mut used = 0;
        let n = self.n() as u64;
        let heaps = &mut self.kept.of(feature).heaps;
        for (slot, entry) in entries.enumerate() {
            let (strength, row) = entry;
            if entry == UNUSED {
                continue;
            }
            if !(strength > 0.0 && strength.is_finite() && row >= 0) {
                return Err(format!(
                    "slot {slot} holds strength {strength} of row {row}"
                ));
            }
            if slot != used {
                return Err(format!("slot {slot} is used after an unused one"));
            }
            if previous
                .is_some_and(|last| last.0 < strength || (last.0 == strength && last.1 >= row))
            {
                return Err(format!("slot {slot} is out of order"));
            }
            seen[bin_of(strength)] += 1;
            heaps.offer(feature % BLOCK, strength, row);
            previous = Some(entry);
            used += 1;
        }
        if used as u64 != count.min(n) {
            return Err(format!(
                "it was active {count} times but {used} examples are kept"
            ));
        }
        if seen.iter().zip(bins).any(|(examples, bin)| examples > bin) {
            return Err("its histogram lacks some of its examples".to_owned());
        }
        Ok(())
    }
}
