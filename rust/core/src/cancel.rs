//! A flag that asks long work to stop.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{current, ThreadId};
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Shared between the thread that waits (and hears ctrl-c) and the threads that
/// work. Long loops call [`Cancel::check`] at least every few milliseconds.
#[derive(Debug, Default)]
pub struct Cancel {
    flag: AtomicBool,
    ear: Option<Ear>,
}

/// Where the thread that hears ctrl-c works itself: what it asks between two steps.
struct Ear {
    thread: ThreadId,
    made: Instant,
    every: Duration,
    /// Nanoseconds after `made` at which to ask again.
    due: AtomicU64,
    is_asked_to_stop: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Cancel {
    /// A flag that is not set.
    pub const fn new() -> Self {
        Self {
            flag: AtomicBool::new(false),
            ear: None,
        }
    }

    /// A flag that sets itself when `is_asked_to_stop` says so. That is called in [`Cancel::check`], only by
    /// the thread that this was made on, and once in `every` at most.
    pub fn listening(
        every: Duration,
        is_asked_to_stop: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Self {
        Self {
            flag: AtomicBool::new(false),
            ear: Some(Ear {
                thread: current().id(),
                made: Instant::now(),
                every,
                due: AtomicU64::new(nanoseconds(every)),
                is_asked_to_stop: Box::new(is_asked_to_stop),
            }),
        }
    }

    /// Asks the work to stop.
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }

    /// Returns [`Error::Interrupted`] once the flag is set.
    #[inline]
    pub fn check(&self) -> Result<()> {
        if self.flag.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        match &self.ear {
            Some(ear) if ear.hears() => {
                self.cancel();
                Err(Error::Interrupted)
            }
            _ => Ok(()),
        }
    }
}

impl Ear {
    fn hears(&self) -> bool {
        if current().id() != self.thread {
            return false;
        }
        let now = self.made.elapsed();
        if nanoseconds(now) < self.due.load(Ordering::Relaxed) {
            return false;
        }
        self.due
            .store(nanoseconds(now + self.every), Ordering::Relaxed);
        (self.is_asked_to_stop)()
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl fmt::Debug for Ear {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Ear")
            .field("thread", &self.thread)
            .field("every", &self.every)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::Arc;

    use super::*;

    #[test]
    fn only_the_thread_that_listens_asks() {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let cancel = Cancel::listening(Duration::ZERO, move || {
            count.fetch_add(1, Ordering::Relaxed) == 2
        });
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(cancel.check().is_ok()));
        });
        assert_eq!(asked.load(Ordering::Relaxed), 0);
        let answers = [0; 4].map(|_| cancel.check().is_ok());
        assert_eq!(answers, [true, true, false, false]);
        // What asked it to stop isn't asked again: it may have only one answer of that kind.
        assert_eq!(asked.load(Ordering::Relaxed), 3);
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(cancel.check().is_err()));
        });
    }

    #[test]
    fn it_is_not_asked_before_it_is_due() {
        let cancel = Cancel::listening(Duration::from_secs(1 << 30), || true);
        assert!(cancel.check().is_ok());
        cancel.cancel();
        assert!(cancel.check().is_err());
    }
}
