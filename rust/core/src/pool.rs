//! The one way to rayon's threads.
//!
//! A fork copies the pool but not its threads, and waiting for them would hang for ever
//! (torch's `DataLoader` forks its workers). So every use of the pool goes through this file,
//! which notes the process that started it and does the work of any other process on the
//! calling thread.

use std::sync::atomic::{AtomicU32, Ordering};

use rayon::prelude::*;

use crate::Result;

/// The process whose threads the pool has; 0 before first use.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// Whether the pool can be used in this process; if none has started it, this one owns it now.
fn is_ours() -> bool {
    let process = std::process::id();
    // One atomic step rather than a `OnceLock`: a fork in the middle of it can't leave a lock
    // that nobody opens.
    match OWNER.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => true,
        Err(owner) => owner == process,
    }
}

/// Calls `work` on each part, on several threads where there are any; results in order of parts.
pub(crate) fn map<T: Send, R: Send>(parts: Vec<T>, work: impl Fn(T) -> R + Sync + Send) -> Vec<R> {
    if parts.len() < 2 || !is_ours() {
        return parts.into_iter().map(work).collect();
    }
    parts.into_par_iter().with_max_len(1).map(work).collect()
}

/// As [`map`], but one error ends it: no further parts are begun.
pub(crate) fn try_for_each<T: Send>(
    parts: Vec<T>,
    work: impl Fn(T) -> Result<()> + Sync + Send,
) -> Result<()> {
    if parts.len() < 2 || !is_ours() {
        return parts.into_iter().try_for_each(work);
    }
    parts.into_par_iter().try_for_each(work)
}
