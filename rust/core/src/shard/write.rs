//! Writing one shard: temporary name, checksum on the way, sync, rename, sync.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use xxhash_rust::xxh3::Xxh3;

use crate::{Cancel, Error, Result};

/// Bytes handed to the system at a time; between two, the cancel flag is looked at.
const BLOCK: usize = 1 << 20;
/// After so many bytes the disk is to begin.
const FLUSH: u64 = 32 << 20;

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
    let parts: Vec<&[u8]> = std::iter::once(header.as_slice())
        .chain(tensors.iter().map(|tensor| tensor.bytes))
        .collect();
    let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
    let failed = AtomicBool::new(false);
    let hash = || -> Result<u64> {
        let mut hasher = Xxh3::new();
        for block in parts.iter().flat_map(|part| part.chunks(BLOCK)) {
            cancel.check()?;
            // Nobody asks any more.
            if failed.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            hasher.update(block);
        }
        Ok(hasher.digest())
    };
    let mut write = || -> Result<()> {
        let mut written = 0;
        for block in parts.iter().flat_map(|part| part.chunks(BLOCK)) {
            cancel.check()?;
            file.write_all(block).map_err(io)?;
            written += block.len() as u64;
            if written % FLUSH < BLOCK as u64 {
                start_writing_back(&file);
            }
        }
        Ok(())
    };
    // The checksum is worked out beside the system's copying, unless that takes no time or there is
    // no thread to be had.
    let xxh3 = std::thread::scope(|scope| -> Result<u64> {
        let hashing = (bytes >= FLUSH)
            .then(|| std::thread::Builder::new().spawn_scoped(scope, hash))
            .and_then(std::io::Result::ok);
        let written = write();
        failed.store(written.is_err(), Ordering::Relaxed);
        let hashed = match hashing.map(std::thread::ScopedJoinHandle::join) {
            None if written.is_ok() => hash(),
            None => Err(Error::Interrupted),
            Some(Ok(hashed)) => hashed,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        };
        written.and(hashed)
    })?;
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
    Ok(Written { bytes, xxh3 })
}

/// Has the disk begin with what was written so far, so that syncing at the end finds little to do. A
/// hint.
fn start_writing_back(file: &File) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is that of an open file; the call neither reads nor writes memory.
        let _ =
            unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = file;
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
