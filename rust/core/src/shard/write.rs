//! Writing one shard: temporary name, checksum on the way, sync, rename, sync.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use xxhash_rust::xxh3::Xxh3;

use crate::{Cancel, Error, Result};

/// Bytes handed to the system at a time; between two, the cancel flag is looked at.
const BLOCK: usize = 1 << 20;

/// A tensor to be written: its bytes in row-major order, little-endian.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: &'a [u8],
}

/// What lies on the disk now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Length of the file.
    pub bytes: u64,
    /// XXH3-64 of the whole file.
    pub xxh3: u64,
}

/// The file's name while it is not complete.
fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    PathBuf::from(name)
}

/// Removes the temporary file unless the shard was completed.
struct Temporary {
    path: PathBuf,
    done: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.done {
            // A second failure can't be reported from here; a stale temporary file
            // is never read and the next writer overwrites it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes `tensors` to `path`: first under a temporary name, synced, then renamed,
/// then the folder is synced. When this returns an error there is neither the
/// temporary file nor a new file at `path`. The bytes depend on the tensors alone.
pub fn write_shard(path: &Path, tensors: Vec<Tensor<'_>>, cancel: &Cancel) -> Result<Written> {
    let (header, tensors) = lay_out(tensors)?;
    let temp = temporary(path);
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = File::create(&temp).map_err(io)?;
    let mut guard = Temporary {
        path: temp,
        done: false,
    };
    let mut hasher = Xxh3::new();
    let mut bytes = 0;
    let parts = std::iter::once(header.as_slice()).chain(tensors.iter().map(|tensor| tensor.bytes));
    for part in parts {
        for block in part.chunks(BLOCK) {
            cancel.check()?;
            file.write_all(block).map_err(io)?;
            hasher.update(block);
            bytes += block.len() as u64;
        }
    }
    file.sync_all().map_err(io)?;
    drop(file);
    cancel.check()?;
    fs::rename(&guard.path, path).map_err(io)?;
    guard.done = true;
    if let Err(source) = sync_folder(path) {
        // Not known to be on the disk, so it must not look complete.
        let _ = fs::remove_file(path);
        return Err(io(source));
    }
    Ok(Written {
        bytes,
        xxh3: hasher.digest(),
    })
}

/// Header bytes and the tensors in file order: widest elements first, so that each
/// tensor is aligned for its type; then by name.
fn lay_out(mut tensors: Vec<Tensor<'_>>) -> Result<(Vec<u8>, Vec<Tensor<'_>>)> {
    tensors.sort_by(|left, right| {
        right
            .dtype
            .cmp(&left.dtype)
            .then_with(|| left.name.cmp(&right.name))
    });
    let mut offset = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for tensor in &tensors {
        let end = offset + tensor.bytes.len();
        let info = TensorInfo {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            data_offsets: (offset, end),
        };
        infos.push((tensor.name.clone(), info));
        offset = end;
    }
    let bad = |error: &dyn std::fmt::Display| {
        Error::InvalidArgument(format!("a tensor's shape does not fit its bytes: {error}"))
    };
    let metadata = Metadata::new(None, infos).map_err(|error| bad(&error))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| bad(&error))?;
    // Spaces after the JSON are allowed; with them the data starts 64-byte aligned.
    let padded = (json.len() + 8).next_multiple_of(64) - 8;
    json.resize(padded, b' ');
    let mut header = (padded as u64).to_le_bytes().to_vec();
    header.extend_from_slice(&json);
    Ok((header, tensors))
}

#[cfg(unix)]
fn sync_folder(path: &Path) -> std::io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(not(unix))]
fn sync_folder(_path: &Path) -> std::io::Result<()> {
    // Folders can't be synced there; the rename is as durable as the system makes it.
    Ok(())
}

/// Length and XXH3-64 of a file, by plain reads (a failing disk gives an error, not
/// a signal, as it would through a mapping).
pub fn checksum(path: &Path, cancel: &Cancel) -> Result<Written> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let mut hasher = Xxh3::new();
    let mut block = vec![0; BLOCK];
    let mut bytes = 0;
    loop {
        cancel.check()?;
        match file.read(&mut block) {
            Ok(0) => {
                return Ok(Written {
                    bytes,
                    xxh3: hasher.digest(),
                })
            }
            Ok(count) => {
                hasher.update(&block[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io(error)),
        }
    }
}
