//! Sparse gradients and Adam: `r1sae_core::{grad, adam}`.

use numpy::{
    PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1, PyReadwriteArray2,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use r1sae_core::adam::{self, Idle, State, Step};
use r1sae_core::decode::SparseRows;
use r1sae_core::grad::{self, Source, Term};
use r1sae_core::rows::Matrix;
use r1sae_core::simd::Simd;

use crate::errors::to_py;
use crate::interrupt::run_with_torch;
use crate::ops::{options, slice};
use crate::screen::Screen;

/// As many codes are sorted, and as many multiplications done, in milliseconds.
const MANY_CODES: usize = 1 << 20;
const MANY_PRODUCTS: usize = 1 << 24;

/// The codes of a batch, feature by feature.
#[pyclass(frozen, module = "r1sae_fast._core")]
pub struct FeatureLists(grad::FeatureLists);

#[pymethods]
impl FeatureLists {
    #[new]
    fn new(
        py: Python<'_>,
        indices: PyReadonlyArray1<'_, i32>,
        row_offsets: PyReadonlyArray1<'_, i64>,
        d_sae: usize,
    ) -> PyResult<Self> {
        let (indices, row_offsets) = (slice(&indices)?, slice(&row_offsets)?);
        let lists = run_with_torch(py, indices.len() >= MANY_CODES, |cancel| {
            let codes = SparseRows::new(indices, row_offsets, d_sae)?;
            grad::FeatureLists::new(codes, cancel)
        })?;
        Ok(Self(lists))
    }

    /// Of each feature the sum of its codes' values.
    fn sums<'py>(
        &self,
        py: Python<'py>,
        values: PyReadonlyArray1<'py, f32>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let values = slice(&values)?;
        let sums = py.detach(|| self.0.sums(values)).map_err(to_py)?;
        Ok(PyArray1::from_vec(py, sums))
    }

    #[getter]
    fn d_sae(&self) -> usize {
        self.0.d_sae()
    }

    #[getter]
    fn rows(&self) -> usize {
        self.0.rows()
    }

    #[getter]
    fn nnz(&self) -> usize {
        self.0.nnz()
    }
}

/// Coefficients a code, and the rows that they multiply.
type PyTerm<'py> = (PyReadonlyArray1<'py, f32>, PyReadonlyArray2<'py, f32>);
/// As [`Source`].
type PySource<'py> = (Bound<'py, FeatureLists>, Vec<PyTerm<'py>>);

fn matrix<'a>(array: &'a PyReadonlyArray2<'_, f32>) -> PyResult<Matrix<'a, f32>> {
    let [rows, width] = [array.shape()[0], array.shape()[1]];
    let data = array
        .as_slice()
        .map_err(|_| PyValueError::new_err("expected a C-contiguous array"))?;
    Matrix::new(data, rows, width).map_err(to_py)
}

/// The sources as the core takes them, whose terms the first call lends to the second.
fn terms<'a>(sources: &'a [PySource<'_>]) -> PyResult<Vec<Vec<Term<'a>>>> {
    let term = |(coefficients, rows): &'a PyTerm<'_>| {
        Ok(Term {
            coefficients: slice(coefficients)?,
            rows: matrix(rows)?,
        })
    };
    sources
        .iter()
        .map(|source| source.1.iter().map(term).collect())
        .collect()
}

fn sources_of<'a>(sources: &'a [PySource<'_>], terms: &'a [Vec<Term<'a>>]) -> Vec<Source<'a>> {
    sources
        .iter()
        .zip(terms)
        .map(|(source, terms)| Source {
            lists: &source.0.get().0,
            terms,
        })
        .collect()
}

fn products(sources: &[Source<'_>], d_in: usize) -> usize {
    let codes: usize = sources.iter().map(|source| source.lists.nnz()).sum();
    codes.saturating_mul(d_in)
}

/// As `decode_gradient_of_values`, feature by feature.
#[pyfunction]
fn gradient_of_values_by_feature<'py>(
    py: Python<'py>,
    gradient: PyReadonlyArray2<'py, f32>,
    lists: &Bound<'py, FeatureLists>,
    w_dec: PyReadonlyArray2<'py, f32>,
    threads: usize,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let simd = Simd::active().map_err(to_py)?;
    let (gradient, w_dec, lists) = (matrix(&gradient)?, matrix(&w_dec)?, &lists.get().0);
    let long = lists.nnz().saturating_mul(w_dec.width()) >= MANY_PRODUCTS;
    let values = run_with_torch(py, long, |cancel| {
        grad::gradient_of_values_by_feature(gradient, lists, w_dec, simd, threads, cancel)
    })?;
    Ok(PyArray1::from_vec(py, values))
}

/// `[features, d_in]`, flat.
#[pyfunction]
fn gradient_rows<'py>(
    py: Python<'py>,
    sources: Vec<PySource<'py>>,
    features: PyReadonlyArray1<'py, i64>,
    d_sae: usize,
    d_in: usize,
    threads: usize,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let simd = Simd::active().map_err(to_py)?;
    let features = slice(&features)?;
    let terms = terms(&sources)?;
    let sources = sources_of(&sources, &terms);
    let long = features.len().saturating_mul(d_in) >= MANY_PRODUCTS
        || products(&sources, d_in) >= MANY_PRODUCTS;
    let rows = run_with_torch(py, long, |cancel| {
        grad::gradient_rows(&sources, features, d_sae, d_in, simd, threads, cancel)
    })?;
    Ok(PyArray1::from_vec(py, rows))
}

#[pyfunction]
fn gradient_squared_norm(
    py: Python<'_>,
    sources: Vec<PySource<'_>>,
    weight: PyReadonlyArray2<'_, f32>,
    unit_rows: bool,
    threads: usize,
) -> PyResult<f64> {
    let simd = Simd::active().map_err(to_py)?;
    let weight = matrix(&weight)?;
    let (d_sae, d_in) = (weight.rows(), weight.width());
    let unit_rows = unit_rows.then_some(weight);
    let terms = terms(&sources)?;
    let sources = sources_of(&sources, &terms);
    run_with_torch(py, products(&sources, d_in) >= MANY_PRODUCTS, |cancel| {
        grad::squared_norm(&sources, d_sae, d_in, unit_rows, simd, threads, cancel)
    })
}

#[pyfunction]
fn gradient_norm_bound(
    py: Python<'_>,
    sources: Vec<PySource<'_>>,
    d_sae: usize,
    d_in: usize,
    threads: usize,
) -> PyResult<f64> {
    let simd = Simd::active().map_err(to_py)?;
    let terms = terms(&sources)?;
    let sources = sources_of(&sources, &terms);
    py.detach(|| grad::norm_bound(&sources, d_sae, d_in, simd, threads))
        .map_err(to_py)
}

/// One step of Adam, in place. Not interruptible: a step is taken whole. A `screen` of `w`, with its
/// `bias`, is brought up to date meanwhile; then the step is of all features.
#[pyfunction]
#[pyo3(signature = (w, m, v, asleep, sources, features, *, number, learning_rate, beta1, beta2, eps, scale,
                    unit_rows, freeze_idle, wake, threads, screen = None, bias = None))]
#[expect(
    clippy::too_many_arguments,
    reason = "named ones, of one call in Python"
)]
fn adam_update<'py>(
    py: Python<'py>,
    mut w: PyReadwriteArray2<'py, f32>,
    mut m: PyReadwriteArray2<'py, f32>,
    mut v: PyReadwriteArray2<'py, f32>,
    mut asleep: PyReadwriteArray1<'py, i64>,
    sources: Vec<PySource<'py>>,
    features: Option<PyReadonlyArray1<'py, i64>>,
    number: u64,
    learning_rate: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    scale: f64,
    unit_rows: bool,
    freeze_idle: bool,
    wake: bool,
    threads: usize,
    screen: Option<Bound<'py, Screen>>,
    bias: Option<PyReadonlyArray1<'py, f32>>,
) -> PyResult<()> {
    let simd = Simd::active().map_err(to_py)?;
    let d_in = w.shape()[1];
    let contiguous = |_| PyValueError::new_err("expected C-contiguous arrays");
    let state = State {
        w: w.as_slice_mut().map_err(contiguous)?,
        m: m.as_slice_mut().map_err(contiguous)?,
        v: v.as_slice_mut().map_err(contiguous)?,
        asleep: asleep.as_slice_mut().map_err(contiguous)?,
    };
    let features = features.as_ref().map(slice).transpose()?;
    let terms = terms(&sources)?;
    let sources = sources_of(&sources, &terms);
    let step = Step {
        number,
        learning_rate,
        beta1,
        beta2,
        eps,
        scale,
        unit_rows,
        idle: if freeze_idle {
            Idle::Freeze
        } else {
            Idle::Decay
        },
        wake,
    };
    let Some(screen) = screen else {
        return py
            .detach(|| adam::update(state, d_in, &sources, features, &step, simd, threads))
            .map_err(to_py);
    };
    let (Some(bias), None) = (&bias, features) else {
        return Err(PyValueError::new_err(
            "a screen to follow; expected its bias, and no choice of features",
        ));
    };
    let (bias, screen) = (slice(bias)?, screen.get());
    let options = options(true, threads)?;
    py.detach(|| screen.lock().update(state, &sources, &step, bias, options))
        .map_err(to_py)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<FeatureLists>()?;
    module.add_function(wrap_pyfunction!(gradient_of_values_by_feature, module)?)?;
    module.add_function(wrap_pyfunction!(gradient_rows, module)?)?;
    module.add_function(wrap_pyfunction!(gradient_squared_norm, module)?)?;
    module.add_function(wrap_pyfunction!(gradient_norm_bound, module)?)?;
    module.add_function(wrap_pyfunction!(adam_update, module)?)?;
    Ok(())
}
