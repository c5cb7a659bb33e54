//! The rounded copy of the weights.

use std::ops::Range;

use super::certificate::{FeatureBounds, FeatureScale, Rounding, LARGEST_NORM, SMALLEST_SCALE};
use super::coarse;
use super::dither::Dither;
use super::kernel::Kind;
use super::layout::{Pages, STEP, TILE, TILE_ROWS};
use super::quantise::{dither_of_weights, magnitude, round_weights};
use super::Shape;
use crate::adam::AfterRow;
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
            let first = (blocks.start * TILE_ROWS).min(shape.d_sae);
            let last = (blocks.end * TILE_ROWS).min(shape.d_sae);
            let mut rounder = Rounder::new(shape, source.dither, first, tiles, simd);
            for feature in first..last {
                if feature % TILE_ROWS == 0 {
                    cancel.check()?;
                }
                if source.wanted.is_none_or(|wanted| wanted[feature]) {
                    rounder.round(feature, source.w.row(feature));
                }
            }
            Ok(rounder.finish())
        });
        for part in parts {
            self.note(part?, source.bias);
        }
        Ok(())
    }

    /// Takes the scales of features whose tiles were written.
    fn note<E: Element>(&mut self, found: Found, bias: &[E]) {
        for (feature, scale) in found {
            self.bad[feature] = scale.is_none();
            let scale = scale.unwrap_or_else(FeatureScale::boundless);
            self.bounds.set(feature, scale);
            self.note_bias(feature, bias[feature]);
        }
    }

    fn note_bias<E: Element>(&mut self, feature: usize, bias: E) {
        let bias = bias.to_f32();
        self.bad[feature] |= !bias.is_finite();
        self.bounds.set_bias(feature, bias, Rounding::of::<E>());
    }

    /// What rounds features as soon as they have moved; [`Weights::followed`] takes what it found.
    pub(super) fn rounders<'a>(
        &'a mut self,
        shape: Shape,
        dither: &'a Dither,
        simd: Simd,
    ) -> Rounders<'a> {
        Rounders {
            shape,
            dither,
            simd,
            rest: self.tiles.bytes_mut(),
        }
    }

    /// Takes the scales of what was rounded, and all biases.
    pub(super) fn followed<E: Element>(&mut self, found: Vec<Found>, bias: &[E]) {
        for part in found {
            self.note(part, bias);
        }
        for (feature, bias) in bias.iter().enumerate() {
            self.note_bias(feature, *bias);
        }
    }
}

/// Features and their scales, None where they are not finite.
pub(super) type Found = Vec<(usize, Option<FeatureScale>)>;

/// Writes the tiles of one range of features, in rising order.
pub(super) struct Rounder<'a> {
    shape: Shape,
    dither: &'a Dither,
    simd: Simd,
    /// Of the features from the first on.
    tiles: &'a mut [u8],
    first: usize,
    /// The block that lines are of.
    block: usize,
    /// The lines of a block's features, one after another.
    fours: Vec<u32>,
    halves: Vec<u16>,
    wanted: [usize; TILE_ROWS],
    count: usize,
    found: Found,
}

impl<'a> Rounder<'a> {
    /// `first`: of a block.
    fn new(
        shape: Shape,
        dither: &'a Dither,
        first: usize,
        tiles: &'a mut [u8],
        simd: Simd,
    ) -> Self {
        let zero = match shape.kind {
            Kind::Int8 => 128_u8,
            Kind::Bf16 => 0,
        };
        Self {
            shape,
            dither,
            simd,
            tiles,
            first,
            block: 0,
            fours: vec![u32::from_ne_bytes([zero; 4]); shape.steps() * TILE / 4],
            halves: vec![0; shape.d_in],
            wanted: [0; TILE_ROWS],
            count: 0,
            found: Vec::new(),
        }
    }

    pub(super) fn round<E: Element>(&mut self, feature: usize, w: &[E]) {
        let at = feature - self.first;
        if at / TILE_ROWS != self.block {
            self.write();
            self.block = at / TILE_ROWS;
        }
        let (at, d_in) = (at % TILE_ROWS, self.shape.d_in);
        let rounded: &mut [u8] = bytemuck::cast_slice_mut(&mut self.fours);
        let line = &mut rounded[at * self.shape.steps() * STEP..];
        let scale = match self.shape.kind {
            Kind::Int8 => round_feature(self.dither, w, &mut line[..d_in], self.simd),
            Kind::Bf16 => {
                let scale = coarse::round_feature(w, &mut self.halves, self.simd);
                line[..2 * d_in].copy_from_slice(bytemuck::cast_slice(&self.halves));
                scale
            }
        };
        self.found.push((feature, scale));
        self.wanted[self.count] = at;
        self.count += 1;
    }

    /// Writes the block's tiles.
    fn write(&mut self) {
        if self.count == 0 {
            return;
        }
        let bytes = self.shape.steps() * TILE;
        let tiles = &mut self.tiles[self.block * bytes..(self.block + 1) * bytes];
        // Pages: aligned for any number.
        transpose(
            &self.fours,
            bytemuck::cast_slice_mut(tiles),
            &self.wanted[..self.count],
        );
        self.count = 0;
    }

    pub(super) fn finish(mut self) -> Found {
        self.write();
        self.found
    }
}

impl AfterRow for Rounder<'_> {
    fn moved(&mut self, feature: usize, w: &[f32]) {
        self.round(feature, w);
    }

    fn end(&mut self) {
        self.write();
    }
}

/// Shares the tiles out.
pub(super) struct Rounders<'a> {
    shape: Shape,
    dither: &'a Dither,
    simd: Simd,
    rest: &'a mut [u8],
}

impl<'a> Rounders<'a> {
    /// Of the next features, whole blocks but for the last.
    pub(super) fn take(&mut self, features: Range<usize>) -> Rounder<'a> {
        let bytes = features.len().div_ceil(TILE_ROWS) * self.shape.steps() * TILE;
        let (tiles, rest) = std::mem::take(&mut self.rest).split_at_mut(bytes);
        self.rest = rest;
        Rounder::new(self.shape, self.dither, features.start, tiles, self.simd)
    }
}

/// None where the feature is not finite.
fn round_feature<E: Element>(
    dither: &Dither,
    w: &[E],
    line: &mut [u8],
    simd: Simd,
) -> Option<FeatureScale> {
    let found = magnitude(w, simd);
    if !found.is_finite() || found.norm > LARGEST_NORM {
        line.fill(128);
        return found.is_finite().then(FeatureScale::boundless);
    }
    // A little more than the largest needs, so that no rounding leaves the range.
    let scale = (found.largest * (1.0 + 1e-6) / 127.0).max(SMALLEST_SCALE);
    round_weights(w, 1.0 / scale, &dither.of_weights, line, simd);
    let shift = dither_of_weights(line, &dither.of_rows, simd);
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
