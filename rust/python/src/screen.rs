//! Codes straight from x: `r1sae_core::screen`. bf16 crosses as uint16.

use std::sync::{Mutex, PoisonError};

use half::bf16;
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use r1sae_core::memory;
use r1sae_core::rows::Matrix;
use r1sae_core::screen::{Encoder, Kernel, Kind, Rule, Screen as Core};
use r1sae_core::select::Threshold;
use r1sae_core::simd::Simd;

use crate::errors::to_py;
use crate::interrupt::run_undisturbed;
use crate::ops::{array, matrix, mixed, options, slice, Crossing, Floats1, Floats2, PyCodes};

/// As many 8-bit products take milliseconds.
const MANY_PRODUCTS: usize = 1 << 28;
/// As many take a good part of a second by the kernels that `auto` screens with, and by the others.
const PRODUCTS_OF_SECONDS: usize = 1 << 38;
const PRODUCTS_OF_SLOW_SECONDS: usize = 1 << 32;
/// Rounding so many weights takes milliseconds.
const MANY_WEIGHTS: usize = 1 << 24;
/// And so many a good part of a second.
const WEIGHTS_OF_SECONDS: usize = 1 << 29;

/// The rounded copy of an encoder's weights. Calls from several threads take turns; signals' handlers, which
/// may call it too, never run on a thread in whose call they would stand (they would wait for
/// themselves, or leave the matrix unit set up otherwise than they found it).
#[pyclass(module = "r1sae_fast._core", frozen)]
pub struct Screen {
    core: Mutex<Core>,
    products_of_seconds: usize,
}

/// A rule as it comes from Python.
#[derive(FromPyObject)]
enum Choice<'py> {
    K(usize),
    Thresholds(PyReadonlyArray1<'py, f32>),
}

impl Screen {
    /// A panic elsewhere can't leave less than the next refresh mends.
    pub(crate) fn lock(&self) -> std::sync::MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn encode_as<'py, E: Crossing>(
        &self,
        py: Python<'py>,
        (x, w, bias): (Matrix<'_, E>, Matrix<'_, E>, &[E]),
        rule: Rule<'_>,
        check_finite: bool,
        threads: usize,
    ) -> PyResult<PyCodes<'py>> {
        let options = options(check_finite, threads)?;
        let work = x.rows().saturating_mul(w.rows()).saturating_mul(w.width());
        let codes = run_undisturbed(
            py,
            work >= MANY_PRODUCTS,
            work >= self.products_of_seconds,
            |cancel| {
                self.lock()
                    .encode(x, Encoder { w, bias }, rule, options, cancel)
            },
        )?;
        Ok((
            array(py, codes.values),
            PyArray1::from_vec(py, codes.indices),
            PyArray1::from_vec(py, codes.row_offsets),
        ))
    }

    fn refresh_as<E: Crossing>(
        &self,
        py: Python<'_>,
        w: Matrix<'_, E>,
        bias: &[E],
        rows: Option<&[i64]>,
        threads: usize,
    ) -> PyResult<()> {
        let options = options(true, threads)?;
        let weights = w.rows().saturating_mul(w.width());
        run_undisturbed(
            py,
            weights >= MANY_WEIGHTS,
            weights >= WEIGHTS_OF_SECONDS,
            |cancel| {
                self.lock()
                    .refresh(Encoder { w, bias }, rows, options, cancel)
            },
        )
    }
}

fn new_core<E: Crossing>(
    py: Python<'_>,
    w: Matrix<'_, E>,
    bias: &[E],
    kernel: Kernel,
    seed: u128,
    threads: usize,
) -> PyResult<Core> {
    let options = options(true, threads)?;
    let weights = w.rows().saturating_mul(w.width());
    run_undisturbed(
        py,
        weights >= MANY_WEIGHTS,
        weights >= WEIGHTS_OF_SECONDS,
        |cancel| Core::new(Encoder { w, bias }, kernel, seed, options, cancel),
    )
}

#[pymethods]
impl Screen {
    #[new]
    fn new(
        py: Python<'_>,
        w: Floats2<'_>,
        bias: Floats1<'_>,
        kernel: &str,
        seed: u128,
        threads: usize,
    ) -> PyResult<Self> {
        let kernel = parse(kernel)?;
        let core = match (&w, &bias) {
            (Floats2::F32(w), Floats1::F32(bias)) => {
                new_core::<f32>(py, matrix(w)?, slice(bias)?, kernel, seed, threads)
            }
            (Floats2::Bf16(w), Floats1::Bf16(bias)) => {
                let bias = <bf16 as Crossing>::from_bits(slice(bias)?);
                new_core::<bf16>(py, matrix(w)?, bias, kernel, seed, threads)
            }
            _ => Err(mixed()),
        }?;
        let products_of_seconds = match kernel {
            Kernel::Amx | Kernel::AmxBf16 | Kernel::Avx512Vnni | Kernel::Avx512Bf16 => {
                PRODUCTS_OF_SECONDS
            }
            _ => PRODUCTS_OF_SLOW_SECONDS,
        };
        Ok(Self {
            core: Mutex::new(core),
            products_of_seconds,
        })
    }

    /// Rounds again the features `rows`, or all.
    fn refresh(
        &self,
        py: Python<'_>,
        w: Floats2<'_>,
        bias: Floats1<'_>,
        rows: Option<PyReadonlyArray1<'_, i64>>,
        threads: usize,
    ) -> PyResult<()> {
        let rows = rows.as_ref().map(slice).transpose()?;
        match (&w, &bias) {
            (Floats2::F32(w), Floats1::F32(bias)) => {
                self.refresh_as::<f32>(py, matrix(w)?, slice(bias)?, rows, threads)
            }
            (Floats2::Bf16(w), Floats1::Bf16(bias)) => {
                let bias = <bf16 as Crossing>::from_bits(slice(bias)?);
                self.refresh_as::<bf16>(py, matrix(w)?, bias, rows, threads)
            }
            _ => Err(mixed()),
        }
    }

    /// Codes by `rule`: "topk" or "batch_topk" with k, "threshold" with thresholds.
    #[allow(clippy::too_many_arguments, reason = "Python's keywords name them")]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        x: Floats2<'py>,
        w: Floats2<'py>,
        bias: Floats1<'py>,
        rule: &str,
        choice: Choice<'py>,
        check_finite: bool,
        threads: usize,
    ) -> PyResult<PyCodes<'py>> {
        let rule = match (rule, &choice) {
            ("topk", Choice::K(k)) => Rule::TopK(*k),
            ("batch_topk", Choice::K(k)) => Rule::BatchTopK(*k),
            ("threshold", Choice::Thresholds(thresholds)) => {
                Rule::Threshold(match slice(thresholds)? {
                    [shared] => Threshold::Shared(*shared),
                    each => Threshold::Each(each),
                })
            }
            _ => {
                return Err(PyValueError::new_err(format!(
                    "no rule {rule:?} with such a choice; expected topk or batch_topk with k, \
                     or threshold with thresholds"
                )))
            }
        };
        match (&x, &w, &bias) {
            (Floats2::F32(x), Floats2::F32(w), Floats1::F32(bias)) => {
                let operands = (matrix::<f32>(x)?, matrix(w)?, slice(bias)?);
                self.encode_as(py, operands, rule, check_finite, threads)
            }
            (Floats2::Bf16(x), Floats2::Bf16(w), Floats1::Bf16(bias)) => {
                let bias = <bf16 as Crossing>::from_bits(slice(bias)?);
                let operands = (matrix::<bf16>(x)?, matrix(w)?, bias);
                self.encode_as(py, operands, rule, check_finite, threads)
            }
            _ => Err(mixed()),
        }
    }

    #[getter]
    fn kernel(&self, py: Python<'_>) -> &'static str {
        py.detach(|| self.lock().kernel().name())
    }

    /// Bytes of the copy.
    #[getter]
    fn nbytes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.lock().bytes())
    }

    /// Rows, candidates, rows computed exactly as a whole, values outside their bounds.
    #[getter]
    fn counts(&self, py: Python<'_>) -> (u64, u64, u64, u64) {
        let counts = py.detach(|| self.lock().counts());
        (
            counts.rows,
            counts.candidates,
            counts.exact_rows,
            counts.violations,
        )
    }

    /// The first feature whose weights or bias hold a NaN or an infinity.
    #[getter]
    fn first_bad_feature(&self, py: Python<'_>) -> Option<usize> {
        py.detach(|| self.lock().first_bad_feature())
    }
}

fn parse(name: &str) -> PyResult<Kernel> {
    let known = Kernel::ALL.into_iter().find(|kernel| kernel.name() == name);
    known.ok_or_else(|| {
        let names: Vec<_> = Kernel::ALL.into_iter().map(Kernel::name).collect();
        PyValueError::new_err(format!(
            "unknown kernel {name:?}; expected one of {}",
            names.join(", ")
        ))
    })
}

/// The kernel for products of `kind` ("int8" or "bf16") that fits the SIMD level in use best, and all
/// that this CPU has, slowest first.
#[pyfunction]
#[pyo3(signature = (kind = "int8"))]
fn screen_kernels(kind: &str) -> PyResult<(&'static str, Vec<&'static str>)> {
    let simd = Simd::active().map_err(to_py)?;
    let kind = match kind {
        "int8" => Kind::Int8,
        "bf16" => Kind::Bf16,
        _ => {
            return Err(PyValueError::new_err(format!(
                "unknown kind {kind:?}; expected int8 or bf16"
            )))
        }
    };
    let kernels = Kernel::ALL.into_iter();
    let supported = kernels.filter(|kernel| kernel.kind() == kind && kernel.is_supported());
    Ok((
        Kernel::best(kind, simd).name(),
        supported.map(Kernel::name).collect(),
    ))
}

/// Asks the system for large pages under an array that wasn't written to yet.
#[pyfunction]
fn prefer_large_pages(floats: Floats1<'_>) -> PyResult<()> {
    match &floats {
        Floats1::F32(array) => memory::prefer_large_pages(slice(array)?),
        Floats1::Bf16(array) => memory::prefer_large_pages(slice(array)?),
    }
    Ok(())
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Screen>()?;
    module.add_function(wrap_pyfunction!(screen_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(prefer_large_pages, module)?)?;
    Ok(())
}
