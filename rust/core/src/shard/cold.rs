//! Whether rows have to come from the disk, and asking for them early where they do.
//!
//! A row that isn't in memory costs the thread that touches it a wait, one after another. Where the
//! system is told of all rows of a batch first, the disk works on many at once. But telling costs a
//! system call a row, which rows in memory aren't worth: so a set listens to the system's count of
//! waits (major page faults), and tells only while there are some.

use std::sync::atomic::{AtomicU32, Ordering};

/// Gathers for which a set keeps asking early after a wait.
const KEEP_ASKING: u32 = 16;

/// What a set knows of its files.
#[derive(Debug)]
pub(super) struct Cold(AtomicU32);

impl Cold {
    /// Nothing is known yet: the first gather asks.
    pub fn new() -> Self {
        Self(AtomicU32::new(1))
    }

    /// Whether to ask early.
    pub fn is_likely(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// A gather begins; whether it should ask early.
    pub fn begin(&self) -> bool {
        let less = |left: u32| left.checked_sub(1);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_ok()
    }

    /// Calls `work`, and notes whether this thread had to wait for the disk.
    pub fn watch<R>(&self, work: impl FnOnce() -> R) -> R {
        let before = waits();
        let result = work();
        if waits() != before {
            self.0.store(KEEP_ASKING, Ordering::Relaxed);
        }
        result
    }
}

/// How often this thread waited for a page from the disk; always 0 where the system doesn't tell.
fn waits() -> i64 {
    #[cfg(target_os = "linux")]
    {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the pointer is to a whole `rusage`, which the call fills.
        let failed = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
        if failed != 0 {
            return 0;
        }
        // SAFETY: filled, and zeroed before: an `rusage` is plain numbers.
        let found = unsafe { usage.assume_init() };
        #[allow(clippy::useless_conversion)]
        return i64::from(found.ru_majflt);
    }
    #[cfg(not(target_os = "linux"))]
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_first_and_while_there_are_waits() {
        let cold = Cold::new();
        assert!(cold.begin());
        assert!(!cold.begin());
        assert_eq!(cold.watch(|| 5), 5);
        cold.0.store(KEEP_ASKING, Ordering::Relaxed);
        assert!((0..KEEP_ASKING).all(|_| cold.is_likely() && cold.begin()));
        assert!(!cold.is_likely());
    }
}
