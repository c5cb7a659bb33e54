//! Gradients of the sparse half of an SAE: of decoding in its values and in its weight, and the
//! gradients of both matrices as sums over each feature's codes.
//!
//! Encoding's gradients are of the same forms: with `a` the gradient of the loss in the values,
//! that of `W_enc[f]` (feature-major) is the sum of `a[i] * x[r]` over the codes of `f`, as that
//! of `W_dec[f]` is the sum of `values[i] * gradient[r]`.

use crate::decode::{add_terms, check_len, round_into, SparseRows};
use crate::rows::{by_cost, map_ranges, map_ranges_mut, Matrix};
use crate::simd::{Element, Simd, Stored};
use crate::{pool, Cancel, Result};

mod lists;
mod source;
#[cfg(test)]
mod tests;

pub use lists::FeatureLists;
pub(crate) use source::{check_sources, Row};
pub use source::{gradient_rows, norm_bound, squared_norm, Source, Term};

/// The gradient of decoding in `values`: `<gradient[r], w_dec[indices[i]]>`.
///
/// # Errors
/// Shapes that disagree; `cancel`.
pub fn gradient_of_values<E: Element, W: Stored>(
    gradient: Matrix<'_, E>,
    codes: SparseRows<'_>,
    w_dec: Matrix<'_, W>,
    simd: Simd,
    threads: usize,
    cancel: &Cancel,
) -> Result<Vec<E>> {
    check_len("rows of the gradient", gradient.rows(), codes.rows())?;
    check_len("columns of the gradient", gradient.width(), w_dec.width())?;
    check_len("rows of w_dec", w_dec.rows(), codes.d_sae())?;
    let cost = codes.cost(w_dec.width());
    let parts = map_ranges(codes.rows(), cost, threads, |range| {
        let mut output = Vec::new();
        let mut left = vec![0.0_f32; gradient.width()];
        for row in range {
            cancel.check()?;
            for (left, value) in left.iter_mut().zip(gradient.row(row)) {
                *left = value.to_f32();
            }
            let indices = &codes.indices()[codes.range(row)];
            output.extend(
                indices
                    .iter()
                    .map(|index| E::from_f32(simd.dot(&left, w_dec.row(*index as usize)))),
            );
        }
        Ok(output)
    });
    Ok(parts.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

/// As [`gradient_of_values`], feature by feature: each row of `w_dec` is read once, and the rows of
/// the gradient, fewer, come from a nearer cache. What to take where there are lists already.
///
/// # Errors
/// Shapes that disagree; `cancel`.
pub fn gradient_of_values_by_feature(
    gradient: Matrix<'_, f32>,
    lists: &FeatureLists,
    w_dec: Matrix<'_, f32>,
    simd: Simd,
    threads: usize,
    cancel: &Cancel,
) -> Result<Vec<f32>> {
    check_len("rows of the gradient", gradient.rows(), lists.rows())?;
    check_len("columns of the gradient", gradient.width(), w_dec.width())?;
    check_len("rows of w_dec", w_dec.rows(), lists.d_sae())?;
    // The row of w_dec costs as much as one of the gradient, or more.
    let cost = |feature| match lists.count(feature) {
        0 => 0,
        count => (count + 1).saturating_mul(w_dec.width()),
    };
    let parts = by_cost(lists.d_sae(), threads, cost);
    let products = pool::map(parts, |features| {
        let mut products = Vec::new();
        for feature in features.clone() {
            cancel.check()?;
            let weight = w_dec.row(feature);
            let dot = |row: &u32| simd.dot(weight, gradient.row(*row as usize));
            products.extend(lists.of(feature).0.iter().map(dot));
        }
        Ok((features, products))
    });
    let mut output = vec![0.0; lists.nnz()];
    for part in products {
        let (features, products): (_, Vec<f32>) = part?;
        let codes = features.flat_map(|feature| lists.of(feature).1);
        for (code, product) in codes.zip(products) {
            output[*code as usize] = product;
        }
    }
    Ok(output)
}

/// The gradient of decoding in `w_dec`, `[d_sae, d_in]`: row `f` is the sum of
/// `values[i] * gradient[r]` over the codes of feature `f`, in rising row.
///
/// # Errors
/// Shapes that disagree; `cancel`.
pub fn gradient_of_weight<E: Element>(
    gradient: Matrix<'_, E>,
    values: &[E],
    codes: SparseRows<'_>,
    simd: Simd,
    threads: usize,
    cancel: &Cancel,
) -> Result<Vec<E>> {
    let (d_in, d_sae) = (gradient.width(), codes.d_sae());
    check_len("rows of the gradient", gradient.rows(), codes.rows())?;
    check_len("length of values", values.len(), codes.nnz())?;
    let lists = FeatureLists::new(codes, cancel)?;
    let mut output = vec![E::default(); d_sae.saturating_mul(d_in)];
    let cost = (codes.nnz() / d_sae.max(1) + 1).saturating_mul(d_in);
    let parts = map_ranges_mut(&mut output, d_in, cost, threads, |range, part| {
        let mut sum = vec![0.0_f32; d_in];
        for (feature, output) in range.zip(part.chunks_exact_mut(d_in)) {
            cancel.check()?;
            let (rows, codes) = lists.of(feature);
            if rows.is_empty() {
                continue;
            }
            sum.fill(0.0);
            let terms = rows.iter().zip(codes).map(|(row, code)| {
                let value = values[*code as usize].to_f32();
                (value, gradient.row(*row as usize))
            });
            add_terms(simd, &mut sum, terms, cancel)?;
            round_into(&sum, output);
        }
        Ok(())
    });
    parts.into_iter().collect::<Result<()>>()?;
    Ok(output)
}
