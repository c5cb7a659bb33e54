//! Adam (arXiv:1412.6980) on a weight `[d_sae, d_in]` whose gradient is a sum over sparse codes.
//!
//! Each row's gradient is summed in cache and used at once: it is never written. Rows are
//! independent of each other, so that the result doesn't depend on the number of threads.
//!
//! A row without codes moves on by its decaying momentum, until no number of it moves any more
//! (some 200 steps; long before its mean turns into denormal numbers, which are slow). Its moments
//! are read meanwhile and not written: what they are by now is a power of their decays. From then
//! on it sleeps (a row that never had a code does from the start): nothing of it is read or
//! written. When a row has codes again, its moments are multiplied by what they missed. That is
//! `torch.optim.Adam` to rounding.

use std::ops::Range;

use crate::grad::{check_sources, Row, Source};
use crate::memory::populate;
use crate::rows::by_cost;
use crate::simd::Simd;
use crate::{pool, Error, Result};

mod kernel;
#[cfg(test)]
mod tests;

/// A weight and its two moments, each `[d_sae, d_in]`.
#[derive(Debug)]
pub struct State<'a> {
    /// The weight.
    pub w: &'a mut [f32],
    /// Adam's moving mean of the gradient.
    pub m: &'a mut [f32],
    /// And of its square.
    pub v: &'a mut [f32],
    /// 0: the row's moments know of all steps. Else the last step that they know of, above 0 where
    /// the row sleeps, below 0 (negated) where it moves on.
    pub asleep: &'a mut [i64],
}

/// What happens to a row without codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Its gradient is 0: the moments decay and the row moves on, as in `torch.optim.Adam`.
    Decay,
    /// Nothing, as in `torch.optim.SparseAdam`.
    Freeze,
}

/// One step's settings.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The number of this step, from 1.
    pub number: u64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the mean.
    pub beta1: f64,
    /// Decay of the mean square.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// What gradients are multiplied by (clipping).
    pub scale: f64,
    /// Rows are of norm 1 and stay so: of a gradient only what turns its row counts.
    pub unit_rows: bool,
    /// Rows without codes.
    pub idle: Idle,
    /// No row may sleep on: for when the learning rate is more than twice what it was since a row
    /// fell asleep.
    pub wake: bool,
}

/// Before this step, the corrections of the moments grow so fast that a row that didn't move may
/// move again.
const FIRST_SLEEP: u64 = 20;

/// [`Step`] as the loops use it, in f32.
#[derive(Clone, Copy, Debug)]
struct Factors {
    rest1: f32,
    rest2: f32,
    step_size: f32,
    root_correction: f32,
    eps: f32,
    scale: f32,
    /// Whether a row that doesn't move now, won't.
    may_sleep: bool,
}

/// What moments are multiplied by.
#[derive(Clone, Copy, Debug)]
struct Decay {
    mean: f32,
    square: f32,
}

impl Decay {
    /// Of so many steps.
    fn of(step: &Step, steps: u64) -> Self {
        let steps = steps as f64;
        Self {
            mean: step.beta1.powf(steps) as f32,
            square: step.beta2.powf(steps) as f32,
        }
    }
}

impl Factors {
    fn of(step: &Step) -> Result<Self> {
        let in_range = |name: &str, value: f64, most: f64| {
            if (0.0..=most).contains(&value) {
                return Ok(());
            }
            Err(Error::InvalidArgument(format!(
                "{name} is {value}; expected 0 to {most}"
            )))
        };
        in_range("learning_rate", step.learning_rate, f64::MAX)?;
        in_range("beta1", step.beta1, 1.0 - f64::EPSILON)?;
        in_range("beta2", step.beta2, 1.0 - f64::EPSILON)?;
        in_range("eps", step.eps, f64::MAX)?;
        if step.number == 0 {
            return Err(Error::InvalidArgument(
                "the number of a step is 0; expected 1 or more".into(),
            ));
        }
        let steps = step.number as f64;
        Ok(Self {
            rest1: (1.0 - step.beta1) as f32,
            rest2: (1.0 - step.beta2) as f32,
            step_size: (step.learning_rate / (1.0 - step.beta1.powf(steps))) as f32,
            root_correction: (1.0 / (1.0 - step.beta2.powf(steps)).sqrt()) as f32,
            eps: step.eps as f32,
            scale: step.scale as f32,
            // The step of an idle row shrinks by beta1 / sqrt(beta2) each time.
            may_sleep: step.number >= FIRST_SLEEP && step.beta1 < 0.95 * step.beta2.sqrt(),
        })
    }
}

/// Takes one step.
///
/// `features`: only these rows, in rising order (the others are left as they are); None: all.
/// It can't be cancelled: a step is taken whole.
///
/// # Errors
/// Shapes that disagree, features out of order, or settings out of range; nothing has changed.
pub fn update(
    state: State<'_>,
    d_in: usize,
    sources: &[Source<'_>],
    features: Option<&[i64]>,
    step: &Step,
    simd: Simd,
    threads: usize,
) -> Result<()> {
    let selection = Selection::new(features, state.asleep.len())?;
    let nothing = |_| Nothing;
    run(
        state,
        d_in,
        sources,
        selection,
        step,
        (simd, threads, 1),
        nothing,
    )
    .map(|_| ())
}

/// What is done with a row right after it has moved.
pub(crate) trait AfterRow: Send {
    /// In rising order.
    fn moved(&mut self, feature: usize, w: &[f32]);
    /// After the last.
    fn end(&mut self);
}

struct Nothing;

impl AfterRow for Nothing {
    fn moved(&mut self, _: usize, _: &[f32]) {}
    fn end(&mut self) {}
}

/// As [`update`] of all rows; `after` gives what follows each thread's rows, of ranges in rising order
/// that begin with a multiple of `align`.
#[expect(clippy::too_many_arguments, reason = "as many as update has")]
pub(crate) fn update_then<A: AfterRow>(
    state: State<'_>,
    d_in: usize,
    sources: &[Source<'_>],
    step: &Step,
    simd: Simd,
    threads: usize,
    align: usize,
    after: impl FnMut(Range<usize>) -> A,
) -> Result<Vec<A>> {
    let all = Selection::new(None, state.asleep.len())?;
    run(
        state,
        d_in,
        sources,
        all,
        step,
        (simd, threads, align),
        after,
    )
}

fn run<A: AfterRow>(
    state: State<'_>,
    d_in: usize,
    sources: &[Source<'_>],
    selection: Selection<'_>,
    step: &Step,
    (simd, threads, align): (Simd, usize, usize),
    mut after: impl FnMut(Range<usize>) -> A,
) -> Result<Vec<A>> {
    let factors = Factors::of(step)?;
    let State { w, m, v, asleep } = state;
    let d_sae = asleep.len();
    for (name, len) in [("w", w.len()), ("m", m.len()), ("v", v.len())] {
        if Some(len) != d_sae.checked_mul(d_in) {
            return Err(Error::InvalidArgument(format!(
                "{name} has {len} elements; expected {d_sae} rows of {d_in}"
            )));
        }
    }
    check_sources(sources, d_sae, d_in)?;
    // Of the chosen rows only: others may have fallen asleep in this very step.
    let in_past = |last: i64| last.unsigned_abs() < step.number;
    let mut chosen = (0..selection.len()).map(|at| asleep[selection.feature(at)]);
    if let Some(last) = chosen.find(|last| !in_past(*last)) {
        return Err(Error::InvalidArgument(format!(
            "the moments of a row know of step {}; this is step {}",
            last.unsigned_abs(),
            step.number
        )));
    }

    let cost = |at| {
        let feature = selection.feature(at);
        let codes = sources
            .iter()
            .map(|source| source.lists.count(feature) * source.terms.len());
        let codes: usize = codes.sum();
        if codes == 0 && asleep[feature] > 0 && !step.wake {
            return 1;
        }
        // Six rows are read or written for the state of each, four where it has no codes.
        let state = if codes == 0 { 4 } else { 6 };
        (state + codes).saturating_mul(d_in)
    };
    let mut parts = Vec::new();
    let ranges = aligned(by_cost(selection.len(), threads, cost), align);
    let mut rest = (w, m, v, asleep);
    let mut taken = 0;
    for range in ranges {
        let (first, end) = (
            selection.feature(range.start),
            selection.feature(range.end - 1) + 1,
        );
        let (skip, take) = (first - taken, end - first);
        parts.push(Part {
            simd,
            step,
            factors: &factors,
            first,
            w: cut(&mut rest.0, skip * d_in, take * d_in),
            m: cut(&mut rest.1, skip * d_in, take * d_in),
            v: cut(&mut rest.2, skip * d_in, take * d_in),
            asleep: cut(&mut rest.3, skip, take),
            d_in,
            after: after(first..end),
            range,
        });
        taken = end;
    }
    pool::map(parts, |part| part.update(sources, selection))
        .into_iter()
        .collect()
}

/// The same ranges with their inner ends moved down to multiples of `align`, those without.
fn aligned(mut ranges: Vec<Range<usize>>, align: usize) -> Vec<Range<usize>> {
    for at in 1..ranges.len() {
        let end = ranges[at].start / align * align;
        ranges[at - 1].end = end;
        ranges[at].start = end;
    }
    ranges.retain(|range| !range.is_empty());
    ranges
}

/// The last step that the moments of a row know of, where they don't hear of step `number`: 1 at
/// the least, as before the first there are none.
fn known(asleep: i64, number: u64) -> i64 {
    match asleep {
        0 => (number as i64 - 1).max(1),
        last => last.abs(),
    }
}

/// A thread's rows.
struct Part<'a, A> {
    simd: Simd,
    after: A,
    step: &'a Step,
    factors: &'a Factors,
    /// Of the selection.
    range: Range<usize>,
    /// The feature that the slices begin with.
    first: usize,
    w: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    asleep: &'a mut [i64],
    d_in: usize,
}

impl<A: AfterRow> Part<'_, A> {
    fn update(self, sources: &[Source<'_>], selection: Selection<'_>) -> Result<A> {
        let Self {
            simd,
            step,
            factors,
            d_in,
            mut after,
            ..
        } = self;
        let mut row = Row::new(sources, d_in, simd);
        for at in self.range {
            let feature = selection.feature(at);
            let here = (feature - self.first) * d_in..(feature - self.first + 1) * d_in;
            let (w, m, v) = (
                &mut self.w[here.clone()],
                &mut self.m[here.clone()],
                &mut self.v[here],
            );
            let asleep = &mut self.asleep[feature - self.first];
            let gradient = row.of(feature)?;
            if gradient.is_none() && (step.idle == Idle::Freeze || (*asleep > 0 && !step.wake)) {
                continue;
            }
            if gradient.is_some() && (*asleep > 0 || step.number == 1) {
                // Moments have no memory before they are written to.
                populate(m);
                populate(v);
            }
            if gradient.is_none() && m.iter().all(|mean| *mean == 0.0) {
                // Never had a code, or long ago: without a mean nothing moves, whatever the step.
                if *asleep <= 0 {
                    // Its mean square hasn't heard of this step (of the first, there is none).
                    *asleep = known(*asleep, step.number);
                    if step.unit_rows {
                        let squared_norm = simd.dot(w, &*w);
                        kernel::multiply(simd, w, 1.0 / squared_norm.sqrt().max(1e-12));
                        after.moved(feature, w);
                    }
                }
                continue;
            }
            if *asleep == 0 && step.number == 1 && gradient.is_none() {
                // There is no step before the first that its moments could know of.
                let none = Decay::of(step, 1);
                kernel::multiply(simd, m, none.mean);
                kernel::multiply(simd, v, none.square);
                *asleep = 1;
            }
            // Not after this step, as was checked.
            let missed = match asleep.unsigned_abs() {
                0 => 1,
                last => step.number - last,
            };
            let decay = Decay::of(step, missed);
            let squared_norm = if let Some(gradient) = gradient {
                *asleep = 0;
                let along = if step.unit_rows {
                    simd.dot(gradient, w)
                } else {
                    0.0
                };
                let w = &mut *w;
                kernel::touched(
                    simd,
                    kernel::Moving { w, m, v },
                    gradient,
                    along,
                    decay,
                    factors,
                )
            } else {
                let (squared_norm, moved) = kernel::idle(simd, w, m, v, decay, factors);
                let known = known(*asleep, step.number);
                *asleep = if moved || !factors.may_sleep {
                    -known
                } else {
                    known
                };
                squared_norm
            };
            if step.unit_rows {
                kernel::multiply(simd, w, 1.0 / squared_norm.sqrt().max(1e-12));
            }
            after.moved(feature, w);
        }
        after.end();
        Ok(after)
    }
}

/// Splits `take` elements off the front of `rest`, after dropping `skip`.
fn cut<'a, T>(rest: &mut &'a mut [T], skip: usize, take: usize) -> &'a mut [T] {
    let (taken, after) = std::mem::take(rest)[skip..].split_at_mut(take);
    *rest = after;
    taken
}

/// Which rows are updated.
#[derive(Clone, Copy)]
struct Selection<'a> {
    features: Option<&'a [i64]>,
    d_sae: usize,
}

impl<'a> Selection<'a> {
    fn new(features: Option<&'a [i64]>, d_sae: usize) -> Result<Self> {
        let in_range = |feature: &i64| usize::try_from(*feature).is_ok_and(|f| f < d_sae);
        if let Some(features) = features {
            if let Some(feature) = features.iter().find(|feature| !in_range(feature)) {
                return Err(Error::InvalidArgument(format!(
                    "feature {feature}; expected 0 to {d_sae} - 1"
                )));
            }
            if let Some(pair) = features.windows(2).find(|pair| pair[0] >= pair[1]) {
                return Err(Error::InvalidArgument(format!(
                    "feature {} follows {}; expected rising order",
                    pair[1], pair[0]
                )));
            }
        }
        Ok(Self { features, d_sae })
    }

    fn len(self) -> usize {
        self.features.map_or(self.d_sae, <[i64]>::len)
    }

    #[inline]
    fn feature(self, at: usize) -> usize {
        // Were found to be in range.
        self.features.map_or(at, |features| features[at] as usize)
    }
}
