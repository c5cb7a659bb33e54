//! Gradients of a weight that are kept as what they are sums of.

use std::ops::Range;

use super::FeatureLists;
use crate::decode::add_terms;
use crate::rows::{map_ranges, map_ranges_mut, Matrix};
use crate::simd::Simd;
use crate::{Cancel, Error, Result};

/// `sum of coefficients[i] * rows[r]` over a feature's codes `i` of rows `r`.
#[derive(Clone, Copy, Debug)]
pub struct Term<'a> {
    /// One a code, in order of rows.
    pub coefficients: &'a [f32],
    /// One a row of the batch: the activations, or the gradient of the reconstruction.
    pub rows: Matrix<'a, f32>,
}

/// The terms of one batch, which share its codes. A weight's gradient is the sum of its sources.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The codes by feature.
    pub lists: &'a FeatureLists,
    /// One, or two where one matrix both encodes and decodes.
    pub terms: &'a [Term<'a>],
}

/// Checks that all sources are of `d_sae` features and of rows of `d_in`.
///
/// # Errors
/// The first that isn't, and lengths that don't fit its codes.
pub(crate) fn check_sources(sources: &[Source<'_>], d_sae: usize, d_in: usize) -> Result<()> {
    let require = |what: &str, found: usize, expected: usize| {
        if found == expected {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!(
            "a gradient's {what}: found {found}, expected {expected}"
        )))
    };
    for source in sources {
        require("number of features", source.lists.d_sae(), d_sae)?;
        for term in source.terms {
            source.lists.check_values(term.coefficients)?;
            require("number of rows", term.rows.rows(), source.lists.rows())?;
            require("width of a row", term.rows.width(), d_in)?;
        }
    }
    Ok(())
}

/// Sums one feature's gradient at a time, in one buffer.
pub(crate) struct Row<'a> {
    sources: &'a [Source<'a>],
    simd: Simd,
    /// Never set: a feature's sum takes a moment.
    cancel: Cancel,
    sum: Vec<f32>,
}

impl<'a> Row<'a> {
    pub(crate) fn new(sources: &'a [Source<'a>], d_in: usize, simd: Simd) -> Self {
        Self {
            sources,
            simd,
            cancel: Cancel::new(),
            sum: vec![0.0; d_in],
        }
    }

    /// The gradient of `feature`; None where it has no codes.
    pub(crate) fn of(&mut self, feature: usize) -> Result<Option<&mut [f32]>> {
        if self
            .sources
            .iter()
            .all(|source| source.lists.count(feature) == 0)
        {
            return Ok(None);
        }
        self.sum.fill(0.0);
        for source in self.sources {
            let (rows, codes) = source.lists.of(feature);
            for term in source.terms {
                let terms = rows.iter().zip(codes).map(|(row, code)| {
                    let coefficient = term.coefficients[*code as usize];
                    (coefficient, term.rows.row(*row as usize))
                });
                add_terms(self.simd, &mut self.sum, terms, &self.cancel)?;
            }
        }
        Ok(Some(&mut self.sum))
    }
}

/// About how many elements of a row a feature's sum reads, over all sources.
fn cost(sources: &[Source<'_>], d_sae: usize, d_in: usize) -> usize {
    let codes: usize = sources
        .iter()
        .map(|source| source.lists.nnz() * source.terms.len())
        .sum();
    (codes / d_sae.max(1) + 1).saturating_mul(d_in)
}

/// The gradient's rows `features`, written out: `[features, d_in]`.
///
/// # Errors
/// Shapes that disagree, a feature out of range; `cancel`.
pub fn gradient_rows(
    sources: &[Source<'_>],
    features: &[i64],
    d_sae: usize,
    d_in: usize,
    simd: Simd,
    threads: usize,
    cancel: &Cancel,
) -> Result<Vec<f32>> {
    check_sources(sources, d_sae, d_in)?;
    let in_range = |feature: &i64| usize::try_from(*feature).is_ok_and(|f| f < d_sae);
    if let Some(feature) = features.iter().find(|feature| !in_range(feature)) {
        return Err(Error::InvalidArgument(format!(
            "feature {feature}; expected 0 to {d_sae} - 1"
        )));
    }
    let mut output = vec![0.0; features.len() * d_in];
    let cost = cost(sources, d_sae, d_in);
    let parts = map_ranges_mut(&mut output, d_in, cost, threads, |range, part| {
        let mut row = Row::new(sources, d_in, simd);
        for (at, output) in range.zip(part.chunks_exact_mut(d_in)) {
            cancel.check()?;
            if let Some(gradient) = row.of(features[at] as usize)? {
                output.copy_from_slice(gradient);
            }
        }
        Ok(())
    });
    parts.into_iter().collect::<Result<()>>()?;
    Ok(output)
}

/// The squared norm of the whole gradient, from sums that are made and dropped; each feature's in
/// f32, their sum in f64, in order of features whatever the number of threads.
///
/// `unit_rows`: the weight, where only what turns its rows (of norm 1) counts as gradient.
///
/// # Errors
/// Shapes that disagree; `cancel`.
pub fn squared_norm(
    sources: &[Source<'_>],
    d_sae: usize,
    d_in: usize,
    unit_rows: Option<Matrix<'_, f32>>,
    simd: Simd,
    threads: usize,
    cancel: &Cancel,
) -> Result<f64> {
    check_sources(sources, d_sae, d_in)?;
    if let Some(weight) = unit_rows {
        if (weight.rows(), weight.width()) != (d_sae, d_in) {
            return Err(Error::InvalidArgument(format!(
                "the weight is [{}, {}]; expected [{d_sae}, {d_in}]",
                weight.rows(),
                weight.width()
            )));
        }
    }
    let of_range = |range: Range<usize>| -> Result<Vec<f64>> {
        let mut row = Row::new(sources, d_in, simd);
        let of_feature = |feature| -> Result<f64> {
            cancel.check()?;
            let Some(gradient) = row.of(feature)? else {
                return Ok(0.0);
            };
            if let Some(weight) = unit_rows {
                turn(simd, gradient, weight.row(feature));
            }
            Ok(f64::from(simd.dot(gradient, &*gradient)))
        };
        range.map(of_feature).collect()
    };
    let parts = map_ranges(d_sae, cost(sources, d_sae, d_in), threads, of_range);
    let norms = parts.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(norms.into_iter().flatten().sum())
}

/// A bound of [`squared_norm`] (but for rounding) that needs no sums of rows: of a feature's
/// gradient, the norm is at most the sum of its terms' norms. A gradient whose bound is within the
/// clip is not clipped.
///
/// # Errors
/// Shapes that disagree.
pub fn norm_bound(
    sources: &[Source<'_>],
    d_sae: usize,
    d_in: usize,
    simd: Simd,
    threads: usize,
) -> Result<f64> {
    check_sources(sources, d_sae, d_in)?;
    let mut bounds = vec![0.0_f64; d_sae];
    for source in sources {
        for term in source.terms {
            let rows = term.rows;
            let norms = map_ranges(rows.rows(), d_in, threads, |range| {
                let norm = |row| simd.dot(rows.row(row), rows.row(row)).sqrt();
                range.map(norm).collect::<Vec<f32>>()
            })
            .concat();
            for (feature, bound) in bounds.iter_mut().enumerate() {
                let (rows, codes) = source.lists.of(feature);
                for (row, code) in rows.iter().zip(codes) {
                    let coefficient = f64::from(term.coefficients[*code as usize]);
                    *bound += coefficient.abs() * f64::from(norms[*row as usize]);
                }
            }
        }
    }
    Ok(bounds.into_iter().map(|bound| bound * bound).sum())
}

/// Takes from `gradient` what lies along `weight`, a row of norm 1.
fn turn(simd: Simd, gradient: &mut [f32], weight: &[f32]) {
    let along = simd.dot(gradient, weight);
    simd.add_scaled(gradient, -along, weight);
}
