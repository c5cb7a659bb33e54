//! Between the products of R1's forward: `r1sae_core::r1`. Every function writes into arrays that
//! the caller made; bf16 crosses as uint16.

use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;
use r1sae_core::r1::{self, Routing, Step, Tensors};
use r1sae_core::simd::Simd;

use crate::errors::to_py;
use crate::floats::{
    bf16s, bf16s_mut, contiguous, matrix, mixed, slice_mut, vector, Floats, FloatsOut,
};

#[derive(FromPyObject)]
enum Weight<'py> {
    F32(PyReadonlyArray1<'py, f32>),
    Bf16(PyReadonlyArray1<'py, u16>),
}

/// Normalised rows, into `output`.
#[pyfunction]
fn r1_rms_norm(
    py: Python<'_>,
    input: Floats<'_>,
    weight: Weight<'_>,
    eps: f32,
    output: FloatsOut<'_>,
    threads: usize,
) -> PyResult<()> {
    let simd = Simd::active().map_err(to_py)?;
    match (&input, &weight, output) {
        (Floats::F32(input), Weight::F32(weight), FloatsOut::F32(mut output)) => {
            let (input, weight) = (matrix(input, |bits| bits)?, vector(weight)?);
            let output = slice_mut(&mut output)?;
            py.detach(|| r1::rms_norm(input, weight, eps, output, simd, threads))
        }
        (Floats::Bf16(input), Weight::Bf16(weight), FloatsOut::Bf16(mut output)) => {
            let (input, weight) = (matrix(input, bf16s)?, bf16s(vector(weight)?));
            let output = bf16s_mut(slice_mut(&mut output)?);
            py.detach(|| r1::rms_norm(input, weight, eps, output, simd, threads))
        }
        _ => return Err(mixed()),
    }
    .map_err(to_py)
}

/// Turns the end of each head of each row of `queries`, in place.
#[pyfunction]
fn r1_rotate(
    py: Python<'_>,
    queries: FloatsOut<'_>,
    head: usize,
    table: PyReadonlyArray2<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let simd = Simd::active().map_err(to_py)?;
    let table = matrix(&table, |bits| bits)?;
    match queries {
        FloatsOut::F32(mut queries) => {
            let width = queries.shape()[1];
            let queries = slice_mut(&mut queries)?;
            py.detach(|| r1::rotate(queries, width, head, table, simd, threads))
        }
        FloatsOut::Bf16(mut queries) => {
            let width = queries.shape()[1];
            let queries = bf16s_mut(slice_mut(&mut queries)?);
            py.detach(|| r1::rotate(queries, width, head, table, simd, threads))
        }
    }
    .map_err(to_py)
}

/// Makes cache rows of `rows`, in place.
#[pyfunction]
fn r1_latents(
    py: Python<'_>,
    rows: FloatsOut<'_>,
    weight: Weight<'_>,
    eps: f32,
    table: PyReadonlyArray2<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let simd = Simd::active().map_err(to_py)?;
    let table = matrix(&table, |bits| bits)?;
    match (rows, &weight) {
        (FloatsOut::F32(mut rows), Weight::F32(weight)) => {
            let (rows, weight) = (slice_mut(&mut rows)?, vector(weight)?);
            py.detach(|| r1::latents(rows, weight, eps, table, simd, threads))
        }
        (FloatsOut::Bf16(mut rows), Weight::Bf16(weight)) => {
            let (rows, weight) = (bf16s_mut(slice_mut(&mut rows)?), bf16s(vector(weight)?));
            py.detach(|| r1::latents(rows, weight, eps, table, simd, threads))
        }
        _ => return Err(mixed()),
    }
    .map_err(to_py)
}

/// Each token's experts and their weights, into `chosen` and `weights`.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // flat, as Python gives them
fn r1_route(
    py: Python<'_>,
    logits: PyReadonlyArray2<'_, f32>,
    bias: PyReadonlyArray1<'_, f32>,
    groups: usize,
    kept_groups: usize,
    normalise: bool,
    scale: f32,
    mut chosen: PyReadwriteArray2<'_, i64>,
    mut weights: PyReadwriteArray2<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let routing = Routing {
        groups,
        kept_groups,
        experts: chosen.shape()[1],
        normalise,
        scale,
    };
    let (logits, bias) = (matrix(&logits, |bits| bits)?, vector(&bias)?);
    let (chosen, weights) = (slice_mut(&mut chosen)?, slice_mut(&mut weights)?);
    py.detach(|| r1::route(logits, bias, routing, chosen, weights, threads))
        .map_err(to_py)
}

/// Attention of new tokens to the cache `[sequences, capacity * width]`, to which their `rows`
/// `[tokens, width]` are written: from `absorbed` `[heads, tokens * rank]` and `query`
/// `[tokens, heads * head]` into `output` `[heads, tokens * rank]`.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // flat, as Python gives them
fn r1_attend(
    py: Python<'_>,
    rows: Floats<'_>,
    absorbed: Floats<'_>,
    query: Floats<'_>,
    slots: PyReadonlyArray1<'_, i64>,
    cache: FloatsOut<'_>,
    output: FloatsOut<'_>,
    rank: usize,
    scale: f32,
    threads: usize,
) -> PyResult<()> {
    let simd = Simd::active().map_err(to_py)?;
    let slots = vector(&slots)?;
    let step = |rows: &[usize], heads: usize, query: &[usize], cache: &[usize]| Step {
        heads,
        new: slots.len().checked_div(cache[0]).unwrap_or(0),
        capacity: cache[1].checked_div(rows[1]).unwrap_or(0),
        rank,
        width: rows[1],
        head: query[1].checked_div(heads).unwrap_or(0),
        scale,
    };
    match (&rows, &absorbed, &query, cache, output) {
        (
            Floats::F32(rows),
            Floats::F32(absorbed),
            Floats::F32(query),
            FloatsOut::F32(mut cache),
            FloatsOut::F32(mut output),
        ) => {
            let step = step(
                rows.shape(),
                absorbed.shape()[0],
                query.shape(),
                cache.shape(),
            );
            let tensors = Tensors {
                rows: rows.as_slice().map_err(contiguous)?,
                absorbed: absorbed.as_slice().map_err(contiguous)?,
                query: query.as_slice().map_err(contiguous)?,
                slots,
                cache: slice_mut(&mut cache)?,
                output: slice_mut(&mut output)?,
            };
            py.detach(|| r1::attend(step, tensors, simd, threads))
        }
        (
            Floats::Bf16(rows),
            Floats::Bf16(absorbed),
            Floats::Bf16(query),
            FloatsOut::Bf16(mut cache),
            FloatsOut::Bf16(mut output),
        ) => {
            let step = step(
                rows.shape(),
                absorbed.shape()[0],
                query.shape(),
                cache.shape(),
            );
            let tensors = Tensors {
                rows: bf16s(rows.as_slice().map_err(contiguous)?),
                absorbed: bf16s(absorbed.as_slice().map_err(contiguous)?),
                query: bf16s(query.as_slice().map_err(contiguous)?),
                slots,
                cache: bf16s_mut(slice_mut(&mut cache)?),
                output: bf16s_mut(slice_mut(&mut output)?),
            };
            py.detach(|| r1::attend(step, tensors, simd, threads))
        }
        _ => return Err(mixed()),
    }
    .map_err(to_py)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(r1_rms_norm, module)?)?;
    module.add_function(wrap_pyfunction!(r1_rotate, module)?)?;
    module.add_function(wrap_pyfunction!(r1_latents, module)?)?;
    module.add_function(wrap_pyfunction!(r1_route, module)?)?;
    module.add_function(wrap_pyfunction!(r1_attend, module)?)?;
    Ok(())
}
