//! Runs core work with the GIL released, while ctrl-c is still heard.

use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use r1sae_core::{pool, Cancel, Result};

use crate::errors::to_py;

/// How often a long call looks for signals.
const POLL: Duration = Duration::from_millis(50);

/// Runs `work` on another thread with the GIL released. Python's signal handlers
/// run every 50 ms; when one raises (ctrl-c), the work is cancelled, awaited, and
/// the handler's exception is returned. For calls that may take longer than a
/// moment; see [`run`] for those that may be short.
pub fn run_interruptible<T, F>(py: Python<'_>, work: F) -> PyResult<T>
where
    T: Send,
    F: FnOnce(&Cancel) -> Result<T> + Send,
{
    run_cancellable(py, &Cancel::new(), work)
}

/// As [`run_interruptible`], for calls on threads that hear no signals: another one sets `cancel`, and
/// the call ends as with ctrl-c.
pub fn run_cancellable<T, F>(py: Python<'_>, cancel: &Cancel, work: F) -> PyResult<T>
where
    T: Send,
    F: FnOnce(&Cancel) -> Result<T> + Send,
{
    std::thread::scope(|scope| {
        let (sender, mut receiver) = channel();
        scope.spawn(move || {
            // The receiver outlives the scope's threads, so a send can't fail.
            let _ = sender.send(work(cancel));
        });
        let mut raised = None;
        loop {
            // By unique reference: a shared one to a `Receiver` may not change threads.
            let waiting = &mut receiver;
            match py.detach(move || waiting.recv_timeout(POLL)) {
                Ok(result) => return raised.map_or_else(|| result.map_err(to_py), Err),
                Err(RecvTimeoutError::Timeout) => {
                    if raised.is_none() {
                        if let Err(error) = py.check_signals() {
                            cancel.cancel();
                            raised = Some(error);
                        }
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    // The worker panicked; the scope re-raises the panic on exit.
                    return Err(raised.unwrap_or_else(|| to_py(r1sae_core::Error::Interrupted)));
                }
            }
        }
    })
}

/// As [`run`], for work on as many threads as torch has: where torch's own threads do it, long work too
/// stays on this thread, which is one of them, and Python's signal handlers run between two steps. So
/// `work` may hold nothing then that a handler could want: no lock, no state of the CPU.
pub fn run_with_torch<T, F>(py: Python<'_>, long: bool, work: F) -> PyResult<T>
where
    T: Send,
    F: FnOnce(&Cancel) -> Result<T> + Send,
{
    if !long || !pool::has_team() {
        return run(py, long, work);
    }
    let raised = Arc::new(Mutex::new(None));
    let heard = Arc::clone(&raised);
    let cancel = Cancel::listening(POLL, move || {
        let Err(error) = Python::attach(|py| py.check_signals()) else {
            return false;
        };
        *heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        true
    });
    let result = py.detach(|| work(&cancel));
    let raised = raised.lock().unwrap_or_else(PoisonError::into_inner).take();
    raised.map_or_else(|| result.map_err(to_py), Err)
}

/// As [`run_with_torch`], for work in whose midst no handler may run on the thread that does it: on torch's
/// threads they run after it. Where it `takes_seconds`, or there are none of torch's, it is done by a thread of its
/// own, and handlers run on this one meanwhile.
pub fn run_undisturbed<T, F>(
    py: Python<'_>,
    long: bool,
    takes_seconds: bool,
    work: F,
) -> PyResult<T>
where
    T: Send,
    F: FnOnce(&Cancel) -> Result<T> + Send,
{
    let on_team = pool::has_team() && !takes_seconds;
    run(py, long && !on_team, work)
}

/// Releases the GIL around `work`; listens for ctrl-c where it is `long`. Work of a few
/// milliseconds is not: a thread of its own would cost it more than it is worth.
pub fn run<T, F>(py: Python<'_>, long: bool, work: F) -> PyResult<T>
where
    T: Send,
    F: FnOnce(&Cancel) -> Result<T> + Send,
{
    if long {
        run_interruptible(py, work)
    } else {
        py.detach(|| work(&Cancel::new())).map_err(to_py)
    }
}
