//! Outlier dimensions, spread over several 8-bit numbers.
//!
//! A row's unit is its largest magnitude over 127, so a few large dimensions (a residual stream has
//! some, always the same ones) would make it coarse for all others. Such a dimension gets further
//! places in the product, with the same weights: its whole number is split among them, and the
//! largest that a row's unit must allow for shrinks as many times.

use super::layout::{Pages, STEP, TILE, TILE_ROWS};
use super::weights::weight_at;
use super::Shape;
use crate::rows::{map_ranges_mut, Matrix};
use crate::simd::Element;
use crate::Result;

/// Further places: one step's worth.
const PLACES: usize = STEP;
/// Rows that are looked at for large dimensions.
const SAMPLE: usize = 64;
/// A new choice must promise a unit this many times smaller, else the old one is kept.
const WORTH: f32 = 1.2;

/// Which dimensions have further places, and the weights at those.
#[derive(Debug)]
pub(super) struct Spread {
    /// The dimension of each place; places of a dimension follow one another.
    pub dimensions: Vec<usize>,
    /// For each dimension, one over the number of its places.
    pub weights: Vec<f32>,
    /// One tile for each 16 features.
    pub tiles: Pages,
}

impl Spread {
    /// No dimension has further places.
    pub(super) fn none(shape: Shape) -> Result<Self> {
        Ok(Self {
            dimensions: Vec::new(),
            weights: vec![1.0; shape.d_in],
            tiles: Pages::new(shape.blocks() * TILE)?,
        })
    }

    /// Chooses places for the dimensions that are large in `x`, unless those there are do as well.
    /// Returns whether the choice changed, so that [`Spread::refresh`] is due.
    pub(super) fn adapt<E: Element>(&mut self, x: Matrix<'_, E>) -> bool {
        let typical = typical_magnitudes(x);
        let mut places: Vec<u32> = vec![1; typical.len()];
        for _ in 0..PLACES.min(typical.len()) {
            // A residual stream has a handful of large dimensions: each round finds the largest left.
            let share = |dimension: &usize| typical[*dimension] / places[*dimension] as f32;
            let largest =
                (0..typical.len()).max_by(|left, right| share(left).total_cmp(&share(right)));
            if let Some(largest) = largest {
                places[largest] += 1;
            }
        }
        let unit = |weights: &dyn Fn(usize) -> f32| {
            let shares = typical.iter().enumerate();
            shares.fold(0.0_f32, |unit, (at, typical)| {
                unit.max(typical * weights(at))
            })
        };
        let old = unit(&|at| self.weights[at]);
        let new = unit(&|at| 1.0 / places[at] as f32);
        if old <= WORTH * new {
            return false;
        }
        self.dimensions.clear();
        for (dimension, places) in places.iter().enumerate() {
            self.weights[dimension] = 1.0 / *places as f32;
            let further = std::iter::repeat_n(dimension, *places as usize - 1);
            self.dimensions.extend(further);
        }
        true
    }

    /// Copies the weights of the places out of all weights.
    pub(super) fn refresh(&mut self, shape: Shape, weights: &[u8], threads: usize) {
        let steps = shape.steps();
        let dimensions = &self.dimensions;
        // Each place is a look-up elsewhere in memory.
        let cost = dimensions.len() * TILE_ROWS * STEP;
        map_ranges_mut(
            self.tiles.bytes_mut(),
            TILE,
            cost,
            threads,
            |blocks, tiles| {
                for (block, tile) in blocks.zip(tiles.chunks_exact_mut(TILE)) {
                    tile.fill(128);
                    for (place, dimension) in dimensions.iter().enumerate() {
                        for feature in 0..TILE_ROWS {
                            let at = block * TILE_ROWS + feature;
                            tile[place / 4 * STEP + feature * 4 + place % 4] =
                                weight_at(weights, steps, at, *dimension);
                        }
                    }
                }
            },
        );
    }
}

/// The root mean square of each dimension over rows of norm 1 (so that no row outweighs another).
fn typical_magnitudes<E: Element>(x: Matrix<'_, E>) -> Vec<f32> {
    let mut squares = vec![0.0_f32; x.width()];
    let every = x.rows().div_ceil(SAMPLE).max(1);
    for row in (0..x.rows()).step_by(every) {
        let row = x.row(row);
        let norm2: f32 = row.iter().map(|value| value.to_f32().powi(2)).sum();
        if norm2.is_normal() {
            for (square, value) in squares.iter_mut().zip(row) {
                *square += value.to_f32().powi(2) / norm2;
            }
        }
    }
    squares.iter().map(|square| square.sqrt()).collect()
}
