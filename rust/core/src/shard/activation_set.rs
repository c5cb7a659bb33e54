//! All activation shards of a folder as one long array of rows.

use std::ops::Range;
use std::path::Path;

use half::bf16;
use memmap2::MmapMut;

use super::activations::{ActivationDtype, ActivationShardReader, ActivationView};
use super::cold::Cold;
use super::copy::Copy;
use super::fp8;
use super::gather::{ColumnsMut, Listed, Rows, Starts};
use crate::simd::fetch;
use crate::{pool, Cancel, Error, Result};

/// Bytes of output that one task fills.
const TASK_BYTES: usize = 1 << 18;
/// Rows that one task asks the system for.
const ASKED_ROWS: usize = 64;
/// While a row is copied, the columns and the beginning of the row that is so many later are
/// fetched.
const AHEAD: usize = 4;

/// What a gather writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// The stored bytes (not for fp8, whose codes mean nothing without their scales).
    Stored,
    /// bfloat16, decoded from fp8.
    Bf16,
    /// f32, decoded from fp8.
    F32,
}

/// Activation shards in manifest order.
#[derive(Debug)]
pub struct ActivationSet {
    shards: Vec<ActivationShardReader>,
    starts: Starts,
    d_in: usize,
    dtype: ActivationDtype,
    cold: Cold,
}

impl ActivationSet {
    /// Opens all files and compares each with what is listed of it.
    pub fn open(
        listed: &[Listed],
        d_in: usize,
        dtype: ActivationDtype,
        cancel: &Cancel,
    ) -> Result<Self> {
        let mut shards = Vec::with_capacity(listed.len());
        for listed in listed {
            cancel.check()?;
            let shard = ActivationShardReader::open(&listed.path)
                .map_err(|error| listed.explain_missing(error))?;
            if shard.d_in() != d_in || shard.dtype() != dtype {
                return Err(shard.bad(format!(
                    "holds {} activations of width {}, the manifest says {} of width {d_in}; \
                     restore the file that the manifest describes",
                    shard.dtype().dtype(),
                    shard.d_in(),
                    dtype.dtype()
                )));
            }
            listed.check(shard.rows(), shard.bytes())?;
            shards.push(shard);
        }
        let starts = Starts::new(shards.iter().map(ActivationShardReader::rows));
        Ok(Self {
            shards,
            starts,
            d_in,
            dtype,
            cold: Cold::new(),
        })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.starts.rows()
    }

    /// Copies or decodes `rows` into `out`, `[rows, d_in]` in the type of `output`, and
    /// their columns into `columns`, on all of rayon's threads.
    pub fn gather(
        &self,
        rows: &Rows<'_>,
        output: Output,
        out: &mut [u8],
        columns: ColumnsMut<'_>,
        cancel: &Cancel,
    ) -> Result<()> {
        rows.check(self.rows())?;
        columns.check(rows.len())?;
        let size = match (output, self.dtype) {
            (Output::Stored, ActivationDtype::Fp8) => {
                return Err(Error::InvalidArgument(
                    "fp8 activations are read decoded: ask for bfloat16 or float32".to_owned(),
                ));
            }
            (Output::Stored, dtype) => dtype.size(),
            (Output::Bf16, ActivationDtype::Fp8) => 2,
            (Output::F32, ActivationDtype::Fp8) => 4,
            (_, dtype) => {
                return Err(Error::InvalidArgument(format!(
                    "{} activations are read as they are stored",
                    dtype.dtype()
                )));
            }
        };
        let width = self.d_in * size;
        if out.len() != rows.len() * width {
            return Err(Error::InvalidArgument(format!(
                "the array to fill has {} bytes, expected {} rows of {width}",
                out.len(),
                rows.len()
            )));
        }
        if rows.is_empty() {
            return Ok(());
        }
        if self.cold.begin() {
            self.ask_for(rows, cancel)?;
        }
        let task_rows = (TASK_BYTES / width).max(1);
        let mut tasks = Vec::new();
        let mut rest = columns;
        let way = Copy::of(out.len());
        for (task, out) in out.chunks_mut(task_rows * width).enumerate() {
            let (columns, more) = rest.split(out.len() / width);
            rest = more;
            tasks.push((task * task_rows, out, columns));
        }
        // All at once, unless there are more shards than rows.
        let few = if self.shards.len() <= rows.len() {
            &self.shards[..]
        } else {
            &[]
        };
        let views: Vec<_> = few.iter().map(ActivationShardReader::view).collect();
        let view_of = |shard: usize| match views.get(shard) {
            Some(view) => *view,
            None => self.shards[shard].view(),
        };
        pool::try_for_each(tasks, |(first, out, mut columns)| {
            cancel.check()?;
            let copied = self.cold.watch(|| -> Result<()> {
                let count = out.len() / width;
                let mut shard = 0;
                for (place, out) in out.chunks_exact_mut(width).enumerate() {
                    if matches!(rows, Rows::List(_)) && place + AHEAD < count {
                        let (shard, row) = self.starts.locate(rows.get(first + place + AHEAD));
                        let view = view_of(shard);
                        view.columns.fetch(row);
                        fetch(view.row(row), 0);
                    }
                    let (found, row) = self.starts.locate_near(rows.get(first + place), shard);
                    shard = found;
                    let view = view_of(shard);
                    read_row(&view, row, output, way, out)?;
                    columns.set(place, &view.columns, row);
                }
                Ok(())
            });
            way.finish();
            copied
        })
    }

    /// Whether rows had to come from the disk lately, so that [`ActivationSet::will_be_read`] helps.
    pub fn is_cold(&self) -> bool {
        self.cold.is_likely()
    }

    /// Asks the system to fetch the activations of rows that will be read, without waiting for it.
    /// A hint; rows that don't exist are passed over.
    pub fn will_be_read(&self, rows: Range<usize>) {
        let (mut start, end) = (rows.start, rows.end.min(self.rows()));
        while start < end {
            let (shard, row) = self.starts.locate(start);
            let here = (self.shards[shard].rows() - row).min(end - start);
            self.shards[shard].will_be_read(row..row + here);
            start += here;
        }
    }

    fn ask_for(&self, rows: &Rows<'_>, cancel: &Cancel) -> Result<()> {
        match rows {
            Rows::Range(range) => self.will_be_read(range.clone()),
            Rows::List(list) => {
                let tasks: Vec<_> = list.chunks(ASKED_ROWS).collect();
                pool::try_for_each(tasks, |task| {
                    cancel.check()?;
                    for &row in task {
                        // Checked to be at least 0.
                        self.will_be_read(row as usize..row as usize + 1);
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    /// Copies the columns of `rows`, without their activations.
    pub fn columns(
        &self,
        rows: &Rows<'_>,
        mut columns: ColumnsMut<'_>,
        cancel: &Cancel,
    ) -> Result<()> {
        rows.check(self.rows())?;
        columns.check(rows.len())?;
        let mut shard = 0;
        for place in 0..rows.len() {
            if place % 4096 == 0 {
                cancel.check()?;
            }
            let (found, row) = self.starts.locate_near(rows.get(place), shard);
            shard = found;
            columns.set(place, &self.shards[shard].view().columns, row);
        }
        Ok(())
    }

    /// A private mapping of the stored bytes of `rows`, if they lie in one shard and
    /// need no decoding; else `None`, and [`ActivationSet::gather`] serves. See
    /// [`ActivationShardReader::map_private`].
    pub fn map_private(&self, rows: Range<usize>) -> Result<Option<MmapMut>> {
        Rows::Range(rows.clone()).check(self.rows())?;
        if rows.is_empty() || self.dtype == ActivationDtype::Fp8 {
            return Ok(None);
        }
        let (shard, start) = self.starts.locate(rows.start);
        if self.starts.locate(rows.end - 1).0 != shard {
            return Ok(None);
        }
        self.shards[shard].map_private(start..start + rows.len())
    }

    /// The files, in order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(ActivationShardReader::path)
    }
}

/// Copies or decodes one row; `out` has the width that `output` needs.
fn read_row(
    view: &ActivationView<'_>,
    row: usize,
    output: Output,
    way: Copy,
    out: &mut [u8],
) -> Result<()> {
    let misaligned = |error| {
        Error::InvalidArgument(format!(
            "the array to fill is not aligned for its type: {error}"
        ))
    };
    let stored = view.row(row);
    match output {
        Output::Stored => way.copy(stored, out),
        Output::Bf16 => {
            let out = bytemuck::try_cast_slice_mut::<u8, bf16>(out).map_err(misaligned)?;
            fp8::decode_bf16(stored, view.scales[row], out);
        }
        Output::F32 => {
            let out = bytemuck::try_cast_slice_mut::<u8, f32>(out).map_err(misaligned)?;
            fp8::decode_f32(stored, view.scales[row], out);
        }
    }
    Ok(())
}
