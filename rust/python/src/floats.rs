//! Arrays of float32 or bf16 (which crosses as uint16) as the core's slices and matrices.

use half::bf16;
use numpy::{
    Element as NumpyElement, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray2,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use r1sae_core::rows::Matrix;

use crate::errors::to_py;

#[derive(FromPyObject)]
pub(crate) enum Floats<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    Bf16(PyReadonlyArray2<'py, u16>),
}

#[derive(FromPyObject)]
pub(crate) enum FloatsOut<'py> {
    F32(PyReadwriteArray2<'py, f32>),
    Bf16(PyReadwriteArray2<'py, u16>),
}

pub(crate) fn contiguous(_: impl std::fmt::Debug) -> PyErr {
    PyValueError::new_err("expected a C-contiguous array")
}

pub(crate) fn mixed() -> PyErr {
    PyTypeError::new_err("expected arrays of one dtype: float32, or uint16 (bf16 bits)")
}

pub(crate) fn slice<'a, T: NumpyElement>(array: &'a PyReadonlyArray2<'_, T>) -> PyResult<&'a [T]> {
    array.as_slice().map_err(contiguous)
}

pub(crate) fn matrix<'a, T, B: NumpyElement>(
    array: &'a PyReadonlyArray2<'_, B>,
    from_bits: impl Fn(&'a [B]) -> &'a [T],
) -> PyResult<Matrix<'a, T>> {
    Matrix::new(from_bits(slice(array)?), array.shape()[0], array.shape()[1]).map_err(to_py)
}

pub(crate) fn slice_mut<'a, T: NumpyElement>(
    array: &'a mut PyReadwriteArray2<'_, T>,
) -> PyResult<&'a mut [T]> {
    array.as_slice_mut().map_err(contiguous)
}

pub(crate) fn bf16s(bits: &[u16]) -> &[bf16] {
    half::slice::HalfBitsSliceExt::reinterpret_cast(bits)
}

pub(crate) fn bf16s_mut(bits: &mut [u16]) -> &mut [bf16] {
    half::slice::HalfBitsSliceExt::reinterpret_cast_mut(bits)
}

pub(crate) fn vector<'a, T: NumpyElement>(array: &'a PyReadonlyArray1<'_, T>) -> PyResult<&'a [T]> {
    array.as_slice().map_err(contiguous)
}
