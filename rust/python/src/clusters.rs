//! `r1sae_core::clusters` for Python.

use std::path::PathBuf;

use numpy::{
    PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use r1sae_core::clusters::coactivation::tiles;
use r1sae_core::clusters::columns::{Chosen, Columns};
use r1sae_core::clusters::contexts::Contexts;
use r1sae_core::clusters::partners::Partners;
use r1sae_core::clusters::{
    count_shards, gather, scatter_shards, Bases, Coactivation, Options, Place, Places, Record,
    Spill, Stretches, Texts, Work,
};
use r1sae_core::examples::ShardFile;
use r1sae_core::Cancel;

use crate::errors::to_py;
use crate::interrupt::{run_cancellable, run_interruptible};

/// Path, number of the first row, rows.
type Shards = Vec<(PathBuf, i64, usize)>;

fn files(shards: Shards) -> Vec<ShardFile> {
    let file = |(path, first_row, rows)| ShardFile {
        path,
        first_row,
        rows,
    };
    shards.into_iter().map(file).collect()
}

/// Adds to `counts` (uint64, one a feature) how often each feature is active in these shards.
#[pyfunction]
fn count_activations(
    py: Python<'_>,
    shards: Shards,
    mut counts: PyReadwriteArray1<'_, u64>,
    threads: usize,
) -> PyResult<()> {
    let (files, counts) = (files(shards), counts.as_slice_mut()?);
    run_interruptible(py, move |cancel| {
        count_shards(&files, counts, threads, cancel)
    })
}

/// A file of activations in buckets of whole features.
#[pyclass(module = "r1sae_fast._core")]
struct ActivationSpill(Spill);

#[pymethods]
impl ActivationSpill {
    /// For features that are active `counts` times, in buckets of at most `records` activations.
    /// `filled`: how far each bucket is filled, to go on; None to begin anew.
    #[new]
    fn new(
        path: PathBuf,
        counts: PyReadonlyArray1<'_, u64>,
        records: u64,
        filled: Option<Vec<u64>>,
    ) -> PyResult<Self> {
        Spill::open(&path, counts.as_slice()?, records, filled)
            .map(Self)
            .map_err(to_py)
    }

    #[getter]
    fn buckets(&self) -> usize {
        self.0.buckets()
    }

    #[getter]
    fn filled(&self) -> Vec<u64> {
        self.0.filled()
    }

    /// The first feature of a bucket, and the one after its last.
    fn features(&self, bucket: usize) -> PyResult<(u32, u32)> {
        if bucket >= self.0.buckets() {
            return Err(PyValueError::new_err(format!(
                "there is no bucket {bucket}"
            )));
        }
        let range = self.0.features(bucket);
        Ok((range.start, range.end))
    }

    /// How many activations a bucket has.
    fn size(&self, bucket: usize) -> PyResult<u64> {
        if bucket >= self.0.buckets() {
            return Err(PyValueError::new_err(format!(
                "there is no bucket {bucket}"
            )));
        }
        Ok(self.0.size(bucket))
    }

    /// Waits until all is on the disk.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.sync()).map_err(to_py)
    }

    /// Adds all activations of code shards. `ranks`: the place of each row, where rows are not in
    /// the order of places.
    fn add_shards(
        &self,
        py: Python<'_>,
        shards: Shards,
        ranks: Option<PyReadonlyArray1<'_, u32>>,
        threads: usize,
    ) -> PyResult<()> {
        let files = files(shards);
        let ranks = ranks.as_ref().map(|ranks| ranks.as_slice()).transpose()?;
        run_interruptible(py, move |cancel| {
            scatter_shards(&self.0, &files, ranks, threads, cancel)
        })
    }

    /// Adds activations at places. The first one that has no place, if any: then some were added
    /// and others not.
    fn add(
        &self,
        py: Python<'_>,
        places: &TokenPlaces,
        features: PyReadonlyArray1<'_, i32>,
        sequences: PyReadonlyArray1<'_, i64>,
        positions: PyReadonlyArray1<'_, i32>,
        strengths: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<Option<usize>> {
        let (features, sequences) = (features.as_slice()?, sequences.as_slice()?);
        let (positions, strengths) = (positions.as_slice()?, strengths.as_slice()?);
        let sizes = [
            features.len(),
            sequences.len(),
            positions.len(),
            strengths.len(),
        ];
        if sizes != [features.len(); 4] {
            return Err(PyValueError::new_err(format!(
                "{sizes:?} features, sequences, positions and strengths; expected as many of each"
            )));
        }
        let view: PyReadonlyArray1<'_, u8> = places.bytes.bind(py).try_readonly()?;
        let rows = Place::from_bytes(view.as_slice()?).map_err(to_py)?;
        run_interruptible(py, move |cancel| {
            let places = Places::checked_before(rows);
            let mut writer = self.0.writer(64 << 20);
            let mut row = 0;
            for (at, &feature) in features.iter().enumerate() {
                if at % (1 << 16) == 0 {
                    cancel.check()?;
                }
                match places.locate(sequences[at], positions[at], row) {
                    Some(found) => row = found,
                    None => return Ok(Some(at)),
                }
                writer.push(Record {
                    // A negative one becomes one that is not below d_sae.
                    feature: feature as u32,
                    row: row as u32,
                    bits: strengths[at].to_bits(),
                })?;
            }
            writer.flush()?;
            Ok(None)
        })
    }
}

/// What token each row is, and how often each token occurs.
#[pyclass(module = "r1sae_fast._core")]
struct TokenPlaces {
    /// Kept alive, and not to be written to.
    bytes: Py<PyArray1<u8>>,
    bases: Bases,
    stretches: Stretches,
}

#[pymethods]
impl TokenPlaces {
    /// `bytes`: packed records of sequence i8, position i4, token i4, marks u4, as uint8; must not
    /// change as long as this is in use.
    #[new]
    fn new(py: Python<'_>, bytes: &Bound<'_, PyArray1<u8>>) -> PyResult<Self> {
        let view: PyReadonlyArray1<'_, u8> = bytes.try_readonly()?;
        let rows = Place::from_bytes(view.as_slice()?).map_err(to_py)?;
        let (bases, stretches) = run_interruptible(py, move |_| {
            let places = Places::new(rows)?;
            Ok((Bases::of(&places), Stretches::of(&places)))
        })?;
        Ok(Self {
            bytes: bytes.clone().unbind(),
            bases,
            stretches,
        })
    }
}

/// A flag that ends the work it was given to.
#[pyclass(name = "Cancel", module = "r1sae_fast._core", frozen)]
struct CancelFlag(Cancel);

#[pymethods]
impl CancelFlag {
    #[new]
    fn new() -> Self {
        Self(Cancel::new())
    }

    /// Sets it, for good.
    fn cancel(&self) {
        self.0.cancel();
    }

    #[getter]
    fn cancelled(&self) -> bool {
        self.0.check().is_err()
    }
}

/// The sorted activations of a bucket and what they tell, as arrays by table and column.
/// `options`: examples, per_sequence, quantiles, per_quantile, negatives, window, tokens, seed.
/// Raises KeyboardInterrupt once `cancel` is set, on whatever thread.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "Python passes each by itself")]
fn cluster_bucket<'py>(
    py: Python<'py>,
    spill: &ActivationSpill,
    bucket: usize,
    places: &TokenPlaces,
    options: (usize, usize, usize, usize, usize, usize, usize, u64),
    activations: bool,
    threads: usize,
    cancel: &CancelFlag,
) -> PyResult<Bound<'py, PyDict>> {
    let (examples, per_sequence, quantiles, per_quantile, negatives, window, tokens, seed) =
        options;
    let options = Options {
        examples,
        per_sequence,
        quantiles,
        per_quantile,
        negatives,
        window,
        tokens,
        seed,
    };
    let view: PyReadonlyArray1<'_, u8> = places.bytes.bind(py).try_readonly()?;
    let rows = Place::from_bytes(view.as_slice()?).map_err(to_py)?;
    let (bases, stretches) = (&places.bases, &places.stretches);
    let spill = &spill.0;
    let columns = run_cancellable(py, &cancel.0, move |cancel| {
        let texts = Texts {
            places: Places::checked_before(rows),
            stretches,
            bases,
        };
        let work = Work {
            options,
            activations,
            threads,
        };
        gather(spill, bucket, texts, work, cancel)
    })?;
    tables(py, columns)
}

fn tables<'py>(py: Python<'py>, columns: Columns) -> PyResult<Bound<'py, PyDict>> {
    let all = PyDict::new(py);
    macro_rules! table {
        ($name:literal, $($column:literal: $values:expr),* $(,)?) => {{
            let table = PyDict::new(py);
            $(table.set_item($column, PyArray1::from_vec(py, $values))?;)*
            all.set_item($name, table)?;
        }};
    }
    let made = columns.activations;
    table!("activations", "feature_id": made.feature, "sequence_id": made.sequence,
        "token_idx": made.position, "strength": made.strength);
    let made = columns.features;
    table!("features", "sum": made.sum, "max": made.max, "histogram": made.histogram,
        "segments": made.segments, "positions": made.positions);
    let Chosen {
        feature,
        rank,
        sequence,
        position,
        strength,
    } = columns.examples;
    table!("examples", "feature_id": feature, "rank": rank, "sequence_id": sequence,
        "token_idx": position, "strength": strength);
    let made = columns.negatives;
    table!("negatives", "feature_id": made.feature, "rank": made.rank,
        "sequence_id": made.sequence, "token_idx": made.position);
    let made = columns.intervals;
    table!("intervals", "feature_id": made.chosen.feature, "quantile": made.quantile,
        "rank": made.chosen.rank, "low": made.low, "high": made.high, "count": made.count,
        "sequence_id": made.chosen.sequence, "token_idx": made.chosen.position,
        "strength": made.chosen.strength);
    let made = columns.lifts;
    table!("token_lift", "feature_id": made.feature, "token_offset": made.offset,
        "rank": made.rank, "token": made.token, "count": made.count, "share": made.share,
        "weighted_share": made.weighted_share, "base": made.base, "score": made.score);
    Ok(all)
}

/// Ranges of features of which pairs are counted one after another within `bytes`.
#[pyfunction]
fn pair_tiles(d_sae: usize, bytes: usize) -> Vec<(usize, usize)> {
    let pair = |range: std::ops::Range<usize>| (range.start, range.end);
    tiles(d_sae, bytes).into_iter().map(pair).collect()
}

/// Counts how often features `start..end` are active together with those below them.
#[pyclass(module = "r1sae_fast._core")]
struct PairCounts(Coactivation);

#[pymethods]
impl PairCounts {
    #[new]
    fn new(py: Python<'_>, d_sae: usize, start: usize, end: usize) -> PyResult<Self> {
        py.detach(|| Coactivation::new(d_sae, start..end))
            .map(Self)
            .map_err(to_py)
    }

    /// Adds code shards, at most `block` rows at a time on each thread.
    fn add_shards(
        &self,
        py: Python<'_>,
        shards: Shards,
        block: usize,
        threads: usize,
    ) -> PyResult<()> {
        let files = files(shards);
        run_interruptible(py, move |cancel| {
            self.0.add_shards(&files, block, threads, cancel)
        })
    }
}

/// The best partners of each feature by pointwise mutual information.
#[pyclass(module = "r1sae_fast._core")]
struct PairPartners(Partners);

#[pymethods]
impl PairPartners {
    #[new]
    fn new(d_sae: usize, n: usize) -> Self {
        Self(Partners::new(d_sae, n))
    }

    /// Looks at all counted pairs that met at least `least` times.
    fn add(
        &mut self,
        py: Python<'_>,
        pairs: &PairCounts,
        counts: PyReadonlyArray1<'_, u64>,
        least: u32,
        threads: usize,
    ) -> PyResult<()> {
        let (counts, partners) = (counts.as_slice()?, &mut self.0);
        run_interruptible(py, move |cancel| {
            partners.add(&pairs.0, counts, least, threads, cancel)
        })
    }

    /// feature_id, rank, other_id and count of all partners.
    #[allow(clippy::type_complexity)]
    fn columns<'py>(
        &self,
        py: Python<'py>,
    ) -> (
        Bound<'py, PyArray1<i32>>,
        Bound<'py, PyArray1<i32>>,
        Bound<'py, PyArray1<i32>>,
        Bound<'py, PyArray1<i64>>,
    ) {
        let all = || {
            let of = |(feature, best): (usize, &Vec<_>)| {
                let ranked = best.clone().into_iter().enumerate();
                ranked.map(move |(at, partner)| (feature as i32, at as i32 + 1, partner))
            };
            self.0.best().iter().enumerate().flat_map(of)
        };
        (
            PyArray1::from_iter(py, all().map(|(feature, _, _)| feature)),
            PyArray1::from_iter(py, all().map(|(_, rank, _)| rank)),
            PyArray1::from_iter(py, all().map(|(_, _, partner)| partner.feature as i32)),
            PyArray1::from_iter(py, all().map(|(_, _, partner)| i64::from(partner.together))),
        )
    }
}

/// The entries of each list of examples, from a start to an end, as JSON.
/// `codes` and `strengths`: `[examples, width]`; `bins`: `[examples, 3]`; `texts`: JSON strings.
#[pyfunction]
fn contexts_json<'py>(
    py: Python<'py>,
    codes: PyReadonlyArray2<'_, i32>,
    strengths: PyReadonlyArray2<'_, f64>,
    bins: PyReadonlyArray2<'_, f64>,
    texts: Vec<String>,
    ranges: Vec<(usize, usize)>,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    let contexts = Contexts {
        width: codes.shape()[1],
        codes: codes.as_slice()?,
        strengths: strengths.as_slice()?,
        bins: bins.as_slice()?,
        texts: &texts,
    };
    let lists = run_interruptible(py, move |cancel| {
        ranges
            .iter()
            .map(|&(start, end)| {
                cancel.check()?;
                let mut out = String::new();
                contexts.write(start, end, &mut out)?;
                Ok(out)
            })
            .collect::<r1sae_core::Result<Vec<String>>>()
    })?;
    Ok(lists
        .iter()
        .map(|list| PyBytes::new(py, list.as_bytes()))
        .collect())
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<ActivationSpill>()?;
    module.add_class::<TokenPlaces>()?;
    module.add_class::<CancelFlag>()?;
    module.add_class::<PairCounts>()?;
    module.add_class::<PairPartners>()?;
    module.add_function(wrap_pyfunction!(count_activations, module)?)?;
    module.add_function(wrap_pyfunction!(cluster_bucket, module)?)?;
    module.add_function(wrap_pyfunction!(pair_tiles, module)?)?;
    module.add_function(wrap_pyfunction!(contexts_json, module)?)?;
    Ok(())
}
