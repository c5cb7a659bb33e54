//! The four columns that say where each row comes from, in every shard.

use safetensors::tensor::Dtype;

use super::header::{Entry, Header};
use crate::simd::fetch;

/// Where the token columns lie in a file.
#[derive(Debug, Clone)]
pub struct ColumnLayout {
    tokens: Entry,
    sequence_id: Entry,
    position: Entry,
    segment: Entry,
}

/// The token columns of a shard, each as long as the shard has rows.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// Token id at the row; -1 unknown.
    pub tokens: &'a [i32],
    /// Which sequence the row is of; -1 unknown.
    pub sequence_id: &'a [i64],
    /// Place within the sequence; -1 unknown.
    pub position: &'a [i32],
    /// 0 prompt, 1 thinking, 2 response, 255 unknown.
    pub segment: &'a [u8],
}

impl Columns<'_> {
    /// Has the CPU fetch what is of `row`. A hint.
    #[inline]
    pub(super) fn fetch(&self, row: usize) {
        fetch(self.tokens, row);
        fetch(self.sequence_id, row);
        fetch(self.position, row);
        fetch(self.segment, row);
    }
}

impl ColumnLayout {
    /// Takes the columns from `header` and checks length, dtype and alignment.
    pub fn take(header: &mut Header, file: &[u8], rows: usize) -> Result<Self, String> {
        let layout = Self {
            tokens: header.take_column("tokens", &[Dtype::I32], Some(rows))?,
            sequence_id: header.take_column("sequence_id", &[Dtype::I64], Some(rows))?,
            position: header.take_column("position", &[Dtype::I32], Some(rows))?,
            segment: header.take_column("segment", &[Dtype::U8], Some(rows))?,
        };
        layout.tokens.check::<i32>(file, "tokens")?;
        layout.sequence_id.check::<i64>(file, "sequence_id")?;
        layout.position.check::<i32>(file, "position")?;
        Ok(layout)
    }

    /// The columns of `file`, which must be the bytes that `take` checked.
    pub fn view<'a>(&self, file: &'a [u8]) -> Columns<'a> {
        Columns {
            tokens: self.tokens.view(file),
            sequence_id: self.sequence_id.view(file),
            position: self.position.view(file),
            segment: self.segment.view(file),
        }
    }
}
