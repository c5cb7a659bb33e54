//! The truth, in its plainest form.

use super::{Block, Tiles};
use crate::screen::layout::{PANEL, STEP, TILE, TILE_ROWS};

pub(super) fn multiply(
    x: Tiles<'_>,
    rows: usize,
    w: Tiles<'_>,
    steps: usize,
    block: &mut Block,
    fresh: bool,
) {
    for (row, sums) in block.chunks_exact_mut(PANEL).enumerate().take(rows) {
        if fresh {
            sums.fill(0);
        }
        let x_tiles = &x.bytes[row / TILE_ROWS * x.stride..];
        for (half, sums) in sums.chunks_exact_mut(TILE_ROWS).enumerate() {
            let w_tiles = &w.bytes[half * w.stride..];
            for step in 0..steps {
                let line = &x_tiles[step * TILE + row % TILE_ROWS * STEP..][..STEP];
                let tile = &w_tiles[step * TILE..][..TILE];
                for (x, w) in line.chunks_exact(4).zip(tile.chunks_exact(STEP)) {
                    for (sum, w) in sums.iter_mut().zip(w.chunks_exact(4)) {
                        for (x, w) in x.iter().zip(w) {
                            *sum += i32::from(*x as i8) * i32::from(*w);
                        }
                    }
                }
            }
        }
    }
}
