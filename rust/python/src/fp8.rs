//! Block fp8: `r1sae_core::fp8`. Every function writes into arrays that the caller made; bf16
//! crosses as uint16, fp8 as uint8.

use numpy::{PyReadonlyArray2, PyReadwriteArray2};
use pyo3::prelude::*;
use r1sae_core::fp8::{self, Block};
use r1sae_core::simd::Simd;

use crate::errors::to_py;
use crate::floats::{bf16s, bf16s_mut, matrix, mixed, slice, slice_mut, Floats, FloatsOut};

/// Activations as a w8a8 product sees them, into `output`.
#[pyfunction]
fn fp8_fake_quantize(
    py: Python<'_>,
    input: Floats<'_>,
    group: usize,
    output: FloatsOut<'_>,
    threads: usize,
) -> PyResult<()> {
    let simd = Simd::active().map_err(to_py)?;
    match (&input, output) {
        (Floats::F32(input), FloatsOut::F32(mut output)) => {
            let (input, output) = (matrix(input, |bits| bits)?, slice_mut(&mut output)?);
            py.detach(|| fp8::fake_quantize(input, group, output, simd, threads))
        }
        (Floats::Bf16(input), FloatsOut::Bf16(mut output)) => {
            let (input, output) = (matrix(input, bf16s)?, bf16s_mut(slice_mut(&mut output)?));
            py.detach(|| fp8::fake_quantize(input, group, output, simd, threads))
        }
        _ => return Err(mixed()),
    }
    .map_err(to_py)
}

/// A weight's codes and scales, into `codes` and `scales`.
#[pyfunction]
fn fp8_quantize_blocks(
    py: Python<'_>,
    weight: Floats<'_>,
    block: (usize, usize),
    mut codes: PyReadwriteArray2<'_, u8>,
    mut scales: PyReadwriteArray2<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let simd = Simd::active().map_err(to_py)?;
    let block = Block::new(block.0, block.1).map_err(to_py)?;
    let (codes, scales) = (slice_mut(&mut codes)?, slice_mut(&mut scales)?);
    match &weight {
        Floats::F32(weight) => {
            let weight = matrix(weight, |bits| bits)?;
            py.detach(|| fp8::quantize_blocks(weight, block, codes, scales, simd, threads))
        }
        Floats::Bf16(weight) => {
            let weight = matrix(weight, bf16s)?;
            py.detach(|| fp8::quantize_blocks(weight, block, codes, scales, simd, threads))
        }
    }
    .map_err(to_py)
}

/// The weight of codes and scales, into `output`.
#[pyfunction]
fn fp8_dequantize_blocks(
    py: Python<'_>,
    codes: PyReadonlyArray2<'_, u8>,
    scales: PyReadonlyArray2<'_, f32>,
    block: (usize, usize),
    output: FloatsOut<'_>,
    threads: usize,
) -> PyResult<()> {
    let simd = Simd::active().map_err(to_py)?;
    let block = Block::new(block.0, block.1).map_err(to_py)?;
    let (codes, scales) = (matrix(&codes, |bits| bits)?, slice(&scales)?);
    match output {
        FloatsOut::F32(mut output) => {
            let output = slice_mut(&mut output)?;
            py.detach(|| fp8::dequantize_blocks(codes, scales, block, output, simd, threads))
        }
        FloatsOut::Bf16(mut output) => {
            let output = bf16s_mut(slice_mut(&mut output)?);
            py.detach(|| fp8::dequantize_blocks(codes, scales, block, output, simd, threads))
        }
    }
    .map_err(to_py)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(fp8_fake_quantize, module)?)?;
    module.add_function(wrap_pyfunction!(fp8_quantize_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(fp8_dequantize_blocks, module)?)?;
    Ok(())
}
