//! The features that are active together with each feature most of all.
//!
//! Pointwise mutual information of a pair is log2(n_ab N / (n_a n_b)). Among the partners b of one
//! feature a it is in the order of n_ab / n_b, which is compared exactly, in integers: equal ones go
//! to the pair that met more often, then to the lower feature.

use std::cmp::Ordering;
use std::sync::atomic::{self, AtomicUsize};

use super::coactivation::Coactivation;
use crate::{Cancel, Error, Result};

/// Features whose rows a thread takes at a time.
const UNIT: usize = 64;
/// How much the quick comparison in single precision may err, generously.
const SLACK: f32 = 1.0 - 1e-5;

/// A feature active on the same rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partner {
    /// Which.
    pub feature: u32,
    /// On how many rows both are.
    pub together: u32,
    /// On how many rows it is.
    pub count: u64,
}

impl Partner {
    /// Less: the better one.
    fn order(&self, other: &Self) -> Ordering {
        let mine = u128::from(self.together) * u128::from(other.count);
        let theirs = u128::from(other.together) * u128::from(self.count);
        theirs
            .cmp(&mine)
            .then_with(|| other.together.cmp(&self.together))
            .then_with(|| self.feature.cmp(&other.feature))
    }
}

/// The best `n` partners of each feature.
#[derive(Debug, Clone)]
pub struct Partners {
    n: usize,
    best: Vec<Vec<Partner>>,
    /// Of each feature, what n_ab / n_b must reach to be looked at.
    floors: Vec<f32>,
}

impl Partners {
    /// None yet.
    pub fn new(d_sae: usize, n: usize) -> Self {
        Self {
            n,
            best: vec![Vec::new(); d_sae],
            floors: vec![if n == 0 { f32::INFINITY } else { 0.0 }; d_sae],
        }
    }

    /// Of each feature, the best first.
    pub fn best(&self) -> &[Vec<Partner>] {
        &self.best
    }

    fn offer(&mut self, feature: usize, partner: Partner) {
        let best = &mut self.best[feature];
        let at = best.partition_point(|held| held.order(&partner) == Ordering::Less);
        if at >= self.n {
            return;
        }
        best.insert(at, partner);
        best.truncate(self.n);
        if best.len() == self.n {
            if let Some(last) = best.last() {
                self.floors[feature] = last.together as f32 / last.count as f32 * SLACK;
            }
        }
    }

    /// Offers all pairs of a table that met at least `least` times. `counts` are those of all
    /// features.
    pub fn add(
        &mut self,
        pairs: &Coactivation,
        counts: &[u64],
        least: u32,
        threads: usize,
        cancel: &Cancel,
    ) -> Result<()> {
        if counts.len() != self.best.len() || pairs.d_sae() != self.best.len() {
            return Err(Error::InvalidArgument(format!(
                "counts of {} features and pairs of {} do not fit partners of {}",
                counts.len(),
                pairs.d_sae(),
                self.best.len()
            )));
        }
        let inverse: Vec<f32> = counts.iter().map(|&n| 1.0 / n.max(1) as f32).collect();
        let range = pairs.range();
        let next = AtomicUsize::new(range.start);
        let least = least.max(1);
        let empty = Self::new(self.best.len(), self.n);
        let work = || -> Result<Self> {
            let (mut found, mut row) = (empty.clone(), Vec::new());
            loop {
                let start = next.fetch_add(UNIT, atomic::Ordering::Relaxed);
                if start >= range.end {
                    return Ok(found);
                }
                cancel.check()?;
                for a in start..range.end.min(start + UNIT) {
                    pairs.row(a, &mut row);
                    found.offer_row(a, &row, counts, &inverse, least);
                }
            }
        };
        let results: Vec<Result<Self>> = std::thread::scope(|scope| {
            let helpers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
            let join = |helper: std::thread::ScopedJoinHandle<'_, Result<Self>>| match helper.join()
            {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            helpers.into_iter().map(join).collect()
        });
        for found in results {
            for (feature, best) in found?.best.into_iter().enumerate() {
                for partner in best {
                    self.offer(feature, partner);
                }
            }
        }
        Ok(())
    }

    fn offer_row(&mut self, a: usize, row: &[u32], counts: &[u64], inverse: &[f32], least: u32) {
        const LANES: usize = 16;
        for start in (0..row.len()).step_by(LANES) {
            let end = row.len().min(start + LANES);
            let (floor, own) = (self.floors[a], inverse[a]);
            let lanes = row[start..end]
                .iter()
                .zip(&inverse[start..end])
                .zip(&self.floors[start..end]);
            // Most pairs are none of the best of either: a look at several at once.
            let mut any = false;
            for ((&together, &other), &its) in lanes {
                let met = together as f32;
                any |= (together >= least) & ((met * other >= floor) | (met * own >= its));
            }
            if !any {
                continue;
            }
            for b in start..end {
                let together = row[b];
                let met = together as f32;
                if together < least {
                    continue;
                }
                let partner = |feature: usize| Partner {
                    feature: feature as u32,
                    together,
                    count: counts[feature],
                };
                if met * inverse[b] >= self.floors[a] {
                    self.offer(a, partner(b));
                }
                if met * own >= self.floors[b] {
                    self.offer(b, partner(a));
                }
            }
        }
    }
}
