//! The one way to threads: those of an OpenMP team, where one was shared, else rayon's.
//!
//! Torch's threads look for work for some milliseconds after each parallel operation. Threads of our own
//! would have to share the cores with them meanwhile, so that work whose parts torch's number of
//! threads decides is given to them ([`map`]): they are awake. A team belongs to the thread that
//! calls it; only the process's main thread's is used, as every other thread would get one of its own.
//!
//! A fork copies a pool but not its threads, and waiting for them would hang for ever
//! (torch's `DataLoader` forks its workers). So every use of threads goes through this file,
//! which notes the process that started them and does the work of any other process on the
//! calling thread.

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

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

/// `GOMP_parallel`, by which compilers start a parallel region of GNU's OpenMP (others have it too):
/// calls a function with `data` on every thread of the caller's team (of so many; 0: as many as its
/// settings say), and returns when all have returned.
pub type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// The team that was shared, and the process that has it.
static TEAM: OnceLock<(Parallel, u32)> = OnceLock::new();

/// Has [`map`] work on the threads of OpenMP's teams, as far as it is called on the main thread of this
/// process (on Linux). The first call counts.
///
/// # Safety
/// `parallel` does what [`Parallel`] says, for as long as the process lives.
pub unsafe fn share_team(parallel: Parallel) {
    TEAM.get_or_init(|| (parallel, std::process::id()));
}

/// Whether work that this thread asks for is done on a team that was shared.
pub fn has_team() -> bool {
    team().is_some()
}

fn team() -> Option<Parallel> {
    let (parallel, process) = TEAM.get()?;
    (*process == std::process::id() && is_main_thread()).then_some(*parallel)
}

#[cfg(target_os = "linux")]
fn is_main_thread() -> bool {
    // SAFETY: the call takes nothing and only returns the thread's number.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    thread == libc::c_long::from(std::process::id())
}

#[cfg(not(target_os = "linux"))]
fn is_main_thread() -> bool {
    false
}

/// Calls `work` on each part, on several threads where there are any; results in order of parts.
pub(crate) fn map<T: Send, R: Send>(parts: Vec<T>, work: impl Fn(T) -> R + Sync + Send) -> Vec<R> {
    if parts.len() < 2 {
        return parts.into_iter().map(work).collect();
    }
    if let Some(parallel) = team() {
        return map_on_team(parallel, parts, work);
    }
    if !is_ours() {
        return parts.into_iter().map(work).collect();
    }
    parts.into_par_iter().with_max_len(1).map(work).collect()
}

/// As [`map`], but one error ends it: no further parts are begun. On rayon's threads, all that there are.
pub(crate) fn try_for_each<T: Send>(
    parts: Vec<T>,
    work: impl Fn(T) -> Result<()> + Sync + Send,
) -> Result<()> {
    if parts.len() < 2 || !is_ours() {
        return parts.into_iter().try_for_each(work);
    }
    parts.into_par_iter().try_for_each(work)
}

/// What the threads of a team share.
struct Job<'a> {
    /// The next part that nobody has taken.
    next: AtomicUsize,
    parts: usize,
    work: &'a (dyn Fn(usize) + Sync),
    /// What the first panic said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// One thread's share of a [`Job`]: part after part, until none is left.
extern "C" fn take_parts(job: *mut c_void) {
    // SAFETY: `map_on_team` passes a job that lives until all threads have returned, and which threads
    // only share.
    let job = unsafe { &*job.cast::<Job<'_>>() };
    loop {
        let part = job.next.fetch_add(1, Ordering::Relaxed);
        if part >= job.parts {
            return;
        }
        // No panic may cross OpenMP.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.work)(part))) {
            job.next.store(job.parts, Ordering::Relaxed);
            lock(&job.panic).get_or_insert(panic);
        }
    }
}

fn map_on_team<T: Send, R: Send>(
    parallel: Parallel,
    parts: Vec<T>,
    work: impl Fn(T) -> R + Sync + Send,
) -> Vec<R> {
    let results: Vec<Mutex<Option<R>>> = parts.iter().map(|_| Mutex::new(None)).collect();
    let parts: Vec<Mutex<Option<T>>> = parts.into_iter().map(|t| Mutex::new(Some(t))).collect();
    let do_part = |at: usize| {
        let part = lock(&parts[at]).take();
        if let Some(part) = part {
            let result = work(part);
            *lock(&results[at]) = Some(result);
        }
    };
    let mut job = Job {
        next: AtomicUsize::new(0),
        parts: parts.len(),
        work: &do_part,
        panic: Mutex::new(None),
    };
    // SAFETY: by `share_team`'s contract this calls `take_parts` with the job and returns only when all
    // calls have, so that the job outlives them.
    unsafe { parallel(take_parts, (&raw mut job).cast(), 0, 0) };
    if let Some(panic) = lock(&job.panic).take() {
        resume_unwind(panic);
    }
    let results = results.into_iter();
    results
        .filter_map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect()
}

/// No lock is held while anything can panic.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A team of three made for the occasion.
    unsafe extern "C" fn three(
        call: extern "C" fn(*mut c_void),
        data: *mut c_void,
        _: c_uint,
        _: c_uint,
    ) {
        let data = data as usize;
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(move || call(data as *mut c_void));
            }
        });
    }

    #[test]
    fn a_team_does_each_part_once_in_order() {
        for count in [2_usize, 3, 4, 100] {
            let done = AtomicUsize::new(0);
            let squares = map_on_team(three, (0..count).collect(), |at| {
                done.fetch_add(1, Ordering::Relaxed);
                at * at
            });
            assert_eq!(squares, (0..count).map(|at| at * at).collect::<Vec<_>>());
            assert_eq!(done.into_inner(), count);
        }
    }

    #[test]
    fn a_panic_comes_back_to_the_caller() {
        let panic = catch_unwind(|| {
            map_on_team(three, (0..9).collect(), |at: usize| {
                assert_ne!(at, 5, "part five")
            })
        });
        let panic = panic.expect_err("part 5 panics");
        let said = panic.downcast_ref::<String>().expect("it has a message");
        assert!(said.contains("part five"));
    }

    #[test]
    fn a_thread_that_is_not_the_first_has_no_team() {
        let found = std::thread::spawn(|| (is_main_thread(), has_team())).join();
        assert_eq!(found.expect("it does not panic"), (false, false));
    }
}
