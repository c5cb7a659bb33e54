//! Attention of new tokens to their sequences' latents, as they lie in the cache.
//!
//! To the latents all heads are queries on one and the same key, whose first part is the value as
//! well. With few heads a tensor library's attention is far from the speed of memory here: it pads
//! every sequence to the longest, and reads keys and values apart and a head at a time.

use std::marker::PhantomData;

use super::{check, loops};
use crate::rows::by_cost;
use crate::simd::{Element, Simd};
use crate::{pool, Error, Result};

/// The sizes of a step.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Heads.
    pub heads: usize,
    /// New tokens of each sequence.
    pub new: usize,
    /// Slots of each sequence in the cache.
    pub capacity: usize,
    /// Numbers of a latent, which is key and value.
    pub rank: usize,
    /// Numbers of a cached row: a latent and the rotary key.
    pub width: usize,
    /// Numbers of a head's query before absorption; its rotary part stands last.
    pub head: usize,
    /// Factor on the scores.
    pub scale: f32,
}

/// The tensors of a step, each contiguous; tokens are counted sequence by sequence.
#[derive(Debug)]
pub struct Tensors<'a, E> {
    /// `[tokens, width]`: what the new tokens leave in the cache.
    pub rows: &'a [E],
    /// `[heads, tokens, rank]`: the absorbed queries.
    pub absorbed: &'a [E],
    /// `[tokens, heads, head]`: the queries, of which the rotary part is read.
    pub query: &'a [E],
    /// `[tokens]`: the new tokens' slots; a token sees those up to its own.
    pub slots: &'a [i64],
    /// `[sequences, capacity, width]`: the new rows are written to it.
    pub cache: &'a mut [E],
    /// `[heads, tokens, rank]`: the mixed latents.
    pub output: &'a mut [E],
}

impl Step {
    fn check<E>(self, tensors: &Tensors<'_, E>) -> Result<()> {
        if self.heads == 0
            || self.new == 0
            || self.rank == 0
            || self.rank > self.width
            || self.width - self.rank > self.head
        {
            return Err(Error::InvalidArgument(format!("no such step: {self:?}")));
        }
        let tokens = tensors.slots.len();
        let sequences = tokens / self.new;
        check("the slots", tokens, sequences * self.new)?;
        check("the new rows", tensors.rows.len(), tokens * self.width)?;
        let mixed = self.heads * tokens * self.rank;
        check("the absorbed queries", tensors.absorbed.len(), mixed)?;
        check("the output", tensors.output.len(), mixed)?;
        let queries = tokens * self.heads * self.head;
        check("the queries", tensors.query.len(), queries)?;
        let cached = sequences * self.capacity * self.width;
        check("the cache", tensors.cache.len(), cached)?;
        let fits = |&slot: &i64| usize::try_from(slot).is_ok_and(|slot| slot < self.capacity);
        match tensors.slots.iter().find(|slot| !fits(slot)) {
            None => Ok(()),
            Some(slot) => Err(Error::InvalidArgument(format!(
                "slot {slot} of a cache of {} slots a sequence",
                self.capacity
            ))),
        }
    }
}

/// One thread's sequences.
struct Part<'a, E> {
    first: usize,
    caches: &'a mut [E],
    /// A latent for each token and head of these sequences.
    outputs: Vec<&'a mut [E]>,
}

/// Writes the new rows to the cache, then mixes for each head of each new token the latents that it
/// sees. Scores and sums are f32.
///
/// # Errors
/// The sizes don't fit, or a slot lies outside the cache.
pub fn attend<E: Element>(
    step: Step,
    tensors: Tensors<'_, E>,
    simd: Simd,
    threads: usize,
) -> Result<()> {
    step.check(&tensors)?;
    let Tensors {
        rows,
        absorbed,
        query,
        slots,
        mut cache,
        output,
    } = tensors;
    let tokens = slots.len();
    let seen = |token: usize| usize::try_from(slots[token]).unwrap_or(0) + 1;
    let ranges = by_cost(tokens / step.new, threads, |sequence| {
        let work: usize = (0..step.new)
            .map(|new| seen(sequence * step.new + new))
            .sum();
        work * step.heads * step.width
    });
    // The output is head-major, as the product after it wants it; a thread has some of each head's.
    let mut heads: Vec<_> = output
        .chunks_mut((tokens * step.rank).max(1))
        .map(|head| head.chunks_mut(step.rank))
        .collect();
    let mut parts = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (caches, rest) = cache.split_at_mut(range.len() * step.capacity * step.width);
        cache = rest;
        let mut outputs = Vec::with_capacity(range.len() * step.new * step.heads);
        for _ in 0..range.len() * step.new {
            outputs.extend(heads.iter_mut().filter_map(Iterator::next));
        }
        parts.push(Part {
            first: range.start,
            caches,
            outputs,
        });
    }
    pool::map(parts, |part| {
        let mut scratch = Scratch::default();
        let mut outputs = part.outputs.into_iter();
        for (at, cache) in part
            .caches
            .chunks_mut(step.capacity * step.width)
            .enumerate()
        {
            let first = (part.first + at) * step.new;
            for token in first..first + step.new {
                let slot = (seen(token) - 1) * step.width;
                let row = &rows[token * step.width..][..step.width];
                cache[slot..slot + step.width].copy_from_slice(row);
            }
            for token in first..first + step.new {
                scratch.queries.clear();
                for head in 0..step.heads {
                    let latent = &absorbed[(head * tokens + token) * step.rank..][..step.rank];
                    let own = &query[(token * step.heads + head) * step.head..][..step.head];
                    let turned = &own[step.head - (step.width - step.rank)..];
                    let both = latent.iter().chain(turned);
                    scratch
                        .queries
                        .extend(both.map(|value| value.to_f32() * step.scale));
                }
                scratch.mix(step, &cache[..seen(token) * step.width], simd);
                for (sum, output) in scratch.sums.chunks(step.rank).zip(&mut outputs) {
                    for (output, &sum) in output.iter_mut().zip(sum) {
                        *output = E::from_f32(sum);
                    }
                }
            }
        }
    });
    Ok(())
}

#[derive(Default)]
struct Scratch {
    /// `[heads, width]`, scaled.
    queries: Vec<f32>,
    /// `[heads, keys]`
    scores: Vec<f32>,
    /// `[heads, rank]`
    sums: Vec<f32>,
}

impl Scratch {
    /// Mixes `cache` `[keys, width]` into `sums`.
    fn mix<E: Element>(&mut self, step: Step, cache: &[E], simd: Simd) {
        let keys = cache.len() / step.width;
        self.scores.resize(step.heads * keys, 0.0);
        let (width, rank) = (step.width, step.rank);
        let scores = &mut self.scores[..step.heads * keys];
        let fours = step.heads / 4;
        for (at, key) in cache.chunks_exact(width).enumerate() {
            for (four, queries) in self.queries.chunks_exact(4 * width).enumerate() {
                let queries = [0, 1, 2, 3].map(|head| &queries[head * width..][..width]);
                for (head, score) in simd.dot_4(queries, key).into_iter().enumerate() {
                    scores[(4 * four + head) * keys + at] = score;
                }
            }
            for head in 4 * fours..step.heads {
                scores[head * keys + at] = simd.dot(&self.queries[head * width..][..width], key);
            }
        }
        for scores in scores.chunks_exact_mut(keys) {
            loops::softmax_row(simd, scores, PhantomData::<E>);
        }
        self.sums.clear();
        self.sums.resize(step.heads * rank, 0.0);
        let (together, single) = self.sums.split_at_mut(4 * fours * rank);
        for (sums, weights) in together
            .chunks_exact_mut(4 * rank)
            .zip(scores.chunks_exact(4 * keys))
        {
            let (low, high) = sums.split_at_mut(2 * rank);
            let ((a, b), (c, d)) = (low.split_at_mut(rank), high.split_at_mut(rank));
            let weights = [0, 1, 2, 3].map(|head| &weights[head * keys..][..keys]);
            simd.mix_4([a, b, c, d], weights, cache, width);
        }
        let weights = scores[4 * fours * keys..].chunks_exact(keys);
        for (sum, weights) in single.chunks_exact_mut(rank).zip(weights) {
            for (key, &weight) in cache.chunks_exact(width).zip(weights) {
                simd.add_scaled(sum, weight, &key[..rank]);
            }
        }
    }
}

#[cfg(test)]
#[path = "attend_tests.rs"]
mod tests;
