//! How the 8-bit copies lie in memory: in tiles of 1024 bytes, which every kernel reads from end to
//! end, and which are what AMX loads at once.
//!
//! A tile of weights holds 16 features by 64 dimensions: 16 lines, each the next 4 dimensions of the
//! 16 features. A tile of rows holds 16 rows by 64 dimensions, row after row. Tiles follow one another
//! by dimension, then by feature or row.

use memmap2::MmapMut;

use crate::{Error, Result};

/// Rows, or features, of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Dimensions of a tile.
pub(super) const STEP: usize = 64;
/// Bytes of a tile.
pub(super) const TILE: usize = TILE_ROWS * STEP;
/// Features, and rows, that a kernel takes at once: two tiles.
pub(super) const PANEL: usize = 2 * TILE_ROWS;

/// Zeroed pages of memory, large ones where the system has them.
#[derive(Debug)]
pub(super) struct Pages(MmapMut);

impl Pages {
    pub(super) fn new(bytes: usize) -> Result<Self> {
        let map = MmapMut::map_anon(bytes.max(1)).map_err(|error| {
            Error::InvalidArgument(format!(
                "{bytes} bytes for the 8-bit copy can't be had ({error}); use a smaller batch, or no screen"
            ))
        })?;
        // Only a wish: thousands of small pages would cost a look-up each.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self(map))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// The 64 bytes of one row and one step, within tiles of rows that have `steps` steps.
#[inline(always)]
pub(super) fn row_line(row: usize, step: usize, steps: usize) -> usize {
    (row / TILE_ROWS * steps + step) * TILE + row % TILE_ROWS * STEP
}
