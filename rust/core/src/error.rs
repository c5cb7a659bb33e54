//! The one error type of the crate. Each message says what was found, what was
//! expected and what to do.

use std::path::PathBuf;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong in the core.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument is out of its range or two arguments disagree.
    #[error("{0}")]
    InvalidArgument(String),

    /// A NaN or an infinity where only finite numbers are allowed.
    #[error("{what} holds a NaN or infinite value in row {row}; remove or mask that row before encoding")]
    NonFinite {
        /// Which array.
        what: &'static str,
        /// First offending row.
        row: usize,
    },

    /// A file is not a shard of ours, or was truncated, padded or altered.
    #[error("{path}: {problem}")]
    BadShard {
        /// The file.
        path: PathBuf,
        /// What was found, what was expected, and what to do.
        problem: String,
    },

    /// The operating system refused a file operation.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },

    /// Ctrl-c, or the caller's wish.
    #[error("interrupted")]
    Interrupted,
}
