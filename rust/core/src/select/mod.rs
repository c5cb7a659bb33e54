//! Pre-activations to sparse codes: [`topk`] of each row, [`batch_topk`] over
//! all rows, [`threshold`].
//!
//! All three take positive values only (relu comes first, and a zero is never a
//! code), give each row's codes by falling value, and break ties towards the
//! lower (flat) index. NaN is refused, or passed over where that check is off.
//!
//! How: the maxima of strided groups of a row are cheap (one vector maximum a
//! load) and the k-th largest of them is a lower bound of the k-th largest value,
//! since k groups hold at least one value each that reaches it. A second scan
//! collects what reaches the bound, hardly more than k values, and only these
//! are sorted.

use crate::rows::Matrix;
use crate::simd::{value_of, Element, Simd};
use crate::{Error, Result};

mod batch_topk;
mod kth;
mod threshold;
mod topk;

#[cfg(test)]
mod tests;

pub use batch_topk::batch_topk;
pub(crate) use batch_topk::{keep_largest, Candidates};
pub(crate) use kth::not_above_kth;
pub use threshold::{threshold, Threshold};
pub use topk::topk;

/// How to run, whatever the operation.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The instruction set.
    pub simd: Simd,
    /// At most this many threads.
    pub threads: usize,
    /// Refuse NaN and infinities, naming the first row that holds one.
    pub check_finite: bool,
}

/// Compressed rows of codes: those of row `r` are at `row_offsets[r]..row_offsets[r + 1]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Codes<E> {
    /// Falling within a row.
    pub values: Vec<E>,
    /// The feature of each value.
    pub indices: Vec<i32>,
    /// `rows + 1` of them.
    pub row_offsets: Vec<i64>,
}

/// What one range of rows yields.
struct Part<E> {
    values: Vec<E>,
    indices: Vec<i32>,
    counts: Vec<usize>,
    bad_row: Option<usize>,
}

impl<E: Element> Part<E> {
    fn with_rows(rows: usize) -> Self {
        Self {
            values: Vec::new(),
            indices: Vec::new(),
            counts: Vec::with_capacity(rows),
            bad_row: None,
        }
    }

    /// Ends a row with these keys, sorting them.
    fn push_row(&mut self, keys: &mut [u64]) {
        keys.sort_unstable();
        self.push_sorted(keys);
    }

    /// Ends a row with these keys, which rise.
    fn push_sorted(&mut self, keys: &[u64]) {
        self.counts.push(keys.len());
        let decoded = keys.iter().map(|key| value_of(*key));
        self.values
            .extend(decoded.clone().map(|(value, _)| E::from_f32(value)));
        // `check` has seen to it that indices fit.
        self.indices.extend(decoded.map(|(_, index)| index as i32));
    }
}

/// Joins the ranges' parts, or names the first bad row.
fn join<E: Element>(rows: usize, parts: Vec<Result<Part<E>>>) -> Result<Codes<E>> {
    let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
    if let Some(row) = parts.iter().find_map(|part| part.bad_row) {
        return Err(non_finite(row));
    }
    let nnz = parts.iter().map(|part| part.values.len()).sum();
    let mut codes = Codes {
        values: Vec::with_capacity(nnz),
        indices: Vec::with_capacity(nnz),
        row_offsets: Vec::with_capacity(rows + 1),
    };
    let mut end = 0;
    codes.row_offsets.push(end);
    for part in parts {
        codes.values.extend_from_slice(&part.values);
        codes.indices.extend_from_slice(&part.indices);
        codes.row_offsets.extend(part.counts.iter().map(|count| {
            end += *count as i64;
            end
        }));
    }
    Ok(codes)
}

pub(crate) fn non_finite(row: usize) -> Error {
    Error::NonFinite {
        what: "pre_activations",
        row,
    }
}

fn check<E>(pre_activations: Matrix<'_, E>, k: Option<usize>) -> Result<()> {
    let width = pre_activations.width();
    if i32::try_from(width).is_err() {
        return Err(Error::InvalidArgument(format!(
            "d_sae is {width}; feature indices are int32, so at most {} can be told apart",
            i32::MAX
        )));
    }
    match k {
        Some(k) if k > width => Err(Error::InvalidArgument(format!(
            "k is {k}, more than the {width} features; choose k from 0 to {width}"
        ))),
        _ => Ok(()),
    }
}

/// Number of groups whose maxima bound the k-th largest of `width` values, or 0 where
/// groups would be too small to save anything.
fn group_count(k: usize, width: usize) -> usize {
    // Four groups a code collect about 15% more than k; 64 is a multiple of every lane count.
    let groups = k.saturating_mul(4).next_multiple_of(64);
    if groups <= width / 4 {
        groups
    } else {
        0
    }
}
