//! The code shards of a pass, each mapped only while there is work on it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::shard::CodeShardReader;
use crate::Result;

/// A code shard to be read.
#[derive(Debug, Clone)]
pub struct ShardFile {
    /// Where it is.
    pub path: PathBuf,
    /// The id of its first row.
    pub first_row: i64,
    /// How many rows the manifest lists.
    pub rows: usize,
}

/// Shards, each mapped while there is work on it: each counts the units that are left of it.
#[derive(Debug)]
pub(super) struct OpenShards<'f> {
    files: &'f [ShardFile],
    shards: Vec<Mutex<Option<Arc<CodeShardReader>>>>,
    /// Units of each that are yet to be done.
    left: Vec<AtomicUsize>,
}

impl<'f> OpenShards<'f> {
    /// All of them, each to be done in units of so many rows.
    pub fn new(files: &'f [ShardFile], unit_rows: usize) -> Self {
        let units = |file: &ShardFile| AtomicUsize::new(file.rows.div_ceil(unit_rows));
        Self {
            files,
            shards: files.iter().map(|_| Mutex::new(None)).collect(),
            left: files.iter().map(units).collect(),
        }
    }

    /// Shard `part`, opened by the first who asks.
    pub fn get(&self, part: usize) -> Result<Arc<CodeShardReader>> {
        let mut slot = self.shards[part]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(shard) = &*slot {
            return Ok(Arc::clone(shard));
        }
        let file = &self.files[part];
        let shard = CodeShardReader::open(&file.path)?;
        if shard.rows() != file.rows {
            return Err(shard.bad(format!(
                "holds {} rows, but its manifest line says {}",
                shard.rows(),
                file.rows
            )));
        }
        shard.will_be_read();
        let shard = Arc::new(shard);
        *slot = Some(Arc::clone(&shard));
        Ok(shard)
    }

    /// Opens shard `part` early, so that the system fetches it meanwhile. What is wrong with it is
    /// told when its turn comes.
    pub fn fetch(&self, part: usize) {
        if part < self.files.len() && self.left[part].load(Ordering::Relaxed) > 0 {
            let _ = self.get(part);
        }
    }

    /// A unit of shard `part` is done.
    pub fn done(&self, part: usize) {
        if self.left[part].fetch_sub(1, Ordering::AcqRel) == 1 {
            self.close(part);
        }
    }

    /// Unmaps shard `part`, of which nobody needs more.
    pub fn close(&self, part: usize) {
        *self.shards[part]
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }
}
