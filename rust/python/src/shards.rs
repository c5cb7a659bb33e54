//! Binding of `r1sae_core::shard`: writing, checksums, the folder lock, the shuffled
//! order, and the two sets of shards.

use std::path::PathBuf;

use numpy::ndarray::ArrayViewMut1;
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use r1sae_core::shard::activation_set::{ActivationSet as CoreActivationSet, Output};
use r1sae_core::shard::activations::ActivationDtype;
use r1sae_core::shard::block_order::{BlockOrder, Blocks};
use r1sae_core::shard::buffers::{Buffer as CoreBuffer, BufferPool as CoreBufferPool};
use r1sae_core::shard::code_order::first_repeated;
use r1sae_core::shard::code_set::{CodeSet as CoreCodeSet, ValueDtype, ValuesMut};
use r1sae_core::shard::gather::{ColumnsMut, Listed, Rows};
use r1sae_core::shard::lock::FolderLock as CoreFolderLock;
use r1sae_core::shard::order::Permutation;
use r1sae_core::shard::write::{checksum, write_shard as core_write_shard, Tensor, Written};
use r1sae_core::shard::{dtype_from_name, PrivateMap};

use crate::errors::to_py;
use crate::interrupt::{run, run_interruptible};

/// Copying fewer bytes than this takes milliseconds.
const MANY_BYTES: usize = 32 << 20;
/// Visiting fewer rows than this, or working out fewer places, takes milliseconds.
const MANY_ROWS: usize = 1 << 16;

/// Length and checksum in the manifest's notation.
fn as_listed(written: Written) -> (u64, String) {
    (written.bytes, format!("{:016x}", written.xxh3))
}

/// Writes a safetensors file atomically; tensors are (name, dtype, shape, bytes).
#[pyfunction]
#[allow(clippy::type_complexity)]
fn write_shard(
    py: Python<'_>,
    path: PathBuf,
    tensors: Vec<(String, String, Vec<usize>, PyReadonlyArray1<'_, u8>)>,
) -> PyResult<(u64, String)> {
    let tensors = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            let dtype = dtype_from_name(dtype).ok_or_else(|| {
                PyValueError::new_err(format!("no tensors of dtype {dtype:?} in shards"))
            })?;
            let (name, shape) = (name.clone(), shape.clone());
            Ok(Tensor {
                name,
                dtype,
                shape,
                bytes: bytes.as_slice()?,
            })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let bytes: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
    run(py, bytes >= MANY_BYTES, |cancel| {
        core_write_shard(&path, tensors, cancel)
    })
    .map(as_listed)
}

/// Length and XXH3-64 (16 hex digits) of a file.
#[pyfunction]
fn checksum_file(py: Python<'_>, path: PathBuf) -> PyResult<(u64, String)> {
    run_interruptible(py, |cancel| checksum(&path, cancel)).map(as_listed)
}

/// Places `start..stop` of the shuffled order of `rows` rows.
#[pyfunction]
fn permutation<'py>(
    py: Python<'py>,
    rows: u64,
    seed: u64,
    epoch: u64,
    start: u64,
    stop: u64,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    if start > stop || stop > rows || i64::try_from(rows).is_err() {
        return Err(PyValueError::new_err(format!(
            "places {start}..{stop} are out of range for {rows} rows"
        )));
    }
    let long = stop - start >= MANY_ROWS as u64;
    let places = run(py, long, |cancel| {
        let order = Permutation::new(rows, seed, epoch);
        let places = order.get_range(start..stop, cancel)?;
        // Rows fit an i64 (checked above); the cast is done in place.
        Ok(places.into_iter().map(|row| row as i64).collect::<Vec<_>>())
    })?;
    Ok(places.into_pyarray(py))
}

/// Places `start..stop` of the order of `rows` rows that is shuffled in blocks.
#[pyfunction]
fn block_permutation<'py>(
    py: Python<'py>,
    rows: u64,
    seed: u64,
    epoch: u64,
    blocks: (u64, u64),
    start: u64,
    stop: u64,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    if start > stop || stop > rows || i64::try_from(rows).is_err() {
        return Err(PyValueError::new_err(format!(
            "places {start}..{stop} are out of range for {rows} rows"
        )));
    }
    let (block_rows, window) = blocks;
    let order = BlockOrder::new(
        rows,
        seed,
        epoch,
        Blocks {
            rows: block_rows,
            window,
        },
    )
    .map_err(to_py)?;
    let long = stop - start >= MANY_ROWS as u64;
    let places = run(py, long, |cancel| {
        let places = order.get_range(start..stop, cancel)?;
        // Rows fit an i64 (checked above); the cast is done in place.
        Ok(places.into_iter().map(|row| row as i64).collect::<Vec<_>>())
    })?;
    Ok(places.into_pyarray(py))
}

/// The ranges of rows that the window of place `place` is made of, and the first place of the next
/// window, if there is one.
#[pyfunction]
#[allow(clippy::type_complexity)]
fn block_window(
    rows: u64,
    seed: u64,
    epoch: u64,
    blocks: (u64, u64),
    place: u64,
) -> PyResult<(Vec<(u64, u64)>, Option<u64>)> {
    let (block_rows, window) = blocks;
    let blocks = Blocks {
        rows: block_rows,
        window,
    };
    let order = BlockOrder::new(rows, seed, epoch, blocks).map_err(to_py)?;
    let window = order.window_of(place);
    let next = (window + 1 < order.windows()).then(|| (window + 1) * block_rows * blocks.window);
    let ranges = order.window_ranges(window);
    Ok((
        ranges
            .into_iter()
            .map(|range| (range.start, range.end))
            .collect(),
        next,
    ))
}

/// The first row of CSR codes that names a feature twice, and the feature.
#[pyfunction]
fn repeated_feature(
    py: Python<'_>,
    indices: PyReadonlyArray1<'_, i32>,
    row_offsets: PyReadonlyArray1<'_, i64>,
    d_sae: usize,
) -> PyResult<Option<(usize, u32)>> {
    let (indices, row_offsets) = (indices.as_slice()?, row_offsets.as_slice()?);
    run(py, 4 * indices.len() >= MANY_BYTES, |cancel| {
        first_repeated(indices, row_offsets, d_sae, cancel)
    })
}

/// Exclusive right to write into a folder, until released or the process ends.
#[pyclass]
struct FolderLock(Option<CoreFolderLock>);

#[pymethods]
impl FolderLock {
    #[new]
    fn new(folder: PathBuf) -> PyResult<Self> {
        CoreFolderLock::acquire(&folder)
            .map(|lock| Self(Some(lock)))
            .map_err(to_py)
    }

    fn release(&mut self) {
        self.0 = None;
    }
}

/// Rows as Python gives them: (start, stop), or an array of them.
#[derive(FromPyObject)]
enum RowsArgument<'py> {
    Range((usize, usize)),
    List(PyReadonlyArray1<'py, i64>),
}

impl RowsArgument<'_> {
    fn rows(&self) -> PyResult<Rows<'_>> {
        Ok(match self {
            Self::Range((start, stop)) => Rows::Range(*start..*stop),
            Self::List(list) => Rows::List(list.as_slice()?),
        })
    }
}

/// The four columns to fill: tokens, sequence_id, position, segment.
type ColumnsArgument<'py> = (
    PyReadwriteArray1<'py, i32>,
    PyReadwriteArray1<'py, i64>,
    PyReadwriteArray1<'py, i32>,
    PyReadwriteArray1<'py, u8>,
);

fn columns_mut<'a>(columns: &'a mut ColumnsArgument<'_>) -> PyResult<ColumnsMut<'a>> {
    Ok(ColumnsMut {
        tokens: columns.0.as_slice_mut()?,
        sequence_id: columns.1.as_slice_mut()?,
        position: columns.2.as_slice_mut()?,
        segment: columns.3.as_slice_mut()?,
    })
}

/// The manifest's lines as (path, rows, bytes).
fn listed(files: Vec<(PathBuf, usize, u64)>) -> Vec<Listed> {
    files
        .into_iter()
        .map(|(path, rows, bytes)| Listed { path, rows, bytes })
        .collect()
}

/// The activation shards of a folder, mapped.
#[pyclass(frozen)]
struct ActivationSet(CoreActivationSet);

#[pymethods]
impl ActivationSet {
    #[new]
    fn new(
        py: Python<'_>,
        files: Vec<(PathBuf, usize, u64)>,
        d_in: usize,
        dtype: &str,
    ) -> PyResult<Self> {
        let dtype = ActivationDtype::from_name(dtype).ok_or_else(|| {
            PyValueError::new_err(format!("no activations of dtype {dtype:?} in shards"))
        })?;
        let listed = listed(files);
        run_interruptible(py, |cancel| {
            CoreActivationSet::open(&listed, d_in, dtype, cancel)
        })
        .map(Self)
    }

    #[getter]
    fn rows(&self) -> usize {
        self.0.rows()
    }

    /// Fills `out` (the bytes of `[rows, d_in]`) and the columns; `output` is "stored",
    /// "BF16" or "F32".
    fn gather(
        &self,
        py: Python<'_>,
        rows: RowsArgument<'_>,
        output: &str,
        mut out: PyReadwriteArray1<'_, u8>,
        mut columns: ColumnsArgument<'_>,
    ) -> PyResult<()> {
        let output = match output {
            "stored" => Output::Stored,
            "BF16" => Output::Bf16,
            "F32" => Output::F32,
            other => {
                return Err(PyValueError::new_err(format!(
                    "output is {other:?}, expected \"stored\", \"BF16\" or \"F32\""
                )));
            }
        };
        let rows = rows.rows()?;
        let out = out.as_slice_mut()?;
        let columns = columns_mut(&mut columns)?;
        let long = out.len() >= MANY_BYTES || rows.len() >= MANY_ROWS;
        run(py, long, |cancel| {
            self.0.gather(&rows, output, out, columns, cancel)
        })
    }

    /// Whether rows had to come from the disk lately.
    #[getter]
    fn is_cold(&self) -> bool {
        self.0.is_cold()
    }

    /// Asks the system to fetch the activations of rows `start..stop`, without waiting for it.
    fn will_be_read(&self, py: Python<'_>, start: usize, stop: usize) {
        py.detach(|| self.0.will_be_read(start..stop));
    }

    /// Fills the columns alone.
    fn columns(
        &self,
        py: Python<'_>,
        rows: RowsArgument<'_>,
        mut columns: ColumnsArgument<'_>,
    ) -> PyResult<()> {
        let rows = rows.rows()?;
        let columns = columns_mut(&mut columns)?;
        run(py, rows.len() >= MANY_ROWS, |cancel| {
            self.0.columns(&rows, columns, cancel)
        })
    }

    /// The stored bytes of rows `start..stop` in place, copied only where written to;
    /// `None` when they lie in several shards or need decoding.
    fn map_private<'py>(
        &self,
        py: Python<'py>,
        start: usize,
        stop: usize,
    ) -> PyResult<Option<Bound<'py, PyArray1<u8>>>> {
        let mapping = py
            .detach(|| self.0.map_private(start..stop))
            .map_err(to_py)?;
        let Some(mut mapping) = mapping else {
            return Ok(None);
        };
        let (pointer, length) = (mapping.as_mut_ptr(), mapping.len());
        let owner = Bound::new(py, PrivateMapping { _mapping: mapping })?;
        // SAFETY: the pointer and length are the mapping's, which stays where it is when
        // its handle moves; `u8` has no alignment nor invalid values; nothing else in
        // this program refers to a mapping made for this call alone.
        let view = unsafe { ArrayViewMut1::from_shape_ptr(length, pointer) };
        // SAFETY: `owner` becomes the array's base and so outlives it, and it gives no
        // other access to the memory, whose address never changes.
        Ok(Some(unsafe {
            PyArray1::borrow_from_array(&view, owner.into_any())
        }))
    }
}

/// Memory for batches that is used again once nothing refers to it.
#[pyclass(frozen)]
struct BufferPool(CoreBufferPool);

#[pymethods]
impl BufferPool {
    #[new]
    fn new(keep: usize, most: usize) -> Self {
        Self(CoreBufferPool::new(keep, most))
    }

    /// An array of `bytes` bytes, its contents anything. The memory is the pool's again when the
    /// array and all that show it are gone.
    fn take<'py>(&self, py: Python<'py>, bytes: usize) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let mut buffer = self.0.take(bytes).map_err(to_py)?;
        let (pointer, length) = (buffer.bytes_mut().as_mut_ptr(), bytes);
        let owner = Bound::new(py, PooledBuffer { _buffer: buffer })?;
        // SAFETY: the pointer and length are the buffer's, whose memory stays where it is when its
        // handle moves; `u8` has no alignment nor invalid values; the pool gave the buffer to this
        // call alone.
        let view = unsafe { ArrayViewMut1::from_shape_ptr(length, pointer) };
        // SAFETY: `owner` becomes the array's base and so outlives it, and it gives no other access
        // to the memory, whose address never changes.
        Ok(unsafe { PyArray1::borrow_from_array(&view, owner.into_any()) })
    }
}

/// Keeps a buffer out of its pool for as long as an array shows it.
#[pyclass(frozen)]
struct PooledBuffer {
    _buffer: CoreBuffer,
}

/// Keeps a mapping alive for the array that shows it.
#[pyclass(frozen)]
struct PrivateMapping {
    _mapping: PrivateMap,
}

/// Values to fill, in the type they are stored in (bfloat16 as its bits).
#[derive(FromPyObject)]
enum ValuesArgument<'py> {
    F32(PyReadwriteArray1<'py, f32>),
    Bf16(PyReadwriteArray1<'py, u16>),
}

/// The code shards of a folder, mapped.
#[pyclass(frozen)]
struct CodeSet(CoreCodeSet);

#[pymethods]
impl CodeSet {
    #[new]
    fn new(
        py: Python<'_>,
        files: Vec<(PathBuf, usize, u64)>,
        d_sae: usize,
        dtype: &str,
    ) -> PyResult<Self> {
        let dtype = match dtype {
            "F32" => ValueDtype::F32,
            "BF16" => ValueDtype::Bf16,
            other => {
                return Err(PyValueError::new_err(format!(
                    "no values of dtype {other:?} in shards"
                )))
            }
        };
        let listed = listed(files);
        run_interruptible(py, |cancel| {
            CoreCodeSet::open(&listed, d_sae, dtype, cancel)
        })
        .map(Self)
    }

    #[getter]
    fn rows(&self) -> usize {
        self.0.rows()
    }

    #[getter]
    fn nnz(&self) -> usize {
        self.0.nnz()
    }

    /// Row offsets of a gather of `rows`, from 0.
    fn row_offsets<'py>(
        &self,
        py: Python<'py>,
        rows: RowsArgument<'_>,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let rows = rows.rows()?;
        let offsets = run(py, rows.len() >= MANY_ROWS, |cancel| {
            self.0.row_offsets(&rows, cancel)
        })?;
        Ok(offsets.into_pyarray(py))
    }

    /// Fills values, indices and columns with `rows`, whose offsets `row_offsets` gave.
    fn gather(
        &self,
        py: Python<'_>,
        rows: RowsArgument<'_>,
        row_offsets: PyReadonlyArray1<'_, i64>,
        mut values: ValuesArgument<'_>,
        mut indices: PyReadwriteArray1<'_, i32>,
        mut columns: ColumnsArgument<'_>,
    ) -> PyResult<()> {
        let rows = rows.rows()?;
        let offsets = row_offsets.as_slice()?;
        let values = match &mut values {
            ValuesArgument::F32(values) => ValuesMut::F32(values.as_slice_mut()?),
            ValuesArgument::Bf16(bits) => ValuesMut::Bf16(bits.as_slice_mut()?),
        };
        let indices = indices.as_slice_mut()?;
        let columns = columns_mut(&mut columns)?;
        let long = 8 * indices.len() >= MANY_BYTES || rows.len() >= MANY_ROWS;
        run(py, long, |cancel| {
            self.0
                .gather(&rows, offsets, values, indices, columns, cancel)
        })
    }

    /// Reads shard number `shard` whole and fails if it is malformed anywhere.
    fn validate(&self, py: Python<'_>, shard: usize) -> PyResult<()> {
        run_interruptible(py, |cancel| self.0.validate(shard, cancel))
    }
}

/// Adds this file's functions and classes to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(write_shard, module)?)?;
    module.add_function(wrap_pyfunction!(checksum_file, module)?)?;
    module.add_function(wrap_pyfunction!(permutation, module)?)?;
    module.add_function(wrap_pyfunction!(block_permutation, module)?)?;
    module.add_function(wrap_pyfunction!(block_window, module)?)?;
    module.add_function(wrap_pyfunction!(repeated_feature, module)?)?;
    module.add_class::<FolderLock>()?;
    module.add_class::<BufferPool>()?;
    module.add_class::<ActivationSet>()?;
    module.add_class::<CodeSet>()
}
