//! Numbers in blocks of fp8 (e4m3 without infinities), as DeepSeek-V3 and R1 keep weights and
//! quantise activations. A block shares one f32 scale: its largest magnitude / 448.
//! Source: DeepSeek-V3 technical report, arXiv:2412.19437, 3.3.

use crate::rows::{map_ranges, map_ranges_mut, Matrix};
use crate::simd::{Element, Simd};
use crate::{Error, Result};

mod loops;

/// Rows and columns of a block; blocks at the lower and right edge may be smaller.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    rows: usize,
    columns: usize,
}

impl Block {
    /// Blocks of `rows` by `columns`.
    ///
    /// # Errors
    /// One of them is 0.
    pub fn new(rows: usize, columns: usize) -> Result<Self> {
        if rows == 0 || columns == 0 {
            return Err(Error::InvalidArgument(format!(
                "blocks of {rows} x {columns}; expected at least 1 x 1"
            )));
        }
        Ok(Self { rows, columns })
    }

    /// How many blocks cover a matrix, downwards and across.
    pub fn grid(self, rows: usize, width: usize) -> (usize, usize) {
        (rows.div_ceil(self.rows), width.div_ceil(self.columns))
    }
}

fn check(name: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!(
        "{name} has {found} elements; expected {expected}"
    )))
}

/// Quantises activations a row and `group` columns at a time and dequantises them again into
/// `output`: what a product of fp8 numbers sees of them. Zeros keep the scale 1; a NaN or an
/// infinity makes its whole group NaN.
///
/// # Errors
/// `group` is 0, or `output` is of another size than `input`.
pub fn fake_quantize<E: Element>(
    input: Matrix<'_, E>,
    group: usize,
    output: &mut [E],
    simd: Simd,
    threads: usize,
) -> Result<()> {
    Block::new(1, group)?;
    let width = input.width();
    check("the output", output.len(), input.rows() * width)?;
    map_ranges_mut(output, width, width, threads, |range, part| {
        for (row, output) in range.zip(part.chunks_mut(width)) {
            loops::fake_quantize_row(simd, input.row(row), group, output);
        }
    });
    Ok(())
}

/// A weight's codes into `codes` and its blocks' scales into `scales`, row-major. Zeros keep
/// the scale 1.
///
/// # Errors
/// `codes` or `scales` is of the wrong size, or the weight holds a NaN or an infinity (the row
/// is named; what the outputs hold then is not specified).
pub fn quantize_blocks<E: Element>(
    weight: Matrix<'_, E>,
    block: Block,
    codes: &mut [u8],
    scales: &mut [f32],
    simd: Simd,
    threads: usize,
) -> Result<()> {
    let (rows, width) = (weight.rows(), weight.width());
    let (down, across) = block.grid(rows, width);
    check("the codes", codes.len(), rows * width)?;
    check("the scales", scales.len(), down * across)?;
    let bands = map_ranges(down, block.rows * width, threads, |range| {
        let mut most = vec![0; range.len() * across];
        let first = range.start;
        for row in first * block.rows..(range.end * block.rows).min(rows) {
            let band = row / block.rows - first;
            let most = &mut most[band * across..(band + 1) * across];
            loops::raise_largest_row(simd, weight.row(row), block.columns, most);
        }
        most
    });
    for (scale, &most) in scales.iter_mut().zip(bands.iter().flatten()) {
        if most >= f32::INFINITY.to_bits() {
            let row = (0..rows).find(|&row| {
                let bad = |value: &E| !value.to_f32().is_finite();
                weight.row(row).iter().any(bad)
            });
            return Err(Error::InvalidArgument(format!(
                "row {} of the weight holds a NaN or an infinity; nothing quantised",
                row.unwrap_or_default()
            )));
        }
        *scale = loops::scale_of(most);
    }
    let scales = &*scales;
    map_ranges_mut(codes, width, width, threads, |range, part| {
        for (row, codes) in range.zip(part.chunks_mut(width)) {
            let scales = &scales[row / block.rows * across..][..across];
            loops::quantize_row(simd, weight.row(row), block.columns, scales, codes);
        }
    });
    Ok(())
}

/// The weight of codes and scales, into `output`; multiplied in f32, then rounded.
///
/// # Errors
/// `scales` or `output` is of the wrong size.
pub fn dequantize_blocks<E: Element>(
    codes: Matrix<'_, u8>,
    scales: &[f32],
    block: Block,
    output: &mut [E],
    simd: Simd,
    threads: usize,
) -> Result<()> {
    let width = codes.width();
    let (down, across) = block.grid(codes.rows(), width);
    check("the scales", scales.len(), down * across)?;
    check("the output", output.len(), codes.rows() * width)?;
    map_ranges_mut(output, width, width, threads, |range, part| {
        for (row, output) in range.zip(part.chunks_mut(width)) {
            let scales = &scales[row / block.rows * across..][..across];
            loops::dequantize_row(simd, codes.row(row), block.columns, scales, output);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests;
