//! The computing core of `r1sae-fast`: everything here is plain Rust on slices
//! and files, and never names Python.
//!
//! The modules follow the data: [`shard`] holds activations and codes on disk,
//! [`screen`] finds codes without all pre-activations, [`select`] turns pre-activations into sparse
//! codes, [`decode`] turns sparse codes back into activations, [`grad`] and [`adam`] train,
//! [`examples`] keeps each feature's strongest rows, [`clusters`] sorts all activations by feature.
//! [`fp8`] quantises a model's weights and activations, [`r1`] is what stands between the products
//! of its forward.

pub mod adam;
pub mod cancel;
pub mod clusters;
pub mod decode;
pub mod error;
pub mod examples;
pub mod fp8;
pub mod grad;
mod lines;
pub mod memory;
pub mod pool;
pub mod r1;
pub mod rows;
pub mod screen;
pub mod select;
pub mod shard;
pub mod simd;

pub use cancel::Cancel;
pub use error::{Error, Result};
