//! A shuffled order of rows that reads the disk in long pieces.
//!
//! The rows are cut into blocks of neighbours, the blocks are shuffled, and then the rows of so many
//! blocks at a time (a window). Every row comes exactly once, and like [`Permutation`] the order is
//! a function of its settings that takes no memory, so any place can be asked for alone. Where the
//! cuts lie differs from epoch to epoch; the rows that are left over after the last whole block
//! (others in every epoch) come in the last window.

use std::ops::Range;

use super::order::{mix, Permutation, GOLDEN};
use crate::{Cancel, Error, Result};

/// Places worked out between two looks at the cancel flag.
const BLOCK_PLACES: u64 = 4096;

/// How rows are cut and shuffled together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Rows of a block.
    pub rows: u64,
    /// Blocks of a window.
    pub window: u64,
}

/// The order of one epoch.
#[derive(Debug, Clone)]
pub struct BlockOrder {
    rows: u64,
    blocks: Blocks,
    /// The row that the first block starts with; blocks go on behind the last row with the first.
    offset: u64,
    /// Of whole blocks.
    order: Permutation,
    seed: u64,
    epoch: u64,
}

impl BlockOrder {
    /// The order of `rows` rows in epoch `epoch` under `seed`.
    ///
    /// # Errors
    /// Blocks or windows of nothing, or so large that their rows can't be counted.
    pub fn new(rows: u64, seed: u64, epoch: u64, blocks: Blocks) -> Result<Self> {
        if blocks
            .rows
            .checked_mul(blocks.window)
            .is_none_or(|all| all == 0)
        {
            return Err(Error::InvalidArgument(format!(
                "windows of {} blocks of {} rows: expected at least one of each, and fewer than \
                 2^64 rows in all",
                blocks.window, blocks.rows
            )));
        }
        let key = mix(mix(seed ^ GOLDEN).wrapping_add(epoch));
        Ok(Self {
            rows,
            blocks,
            offset: key.checked_rem(rows).unwrap_or_default(),
            order: Permutation::new(rows / blocks.rows, mix(key), epoch),
            seed: key,
            epoch,
        })
    }

    /// Rows of a window that isn't the last.
    fn window_rows(&self) -> u64 {
        self.blocks.rows * self.blocks.window
    }

    /// How many windows there are; the last may be shorter or, by what is left over, longer.
    pub fn windows(&self) -> u64 {
        self.order.rows().div_ceil(self.blocks.window).max(1)
    }

    /// The window of `place`.
    pub fn window_of(&self, place: u64) -> u64 {
        (place / self.window_rows()).min(self.windows() - 1)
    }

    /// The places of a window.
    fn places(&self, window: u64) -> Range<u64> {
        let start = window * self.window_rows();
        if window + 1 >= self.windows() {
            start..self.rows
        } else {
            start..start + self.window_rows()
        }
    }

    /// The row at place `slot` of a window, before shuffling.
    fn unshuffled(&self, window: u64, slot: u64) -> u64 {
        let number = window * self.blocks.window + slot / self.blocks.rows;
        let whole = self.order.rows();
        // What is left over counts as the block behind the whole ones.
        let block = if number < whole {
            self.order.get(number)
        } else {
            whole
        };
        let row = block * self.blocks.rows + slot % self.blocks.rows;
        // Below 2 * rows, which may not fit.
        let until_end = self.rows - self.offset;
        if row < until_end {
            row + self.offset
        } else {
            row - until_end
        }
    }

    /// The rows at the places `places`, all below the number of rows.
    ///
    /// # Errors
    /// `cancel`.
    pub fn get_range(&self, places: Range<u64>, cancel: &Cancel) -> Result<Vec<u64>> {
        let mut rows = Vec::with_capacity(places.end.saturating_sub(places.start) as usize);
        let mut place = places.start;
        while place < places.end {
            let window = self.window_of(place);
            let all = self.places(window);
            let key = mix(self.seed.wrapping_add(mix(window.wrapping_add(1))));
            let inner = Permutation::new(all.end - all.start, key, self.epoch);
            while place < places.end.min(all.end) {
                if place.is_multiple_of(BLOCK_PLACES) {
                    cancel.check()?;
                }
                rows.push(self.unshuffled(window, inner.get(place - all.start)));
                place += 1;
            }
        }
        Ok(rows)
    }

    /// The rows of a window as ranges: its blocks.
    pub fn window_ranges(&self, window: u64) -> Vec<Range<u64>> {
        let all = self.places(window.min(self.windows() - 1));
        let length = all.end - all.start;
        let mut ranges = Vec::new();
        let mut slot = 0;
        while slot < length {
            let first = self.unshuffled(window, slot);
            let of_block = self.blocks.rows.min(length - slot);
            // A block may go on behind the last row with the first.
            let here = of_block.min(self.rows - first);
            ranges.push(first..first + here);
            if here < of_block {
                ranges.push(0..of_block - here);
            }
            slot += of_block;
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(order: &BlockOrder) -> Vec<u64> {
        order.get_range(0..order.rows, &Cancel::new()).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_row_once_and_any_piece_alone(
            rows in 0_u64..4000, of_block in 1_u64..200, window in 1_u64..9,
            seed: u64, epoch: u64, cut in 0.0..1.0_f64,
        ) {
            let blocks = Blocks { rows: of_block, window };
            let order = BlockOrder::new(rows, seed, epoch, blocks).unwrap();
            let found = all(&order);
            let mut sorted = found.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..rows).collect::<Vec<_>>());
            let cut = (rows as f64 * cut) as u64;
            let mut pieces = order.get_range(0..cut, &Cancel::new()).unwrap();
            pieces.extend(order.get_range(cut..rows, &Cancel::new()).unwrap());
            prop_assert_eq!(pieces, found);
        }

        #[test]
        fn windows_are_made_of_blocks(
            rows in 1_u64..4000, of_block in 1_u64..200, window in 1_u64..9, seed: u64,
        ) {
            let order = BlockOrder::new(rows, seed, 0, Blocks { rows: of_block, window }).unwrap();
            let found = all(&order);
            for window in 0..order.windows() {
                let places = order.places(window);
                let mut rows = found[places.start as usize..places.end as usize].to_vec();
                rows.sort_unstable();
                let mut ranges: Vec<_> =
                    order.window_ranges(window).into_iter().flatten().collect();
                ranges.sort_unstable();
                prop_assert_eq!(rows, ranges);
                prop_assert!(order.window_of(places.start) == window);
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_windows_mix() {
        let blocks = Blocks {
            rows: 10,
            window: 5,
        };
        let order = |seed, epoch| all(&BlockOrder::new(1000, seed, epoch, blocks).unwrap());
        let first = order(1, 0);
        for other in [order(1, 1), order(2, 0), order(0, 1)] {
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 12, "{same} of 1000 places agree, 1 expected");
        }
        // Neighbours in the order are rarely neighbours in the shards: 1 in 25 pairs expected, as a
        // window has 50 rows and each row two neighbours.
        let near = first
            .windows(2)
            .filter(|pair| pair[0].abs_diff(pair[1]) == 1)
            .count();
        assert!(near < 100, "{near}");
    }

    #[test]
    fn nothing_to_shuffle_with() {
        for (rows, window) in [(0, 1), (1, 0), (u64::MAX, 2)] {
            assert!(BlockOrder::new(5, 0, 0, Blocks { rows, window }).is_err());
        }
    }
}
