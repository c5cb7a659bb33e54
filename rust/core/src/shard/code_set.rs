//! All code shards of a folder as one long array of sparse rows.

use std::ops::Range;
use std::path::Path;

use super::codes::{CodeShardReader, CodeView, Indices, Values};
use super::gather::{ColumnsMut, Listed, Rows, Starts};
use crate::{pool, Cancel, Error, Result};

/// Codes that one task copies, about.
const TASK_CODES: usize = 1 << 16;

/// How a folder's code shards store their values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueDtype {
    /// Single precision.
    F32,
    /// bfloat16.
    Bf16,
}

/// Where gathered values go.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// The bits of bfloat16 numbers.
    Bf16(&'a mut [u16]),
}

impl<'a> ValuesMut<'a> {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    fn split(self, count: usize) -> (Self, Self) {
        match self {
            Self::F32(values) => {
                let (head, tail) = values.split_at_mut(count);
                (Self::F32(head), Self::F32(tail))
            }
            Self::Bf16(values) => {
                let (head, tail) = values.split_at_mut(count);
                (Self::Bf16(head), Self::Bf16(tail))
            }
        }
    }
}

/// Code shards in manifest order.
#[derive(Debug)]
pub struct CodeSet {
    shards: Vec<CodeShardReader>,
    starts: Starts,
    d_sae: usize,
}

/// One task of a gather: consecutive places and their share of the outputs.
struct Task<'a> {
    places: Range<usize>,
    values: ValuesMut<'a>,
    indices: &'a mut [i32],
    columns: ColumnsMut<'a>,
}

impl CodeSet {
    /// Opens all files and compares each with what is listed of it. `d_sae` is at most
    /// `i32::MAX`, the largest that sparse codes know.
    pub fn open(
        listed: &[Listed],
        d_sae: usize,
        dtype: ValueDtype,
        cancel: &Cancel,
    ) -> Result<Self> {
        if i32::try_from(d_sae).is_err() {
            return Err(Error::InvalidArgument(format!(
                "d_sae is {d_sae}, expected at most {}",
                i32::MAX
            )));
        }
        let mut shards = Vec::with_capacity(listed.len());
        for listed in listed {
            cancel.check()?;
            let shard = CodeShardReader::open(&listed.path)
                .map_err(|error| listed.explain_missing(error))?;
            let found = match shard.values() {
                Values::F32(_) => ValueDtype::F32,
                Values::Bf16(_) => ValueDtype::Bf16,
            };
            if found != dtype {
                return Err(shard.bad(format!(
                    "holds {found:?} values, the manifest says {dtype:?}; \
                     restore the file that the manifest describes"
                )));
            }
            listed.check(shard.rows(), shard.bytes())?;
            shards.push(shard);
        }
        let starts = Starts::new(shards.iter().map(CodeShardReader::rows));
        Ok(Self {
            shards,
            starts,
            d_sae,
        })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.starts.rows()
    }

    /// Number of codes.
    pub fn nnz(&self) -> usize {
        self.shards.iter().map(CodeShardReader::nnz).sum()
    }

    /// The row offsets of a gather of `rows`: from 0, one more than there are rows.
    pub fn row_offsets(&self, rows: &Rows<'_>, cancel: &Cancel) -> Result<Vec<i64>> {
        rows.check(self.rows())?;
        let mut offsets = Vec::with_capacity(rows.len() + 1);
        let (mut total, mut shard) = (0_i64, 0);
        offsets.push(total);
        for place in 0..rows.len() {
            if place % 4096 == 0 {
                cancel.check()?;
            }
            let (found, row) = self.starts.locate_near(rows.get(place), shard);
            shard = found;
            let span = self.span(&self.shards[shard].view(), shard, row)?;
            total += span.len() as i64;
            offsets.push(total);
        }
        Ok(offsets)
    }

    fn span(&self, view: &CodeView<'_>, shard: usize, row: usize) -> Result<Range<usize>> {
        view.span(row..row + 1)
            .map_err(|problem| self.shards[shard].bad(problem))
    }

    /// Copies the codes of `rows` (indices widened and checked against `d_sae`) and
    /// their columns, on all of rayon's threads. `offsets` is what
    /// [`CodeSet::row_offsets`] gave for the same rows.
    pub fn gather(
        &self,
        rows: &Rows<'_>,
        offsets: &[i64],
        values: ValuesMut<'_>,
        indices: &mut [i32],
        columns: ColumnsMut<'_>,
        cancel: &Cancel,
    ) -> Result<()> {
        rows.check(self.rows())?;
        columns.check(rows.len())?;
        let nnz = offsets.last().and_then(|&last| usize::try_from(last).ok());
        let in_order = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        if offsets.len() != rows.len() + 1
            || offsets.first() != Some(&0)
            || !in_order
            || nnz != Some(indices.len())
            || nnz != Some(values.len())
        {
            return Err(Error::InvalidArgument(
                "the arrays to fill do not fit the row offsets of these rows".to_owned(),
            ));
        }
        let tasks = tasks(rows.len(), offsets, values, indices, columns);
        pool::try_for_each(tasks, |task| {
            cancel.check()?;
            self.run(task, rows, offsets)
        })
    }

    fn run(&self, task: Task<'_>, rows: &Rows<'_>, offsets: &[i64]) -> Result<()> {
        let Task {
            places,
            mut values,
            indices,
            mut columns,
        } = task;
        let base = offsets[places.start];
        let mut shard = 0;
        for place in places.clone() {
            let (found, row) = self.starts.locate_near(rows.get(place), shard);
            shard = found;
            let view = self.shards[shard].view();
            let from = self.span(&view, shard, row)?;
            // Both ends lie in this task's share: the offsets are in order (checked).
            let start = (offsets[place] - base) as usize;
            let to = start..(offsets[place + 1] - base) as usize;
            if to.len() != from.len() {
                return Err(Error::InvalidArgument(
                    "the row offsets belong to other rows".to_owned(),
                ));
            }
            let largest = widen(view.indices, from.clone(), &mut indices[to.clone()]);
            if largest.is_some_and(|largest| largest as usize >= self.d_sae) {
                return Err(self.shards[shard].bad(format!(
                    "row {row} holds a feature index of {}, expected below d_sae = {}; \
                     restore the file or encode these rows again",
                    largest.unwrap_or_default(),
                    self.d_sae
                )));
            }
            match (&mut values, view.values) {
                (ValuesMut::F32(out), Values::F32(stored)) => {
                    out[to].copy_from_slice(&stored[from]);
                }
                (ValuesMut::Bf16(out), Values::Bf16(stored)) => {
                    out[to].copy_from_slice(&stored[from]);
                }
                _ => {
                    return Err(Error::InvalidArgument(
                        "values are read in the type they are stored in".to_owned(),
                    ));
                }
            }
            columns.set(place - places.start, &view.columns, row);
        }
        Ok(())
    }

    /// Reads shard `shard` whole; see [`CodeShardReader::validate`].
    pub fn validate(&self, shard: usize, cancel: &Cancel) -> Result<()> {
        match self.shards.get(shard) {
            Some(shard) => shard.validate(self.d_sae, cancel),
            None => Err(Error::InvalidArgument(format!("there is no shard {shard}"))),
        }
    }

    /// The files, in order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(CodeShardReader::path)
    }
}

/// Cuts the work into tasks of about [`TASK_CODES`] codes each.
fn tasks<'a>(
    rows: usize,
    offsets: &[i64],
    mut values: ValuesMut<'a>,
    mut indices: &'a mut [i32],
    mut columns: ColumnsMut<'a>,
) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    let mut start = 0;
    while start < rows {
        // At least one row, at most as many as have TASK_CODES codes (rows without
        // codes cost something too, so rows count as well).
        let limit = offsets[start] + TASK_CODES as i64;
        let end = (start + 1..rows.min(start + TASK_CODES))
            .find(|&end| offsets[end] >= limit)
            .unwrap_or(rows.min(start + TASK_CODES));
        let count = (offsets[end] - offsets[start]) as usize;
        let (task_values, more_values) = values.split(count);
        let (task_indices, more_indices) = indices.split_at_mut(count);
        let (task_columns, more_columns) = columns.split(end - start);
        tasks.push(Task {
            places: start..end,
            values: task_values,
            indices: task_indices,
            columns: task_columns,
        });
        (values, indices, columns, start) = (more_values, more_indices, more_columns, end);
    }
    tasks
}

/// Copies indices as i32 and returns the largest. One above `i32::MAX` turns negative,
/// but the largest is then above any `d_sae` and the caller fails.
fn widen(indices: Indices<'_>, from: Range<usize>, out: &mut [i32]) -> Option<u32> {
    match indices {
        Indices::U16(stored) => {
            for (out, &index) in out.iter_mut().zip(&stored[from.clone()]) {
                *out = i32::from(index);
            }
            stored[from].iter().max().map(|&index| u32::from(index))
        }
        Indices::U32(stored) => {
            for (out, &index) in out.iter_mut().zip(&stored[from.clone()]) {
                *out = index as i32;
            }
            stored[from].iter().max().copied()
        }
    }
}
