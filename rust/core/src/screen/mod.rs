//! Codes straight from x: products of 8-bit numbers, or of bf16, bound every pre-activation, and only
//! what the bounds can't exclude is computed exactly.
//!
//! The codes are those of the exact pre-activations, rounded to the dtype of the weights
//! ([`Element::exact_pre_activation`]). What makes leaving features out safe is the
//! certificate. Each exact value is compared with its bounds: a row in which one lies outside is
//! computed exactly as a whole, and counted.

mod candidates;
mod certificate;
mod choose;
mod coarse;
mod dither;
mod dot;
mod kernel;
mod layout;
mod quantise;
mod rescore;
mod rows;
mod scan;
mod search;
mod settle;
mod spread;
mod weights;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod update_tests;

use std::sync::atomic::AtomicU32;

use candidates::{Cut, Wanted};
use certificate::Rounding;
use dither::Dither;
use search::Search;
use spread::Spread;
use weights::{Rounder, Source, Weights};

use layout::TILE_ROWS;

pub use kernel::{Kernel, Kind};

use crate::rows::Matrix;
use crate::select::{Codes, Options, Threshold};
use crate::simd::Element;
use crate::{adam, grad};
use crate::{Cancel, Error, Result};

/// The widest x: sums of 8-bit products must fit into 32 bits.
pub const MOST_DIMENSIONS: usize = 65_000;

/// Sizes, and how they are cut into tiles.
#[derive(Clone, Copy, Debug)]
struct Shape {
    d_in: usize,
    d_sae: usize,
    kind: Kind,
}

impl Shape {
    /// Steps of [`layout::STEP`] bytes of a row.
    fn steps(self) -> usize {
        (self.d_in * self.kind.bytes()).div_ceil(layout::STEP)
    }

    /// Blocks of [`layout::TILE_ROWS`] features; whole panels.
    fn blocks(self) -> usize {
        self.d_sae.div_ceil(layout::PANEL) * 2
    }
}

/// How codes are chosen.
#[derive(Clone, Copy, Debug)]
pub enum Rule<'a> {
    /// The k largest of each row.
    TopK(usize),
    /// The `k * rows` largest of all rows.
    BatchTopK(usize),
    /// All that exceed a threshold.
    Threshold(Threshold<'a>),
}

/// What encoding took, added up over calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rows encoded.
    pub rows: u64,
    /// Exact products in all.
    pub candidates: u64,
    /// Rows that were computed exactly as a whole: outside the certificate, or contradicting it.
    pub exact_rows: u64,
    /// Exact values outside their bounds: the weights changed unnoticed, or less than a 1e-24 chance.
    pub violations: u64,
}

/// The copy of an encoder's weights, of 8 bits or bf16.
#[derive(Debug)]
pub struct Screen {
    shape: Shape,
    kernel: Kernel,
    weights: Weights,
    spread: Spread,
    dither: Dither,
    counts: Counts,
    /// Whether the copy is of one state of the weights; not after an interrupted refresh.
    is_whole: bool,
}

/// The weights that a screen was made of, feature by feature.
#[derive(Clone, Copy, Debug)]
pub struct Encoder<'a, E> {
    /// `[d_sae, d_in]`.
    pub w: Matrix<'a, E>,
    /// `[d_sae]`.
    pub bias: &'a [E],
}

impl Screen {
    /// Rounds all weights. `seed` draws the dither; codes don't depend on it, but that they are right
    /// does: nobody may choose weights or rows by it, so take it from the system.
    ///
    /// # Errors
    /// Sizes that disagree or are too large; a kernel that this CPU lacks; memory; `cancel`.
    pub fn new<E: Element>(
        encoder: Encoder<'_, E>,
        kernel: Kernel,
        seed: u128,
        options: Options,
        cancel: &Cancel,
    ) -> Result<Self> {
        let shape = Shape {
            d_in: encoder.w.width(),
            d_sae: encoder.w.rows(),
            kind: kernel.kind(),
        };
        if shape.d_in > MOST_DIMENSIONS || i32::try_from(shape.d_sae).is_err() {
            return Err(Error::InvalidArgument(format!(
                "weights of {} features and {} dimensions are too many for a screen; at most {} and {MOST_DIMENSIONS}",
                shape.d_sae, shape.d_in, i32::MAX
            )));
        }
        if !kernel.is_supported() {
            return Err(Error::InvalidArgument(format!(
                "this CPU has no {}; choose another kernel",
                kernel.name()
            )));
        }
        let mut screen = Self {
            shape,
            kernel,
            weights: Weights::new(shape)?,
            spread: Spread::none(shape)?,
            dither: Dither::new(seed, shape.d_in),
            counts: Counts::default(),
            is_whole: false,
        };
        screen.refresh(encoder, None, options, cancel)?;
        Ok(screen)
    }

    /// Rounds weights that have changed: those of `features`, or all (as it does in any case after a
    /// refresh that was interrupted).
    ///
    /// # Errors
    /// Sizes that disagree with the first; a feature out of range; `cancel`.
    pub fn refresh<E: Element>(
        &mut self,
        encoder: Encoder<'_, E>,
        features: Option<&[i64]>,
        options: Options,
        cancel: &Cancel,
    ) -> Result<()> {
        self.check(encoder)?;
        let wanted = features.map(|features| self.mark(features)).transpose()?;
        let source = Source {
            w: encoder.w,
            bias: encoder.bias,
            dither: &self.dither,
            wanted: wanted.as_deref().filter(|_| self.is_whole),
        };
        self.is_whole = false;
        self.weights
            .refresh(self.shape, &source, options.simd, options.threads, cancel)?;
        if self.shape.kind == Kind::Int8 {
            self.spread
                .refresh(self.shape, self.weights.tiles.bytes(), options.threads);
        }
        self.is_whole = true;
        Ok(())
    }

    /// One step of Adam on the weights, which are rounded while they are in cache. The screen must be of
    /// `state.w` as it is; the biases, `bias`, may have changed since.
    ///
    /// # Errors
    /// As [`adam::update`]; a screen of other sizes or of bf16 weights: nothing has changed.
    pub fn update(
        &mut self,
        state: adam::State<'_>,
        sources: &[grad::Source<'_>],
        step: &adam::Step,
        bias: &[f32],
        options: Options,
    ) -> Result<()> {
        let (d_in, simd, threads) = (self.shape.d_in, options.simd, options.threads);
        self.check(Encoder {
            w: Matrix::new(state.w, bias.len(), d_in)?,
            bias,
        })?;
        // Should anything fail, the next refresh is of all.
        let was_whole = std::mem::take(&mut self.is_whole);
        let mut rounders = self.weights.rounders(self.shape, &self.dither, simd);
        let take = |features| rounders.take(features);
        let done = adam::update_then(state, d_in, sources, step, simd, threads, TILE_ROWS, take)?;
        let found = done.into_iter().map(Rounder::finish).collect();
        self.weights.followed(found, bias);
        if self.shape.kind == Kind::Int8 {
            self.spread
                .refresh(self.shape, self.weights.tiles.bytes(), threads);
        }
        self.is_whole = was_whole;
        Ok(())
    }

    fn mark(&self, features: &[i64]) -> Result<Vec<bool>> {
        let mut wanted = vec![false; self.shape.d_sae];
        for feature in features {
            let slot = usize::try_from(*feature).ok();
            let Some(slot) = slot.and_then(|feature| wanted.get_mut(feature)) else {
                return Err(Error::InvalidArgument(format!(
                    "rows names feature {feature}; expected 0 to {}",
                    self.shape.d_sae.saturating_sub(1)
                )));
            };
            *slot = true;
        }
        Ok(wanted)
    }

    /// Which kernel multiplies.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// What encoding took so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The first feature whose weights or bias hold a NaN or an infinity: such weights can't be screened.
    pub fn first_bad_feature(&self) -> Option<usize> {
        self.weights.first_bad()
    }

    /// Bytes of the copy.
    pub fn bytes(&self) -> usize {
        let further = match self.shape.kind {
            Kind::Int8 => self.spread.tiles.bytes().len(),
            Kind::Bf16 => 0,
        };
        self.weights.tiles.bytes().len() + further
    }

    fn check<E: Element>(&self, encoder: Encoder<'_, E>) -> Result<()> {
        let (w, bias) = (encoder.w, encoder.bias);
        if (w.rows(), w.width(), bias.len()) != (self.shape.d_sae, self.shape.d_in, w.rows()) {
            return Err(Error::InvalidArgument(format!(
                "weights of shape ({}, {}) and {} biases; this screen is of ({}, {})",
                w.rows(),
                w.width(),
                bias.len(),
                self.shape.d_sae,
                self.shape.d_in
            )));
        }
        Ok(())
    }

    /// The codes of `x`. `encoder` is what the screen was made of, or was last refreshed with.
    ///
    /// # Errors
    /// Sizes that disagree; weights that aren't finite; with `check_finite`, rows or pre-activations
    /// that aren't; `cancel`.
    pub fn encode<E: Element>(
        &mut self,
        x: Matrix<'_, E>,
        encoder: Encoder<'_, E>,
        rule: Rule<'_>,
        options: Options,
        cancel: &Cancel,
    ) -> Result<Codes<E>> {
        self.check(encoder)?;
        if x.width() != self.shape.d_in {
            return Err(Error::InvalidArgument(format!(
                "x has {} dimensions; expected {}",
                x.width(),
                self.shape.d_in
            )));
        }
        if !self.is_whole {
            return Err(Error::InvalidArgument(
                "the screen's last refresh was interrupted; refresh it again".into(),
            ));
        }
        if let Some(feature) = self.first_bad_feature() {
            return Err(Error::InvalidArgument(format!(
                "the weights or the bias of feature {feature} hold a NaN or an infinity; \
                 such weights can't be screened"
            )));
        }
        if self.shape.kind == Kind::Int8 && self.spread.adapt(x) {
            self.spread
                .refresh(self.shape, self.weights.tiles.bytes(), options.threads);
        }
        let rounding = Rounding::of::<E>();
        let floor = self.floors(rule, rounding)?;
        let shared = AtomicU32::new(0);
        let wanted = match rule {
            Rule::TopK(k) | Rule::BatchTopK(k) if k > self.shape.d_sae => {
                return Err(Error::InvalidArgument(format!(
                    "k is {k}, more than the {} features; choose k from 0 to {}",
                    self.shape.d_sae, self.shape.d_sae
                )))
            }
            Rule::TopK(k) => Wanted::EachRow(k),
            Rule::BatchTopK(k) => Wanted::AllRows(k.saturating_mul(x.rows()), &shared),
            Rule::Threshold(_) => Wanted::All,
        };
        let search = Search {
            shape: self.shape,
            weights: &self.weights,
            spread: &self.spread,
            dither: &self.dither,
            kernel: self.kernel,
            floor: &floor,
            cut: Cut {
                bounds: &self.weights.bounds,
                rounding: rounding.value,
                simd: options.simd,
            },
            wanted,
            options,
        };
        let found = search.run(x, cancel)?;
        let chooser = choose::Chooser {
            x,
            encoder,
            rule,
            bounds: &self.weights.bounds,
            options,
        };
        let (codes, mut counts) = chooser.run(found, cancel)?;
        counts.rows = x.rows() as u64;
        self.counts.add(counts);
        Ok(codes)
    }

    /// What each feature's pre-activation must reach; beyond reach for padding.
    fn floors(&self, rule: Rule<'_>, rounding: Rounding) -> Result<Vec<f32>> {
        let mut floor = vec![f32::MAX; self.shape.blocks() * layout::TILE_ROWS];
        let lowered = |theta: f32| match theta {
            // Nothing exceeds a NaN.
            theta if theta.is_nan() => f32::MAX,
            // relu comes first.
            theta => (theta * (1.0 - rounding.value)).clamp(0.0, f32::MAX),
        };
        let floor_of_features = &mut floor[..self.shape.d_sae];
        match rule {
            // Nothing is wanted: scanning would be in vain, but for the rows' check.
            Rule::TopK(0) | Rule::BatchTopK(0) => {}
            Rule::TopK(_) | Rule::BatchTopK(_) => floor_of_features.fill(0.0),
            Rule::Threshold(Threshold::Shared(theta)) => floor_of_features.fill(lowered(theta)),
            Rule::Threshold(Threshold::Each(each)) => {
                if each.len() != self.shape.d_sae {
                    return Err(Error::InvalidArgument(format!(
                        "{} thresholds for {} features; give one, or one a feature",
                        each.len(),
                        self.shape.d_sae
                    )));
                }
                for (floor, theta) in floor_of_features.iter_mut().zip(each) {
                    *floor = lowered(*theta);
                }
            }
        }
        Ok(floor)
    }
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.rows += other.rows;
        self.candidates += other.candidates;
        self.exact_rows += other.exact_rows;
        self.violations += other.violations;
    }
}
