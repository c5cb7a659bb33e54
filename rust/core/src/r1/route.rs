//! DeepSeek-V3's router: which experts a token goes to, and with what weights.

use super::check;
use crate::rows::{map_ranges_mut, Matrix};
use crate::{Error, Result};

/// How experts are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Routing {
    /// Groups of consecutive experts, of equal size.
    pub groups: usize,
    /// Groups that a token's experts are taken from.
    pub kept_groups: usize,
    /// Experts a token.
    pub experts: usize,
    /// Whether a token's weights are made to add up to `scale`.
    pub normalise: bool,
    /// Factor on the weights.
    pub scale: f32,
}

impl Routing {
    /// # Errors
    /// `count` experts can't be chosen from in this way.
    fn check(self, count: usize) -> Result<()> {
        let size = count.checked_div(self.groups).unwrap_or(0);
        let fits = size > 0
            && size * self.groups == count
            && (1..=self.groups).contains(&self.kept_groups)
            && (1..=self.kept_groups * size).contains(&self.experts);
        if fits {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!(
            "{} of {count} experts from {} of {} groups: that many can't be chosen",
            self.experts, self.kept_groups, self.groups
        )))
    }
}

/// What one thread needs.
struct Scratch {
    scores: Vec<f32>,
    choice: Vec<f32>,
    strength: Vec<f32>,
    kept: Vec<usize>,
    best: Vec<usize>,
}

/// Indices of the `count` largest of `values`, largest first, ties by lower index.
fn largest(
    values: &[f32],
    candidates: impl Iterator<Item = usize>,
    count: usize,
    best: &mut Vec<usize>,
) {
    best.clear();
    for index in candidates {
        let better = |&other: &usize| values[index] > values[other];
        if best.len() == count && !best.last().is_some_and(better) {
            continue;
        }
        best.truncate(count - 1);
        let place = best.iter().position(better).unwrap_or(best.len());
        best.insert(place, index);
    }
}

/// Chooses each token's experts: `chosen` and `weights` hold `routing.experts` a row of `logits`
/// (tokens x experts), strongest first.
///
/// An expert's score is sigmoid(logit). Groups are chosen by the sum of their two best experts'
/// score plus bias, then experts by score plus bias; the weights are the scores alone. A NaN is
/// larger than any number, so that it is chosen and shows in the weights.
/// Source: DeepSeek-V3 technical report, arXiv:2412.19437, 2.1.2.
///
/// # Errors
/// The sizes don't fit, or there are not so many experts to choose.
pub fn route(
    logits: Matrix<'_, f32>,
    bias: &[f32],
    routing: Routing,
    chosen: &mut [i64],
    weights: &mut [f32],
    threads: usize,
) -> Result<()> {
    let (tokens, count) = (logits.rows(), logits.width());
    routing.check(count)?;
    let k = routing.experts;
    check("the bias", bias.len(), count)?;
    check("the experts", chosen.len(), tokens * k)?;
    check("the weights", weights.len(), tokens * k)?;
    let mut pairs: Vec<(&mut [i64], &mut [f32])> =
        chosen.chunks_mut(k).zip(weights.chunks_mut(k)).collect();
    // An exponential costs as much as dozens of additions.
    map_ranges_mut(&mut pairs, 1, 32 * count, threads, |range, part| {
        let mut scratch = Scratch {
            scores: vec![0.0; count],
            choice: vec![0.0; count],
            strength: vec![0.0; routing.groups],
            kept: Vec::with_capacity(routing.groups),
            best: Vec::with_capacity(k),
        };
        for (token, (chosen, weights)) in range.zip(part) {
            route_row(
                logits.row(token),
                bias,
                routing,
                &mut scratch,
                chosen,
                weights,
            );
        }
    });
    Ok(())
}

fn route_row(
    logits: &[f32],
    bias: &[f32],
    routing: Routing,
    scratch: &mut Scratch,
    chosen: &mut [i64],
    weights: &mut [f32],
) {
    let Scratch {
        scores,
        choice,
        strength,
        kept,
        best,
    } = scratch;
    for (((score, choice), &logit), &bias) in
        scores.iter_mut().zip(&mut *choice).zip(logits).zip(bias)
    {
        *score = 1.0 / (1.0 + (-logit).exp());
        let biased = *score + bias;
        *choice = if biased.is_nan() {
            f32::INFINITY
        } else {
            biased
        };
    }
    let size = scores.len() / routing.groups;
    for (strength, group) in strength.iter_mut().zip(choice.chunks(size)) {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &value in group {
            if value > first {
                (first, second) = (value, first);
            } else if value > second {
                second = value;
            }
        }
        *strength = if size == 1 { first } else { first + second };
    }
    largest(strength, 0..routing.groups, routing.kept_groups, kept);
    kept.sort_unstable();
    let candidates = kept
        .iter()
        .flat_map(|&group| group * size..(group + 1) * size);
    largest(choice, candidates, routing.experts, best);
    let mut total = 1e-20;
    for ((&expert, chosen), weight) in best.iter().zip(chosen).zip(&mut *weights) {
        *chosen = expert as i64;
        *weight = scores[expert];
        total += *weight;
    }
    for weight in weights {
        let shared = if routing.normalise {
            *weight / total
        } else {
            *weight
        };
        *weight = shared * routing.scale;
    }
}
