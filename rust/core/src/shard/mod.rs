//! Shards: activations and sparse codes on disk, as plain safetensors files.
//!
//! A folder of shards is indexed by a manifest (kept by the Python side); this
//! module knows single files and ordered lists of them:
//! - [`header`]: what a file claims to hold, checked against its size;
//! - [`activations`], [`codes`]: one file of either kind, mapped for reading;
//! - [`code_order`]: what holds within a row of codes;
//! - [`activation_set`], [`code_set`]: many files as one array of rows, with [`gather`]
//!   for what they have in common and [`fp8`] for what is decoded on the way;
//! - [`order`], [`block_order`]: shuffled orders of rows that take no memory;
//! - [`buffers`]: memory for batches that is used again;
//! - [`write`](mod@write), [`lock`]: one file written atomically, by one writer a folder.
//!
//! Files are little-endian, as safetensors prescribes; the views below are the
//! file's own bytes, so only little-endian machines are supported.

#[cfg(target_endian = "big")]
compile_error!("shards are read in place, which needs a little-endian machine");

pub mod activation_set;
pub mod activations;
pub mod block_order;
pub mod buffers;
pub mod code_order;
pub mod code_set;
pub mod codes;
mod cold;
pub mod columns;
mod copy;
pub mod fp8;
pub mod gather;
pub mod header;
pub mod lock;
mod mapped;
pub mod order;
pub mod write;

pub use codes::{CodeShardReader, CodeView, Indices, Values};
pub use columns::Columns;

pub use memmap2::MmapMut as PrivateMap;
pub use safetensors::tensor::Dtype;

/// The dtypes that occur in shards, by their safetensors names.
pub fn dtype_from_name(name: &str) -> Option<Dtype> {
    [
        Dtype::U8,
        Dtype::F8_E4M3,
        Dtype::U16,
        Dtype::F16,
        Dtype::BF16,
        Dtype::I32,
        Dtype::U32,
        Dtype::F32,
        Dtype::I64,
    ]
    .into_iter()
    .find(|dtype| dtype.to_string() == name)
}
