//! All activations sorted by feature, and what each feature's tell: a counting sort that goes by
//! way of a file, so that memory does not grow with the rows.
//!
//! - [`spill`]: activations `(feature, row, strength)` scattered into buckets of a file, each of
//!   whole features;
//! - [`scatter`]: code shards into such a file, on several threads;
//! - [`place`]: what token each row is;
//! - [`page`]: the statistics of one feature from its activations;
//! - [`bucket`]: a bucket sorted, its features' pages and activations as [`columns`];
//! - [`coactivation`], [`partners`]: how often features are active together, exactly, and the
//!   features that are so most of all by pointwise mutual information;
//! - [`contexts`]: examples with the tokens around them, for other tools' pages.
//!
//! What comes out is a function of the set of (row, feature, strength) and of the rows' places.

pub mod bucket;
pub mod coactivation;
#[expect(
    missing_docs,
    reason = "the fields are columns of the tables in features/schema.py"
)]
pub mod columns;
pub mod contexts;
#[expect(
    missing_docs,
    reason = "the fields are columns of the tables in features/schema.py"
)]
pub mod page;
pub mod partners;
pub mod place;
pub mod scatter;
pub mod spill;
#[cfg(test)]
mod tests;
mod tokens;

pub use bucket::{gather, Work};
pub use coactivation::Coactivation;
pub use columns::Columns;
pub use page::{Options, Texts};
pub use place::{Place, Places, Stretches};
pub use scatter::{count_shards, scatter_shards};
pub use spill::{Record, Spill};
pub use tokens::Bases;
