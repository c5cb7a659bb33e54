//! Activation shards: one row of activations a token, and where the token comes from.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::{MmapMut, MmapOptions};
use safetensors::tensor::Dtype;

use super::columns::{ColumnLayout, Columns};
use super::header::{Entry, Header};
use super::mapped::Mapped;
use crate::{Error, Result};

/// How activations are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationDtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// E4M3 with one f32 scale a row.
    Fp8,
}

impl ActivationDtype {
    /// Bytes of one activation.
    pub const fn size(self) -> usize {
        match self {
            Self::Fp8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// From the safetensors name: "BF16", "F16", "F32" or "F8_E4M3".
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "BF16" => Some(Self::Bf16),
            "F16" => Some(Self::F16),
            "F32" => Some(Self::F32),
            "F8_E4M3" => Some(Self::Fp8),
            _ => None,
        }
    }

    /// The safetensors dtype.
    pub const fn dtype(self) -> Dtype {
        match self {
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
            Self::F32 => Dtype::F32,
            Self::Fp8 => Dtype::F8_E4M3,
        }
    }
}

/// Where the tensors of an activation shard lie in its file.
#[derive(Debug, Clone)]
struct ActivationLayout {
    dtype: ActivationDtype,
    activations: Entry,
    scales: Option<Entry>,
    columns: ColumnLayout,
}

/// An activation shard's contents, borrowed from the bytes of a file.
#[derive(Debug, Clone, Copy)]
pub struct ActivationView<'a> {
    /// How `activations` are stored.
    pub dtype: ActivationDtype,
    /// Width of a row.
    pub d_in: usize,
    /// The bytes of `[rows, d_in]` activations, aligned for their type.
    pub activations: &'a [u8],
    /// `[rows]` for [`ActivationDtype::Fp8`], else empty.
    pub scales: &'a [f32],
    /// The token columns.
    pub columns: Columns<'a>,
}

impl ActivationLayout {
    fn parse(file: &[u8]) -> Result<Self, String> {
        let mut header = Header::parse(file)?;
        let dtypes = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F8_E4M3];
        let activations = header.take("activations", &dtypes)?;
        let &[rows, d_in] = activations.shape.as_slice() else {
            return Err(format!(
                "tensor `activations` has shape {:?}, expected [rows, d_in]",
                activations.shape
            ));
        };
        if d_in == 0 {
            return Err("tensor `activations` has d_in = 0, expected at least 1".to_owned());
        }
        let dtype = match activations.dtype {
            Dtype::BF16 => ActivationDtype::Bf16,
            Dtype::F16 => ActivationDtype::F16,
            Dtype::F32 => ActivationDtype::F32,
            _ => ActivationDtype::Fp8,
        };
        let scales = match dtype {
            ActivationDtype::Fp8 => {
                Some(header.take_column("scales", &[Dtype::F32], Some(rows))?)
            }
            _ => None,
        };
        let columns = ColumnLayout::take(&mut header, file, rows)?;
        header.finish()?;
        match dtype {
            ActivationDtype::Fp8 => {}
            ActivationDtype::F32 => activations.check::<f32>(file, "activations")?,
            _ => activations.check::<u16>(file, "activations")?,
        }
        if let Some(scales) = &scales {
            scales.check::<f32>(file, "scales")?;
        }
        Ok(Self {
            dtype,
            activations,
            scales,
            columns,
        })
    }

    fn view<'a>(&self, file: &'a [u8]) -> ActivationView<'a> {
        ActivationView {
            dtype: self.dtype,
            d_in: self.activations.shape[1],
            activations: self.activations.view(file),
            scales: self.scales.as_ref().map_or(&[], |scales| scales.view(file)),
            columns: self.columns.view(file),
        }
    }
}

impl<'a> ActivationView<'a> {
    /// Reads the bytes of a whole file; looks at the header alone.
    pub fn parse(file: &'a [u8]) -> Result<Self, String> {
        Ok(ActivationLayout::parse(file)?.view(file))
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.columns.tokens.len()
    }

    /// Bytes of one stored row.
    pub fn row_bytes(&self) -> usize {
        self.d_in * self.dtype.size()
    }

    /// The stored bytes of row `row`; panics when out of range, as slices do.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let width = self.row_bytes();
        &self.activations[row * width..(row + 1) * width]
    }
}

/// An activation shard file, mapped for reading.
#[derive(Debug)]
pub struct ActivationShardReader {
    file: Mapped,
    layout: ActivationLayout,
}

impl ActivationShardReader {
    /// Maps `path` and checks its size, tensors, dtypes and shapes.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Mapped::open(path)?;
        let layout = ActivationLayout::parse(file.bytes()).map_err(|problem| file.bad(problem))?;
        Ok(Self { file, layout })
    }

    /// The contents.
    pub fn view(&self) -> ActivationView<'_> {
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
        self.layout.activations.shape[0]
    }

    /// Width of a row.
    pub fn d_in(&self) -> usize {
        self.layout.activations.shape[1]
    }

    /// How activations are stored.
    pub fn dtype(&self) -> ActivationDtype {
        self.layout.dtype
    }

    /// The error that this file has `problem`.
    pub fn bad(&self, problem: String) -> Error {
        self.file.bad(problem)
    }

    /// Asks the system to fetch the activations of `rows`, without waiting for it.
    pub(super) fn will_be_read(&self, rows: Range<usize>) {
        let width = self.d_in() * self.dtype().size();
        let start = self.layout.activations.range.start;
        self.file
            .will_be_read(start + rows.start * width..start + rows.end * width);
    }

    /// Maps the stored bytes of `rows` anew, privately: no byte is copied until it is
    /// written to, and then the change is seen through this mapping alone, never in
    /// the file nor in another reader. `None` when the system has no mapping to give
    /// (the caller then copies).
    pub fn map_private(&self, rows: Range<usize>) -> Result<Option<MmapMut>> {
        let width = self.d_in() * self.dtype().size();
        let all = self.layout.activations.range.clone();
        if rows.is_empty() || rows.end > self.rows() {
            return Err(Error::InvalidArgument(format!(
                "rows {rows:?} of a shard of {} rows can't be mapped",
                self.rows()
            )));
        }
        let start = all.start + rows.start * width;
        let io = |source| Error::Io {
            path: self.path().to_owned(),
            source,
        };
        let file = File::open(self.path()).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length != self.file.bytes().len() as u64 {
            return Err(self.bad(format!(
                "the file had {} bytes when it was opened and has {length} now; \
                 shards must not be changed while they are read",
                self.file.bytes().len()
            )));
        }
        // SAFETY: the mapping is private and owned by the caller, its range lies inside
        // the file (length just checked), and listed shards are never written again,
        // which is what keeps pages that were not yet copied from changing.
        let mapping = unsafe {
            MmapOptions::new()
                .offset(start as u64)
                .len(rows.len() * width)
                .map_copy(&file)
        };
        Ok(mapping.ok())
    }
}
