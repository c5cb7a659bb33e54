//! Code shards: the sparse codes of many rows, in CSR form.

use std::ops::Range;
use std::path::Path;

use safetensors::tensor::Dtype;

use super::code_order::{in_order, Seen};
use super::columns::{ColumnLayout, Columns};
use super::header::{Entry, Header};
use super::mapped::Mapped;
use crate::{Cancel, Error, Result};

/// Rows that [`CodeView::validate`] checks between two looks at the cancel flag.
const VALIDATE_ROWS: usize = 4096;

/// Feature indices; 16-bit ones when `d_sae <= 65536`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Indices<'a> {
    /// 16-bit.
    U16(&'a [u16]),
    /// 32-bit.
    U32(&'a [u32]),
}

impl Indices<'_> {
    /// How many there are (the shard's nnz).
    pub fn len(&self) -> usize {
        match self {
            Self::U16(indices) => indices.len(),
            Self::U32(indices) => indices.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn max(&self, range: Range<usize>) -> Option<u32> {
        match self {
            Self::U16(indices) => indices[range].iter().max().map(|&index| u32::from(index)),
            Self::U32(indices) => indices[range].iter().max().copied(),
        }
    }
}

/// Activations of the features.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Values<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// The bits of bfloat16 numbers (the upper half of an f32's).
    Bf16(&'a [u16]),
}

impl Values<'_> {
    /// How many there are (the shard's nnz).
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where the tensors of a code shard lie in its file.
#[derive(Debug, Clone)]
struct CodeLayout {
    values: Entry,
    indices: Entry,
    row_offsets: Entry,
    columns: ColumnLayout,
}

/// A code shard's contents, borrowed from the bytes of a file.
#[derive(Debug, Clone, Copy)]
pub struct CodeView<'a> {
    /// `[nnz]`, within a row by falling value.
    pub values: Values<'a>,
    /// `[nnz]`, each below `d_sae`, within a row each once, rising among equal values.
    pub indices: Indices<'a>,
    /// `[rows + 1]`: row `i` is `row_offsets[i]..row_offsets[i + 1]`.
    pub row_offsets: &'a [i64],
    /// The token columns.
    pub columns: Columns<'a>,
}

impl CodeLayout {
    fn parse(file: &[u8]) -> Result<Self, String> {
        let mut header = Header::parse(file)?;
        let row_offsets = header.take_column("row_offsets", &[Dtype::I64], None)?;
        let Some(rows) = row_offsets.shape[0].checked_sub(1) else {
            return Err("tensor `row_offsets` is empty, expected rows + 1 elements".to_owned());
        };
        let values = header.take_column("values", &[Dtype::F32, Dtype::BF16], None)?;
        let nnz = values.shape[0];
        let indices = header.take_column("indices", &[Dtype::U16, Dtype::U32], Some(nnz))?;
        let columns = ColumnLayout::take(&mut header, file, rows)?;
        header.finish()?;
        row_offsets.check::<i64>(file, "row_offsets")?;
        match values.dtype {
            Dtype::F32 => values.check::<f32>(file, "values")?,
            _ => values.check::<u16>(file, "values")?,
        }
        match indices.dtype {
            Dtype::U16 => indices.check::<u16>(file, "indices")?,
            _ => indices.check::<u32>(file, "indices")?,
        }
        let layout = Self {
            values,
            indices,
            row_offsets,
            columns,
        };
        layout.view(file).check_ends()?;
        Ok(layout)
    }

    fn view<'a>(&self, file: &'a [u8]) -> CodeView<'a> {
        CodeView {
            values: match self.values.dtype {
                Dtype::F32 => Values::F32(self.values.view(file)),
                _ => Values::Bf16(self.values.view(file)),
            },
            indices: match self.indices.dtype {
                Dtype::U16 => Indices::U16(self.indices.view(file)),
                _ => Indices::U32(self.indices.view(file)),
            },
            row_offsets: self.row_offsets.view(file),
            columns: self.columns.view(file),
        }
    }
}

impl<'a> CodeView<'a> {
    /// Reads the bytes of a whole file. Cheap: looks at the header and at the first
    /// and last row offset; [`CodeView::validate`] looks at everything.
    pub fn parse(file: &'a [u8]) -> Result<Self, String> {
        Ok(CodeLayout::parse(file)?.view(file))
    }

    fn check_ends(&self) -> Result<(), String> {
        let nnz = self.values.len();
        match (self.row_offsets.first(), self.row_offsets.last()) {
            (Some(0), Some(&last)) if usize::try_from(last) == Ok(nnz) => Ok(()),
            (first, last) => Err(format!(
                "row_offsets go from {} to {}, expected from 0 to {nnz} (the number of values)",
                first.copied().unwrap_or_default(),
                last.copied().unwrap_or_default()
            )),
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.row_offsets.len().saturating_sub(1)
    }

    /// The codes of rows `rows`, as a range of `values` and `indices`; an error if
    /// the offsets at its ends are out of order or out of bounds.
    pub fn span(&self, rows: Range<usize>) -> Result<Range<usize>, String> {
        let ends = (
            self.row_offsets.get(rows.start),
            self.row_offsets.get(rows.end),
        );
        let (Some(&from), Some(&to)) = ends else {
            return Err(format!(
                "rows {rows:?} are out of range for {} rows",
                self.rows()
            ));
        };
        match (usize::try_from(from), usize::try_from(to)) {
            (Ok(start), Ok(end)) if start <= end && end <= self.values.len() => Ok(start..end),
            _ => Err(format!(
                "row_offsets are not in order: rows {}..{} would span codes {from}..{to} of {}",
                rows.start,
                rows.end,
                self.values.len()
            )),
        }
    }

    /// Full check of rows `rows`; see [`CodeView::validate`].
    fn validate_rows(
        &self,
        rows: Range<usize>,
        d_sae: usize,
        seen: &mut Seen,
    ) -> Result<(), String> {
        let span = self.span(rows.clone())?;
        for row in rows.clone() {
            self.span(row..row + 1)?;
        }
        if let Some(largest) = self.indices.max(span.clone()) {
            if largest as usize >= d_sae {
                return Err(format!(
                    "feature index {largest} in rows {}..{} is not below d_sae = {d_sae}",
                    rows.start, rows.end
                ));
            }
        }
        let finite = match self.values {
            Values::F32(values) => values[span].iter().all(|value| value.is_finite()),
            Values::Bf16(values) => values[span].iter().all(|bits| bits & 0x7F80 != 0x7F80),
        };
        if !finite {
            return Err(format!(
                "a value in rows {}..{} is NaN or infinite",
                rows.start, rows.end
            ));
        }
        for row in rows {
            let span = self.span(row..row + 1)?;
            let repeated = match self.indices {
                Indices::U16(indices) => {
                    self.check_order(row, span.clone(), indices)?;
                    seen.repeated(indices[span].iter().map(|&index| u32::from(index)))
                }
                Indices::U32(indices) => {
                    self.check_order(row, span.clone(), indices)?;
                    seen.repeated(indices[span].iter().copied())
                }
            };
            if let Some(feature) = repeated {
                return Err(format!("row {row} names feature {feature} more than once"));
            }
        }
        Ok(())
    }

    /// `indices` are the view's own.
    fn check_order<T: Copy + Into<u32>>(
        &self,
        row: usize,
        span: Range<usize>,
        indices: &[T],
    ) -> Result<(), String> {
        let features = indices[span.clone()].iter().map(|&index| index.into());
        let sound = match self.values {
            Values::F32(values) => in_order(values[span].iter().copied(), features),
            Values::Bf16(values) => {
                let widen = |&bits: &u16| f32::from_bits(u32::from(bits) << 16);
                in_order(values[span].iter().map(widen), features)
            }
        };
        if sound {
            Ok(())
        } else {
            Err(format!(
                "row {row} is out of order, expected falling values, ties by lower feature"
            ))
        }
    }

    /// Full check in blocks: offsets in order, each index below `d_sae`, each value
    /// finite, rows in order and without a feature twice. The inner error says what is
    /// wrong.
    pub fn validate(&self, d_sae: usize, cancel: &Cancel) -> Result<Result<(), String>> {
        let rows = self.rows();
        let mut seen = Seen::new(d_sae);
        for start in (0..rows).step_by(VALIDATE_ROWS) {
            cancel.check()?;
            let block = start..rows.min(start + VALIDATE_ROWS);
            if let Err(problem) = self.validate_rows(block, d_sae, &mut seen) {
                return Ok(Err(problem));
            }
        }
        Ok(Ok(()))
    }
}

/// A code shard file, mapped for reading.
#[derive(Debug)]
pub struct CodeShardReader {
    file: Mapped,
    layout: CodeLayout,
}

impl CodeShardReader {
    /// Maps `path` and checks its size, tensors and shapes, and that the row offsets
    /// start at 0 and end at the number of values. That the offsets in between are in
    /// order and the indices below `d_sae` is checked by [`CodeShardReader::validate`]:
    /// call it, or index with checks, before trusting a file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Mapped::open(path)?;
        let layout = CodeLayout::parse(file.bytes()).map_err(|problem| file.bad(problem))?;
        Ok(Self { file, layout })
    }

    /// The contents.
    pub fn view(&self) -> CodeView<'_> {
        self.layout.view(self.file.bytes())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Length of the file.
    pub fn bytes(&self) -> usize {
        self.file.bytes().len()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.layout.row_offsets.shape[0].saturating_sub(1)
    }

    /// Number of codes.
    pub fn nnz(&self) -> usize {
        self.layout.values.shape[0]
    }

    /// `[rows + 1]`, from 0 to nnz.
    pub fn row_offsets(&self) -> &[i64] {
        self.view().row_offsets
    }

    /// `[nnz]`.
    pub fn indices(&self) -> Indices<'_> {
        self.view().indices
    }

    /// `[nnz]`.
    pub fn values(&self) -> Values<'_> {
        self.view().values
    }

    /// Tells the system that values, indices and offsets will be read from front to back.
    pub fn will_be_read(&self) {
        for entry in [
            &self.layout.values,
            &self.layout.indices,
            &self.layout.row_offsets,
        ] {
            self.file.will_be_read(entry.range.clone());
        }
    }

    /// The error that this file has `problem`.
    pub fn bad(&self, problem: String) -> Error {
        self.file.bad(problem)
    }

    /// Reads everything; see [`CodeView::validate`].
    pub fn validate(&self, d_sae: usize, cancel: &Cancel) -> Result<()> {
        self.view()
            .validate(d_sae, cancel)?
            .map_err(|problem| self.bad(problem))
    }
}
