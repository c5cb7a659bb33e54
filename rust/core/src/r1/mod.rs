//! What stands between the products of an R1 forward on a CPU: norms, rotary positions, routing;
//! and attention on the cache.
//!
//! Each is a pass or two over a token's numbers, where the same in a tensor library is a handful
//! of operations that all read and write memory; in a small model these take longer than the
//! products. Rounding is that of the plain definitions: everything in f32, one rounding where the
//! released code rounds.

use crate::rows::{map_ranges_mut, Matrix};
use crate::simd::{Element, Simd};
use crate::{Error, Result};

mod attend;
mod loops;
mod route;

pub use attend::{attend, Step, Tensors};
pub use route::{route, Routing};

fn check(name: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!(
        "{name} has {found} elements; expected {expected}"
    )))
}

/// `x / sqrt(mean(x^2) + eps)`, rounded, times `weight`, of each row into `output`.
///
/// # Errors
/// `weight` or `output` is of the wrong size.
pub fn rms_norm<E: Element>(
    input: Matrix<'_, E>,
    weight: &[E],
    eps: f32,
    output: &mut [E],
    simd: Simd,
    threads: usize,
) -> Result<()> {
    let width = input.width();
    check("the weight", weight.len(), width)?;
    check("the output", output.len(), input.rows() * width)?;
    map_ranges_mut(output, width, width, threads, |range, part| {
        for (row, output) in range.zip(part.chunks_mut(width)) {
            output.copy_from_slice(input.row(row));
            loops::normalise_row(simd, output, weight, eps);
        }
    });
    Ok(())
}

/// Which row of a table belongs to each of `rows` tokens: the table repeats.
fn check_table(table: Matrix<'_, f32>, rows: usize) -> Result<()> {
    if table.width().is_multiple_of(2)
        && (rows == 0 || (table.rows() > 0 && rows.is_multiple_of(table.rows())))
    {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!(
        "a rotary table of {} rows of {} for {rows} tokens; expected pairs, and tokens that are a \
         multiple of the rows",
        table.rows(),
        table.width()
    )))
}

/// Turns, in place, the last `table.width()` numbers of each head of each token: interleaved pairs
/// by the cosines and sines of row `token % table.rows()`.
///
/// `queries` holds tokens of `width` numbers, heads of `head` numbers.
///
/// # Errors
/// The sizes don't fit.
pub fn rotate<E: Element>(
    queries: &mut [E],
    width: usize,
    head: usize,
    table: Matrix<'_, f32>,
    simd: Simd,
    threads: usize,
) -> Result<()> {
    if head == 0 || !width.is_multiple_of(head) || table.width() > head || width == 0 {
        return Err(Error::InvalidArgument(format!(
            "tokens of {width} numbers, heads of {head} and {} that turn; expected each to divide \
             or fit into the one before",
            table.width()
        )));
    }
    let rows = queries.len() / width;
    check("the queries", queries.len(), rows * width)?;
    check_table(table, rows)?;
    map_ranges_mut(queries, width, width, threads, |range, part| {
        for (row, token) in range.zip(part.chunks_mut(width)) {
            let turns = table.row(row % table.rows());
            loops::rotate_row(simd, token, head, turns);
        }
    });
    Ok(())
}

/// Makes cache rows of what `kv_a_proj_with_mqa` gives, in place: the first `weight.len()` numbers
/// of each token normalised as by [`rms_norm`], the rest turned as by [`rotate`].
///
/// # Errors
/// The sizes don't fit.
pub fn latents<E: Element>(
    rows: &mut [E],
    weight: &[E],
    eps: f32,
    table: Matrix<'_, f32>,
    simd: Simd,
    threads: usize,
) -> Result<()> {
    let width = weight.len() + table.width();
    let count = rows.len().checked_div(width).unwrap_or(0);
    check("the latents", rows.len(), count * width)?;
    check_table(table, count)?;
    map_ranges_mut(rows, width, width, threads, |range, part| {
        for (row, token) in range.zip(part.chunks_mut(width)) {
            let (latent, key) = token.split_at_mut(weight.len());
            loops::normalise_row(simd, latent, weight, eps);
            let turns = table.row(row % table.rows());
            loops::rotate_row(simd, key, turns.len().max(1), turns);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests;
