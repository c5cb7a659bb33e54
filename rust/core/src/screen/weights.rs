//! The rounded copy of the weights.

use super::certificate::{FeatureBounds, FeatureScale, Rounding, LARGEST_NORM, SMALLEST_SCALE};
use super::coarse;
use super::dither::Dither;
use super::kernel::Kind;
use super::layout::{Pages, STEP, TILE, TILE_ROWS};
use super::quantise::{dither_of_weights, magnitude, round_weights};
use super::Shape;
use crate::rows::{map_ranges_mut, Matrix};
use crate::simd::{Element, Simd};
use crate::{Cancel, Result};

/// The weights in tiles, and the bounds that go with them.
#[derive(Debug)]
pub(super) struct Weights {
    pub tiles: Pages,
    pub bounds: FeatureBounds,
    /// Features whose weights or bias are not finite.
    bad: Vec<bool>,
}

/// What to round, and how.
pub(super) struct Source<'a, E> {
    pub w: Matrix<'a, E>,
    pub bias: &'a [E],
    pub dither: &'a Dither,
    /// Which features; None for all.
    pub wanted: Option<&'a [bool]>,
}

impl Weights {
    pub(super) fn new(shape: Shape) -> Result<Self> {
        Ok(Self {
            tiles: Pages::new(shape.blocks() * shape.steps() * TILE)?,
            bounds: FeatureBounds::with_len(shape.blocks() * TILE_ROWS),
            bad: vec![false; shape.d_sae],
        })
    }

    /// The first feature whose weights or bias hold a NaN or an infinity.
    pub(super) fn first_bad(&self) -> Option<usize> {
        self.bad.iter().position(|bad| *bad)
    }

    /// Rounds features, in one pass over their weights.
    pub(super) fn refresh<E: Element>(
        &mut self,
        shape: Shape,
        source: &Source<'_, E>,
        simd: Simd,
        threads: usize,
        cancel: &Cancel,
    ) -> Result<()> {
        let block_bytes = shape.steps() * TILE;
        let tiles = self.tiles.bytes_mut();
        let parts = map_ranges_mut(tiles, block_bytes, block_bytes, threads, |blocks, tiles| {
            let mut found = Vec::new();
            let zero = match shape.kind {
                Kind::Int8 => 128_u8,
                Kind::Bf16 => 0,
            };
            let mut fours = vec![u32::from_ne_bytes([zero; 4]); block_bytes / 4];
            let mut halves = vec![0_u16; shape.d_in];
            for (block, tiles) in blocks.zip(tiles.chunks_exact_mut(block_bytes)) {
                cancel.check()?;
                let first = (block * TILE_ROWS).min(shape.d_sae);
                let last = (first + TILE_ROWS).min(shape.d_sae);
                let is_wanted = |feature: usize| source.wanted.is_none_or(|wanted| wanted[feature]);
                let (mut wanted, mut count) = ([0; TILE_ROWS], 0);
                let rounded: &mut [u8] = bytemuck::cast_slice_mut(&mut fours);
                for feature in (first..last).filter(|feature| is_wanted(*feature)) {
                    let line = &mut rounded[(feature - first) * shape.steps() * STEP..];
                    let scale = match shape.kind {
                        Kind::Int8 => round_feature(source, feature, &mut line[..shape.d_in], simd),
                        Kind::Bf16 => {
                            let scale =
                                coarse::round_feature(source.w.row(feature), &mut halves, simd);
                            line[..2 * shape.d_in].copy_from_slice(bytemuck::cast_slice(&halves));
                            scale
                        }
                    };
                    found.push((feature, scale));
                    wanted[count] = feature - first;
                    count += 1;
                }
                // Pages: aligned for any number.
                transpose(&fours, bytemuck::cast_slice_mut(tiles), &wanted[..count]);
            }
            Ok(found)
        });
        for part in parts.into_iter().collect::<Result<Vec<_>>>()? {
            for (feature, scale) in part {
                let bias = source.bias[feature].to_f32();
                self.bad[feature] = scale.is_none() || !bias.is_finite();
                let scale = scale.unwrap_or_else(FeatureScale::boundless);
                self.bounds.set(feature, scale);
                self.bounds.set_bias(feature, bias, Rounding::of::<E>());
            }
        }
        Ok(())
    }
}

/// None where the feature is not finite.
fn round_feature<E: Element>(
    source: &Source<'_, E>,
    feature: usize,
    line: &mut [u8],
    simd: Simd,
) -> Option<FeatureScale> {
    let w = source.w.row(feature);
    let found = magnitude(w, simd);
    if !found.is_finite() || found.norm > LARGEST_NORM {
        line.fill(128);
        return found.is_finite().then(FeatureScale::boundless);
    }
    // A little more than the largest needs, so that no rounding leaves the range.
    let scale = (found.largest * (1.0 + 1e-6) / 127.0).max(SMALLEST_SCALE);
    round_weights(w, 1.0 / scale, &source.dither.of_weights, line, simd);
    let shift = dither_of_weights(line, &source.dither.of_rows, simd);
    Some(FeatureScale::new(scale, shift, found.norm, w.len()))
}

/// Numbers of four dimensions that a line of a tile holds, one a feature.
const FOURS: usize = STEP / 4;

/// Writes the lines of `wanted` features (of [`TILE_ROWS`], one after another in `rounded`) into
/// their block's tiles, four dimensions at a time.
fn transpose(rounded: &[u32], tiles: &mut [u32], wanted: &[usize]) {
    let (lines, _) = rounded.as_chunks::<FOURS>();
    let (tiles, _) = tiles.as_chunks_mut::<{ FOURS * TILE_ROWS }>();
    let steps = lines.len() / TILE_ROWS;
    for (step, tile) in tiles.iter_mut().enumerate().take(steps) {
        for feature in wanted {
            // Without checks of bounds it takes a third of the time.
            let (line, feature) = (&lines[feature * steps + step], feature % TILE_ROWS);
            for (at, four) in line.iter().enumerate() {
                tile[at * TILE_ROWS + feature] = *four;
            }
        }
    }
}

/// What the tiles hold for a feature and a dimension.
#[inline]
pub(super) fn weight_at(tiles: &[u8], steps: usize, feature: usize, dimension: usize) -> u8 {
    let tile = feature / TILE_ROWS * steps + dimension / STEP;
    tiles[tile * TILE + dimension % STEP / 4 * STEP + feature % TILE_ROWS * 4 + dimension % 4]
}
