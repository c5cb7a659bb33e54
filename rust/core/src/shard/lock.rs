//! One writer a folder.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use crate::{Error, Result};

/// The lock file's name within the folder. It stays when the lock is released:
/// removing it would let two writers lock two different files.
pub const LOCK_FILE: &str = ".lock";

/// An exclusive lock on a folder of shards; the system releases it when this is
/// dropped and when the process dies, however it dies.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Locks `folder`, or fails at once if another writer holds it.
    pub fn acquire(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK_FILE);
        let io = |source| Error::Io {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::BadShard {
                path: folder.to_owned(),
                problem: "another writer is at work in this folder, and there can be only one; \
                          wait until it is done or write to another folder"
                    .to_owned(),
            }),
            Err(TryLockError::Error(source)) => Err(io(source)),
        }
    }
}
