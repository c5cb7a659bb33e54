//! Memory for batches that is used again.
//!
//! A fresh buffer costs a page fault for every 4 KiB, which takes longer than copying a row into it.
//! A [`Buffer`] goes back to its pool when it is dropped, wherever and on whatever thread that is.

use std::sync::{Arc, Mutex, TryLockError};

use memmap2::MmapMut;

use crate::memory::prefer_large_pages;
use crate::{Error, Result};

/// A buffer that is this much larger than needed is left for others.
const MOST_WASTE: usize = 4;

/// Free buffers of one owner; clones share them.
#[derive(Debug, Clone)]
pub struct BufferPool {
    free: Arc<Mutex<Vec<MmapMut>>>,
    keep: usize,
    most: usize,
}

impl BufferPool {
    /// Keeps at most `keep` free buffers, each of at most `most` bytes.
    pub fn new(keep: usize, most: usize) -> Self {
        Self {
            free: Arc::default(),
            keep,
            most,
        }
    }

    /// A buffer of `bytes` bytes (at least 1), its contents anything: zeros, or an earlier batch.
    ///
    /// # Errors
    /// The system has no memory to give.
    pub fn take(&self, bytes: usize) -> Result<Buffer> {
        // Never waits: a fork may have left the lock closed for good.
        let mut free = self.free.try_lock().ok();
        let fits = |map: &MmapMut| (bytes..=bytes.saturating_mul(MOST_WASTE)).contains(&map.len());
        let found = free.as_mut().and_then(|free| {
            let at = free.iter().position(fits)?;
            Some(free.swap_remove(at))
        });
        let memory = match found {
            Some(memory) => memory,
            None => {
                let memory = MmapMut::map_anon(bytes.max(1)).map_err(|error| {
                    Error::InvalidArgument(format!(
                        "a batch of {bytes} bytes needs more memory than this machine gives \
                         ({error}); ask for fewer rows"
                    ))
                })?;
                prefer_large_pages(&memory);
                memory
            }
        };
        Ok(Buffer {
            memory: Some(memory),
            bytes,
            pool: self.clone(),
        })
    }

    fn give_back(&self, memory: MmapMut) {
        if memory.len() > self.most {
            return;
        }
        let mut free = match self.free.try_lock() {
            Ok(free) => free,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        free.push(memory);
        if free.len() > self.keep {
            free.remove(0);
        }
    }
}

/// Memory of a pool, aligned to a page.
#[derive(Debug)]
pub struct Buffer {
    /// `None` once it has gone back.
    memory: Option<MmapMut>,
    bytes: usize,
    pool: BufferPool,
}

impl Buffer {
    /// The memory, as long as was asked for.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Some(memory) => &mut memory[..self.bytes],
            None => &mut [],
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.give_back(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(buffer: &mut Buffer) -> usize {
        buffer.bytes_mut().as_ptr() as usize
    }

    #[test]
    fn buffers_are_used_again_once_they_are_free() {
        let pool = BufferPool::new(2, 1 << 20);
        let (mut first, mut second) = (pool.take(9000).unwrap(), pool.take(9000).unwrap());
        let (one, two) = (address(&mut first), address(&mut second));
        assert_ne!(one, two);
        assert_eq!(one % 4096, 0);
        drop(first);
        let mut third = pool.take(8000).unwrap();
        assert_eq!((address(&mut third), third.bytes_mut().len()), (one, 8000));
        drop(std::thread::spawn(move || drop(second)).join());
        assert_eq!(address(&mut pool.take(9000).unwrap()), two);
    }

    #[test]
    fn few_and_no_large_ones_are_kept() {
        let pool = BufferPool::new(1, 10_000);
        let taken: Vec<_> = [5000, 6000, 20_000]
            .map(|bytes| pool.take(bytes).unwrap())
            .into();
        drop(taken);
        let kept: Vec<_> = pool
            .free
            .lock()
            .unwrap()
            .iter()
            .map(|map| map.len())
            .collect();
        assert_eq!(kept, [6000]);
        // Far too large for this, so it stays for others.
        drop(pool.take(100).unwrap());
        drop(pool.take(0).unwrap());
    }
}
