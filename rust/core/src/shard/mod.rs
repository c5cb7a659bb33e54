//! Shards: activations and sparse codes on disk, as plain safetensors files.
//!
//! A folder of shards is indexed by a manifest (kept by the Python side); this
//! module knows single files and ordered lists of them:
//! - [`header`]: what a file claims to hold, checked against its size;
//! - [`codes`]: code shards (`values`, `indices`, `row_offsets`, token columns).
//!
//! Files are little-endian, as safetensors prescribes; the views below are the
//! file's own bytes, so only little-endian machines are supported.

#[cfg(target_endian = "big")]
compile_error!("shards are read in place, which needs a little-endian machine");

pub mod codes;
pub mod columns;
pub mod header;
mod mapped;

pub use codes::{CodeShardReader, CodeView, Indices, Values};
pub use columns::Columns;
