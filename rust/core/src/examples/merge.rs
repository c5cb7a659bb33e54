//! Joining what was collected from different rows, exactly.

use super::accumulator::Accumulator;
use super::heap::UNUSED;
use super::histogram::{bin_of, BINS};
use crate::{Error, Result};

impl Accumulator {
    /// Adds what `other` collected, as if its rows had been added to `self`. The
    /// rows of the two must differ, which the caller vouches for.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        self.check_same_size(other)?;
        for feature in 0..self.d_sae {
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
        self.scanned += other.scanned;
        Ok(())
    }

    fn check_same_size(&self, other: &Self) -> Result<()> {
        if (self.d_sae, self.n()) != (other.d_sae, other.n()) {
            return Err(Error::InvalidArgument(format!(
                "examples of d_sae = {} and n = {} can't be merged with examples of d_sae = {} and \
                 n = {}: collect both with the same SAE and the same n",
                self.d_sae,
                self.n(),
                other.d_sae,
                other.n(),
            )));
        }
        Ok(())
    }

    /// Refuses accumulators that have a row of a feature in common: merging them
    /// would count it twice. It sees only the rows kept as examples: rows whose
    /// examples have all been pushed out by stronger ones can still be merged
    /// twice unseen, so that they differ stays the caller's word.
    pub fn check_disjoint(&self, other: &Self) -> Result<()> {
        self.check_same_size(other)?;
        let mut mine = Vec::with_capacity(self.n());
        for feature in 0..self.d_sae {
            mine.clear();
            mine.extend(self.heaps.entries(feature).map(|(_, row)| row));
            mine.sort_unstable();
            if let Some((_, row)) = other
                .heaps
                .entries(feature)
                .find(|(_, row)| mine.binary_search(row).is_ok())
            {
                return Err(Error::InvalidArgument(format!(
                    "both hold row {row} as an example of feature {feature}: the same rows would be \
                     counted twice; merge examples of different rows (give later codes their own \
                     first_row)"
                )));
            }
        }
        Ok(())
    }

    /// An accumulator from arrays that were saved: `strengths` and `rows`
    /// `[d_sae, n]`, `histogram` `[d_sae, BINS]`, `sums` `[d_sae]`, and the rows
    /// `scanned`. Refuses arrays that no collection can have produced.
    pub fn from_parts(
        d_sae: usize,
        n: usize,
        strengths: &[f32],
        rows: &[i64],
        histogram: &[u64],
        sums: &[u128],
        scanned: u64,
    ) -> Result<Self> {
        let mut made = Self::new(d_sae, n)?;
        let sizes = [strengths.len(), rows.len(), histogram.len(), sums.len()];
        let expected = [d_sae * n, d_sae * n, d_sae * BINS, d_sae];
        if sizes != expected {
            return Err(Error::InvalidArgument(format!(
                "examples of d_sae = {d_sae} and n = {n} need {expected:?} strengths, rows, \
                 histogram bins and sums, found {sizes:?}"
            )));
        }
        made.histogram.copy_from_slice(histogram);
        made.sums.copy_from_slice(sums);
        made.scanned = scanned;
        for feature in 0..d_sae {
            let slots = feature * n..(feature + 1) * n;
            let entries = strengths[slots.clone()]
                .iter()
                .copied()
                .zip(rows[slots].iter().copied());
            let bins = &histogram[feature * BINS..(feature + 1) * BINS];
            made.restore(feature, entries, bins).map_err(|problem| {
                Error::InvalidArgument(format!(
                    "examples of feature {feature} are damaged: {problem}"
                ))
            })?;
        }
        Ok(made)
    }

    fn restore(
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
            self.heaps.offer(feature, strength, row);
            previous = Some(entry);
            used += 1;
        }
        if used as u64 != count.min(self.n() as u64) {
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
