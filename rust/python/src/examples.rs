//! `r1sae_core::examples` for Python.

use std::path::PathBuf;

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use r1sae_core::examples::samples::Ranking;
use r1sae_core::examples::{
    collect, collect_shards, histogram, Accumulator, CodesView, Keep, Parts, ShardFile,
};
use r1sae_core::shard::{Indices, Values};

use crate::errors::to_py;
use crate::interrupt::run_interruptible;

/// Strengths and rows `[d_sae, n]`, histogram `[d_sae, bins]`, sums `[d_sae, 2]` (low and high half
/// of a count of 2^-64), offsets `[d_sae + 1]` of samples and their strengths and rows, rows scanned.
type PartsTuple<'py> = (
    Bound<'py, PyArray2<f32>>,
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray2<u64>>,
    Bound<'py, PyArray2<u64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<i64>>,
    u64,
);

/// [`PartsTuple`] as arguments.
type PartsArguments<'py> = (
    PyReadonlyArray2<'py, f32>,
    PyReadonlyArray2<'py, i64>,
    PyReadonlyArray2<'py, u64>,
    PyReadonlyArray2<'py, u64>,
    PyReadonlyArray1<'py, i64>,
    PyReadonlyArray1<'py, f32>,
    PyReadonlyArray1<'py, i64>,
    u64,
);

/// What one pass keeps of every feature.
#[pyclass(module = "r1sae_fast._core")]
pub struct ExampleAccumulator(Accumulator);

#[pymethods]
impl ExampleAccumulator {
    /// Keeps of each feature the `n` strongest rows, and of each bin of its histogram `samples`
    /// rows, which ones being decided by `seed`.
    #[new]
    fn new(py: Python<'_>, d_sae: usize, n: usize, samples: usize, seed: u64) -> PyResult<Self> {
        let keep = Keep { n, samples, seed };
        py.detach(|| Accumulator::new(d_sae, keep))
            .map(Self)
            .map_err(to_py)
    }

    /// From what `parts` gave.
    #[staticmethod]
    fn from_parts(
        py: Python<'_>,
        parts: PartsArguments<'_>,
        samples: usize,
        seed: u64,
    ) -> PyResult<Self> {
        let (strengths, rows, histogram, halves, offsets, sample_strengths, sample_rows, scanned) =
            &parts;
        let [d_sae, n] = *strengths.as_array().shape() else {
            return Err(PyTypeError::new_err("strengths must have two dimensions"));
        };
        let (strengths, rows) = (strengths.as_slice()?, rows.as_slice()?);
        let (histogram, halves) = (histogram.as_slice()?, halves.as_slice()?);
        let (sample_offsets, sample_rows) = (offsets.as_slice()?, sample_rows.as_slice()?);
        let sample_strengths = sample_strengths.as_slice()?;
        let (keep, scanned) = (Keep { n, samples, seed }, *scanned);
        let restore = || {
            let sums: Vec<u128> = halves
                .chunks_exact(2)
                .map(|half| u128::from(half[1]) << 64 | u128::from(half[0]))
                .collect();
            let parts = Parts {
                strengths,
                rows,
                histogram,
                sums: &sums,
                sample_offsets,
                sample_strengths,
                sample_rows,
                scanned,
            };
            Accumulator::from_parts(d_sae, keep, &parts)
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
        let files: Vec<ShardFile> = shards
            .into_iter()
            .map(|(path, first_row, rows)| ShardFile {
                path,
                first_row,
                rows,
            })
            .collect();
        run_interruptible(py, move |cancel| {
            collect_shards(accumulator, &files, threads, cancel)
        })
    }

    /// Adds what another one collected from other rows.
    fn merge(&mut self, py: Python<'_>, other: &mut Self) -> PyResult<()> {
        let (mine, theirs) = (&mut self.0, &mut other.0);
        py.detach(move || mine.merge(theirs)).map_err(to_py)
    }

    /// How many rows were scanned so far; a call that fails adds none.
    #[getter]
    fn scanned(&self) -> u64 {
        self.0.scanned()
    }

    /// Everything collected so far.
    fn parts<'py>(&mut self, py: Python<'py>) -> PyResult<PartsTuple<'py>> {
        let accumulator = &mut self.0;
        let (d_sae, n) = (accumulator.d_sae(), accumulator.n());
        let scanned = accumulator.scanned();
        let ((strengths, rows), histogram, sums, samples) = py.detach(|| {
            let halves = |&sum: &u128| [sum as u64, (sum >> 64) as u64];
            let sums: Vec<u64> = accumulator.sums().iter().flat_map(halves).collect();
            (
                accumulator.examples(),
                accumulator.histogram(),
                sums,
                accumulator.samples(),
            )
        });
        Ok((
            PyArray1::from_vec(py, strengths).reshape([d_sae, n])?,
            PyArray1::from_vec(py, rows).reshape([d_sae, n])?,
            PyArray1::from_vec(py, histogram).reshape([d_sae, histogram::BINS])?,
            PyArray1::from_vec(py, sums).reshape([d_sae, 2])?,
            PyArray1::from_vec(py, samples.0),
            PyArray1::from_vec(py, samples.1),
            PyArray1::from_vec(py, samples.2),
            scanned,
        ))
    }
}

/// The rank of each row: of each bin, rows of lower ranks are sampled.
#[pyfunction]
pub fn example_sample_ranks<'py>(
    py: Python<'py>,
    rows: PyReadonlyArray1<'_, i64>,
    seed: u64,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let ranking = Ranking { seed };
    let ranks = rows.as_slice()?.iter().map(|&row| ranking.rank(row));
    Ok(PyArray1::from_vec(py, ranks.collect()))
}

/// The edges of the histogram's bins.
#[pyfunction]
pub fn example_histogram_edges(py: Python<'_>) -> Bound<'_, PyArray1<f32>> {
    PyArray1::from_vec(py, histogram::edges())
}
