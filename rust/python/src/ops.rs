//! Selection and decoding: `r1sae_core::{select, decode, simd}`. bf16 crosses as uint16.

use half::{bf16, f16};
use numpy::{
    Element as NumpyElement, PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use r1sae_core::rows::Matrix;
use r1sae_core::select::{self, Codes, Options, Threshold};
use r1sae_core::simd::{set_active, Element, Level, Simd, Stored};
use r1sae_core::{decode as core_decode, grad, pool, Cancel, Result};

use crate::errors::to_py;
use crate::interrupt::run_with_torch;

/// Selecting from fewer values than this takes milliseconds.
const MANY_VALUES: usize = 1 << 20;
/// As many multiplications and additions take milliseconds.
const MANY_PRODUCTS: usize = 1 << 24;

/// An element of the core and the bits by which numpy knows it.
pub(crate) trait Crossing: Element {
    type Bits: NumpyElement;
    fn from_bits(bits: &[Self::Bits]) -> &[Self];
    fn into_bits(values: Vec<Self>) -> Vec<Self::Bits>;
}

impl Crossing for f32 {
    type Bits = f32;
    fn from_bits(bits: &[f32]) -> &[f32] {
        bits
    }
    fn into_bits(values: Vec<f32>) -> Vec<f32> {
        values
    }
}

impl Crossing for bf16 {
    type Bits = u16;
    fn from_bits(bits: &[u16]) -> &[bf16] {
        half::slice::HalfBitsSliceExt::reinterpret_cast(bits)
    }
    fn into_bits(values: Vec<bf16>) -> Vec<u16> {
        half::vec::HalfFloatVecExt::reinterpret_into(values)
    }
}

/// A float32 array, or a uint16 array of bf16 bits.
#[derive(FromPyObject)]
pub(crate) enum Floats1<'py> {
    F32(PyReadonlyArray1<'py, f32>),
    Bf16(PyReadonlyArray1<'py, u16>),
}

/// As [`Floats1`], with two dimensions.
#[derive(FromPyObject)]
pub(crate) enum Floats2<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    Bf16(PyReadonlyArray2<'py, u16>),
}

/// Weights as they may be kept beside float32 values.
#[derive(FromPyObject)]
enum Weights<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    Bf16(PyReadonlyArray2<'py, u16>),
    F16(PyReadonlyArray2<'py, f16>),
}

/// values, indices, row_offsets.
pub(crate) type PyCodes<'py> = (
    Bound<'py, PyAny>,
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<i64>>,
);

pub(crate) fn slice<'a, T: NumpyElement>(array: &'a PyReadonlyArray1<'_, T>) -> PyResult<&'a [T]> {
    array
        .as_slice()
        .map_err(|_| PyValueError::new_err("expected a contiguous array"))
}

pub(crate) fn matrix<'a, E: Crossing>(
    array: &'a PyReadonlyArray2<'_, E::Bits>,
) -> PyResult<Matrix<'a, E>> {
    let [rows, width] = [array.shape()[0], array.shape()[1]];
    let data = array
        .as_slice()
        .map_err(|_| PyValueError::new_err("expected a C-contiguous array"))?;
    Matrix::new(E::from_bits(data), rows, width).map_err(to_py)
}

pub(crate) fn array<'py, E: Crossing>(py: Python<'py>, values: Vec<E>) -> Bound<'py, PyAny> {
    PyArray1::from_vec(py, E::into_bits(values)).into_any()
}

pub(crate) fn mixed() -> PyErr {
    PyTypeError::new_err("expected all arrays of one dtype: float32, or uint16 (bf16 bits)")
}

/// Runs one selection on either dtype with the GIL released.
macro_rules! select {
    ($py:ident, $pre:ident, |$matrix:ident, $cancel:ident| $call:expr) => {
        match &$pre {
            Floats2::F32(array) => select_as::<f32>($py, array, |$matrix, $cancel| $call),
            Floats2::Bf16(array) => select_as::<bf16>($py, array, |$matrix, $cancel| $call),
        }
    };
}

fn select_as<'py, E: Crossing>(
    py: Python<'py>,
    array_2d: &PyReadonlyArray2<'py, E::Bits>,
    call: impl FnOnce(Matrix<'_, E>, &Cancel) -> Result<Codes<E>> + Send,
) -> PyResult<PyCodes<'py>> {
    let matrix = matrix::<E>(array_2d)?;
    let long = matrix.rows() * matrix.width() >= MANY_VALUES;
    let codes = run_with_torch(py, long, |cancel| call(matrix, cancel))?;
    Ok((
        array(py, codes.values),
        PyArray1::from_vec(py, codes.indices),
        PyArray1::from_vec(py, codes.row_offsets),
    ))
}

pub(crate) fn options(check_finite: bool, threads: usize) -> PyResult<Options> {
    Ok(Options {
        simd: Simd::active().map_err(to_py)?,
        threads,
        check_finite,
    })
}

#[pyfunction]
fn topk<'py>(
    py: Python<'py>,
    pre_activations: Floats2<'py>,
    k: usize,
    check_finite: bool,
    threads: usize,
) -> PyResult<PyCodes<'py>> {
    let options = options(check_finite, threads)?;
    select!(py, pre_activations, |matrix, cancel| select::topk(
        matrix, k, options, cancel
    ))
}

#[pyfunction]
fn batch_topk<'py>(
    py: Python<'py>,
    pre_activations: Floats2<'py>,
    k: usize,
    check_finite: bool,
    threads: usize,
) -> PyResult<PyCodes<'py>> {
    let options = options(check_finite, threads)?;
    select!(py, pre_activations, |matrix, cancel| select::batch_topk(
        matrix, k, options, cancel
    ))
}

#[pyfunction]
fn threshold<'py>(
    py: Python<'py>,
    pre_activations: Floats2<'py>,
    thresholds: PyReadonlyArray1<'py, f32>,
    check_finite: bool,
    threads: usize,
) -> PyResult<PyCodes<'py>> {
    let options = options(check_finite, threads)?;
    let threshold = match slice(&thresholds)? {
        [shared] => Threshold::Shared(*shared),
        each => Threshold::Each(each),
    };
    select!(py, pre_activations, |matrix, cancel| select::threshold(
        matrix, threshold, options, cancel
    ))
}

/// Codes as they come from Python.
struct CodesIn<'a> {
    indices: &'a [i32],
    row_offsets: &'a [i64],
    threads: usize,
}

impl CodesIn<'_> {
    /// Whether work on rows of `d_in` elements may take longer than a moment.
    fn is_long(&self, d_in: usize) -> bool {
        let rows = self.indices.len() + self.row_offsets.len();
        rows.saturating_mul(d_in) >= MANY_PRODUCTS
    }
}

fn decode_as<'py, E: Crossing, W: Stored>(
    py: Python<'py>,
    values: &PyReadonlyArray1<'py, E::Bits>,
    codes: &CodesIn<'_>,
    w_dec: Matrix<'_, W>,
    b_dec: Option<&PyReadonlyArray1<'py, E::Bits>>,
) -> PyResult<Bound<'py, PyAny>> {
    let simd = Simd::active().map_err(to_py)?;
    let values = E::from_bits(slice(values)?);
    let b_dec = b_dec.map(slice).transpose()?.map(E::from_bits);
    let output = run_with_torch(py, codes.is_long(w_dec.width()), |cancel| {
        let rows = core_decode::SparseRows::new(codes.indices, codes.row_offsets, w_dec.rows())?;
        core_decode::decode(values, rows, w_dec, b_dec, simd, codes.threads, cancel)
    })?;
    Ok(array(py, output))
}

fn f16_matrix<'a>(array: &'a PyReadonlyArray2<'_, f16>) -> PyResult<Matrix<'a, f16>> {
    let data = array
        .as_slice()
        .map_err(|_| PyValueError::new_err("expected a C-contiguous array"))?;
    Matrix::new(data, array.shape()[0], array.shape()[1]).map_err(to_py)
}

#[pyfunction]
fn decode<'py>(
    py: Python<'py>,
    values: Floats1<'py>,
    indices: PyReadonlyArray1<'py, i32>,
    row_offsets: PyReadonlyArray1<'py, i64>,
    w_dec: Weights<'py>,
    b_dec: Option<Floats1<'py>>,
    threads: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let codes = CodesIn {
        indices: slice(&indices)?,
        row_offsets: slice(&row_offsets)?,
        threads,
    };
    match (&values, &b_dec) {
        (Floats1::F32(values), None | Some(Floats1::F32(_))) => {
            let b_dec = match &b_dec {
                Some(Floats1::F32(b_dec)) => Some(b_dec),
                _ => None,
            };
            match &w_dec {
                Weights::F32(w) => decode_as::<f32, f32>(py, values, &codes, matrix(w)?, b_dec),
                Weights::Bf16(w) => decode_as::<f32, bf16>(py, values, &codes, matrix(w)?, b_dec),
                Weights::F16(w) => decode_as::<f32, f16>(py, values, &codes, f16_matrix(w)?, b_dec),
            }
        }
        (Floats1::Bf16(values), None | Some(Floats1::Bf16(_))) => {
            let b_dec = match &b_dec {
                Some(Floats1::Bf16(b_dec)) => Some(b_dec),
                _ => None,
            };
            let Weights::Bf16(w) = &w_dec else {
                return Err(mixed());
            };
            decode_as::<bf16, bf16>(py, values, &codes, matrix(w)?, b_dec)
        }
        _ => Err(mixed()),
    }
}

fn gradient_of_values_as<'py, E: Crossing, W: Stored>(
    py: Python<'py>,
    gradient: &PyReadonlyArray2<'py, E::Bits>,
    codes: &CodesIn<'_>,
    w_dec: Matrix<'_, W>,
) -> PyResult<Bound<'py, PyAny>> {
    let simd = Simd::active().map_err(to_py)?;
    let gradient = matrix::<E>(gradient)?;
    let output = run_with_torch(py, codes.is_long(w_dec.width()), |cancel| {
        let rows = core_decode::SparseRows::new(codes.indices, codes.row_offsets, w_dec.rows())?;
        grad::gradient_of_values(gradient, rows, w_dec, simd, codes.threads, cancel)
    })?;
    Ok(array(py, output))
}

#[pyfunction]
fn decode_gradient_of_values<'py>(
    py: Python<'py>,
    gradient: Floats2<'py>,
    indices: PyReadonlyArray1<'py, i32>,
    row_offsets: PyReadonlyArray1<'py, i64>,
    w_dec: Weights<'py>,
    threads: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let codes = CodesIn {
        indices: slice(&indices)?,
        row_offsets: slice(&row_offsets)?,
        threads,
    };
    match (&gradient, &w_dec) {
        (Floats2::F32(of), Weights::F32(w)) => {
            gradient_of_values_as::<f32, f32>(py, of, &codes, matrix(w)?)
        }
        (Floats2::F32(of), Weights::Bf16(w)) => {
            gradient_of_values_as::<f32, bf16>(py, of, &codes, matrix(w)?)
        }
        (Floats2::F32(of), Weights::F16(w)) => {
            gradient_of_values_as::<f32, f16>(py, of, &codes, f16_matrix(w)?)
        }
        (Floats2::Bf16(of), Weights::Bf16(w)) => {
            gradient_of_values_as::<bf16, bf16>(py, of, &codes, matrix(w)?)
        }
        _ => Err(mixed()),
    }
}

fn gradient_of_weight_as<'py, E: Crossing>(
    py: Python<'py>,
    gradient: &PyReadonlyArray2<'py, E::Bits>,
    values: &PyReadonlyArray1<'py, E::Bits>,
    codes: &CodesIn<'_>,
    d_sae: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let simd = Simd::active().map_err(to_py)?;
    let gradient = matrix::<E>(gradient)?;
    let values = E::from_bits(slice(values)?);
    let output = run_with_torch(py, codes.is_long(gradient.width()), |cancel| {
        let rows = core_decode::SparseRows::new(codes.indices, codes.row_offsets, d_sae)?;
        grad::gradient_of_weight(gradient, values, rows, simd, codes.threads, cancel)
    })?;
    Ok(array(py, output))
}

#[pyfunction]
fn decode_gradient_of_weight<'py>(
    py: Python<'py>,
    gradient: Floats2<'py>,
    values: Floats1<'py>,
    indices: PyReadonlyArray1<'py, i32>,
    row_offsets: PyReadonlyArray1<'py, i64>,
    d_sae: usize,
    threads: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let codes = CodesIn {
        indices: slice(&indices)?,
        row_offsets: slice(&row_offsets)?,
        threads,
    };
    match (&gradient, &values) {
        (Floats2::F32(gradient), Floats1::F32(values)) => {
            gradient_of_weight_as::<f32>(py, gradient, values, &codes, d_sae)
        }
        (Floats2::Bf16(gradient), Floats1::Bf16(values)) => {
            gradient_of_weight_as::<bf16>(py, gradient, values, &codes, d_sae)
        }
        _ => Err(mixed()),
    }
}

/// The level in use, and all that this CPU has, slowest first.
#[pyfunction]
fn simd_info() -> PyResult<(&'static str, Vec<&'static str>)> {
    let active = Simd::active().map_err(to_py)?.level().name();
    let available = Level::ALL.into_iter().filter(|level| level.is_supported());
    Ok((active, available.map(Level::name).collect()))
}

/// Sets the process's level (`auto`, `scalar`, `avx2`, `avx512`); returns the one now in use.
#[pyfunction]
fn set_simd(name: &str) -> PyResult<&'static str> {
    Ok(set_active(name).map_err(to_py)?.level().name())
}

/// Has operations of the main thread work on the threads of its OpenMP team: `parallel` is the address of
/// `GOMP_parallel`.
#[pyfunction]
fn share_openmp(parallel: usize) -> PyResult<()> {
    if parallel == 0 {
        return Err(PyValueError::new_err("parallel is 0; expected an address"));
    }
    let parallel = parallel as *const ();
    // SAFETY: ops/_openmp.py takes the address from the library that torch runs on, which is never
    // unloaded, by the name of this function of the C ABI.
    unsafe { pool::share_team(std::mem::transmute::<*const (), pool::Parallel>(parallel)) };
    Ok(())
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(topk, module)?)?;
    module.add_function(wrap_pyfunction!(batch_topk, module)?)?;
    module.add_function(wrap_pyfunction!(threshold, module)?)?;
    module.add_function(wrap_pyfunction!(decode, module)?)?;
    module.add_function(wrap_pyfunction!(decode_gradient_of_values, module)?)?;
    module.add_function(wrap_pyfunction!(decode_gradient_of_weight, module)?)?;
    module.add_function(wrap_pyfunction!(simd_info, module)?)?;
    module.add_function(wrap_pyfunction!(share_openmp, module)?)?;
    module.add_function(wrap_pyfunction!(set_simd, module)?)?;
    Ok(())
}
