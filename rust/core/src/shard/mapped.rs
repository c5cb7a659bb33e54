//! A file mapped for reading.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::{Error, Result};

/// A whole file, mapped read-only.
#[derive(Debug)]
pub(crate) struct Mapped {
    path: PathBuf,
    bytes: Mmap,
}

impl Mapped {
    /// Maps `path`; an empty or unreadable file is an error that names it.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(Error::BadShard {
                path: path.to_owned(),
                problem: "not a regular file; expected a safetensors shard".to_owned(),
            });
        }
        // SAFETY: the mapping is read-only and owned by the result. Listed shards are
        // never written again (writers fill another name and rename), which is the
        // fact that keeps the bytes behind the shared slices from changing.
        let bytes = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
        })
    }

    /// Asks the system to fetch `range` of the file now, without waiting for it. A hint: what the
    /// system makes of it changes speed alone.
    pub fn will_be_read(&self, range: Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty() && range.end <= self.bytes.len() {
            let _ = self
                .bytes
                .advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The error that this file has `problem`.
    pub fn bad(&self, problem: String) -> Error {
        Error::BadShard {
            path: self.path.clone(),
            problem,
        }
    }
}
