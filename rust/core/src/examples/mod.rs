//! The strongest rows, samples of all strengths, counts, sums and histograms of all features at
//! once, in one pass over sparse codes and in memory that does not grow with the rows.
//!
//! The result is a function of the set of (row, feature, strength) alone: an
//! [`Accumulator`] merges exactly, so how the rows were cut into shards, batches
//! and threads can't be seen in it. That asks four things of its parts:
//! [`heap`] breaks ties by the lower row, [`histogram`] has fixed edges, [`sum`] adds in integers
//! (floating sums depend on their order), and [`samples`] rank rows by a keyed hash.

pub mod accumulator;
pub mod codes;
pub mod collect;
pub mod heap;
pub mod histogram;
mod kept;
mod lines;
pub mod merge;
mod queue;
pub mod samples;
mod scan;
#[cfg(target_arch = "x86_64")]
mod scatter;
mod shards;
mod stage;
pub mod sum;
#[cfg(test)]
mod tests;

pub use accumulator::{Accumulator, Keep};
pub use codes::CodesView;
pub use collect::{collect, collect_shards};
pub use merge::Parts;
pub use shards::ShardFile;
