//! The one place where the core's errors become Python's.

use pyo3::exceptions::{PyFileNotFoundError, PyKeyboardInterrupt, PyOSError, PyValueError};
use pyo3::prelude::*;
use r1sae_core::Error;

/// Builds `r1sae_fast.errors.<class>(message)`; a plain `ValueError` if that
/// module can't be imported.
fn own_error(class: &str, message: String) -> PyErr {
    Python::attach(|py| {
        match py
            .import("r1sae_fast.errors")
            .and_then(|module| module.getattr(class))
        {
            Ok(class) => match class.call1((message,)) {
                Ok(instance) => PyErr::from_value(instance),
                Err(error) => error,
            },
            Err(_) => PyValueError::new_err(message),
        }
    })
}

/// Maps the core's error to the Python exception that users know.
pub fn to_py(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::InvalidArgument(_) => PyValueError::new_err(message),
        Error::NonFinite { .. } => own_error("NonFiniteError", message),
        Error::BadShard { .. } => own_error("ShardError", message),
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            PyFileNotFoundError::new_err(message)
        }
        Error::Io { source, .. } => match source.raw_os_error() {
            // OSError(errno, text) so that callers can test `.errno` (ENOSPC, EACCES...).
            Some(code) => PyOSError::new_err((code, message)),
            None => PyOSError::new_err(message),
        },
        Error::Interrupted => PyKeyboardInterrupt::new_err(()),
        _ => PyValueError::new_err(message),
    }
}
