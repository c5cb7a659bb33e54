//! The rounded copy of a chunk of rows.

use super::certificate::{RowBound, LARGEST_NORM, SMALLEST_SCALE};
use super::coarse;
use super::dither::Dither;
use super::kernel::Kind;
use super::layout::{row_line, Pages, PANEL, STEP, TILE, TILE_ROWS};
use super::quantise::{dither_of_row, largest_weighted, magnitude, round_row};
use super::spread::Spread;
use super::Shape;
use crate::rows::{map_ranges_mut, Matrix};
use crate::simd::{Element, Simd};
use crate::Result;

/// Rows in tiles; the last step of each holds the further places.
#[derive(Debug)]
pub(super) struct Rows {
    tiles: Pages,
    steps: usize,
}

/// How rows are rounded.
pub(super) struct Rounder<'a> {
    pub shape: Shape,
    pub spread: &'a Spread,
    pub dither: &'a Dither,
    /// Whole numbers reach from minus this to this.
    pub levels: i32,
    pub simd: Simd,
    pub threads: usize,
}

impl Rows {
    /// Room for `rows` rows.
    pub(super) fn new(shape: Shape, rows: usize) -> Result<Self> {
        let steps = shape.steps() + 1;
        Ok(Self {
            tiles: Pages::new(rows.div_ceil(PANEL) * PANEL / TILE_ROWS * steps * TILE)?,
            steps,
        })
    }

    /// Steps a row, the one of further places included.
    pub(super) fn steps(&self) -> usize {
        self.steps
    }

    pub(super) fn tiles(&self) -> &[u8] {
        self.tiles.bytes()
    }

    /// Rounds rows `first..first + count` of `x`; returns each row's bound, or None for a row that is
    /// not finite. Room that is left over keeps what it held, which is harmless.
    pub(super) fn fill<E: Element>(
        &mut self,
        x: Matrix<'_, E>,
        first: usize,
        count: usize,
        rounder: &Rounder<'_>,
    ) -> Vec<Option<RowBound>> {
        let tile_bytes = self.steps * TILE;
        let used = count.div_ceil(TILE_ROWS) * tile_bytes;
        let steps = self.steps;
        let tiles = &mut self.tiles.bytes_mut()[..used];
        let cost = TILE_ROWS * rounder.shape.d_in;
        let parts = map_ranges_mut(tiles, tile_bytes, cost, rounder.threads, |range, tiles| {
            let mut bounds = Vec::new();
            let mut values = vec![0.0_f32; rounder.shape.d_in];
            let mut rounded = match rounder.shape.kind {
                Kind::Int8 => vec![0_i8; steps * STEP],
                Kind::Bf16 => Vec::new(),
            };
            let mut halves = vec![0_u16; steps * STEP / 2 - rounded.len() / 2];
            for row in range.start * TILE_ROWS..(range.end * TILE_ROWS).min(count) {
                for (value, x) in values.iter_mut().zip(x.row(first + row)) {
                    *value = x.to_f32();
                }
                let bound = match rounder.shape.kind {
                    Kind::Int8 => rounder.round(&values, &mut rounded),
                    Kind::Bf16 => coarse::round_row::<E>(&values, &mut halves, rounder.simd),
                };
                bounds.push(bound);
                if bound.is_none_or(|bound| bound.is_exact) {
                    continue;
                }
                let bytes: &[u8] = match rounder.shape.kind {
                    Kind::Int8 => bytemuck::cast_slice(&rounded),
                    Kind::Bf16 => bytemuck::cast_slice(&halves),
                };
                for (step, line) in bytes.chunks_exact(STEP).enumerate() {
                    let at = row_line(row - range.start * TILE_ROWS, step, steps);
                    tiles[at..at + STEP].copy_from_slice(line);
                }
            }
            bounds
        });
        parts.concat()
    }
}

impl Rounder<'_> {
    fn round(&self, values: &[f32], rounded: &mut [i8]) -> Option<RowBound> {
        let found = magnitude(values, self.simd);
        if !found.is_finite() {
            return None;
        }
        if found.norm > LARGEST_NORM {
            return Some(RowBound::exact());
        }
        if found.largest == 0.0 {
            return Some(RowBound::zero());
        }
        let levels = self.levels as f32;
        let largest = largest_weighted(values, &self.spread.weights, self.simd);
        let scale = (largest * (1.0 + 1e-6) / levels).max(SMALLEST_SCALE);
        let inverse = 1.0 / scale;
        let (body, places) = rounded.split_at_mut(rounded.len() - STEP);
        let body = &mut body[..values.len()];
        let (of_rows, of_weights) = (&self.dither.of_rows, &self.dither.of_weights);
        let mut sum = round_row(values, inverse, levels, of_rows, body, self.simd);
        let mut shift = dither_of_row(body, of_weights, self.simd);
        places.fill(0);
        let mut place = 0;
        for further in self.spread.dimensions.chunk_by(|left, right| left == right) {
            let dimension = further[0];
            // The same rounding as elsewhere, of a number that may be larger.
            let mut left = (values[dimension] * inverse + of_rows[dimension]).floor() as i32;
            let more = left - i32::from(body[dimension]);
            sum += more;
            shift += more as f32 * (0.5 - of_weights[dimension]);
            let mut take = || {
                let part = left.clamp(-self.levels, self.levels);
                left -= part;
                part as i8
            };
            body[dimension] = take();
            for slot in &mut places[place..place + further.len()] {
                *slot = take();
            }
            place += further.len();
        }
        shift += self.dither.constant;
        Some(RowBound::new(scale, sum, shift, found.norm, values.len()))
    }
}
