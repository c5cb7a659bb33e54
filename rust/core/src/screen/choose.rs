//! From candidates to codes: exact values, the check of the certificate, the choice.

use super::candidates::List;
use super::certificate::{FeatureBounds, RowBound};
use super::dot::{Sum, CLOSE};
use super::rescore::{products, Wanted, ROWS};
use super::search::{Found, COST};
use super::settle::Settle;
use super::{Counts, Encoder, Rule};
use crate::rows::{map_ranges, Matrix};
use crate::select::{keep_largest, non_finite, Candidates, Codes, Options, Threshold};
use crate::simd::{key_of, Element};
use crate::{Cancel, Result};

/// Rows that are computed exactly at once: each has all features as candidates.
const EXACT_ROWS: usize = 64;

/// What choosing reads.
pub(super) struct Chooser<'a, E> {
    pub x: Matrix<'a, E>,
    pub encoder: Encoder<'a, E>,
    pub rule: Rule<'a>,
    pub bounds: &'a FeatureBounds,
    pub options: Options,
}

impl<E: Element> Chooser<'_, E> {
    /// The codes of all rows.
    pub(super) fn run(&self, found: Found, cancel: &Cancel) -> Result<(Codes<E>, Counts)> {
        let mut counts = Counts::default();
        let mut chosen: Vec<Vec<u64>> = Vec::with_capacity(found.lists.len());
        let mut exact_rows = Vec::new();
        for first in (0..found.lists.len()).step_by(ROWS) {
            let last = (first + ROWS).min(found.lists.len());
            let (lists, rows) = (&found.lists[first..last], &found.bounds[first..last]);
            let exact = self.exact_products(first, lists, rows, cancel)?;
            counts.candidates += exact.len() as u64;
            let starts: Vec<usize> = [0].into_iter().chain(ends_of(lists)).collect();
            let parts = map_ranges(lists.len(), COST, self.options.threads, |range| {
                let choose = |at: usize| {
                    let (list, products) = (&lists[at], &exact[starts[at]..starts[at + 1]]);
                    let wrong = self.violations(list, products);
                    let mut keys = Vec::with_capacity(list.len());
                    let settle = Settle {
                        x: self.x.row(first + at),
                        norm: f64::from(rows[at].norm2).sqrt(),
                        bounds: self.bounds,
                    };
                    if rows[at].is_zero {
                        let zeros = (0..self.encoder.bias.len()).map(|feature| (feature, &0.0));
                        self.row_keys(first + at, settle, zeros, &mut keys)?;
                    } else if !rows[at].is_exact && wrong == 0 {
                        let features = list.features.iter().map(|feature| *feature as usize);
                        self.row_keys(first + at, settle, features.zip(products), &mut keys)?;
                    }
                    Ok((keys, wrong))
                };
                range.map(choose).collect::<Result<Vec<_>>>()
            });
            for part in parts {
                for (keys, wrong) in part? {
                    counts.violations += wrong;
                    let bound = &found.bounds[chosen.len()];
                    if wrong > 0 || (bound.is_exact && !bound.is_zero) {
                        exact_rows.push(chosen.len());
                    }
                    chosen.push(keys);
                }
            }
        }
        if counts.violations > 0 && matches!(self.rule, Rule::BatchTopK(_)) {
            // A bound that lies has raised the edge that all rows share.
            exact_rows = (0..chosen.len()).collect();
            chosen.iter_mut().for_each(Vec::clear);
        }
        counts.exact_rows = exact_rows.len() as u64;
        for rows in exact_rows.chunks(EXACT_ROWS) {
            self.whole_rows(rows, &mut chosen, &mut counts, cancel)?;
        }
        Ok((self.codes(chosen, cancel)?, counts))
    }

    fn exact_products(
        &self,
        first: usize,
        lists: &[List],
        bounds: &[RowBound],
        cancel: &Cancel,
    ) -> Result<Vec<f64>> {
        let mut features = Vec::new();
        for list in lists {
            features.extend_from_slice(&list.features);
        }
        let ends: Vec<usize> = ends_of(lists).collect();
        let rows: Vec<usize> = (first..first + lists.len()).collect();
        let all = Wanted {
            x: self.x,
            rows: &rows,
            features: &features,
            ends: &ends,
            w: self.encoder.w,
            sum: if E::IS_COARSE { Sum::Close } else { Sum::Exact },
        };
        let mut output = products(all, self.options, cancel)?;
        if E::IS_COARSE {
            self.settle(all, bounds, &mut output, cancel)?;
        }
        Ok(output)
    }

    /// Replaces close products by exact ones where the difference could be seen: a coarse dtype rounds
    /// nearly all to the same value.
    fn settle(
        &self,
        all: Wanted<'_, E>,
        bounds: &[RowBound],
        output: &mut [f64],
        cancel: &Cancel,
    ) -> Result<()> {
        let (mut open, mut features) = (Vec::new(), Vec::new());
        let mut ends = Vec::with_capacity(all.ends.len());
        let mut at = 0;
        for (row, end) in bounds.iter().zip(all.ends) {
            while at < *end {
                let feature = all.features[at] as usize;
                let norms = f64::from(row.norm2) * f64::from(self.bounds.norm2[feature]);
                let (bias, off) = (self.encoder.bias[feature], CLOSE * norms.sqrt());
                let low = E::pre_activation(output[at] - off, bias).to_f32();
                if low.to_bits() != E::pre_activation(output[at] + off, bias).to_f32().to_bits() {
                    open.push(at);
                    features.push(all.features[at]);
                }
                at += 1;
            }
            ends.push(open.len());
        }
        let exact = Wanted {
            features: &features,
            ends: &ends,
            sum: Sum::Exact,
            ..all
        };
        for (at, product) in open.iter().zip(products(exact, self.options, cancel)?) {
            output[*at] = product;
        }
        Ok(())
    }

    /// How many exact values lie outside their bounds.
    fn violations(&self, list: &List, products: &[f64]) -> u64 {
        let mut outside = 0;
        for (at, product) in products.iter().enumerate() {
            let feature = list.features[at] as usize;
            let slack = self.bounds.slack[feature] / 2.0;
            let exact = *product + f64::from(self.encoder.bias[feature].to_f32());
            let off = (exact - f64::from(list.scores[at] - slack)).abs() - f64::from(slack);
            let margin2 = f64::from(list.margins2[at]);
            outside += u64::from(off.is_nan() || (off > 0.0 && off * off > margin2));
        }
        outside
    }

    /// The keys of a row's values that may be codes.
    fn row_keys<'p>(
        &self,
        row: usize,
        settle: Settle<'_, E>,
        pairs: impl Iterator<Item = (usize, &'p f64)>,
        keys: &mut Vec<u64>,
    ) -> Result<()> {
        for (feature, product) in pairs {
            let (w, bias) = (self.encoder.w.row(feature), self.encoder.bias[feature]);
            let value = settle.value(feature, w, *product, bias).to_f32();
            if self.options.check_finite && !value.is_finite() {
                return Err(non_finite(row));
            }
            let floor = match self.rule {
                Rule::Threshold(Threshold::Shared(theta)) => theta,
                Rule::Threshold(Threshold::Each(thetas)) => thetas[feature],
                _ => 0.0,
            };
            // False for NaN.
            if value > 0.0 && value > floor {
                keys.push(key_of(value, feature));
            }
        }
        let most = match self.rule {
            Rule::TopK(k) => k,
            Rule::BatchTopK(k) => k.saturating_mul(self.x.rows()),
            Rule::Threshold(_) => keys.len(),
        };
        if keys.len() > most {
            keys.select_nth_unstable(most);
            keys.truncate(most);
        }
        Ok(())
    }

    /// Rows for which every feature is computed.
    fn whole_rows(
        &self,
        rows: &[usize],
        chosen: &mut [Vec<u64>],
        counts: &mut Counts,
        cancel: &Cancel,
    ) -> Result<()> {
        let d_sae = self.encoder.w.rows();
        let features: Vec<u32> = rows.iter().flat_map(|_| 0..d_sae as u32).collect();
        let ends: Vec<usize> = (1..=rows.len()).map(|row| row * d_sae).collect();
        counts.candidates += features.len() as u64;
        let whole = Wanted {
            x: self.x,
            rows,
            features: &features,
            ends: &ends,
            w: self.encoder.w,
            sum: Sum::Exact,
        };
        let exact = products(whole, self.options, cancel)?;
        for (row, exact) in rows.iter().zip(exact.chunks_exact(d_sae)) {
            let settle = Settle::of(self.x.row(*row), self.bounds);
            self.row_keys(*row, settle, exact.iter().enumerate(), &mut chosen[*row])?;
        }
        Ok(())
    }

    fn codes(&self, mut chosen: Vec<Vec<u64>>, cancel: &Cancel) -> Result<Codes<E>> {
        let rows = chosen.len();
        let k = match self.rule {
            Rule::BatchTopK(k) => k,
            // A row has its own at most, so that nothing is left out.
            _ => chosen.iter().map(Vec::len).max().unwrap_or(0),
        };
        if let Rule::BatchTopK(_) = self.rule {
            // Ties at the edge go to the lower index.
            for keys in &mut chosen {
                keys.sort_unstable_by_key(|key| *key as u32);
            }
        }
        let mut candidates = Candidates {
            keys: Vec::new(),
            ends: Vec::with_capacity(rows),
        };
        for keys in chosen {
            candidates.keys.extend(keys);
            candidates.ends.push(candidates.keys.len());
        }
        keep_largest(rows, k, vec![candidates], self.options, cancel)
    }
}

/// Where each list ends when they follow one another.
fn ends_of(lists: &[List]) -> impl Iterator<Item = usize> + '_ {
    lists.iter().scan(0, |end, list| {
        *end += list.len();
        Some(*end)
    })
}
