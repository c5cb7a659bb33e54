//! `r1sae_core::examples` for Python.

use std::path::PathBuf;

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use r1sae_core::examples::{collect, histogram, Accumulator, CodesView};
use r1sae_core::shard::{CodeShardReader, Indices, Values};
use r1sae_core::{Error, Result};

use crate::errors::to_py;
use crate::interrupt::run_interruptible;

/// Strengths and rows `[d_sae, n]`, histogram `[d_sae, bins]`, sums `[d_sae, 2]`
/// (low and high half of a count of 2^-64), rows scanned.
type Parts<'py> = (
    Bound<'py, PyArray2<f32>>,
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray2<u64>>,
    Bound<'py, PyArray2<u64>>,
    u64,
);

/// What one pass keeps of every feature.
#[pyclass(module = "r1sae_fast._core")]
pub struct ExampleAccumulator(Accumulator);

#[pymethods]
impl ExampleAccumulator {
    #[new]
    fn new(d_sae: usize, n: usize) -> PyResult<Self> {
        Accumulator::new(d_sae, n).map(Self).map_err(to_py)
    }

    /// From what `parts` gave.
    #[staticmethod]
    fn from_parts(
        py: Python<'_>,
        strengths: PyReadonlyArray2<'_, f32>,
        rows: PyReadonlyArray2<'_, i64>,
        histogram: PyReadonlyArray2<'_, u64>,
        sums: PyReadonlyArray2<'_, u64>,
        scanned: u64,
    ) -> PyResult<Self> {
        let [d_sae, n] = *strengths.as_array().shape() else {
            return Err(PyTypeError::new_err("strengths must have two dimensions"));
        };
        let (strengths, rows) = (strengths.as_slice()?, rows.as_slice()?);
        let (histogram, halves) = (histogram.as_slice()?, sums.as_slice()?);
        let restore = || {
            let sums: Vec<u128> = halves
                .chunks_exact(2)
                .map(|half| u128::from(half[1]) << 64 | u128::from(half[0]))
                .collect();
            Accumulator::from_parts(d_sae, n, strengths, rows, histogram, &sums, scanned)
        };
        py.detach(restore).map(Self).map_err(to_py)
    }

    /// Adds the codes of the rows `first_row..`.
    fn add(
        &mut self,
        py: Python<'_>,
        values: &Bound<'_, PyAny>,
        indices: PyReadonlyArray1<'_, u32>,
        row_offsets: PyReadonlyArray1<'_, i64>,
        first_row: i64,
        threads: usize,
    ) -> PyResult<()> {
        let (single, half): (PyReadonlyArray1<'_, f32>, PyReadonlyArray1<'_, u16>);
        let values = if let Ok(array) = values.extract() {
            single = array;
            Values::F32(single.as_slice()?)
        } else if let Ok(array) = values.extract() {
            half = array;
            Values::Bf16(half.as_slice()?)
        } else {
            return Err(PyTypeError::new_err(
                "values must be a float32 array, or a uint16 one of bfloat16 bits",
            ));
        };
        let (indices, row_offsets) = (Indices::U32(indices.as_slice()?), row_offsets.as_slice()?);
        let accumulator = &mut self.0;
        run_interruptible(py, move |cancel| {
            let view = CodesView::new(values, indices, row_offsets, first_row)?;
            collect(accumulator, &[view], threads, cancel)
        })
    }

    /// Adds code shard files; each is given with the id of its first row and the
    /// number of its rows.
    fn add_shards(
        &mut self,
        py: Python<'_>,
        shards: Vec<(PathBuf, i64, usize)>,
        threads: usize,
    ) -> PyResult<()> {
        let accumulator = &mut self.0;
        run_interruptible(py, move |cancel| {
            let readers = shards.iter().map(open).collect::<Result<Vec<_>>>()?;
            let view =
                |(reader, shard): (_, &(PathBuf, i64, usize))| CodesView::of_shard(reader, shard.1);
            let views = readers.iter().zip(&shards).map(view);
            collect(
                accumulator,
                &views.collect::<Result<Vec<_>>>()?,
                threads,
                cancel,
            )
        })
    }

    /// Adds what another one collected from other rows.
    fn merge(&mut self, py: Python<'_>, other: &Self) -> PyResult<()> {
        let (mine, theirs) = (&mut self.0, &other.0);
        py.detach(move || -> Result<(), Error> {
            mine.check_disjoint(theirs)?;
            mine.merge(theirs)
        })
        .map_err(to_py)
    }

    /// How many rows were scanned so far; a call that fails adds none.
    #[getter]
    fn scanned(&self) -> u64 {
        self.0.scanned()
    }

    /// Everything collected so far.
    fn parts<'py>(&self, py: Python<'py>) -> PyResult<Parts<'py>> {
        let accumulator = &self.0;
        let (d_sae, n) = (accumulator.d_sae(), accumulator.n());
        let ((strengths, rows), histogram, sums) = py.detach(|| {
            let halves = |&sum: &u128| [sum as u64, (sum >> 64) as u64];
            let sums: Vec<u64> = accumulator.sums().iter().flat_map(halves).collect();
            (
                accumulator.examples(),
                accumulator.histogram().to_vec(),
                sums,
            )
        });
        Ok((
            PyArray1::from_vec(py, strengths).reshape([d_sae, n])?,
            PyArray1::from_vec(py, rows).reshape([d_sae, n])?,
            PyArray1::from_vec(py, histogram).reshape([d_sae, histogram::BINS])?,
            PyArray1::from_vec(py, sums).reshape([d_sae, 2])?,
            accumulator.scanned(),
        ))
    }
}

fn open((path, _, rows): &(PathBuf, i64, usize)) -> Result<CodeShardReader> {
    let reader = CodeShardReader::open(path)?;
    match reader.rows() {
        found if found == *rows => Ok(reader),
        found => Err(reader.bad(format!(
            "holds {found} rows, but its manifest line says {rows}"
        ))),
    }
}

/// The edges of the histogram's bins.
#[pyfunction]
pub fn example_histogram_edges(py: Python<'_>) -> Bound<'_, PyArray1<f32>> {
    PyArray1::from_vec(py, histogram::edges())
}
