//! Rows out of an ordered list of shards: what the activation set and the code set
//! have in common.

use std::ops::Range;
use std::path::PathBuf;

use super::columns::Columns;
use crate::{Error, Result};

/// Which rows of a set are asked for, in that order; repeats are fine.
#[derive(Debug, Clone)]
pub enum Rows<'a> {
    /// Consecutive rows.
    Range(Range<usize>),
    /// Any rows, each from 0 to the set's length.
    List(&'a [i64]),
}

impl Rows<'_> {
    /// How many rows.
    pub fn len(&self) -> usize {
        match self {
            Self::Range(range) => range.len(),
            Self::List(list) => list.len(),
        }
    }

    /// Whether none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fails unless each row is below `length`.
    pub fn check(&self, length: usize) -> Result<()> {
        let bad = match self {
            Self::Range(range) => {
                (range.start > range.end || range.end > length).then(|| range.end.to_string())
            }
            Self::List(list) => list
                .iter()
                .find(|&&row| usize::try_from(row).map_or(true, |row| row >= length))
                .map(ToString::to_string),
        };
        bad.map_or(Ok(()), |row| {
            Err(Error::InvalidArgument(format!(
                "row {row} is out of range for {length} rows"
            )))
        })
    }

    /// The row at `place`. Only after [`Rows::check`].
    pub(crate) fn get(&self, place: usize) -> usize {
        match self {
            Self::Range(range) => range.start + place,
            // Checked to be at least 0.
            Self::List(list) => list[place] as usize,
        }
    }
}

/// A file that the manifest lists.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Where it is.
    pub path: PathBuf,
    /// How many rows it should have.
    pub rows: usize,
    /// How many bytes it should have.
    pub bytes: u64,
}

impl Listed {
    /// Compares what was found with what is listed.
    pub(crate) fn check(&self, rows: usize, bytes: usize) -> Result<()> {
        let problem = if rows != self.rows {
            format!("holds {rows} rows, the manifest says {}", self.rows)
        } else if bytes as u64 != self.bytes {
            format!("has {bytes} bytes, the manifest says {}", self.bytes)
        } else {
            return Ok(());
        };
        Err(Error::BadShard {
            path: self.path.clone(),
            problem: format!("{problem}; restore the file that the manifest describes"),
        })
    }

    /// A listed file that is not there is a fault of the folder, not of the caller.
    pub(crate) fn explain_missing(&self, error: Error) -> Error {
        match error {
            Error::Io { source, path } if source.kind() == std::io::ErrorKind::NotFound => {
                Error::BadShard {
                    path,
                    problem: "missing, although the manifest lists it; restore the file".to_owned(),
                }
            }
            other => other,
        }
    }
}

/// The first row of each shard, and the number of rows at the end.
#[derive(Debug, Clone)]
pub(crate) struct Starts(Vec<usize>);

impl Starts {
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut starts = vec![0];
        let mut total = 0;
        for length in lengths {
            total += length;
            starts.push(total);
        }
        Self(starts)
    }

    pub fn rows(&self) -> usize {
        self.0.last().copied().unwrap_or_default()
    }

    /// Shard of `row` and the row within it. Only for rows of the set.
    pub fn locate(&self, row: usize) -> (usize, usize) {
        // The last start that is not above `row`; of several (empty shards), the last,
        // which is the one that has rows.
        let shard = self.0.partition_point(|&start| start <= row) - 1;
        (shard, row - self.0[shard])
    }

    /// [`Starts::locate`] that first tries the shard `hint`.
    pub fn locate_near(&self, row: usize, hint: usize) -> (usize, usize) {
        match self.0.get(hint..hint + 2) {
            Some(&[start, end]) if (start..end).contains(&row) => (hint, row - start),
            _ => self.locate(row),
        }
    }
}

/// Where gathered token columns go; all as long as the rows asked for.
#[derive(Debug)]
pub struct ColumnsMut<'a> {
    /// See [`Columns::tokens`].
    pub tokens: &'a mut [i32],
    /// See [`Columns::sequence_id`].
    pub sequence_id: &'a mut [i64],
    /// See [`Columns::position`].
    pub position: &'a mut [i32],
    /// See [`Columns::segment`].
    pub segment: &'a mut [u8],
}

impl<'a> ColumnsMut<'a> {
    /// Fails unless each column has `rows` elements.
    pub(crate) fn check(&self, rows: usize) -> Result<()> {
        let lengths = [
            self.tokens.len(),
            self.sequence_id.len(),
            self.position.len(),
            self.segment.len(),
        ];
        if lengths == [rows; 4] {
            Ok(())
        } else {
            Err(Error::InvalidArgument(format!(
                "the columns to fill have {lengths:?} elements, expected {rows} each"
            )))
        }
    }

    /// Cuts off the first `rows` rows. Only up to the length of the columns.
    pub(crate) fn split(self, rows: usize) -> (Self, Self) {
        let (tokens, more_tokens) = self.tokens.split_at_mut(rows);
        let (sequence_id, more_sequence_id) = self.sequence_id.split_at_mut(rows);
        let (position, more_position) = self.position.split_at_mut(rows);
        let (segment, more_segment) = self.segment.split_at_mut(rows);
        (
            Self {
                tokens,
                sequence_id,
                position,
                segment,
            },
            ColumnsMut {
                tokens: more_tokens,
                sequence_id: more_sequence_id,
                position: more_position,
                segment: more_segment,
            },
        )
    }

    pub(crate) fn set(&mut self, place: usize, from: &Columns<'_>, row: usize) {
        self.tokens[place] = from.tokens[row];
        self.sequence_id[place] = from.sequence_id[row];
        self.position[place] = from.position[row];
        self.segment[place] = from.segment[row];
    }
}
