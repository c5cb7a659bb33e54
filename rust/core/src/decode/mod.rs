//! Sparse codes back to activations; the gradients of that are in [`crate::grad`].
//!
//! `W_dec` is `[d_sae, d_in]`, so each code reads one contiguous row. Sums are
//! f32, in the order of the codes, whatever the element type and the number of
//! threads.

use crate::lines::Lines;
use crate::memory::prefer_large_pages;
use crate::rows::{map_ranges_mut, Matrix};
use crate::simd::{Element, Simd, Stored};
use crate::{Cancel, Error, Result};

/// Terms of one sum added between two looks at the cancel flag: milliseconds, however wide.
const BLOCK_TERMS: usize = 1 << 10;

#[cfg(test)]
mod tests;

/// Borrowed codes whose offsets and indices have been checked.
#[derive(Clone, Copy, Debug)]
pub struct SparseRows<'a> {
    indices: &'a [i32],
    row_offsets: &'a [i64],
    d_sae: usize,
}

impl<'a> SparseRows<'a> {
    /// Checks that `row_offsets` runs from 0 to the number of codes without falling, and that
    /// every index is in `0..d_sae`.
    ///
    /// # Errors
    /// What is wrong, with the row.
    pub fn new(indices: &'a [i32], row_offsets: &'a [i64], d_sae: usize) -> Result<Self> {
        let invalid = |problem| Err(Error::InvalidArgument(problem));
        let (Some(first), Some(last)) = (row_offsets.first(), row_offsets.last()) else {
            return invalid("row_offsets is empty; expected rows + 1 entries".into());
        };
        if *first != 0 || usize::try_from(*last) != Ok(indices.len()) {
            return invalid(format!(
                "row_offsets runs from {first} to {last}; expected 0 to {}, the number of indices",
                indices.len()
            ));
        }
        if let Some(row) = row_offsets.windows(2).position(|pair| pair[0] > pair[1]) {
            return invalid(format!("row_offsets falls after row {row}; it must not"));
        }
        let in_range = |index: &i32| usize::try_from(*index).is_ok_and(|index| index < d_sae);
        if let Some(at) = indices.iter().position(|index| !in_range(index)) {
            let row = row_offsets.partition_point(|offset| *offset <= at as i64) - 1;
            return invalid(format!(
                "row {row} names feature {}; expected 0 to d_sae - 1, where d_sae is {d_sae}",
                indices[at]
            ));
        }
        Ok(Self {
            indices,
            row_offsets,
            d_sae,
        })
    }

    /// Number of rows.
    pub fn rows(self) -> usize {
        self.row_offsets.len() - 1
    }

    /// Number of codes.
    pub fn nnz(self) -> usize {
        self.indices.len()
    }

    /// Number of features.
    pub fn d_sae(self) -> usize {
        self.d_sae
    }

    /// The feature of each code, in order of rows.
    pub fn indices(self) -> &'a [i32] {
        self.indices
    }

    /// Which codes are of row `row`.
    pub(crate) fn range(self, row: usize) -> std::ops::Range<usize> {
        self.row_offsets[row] as usize..self.row_offsets[row + 1] as usize
    }

    /// About how many elements of width `width` a row costs.
    pub(crate) fn cost(self, width: usize) -> usize {
        (self.nnz() / self.rows().max(1) + 1).saturating_mul(width)
    }
}

pub(crate) fn check_len(what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!(
        "{what}: found {found}, expected {expected}"
    )))
}

/// `output[r] = sum of values[i] * w_dec[indices[i]] over the codes i of row r, + b_dec`. `w_dec` may
/// be kept in fewer bits than the values.
///
/// # Errors
/// Lengths that disagree; `cancel`.
pub fn decode<E: Element, W: Stored>(
    values: &[E],
    codes: SparseRows<'_>,
    w_dec: Matrix<'_, W>,
    b_dec: Option<&[E]>,
    simd: Simd,
    threads: usize,
    cancel: &Cancel,
) -> Result<Vec<E>> {
    let d_in = w_dec.width();
    check_len("length of values", values.len(), codes.nnz())?;
    if let Some(b_dec) = b_dec {
        check_len("length of b_dec", b_dec.len(), d_in)?;
    }
    check_len("rows of w_dec", w_dec.rows(), codes.d_sae)?;
    let start: Vec<f32> = match b_dec {
        Some(b_dec) => b_dec.iter().map(|value| value.to_f32()).collect(),
        None => vec![0.0; d_in],
    };
    let mut output = vec![E::default(); codes.rows() * d_in];
    // Zeros of this size are pages that aren't there yet.
    prefer_large_pages(&output);
    let parts = map_ranges_mut(
        &mut output,
        d_in,
        codes.cost(d_in),
        threads,
        |range, part| {
            let mut sum = Lines::new(0.0_f32, d_in);
            for (row, output) in range.zip(part.chunks_exact_mut(d_in)) {
                cancel.check()?;
                sum.copy_from_slice(&start);
                let terms = codes
                    .range(row)
                    .map(|at| (values[at].to_f32(), w_dec.row(codes.indices[at] as usize)));
                add_terms(simd, &mut sum, terms, cancel)?;
                round_into(&sum, output);
            }
            Ok(())
        },
    );
    parts.into_iter().collect::<Result<()>>()?;
    Ok(output)
}

/// `sum += scale * row` for every term, in order, four at a time.
pub(crate) fn add_terms<'a, E: Stored>(
    simd: Simd,
    sum: &mut [f32],
    terms: impl Iterator<Item = (f32, &'a [E])>,
    cancel: &Cancel,
) -> Result<()> {
    let mut waiting = [(0.0, &[][..]); 4];
    let mut count = 0;
    for (at, term) in (1_usize..).zip(terms) {
        if at % BLOCK_TERMS == 0 {
            cancel.check()?;
        }
        waiting[count] = term;
        count += 1;
        if count == 4 {
            simd.add_scaled_4(sum, waiting.map(|term| term.0), waiting.map(|term| term.1));
            count = 0;
        }
    }
    for (scale, row) in &waiting[..count] {
        simd.add_scaled(sum, *scale, row);
    }
    Ok(())
}

pub(crate) fn round_into<E: Element>(sum: &[f32], output: &mut [E]) {
    for (output, sum) in output.iter_mut().zip(sum) {
        *output = E::from_f32(*sum);
    }
}
