//! The exact products of the candidates, feature by feature, so that the weights of each are read once
//! for all rows that want it.

use std::ops::Range;

use super::dot::{dots, Sum, BLOCK, GROUP};
use crate::lines::Lines;
use crate::rows::Matrix;
use crate::select::Options;
use crate::simd::Element;
use crate::{pool, Cancel, Result};

/// Rows for which the weights are read once.
pub(super) const ROWS: usize = 1024;
/// Numbers of x that are gone over again and again, and should stay in a core's second-level cache.
const CACHED: usize = 1 << 20;

/// Pairs of a row and a feature, by feature.
struct Pairs {
    /// Those of feature f are `starts[f]..starts[f + 1]`.
    starts: Vec<usize>,
    rows: Vec<u32>,
    /// Where each pair stood.
    slots: Vec<u32>,
}

impl Pairs {
    /// A counting sort of `features`, whose row r has `ends[r - 1]..ends[r]`.
    fn new(features: &[u32], ends: &[usize], d_sae: usize) -> Self {
        let mut starts = vec![0; d_sae + 1];
        for feature in features {
            starts[*feature as usize + 1] += 1;
        }
        for feature in 0..d_sae {
            starts[feature + 1] += starts[feature];
        }
        let mut next = starts.clone();
        let mut pairs = Self {
            starts,
            rows: vec![0; features.len()],
            slots: vec![0; features.len()],
        };
        let mut slot = 0;
        for (row, end) in ends.iter().enumerate() {
            while slot < *end {
                let place = &mut next[features[slot] as usize];
                pairs.rows[*place] = row as u32;
                pairs.slots[*place] = slot as u32;
                *place += 1;
                slot += 1;
            }
        }
        pairs
    }

    /// The features of `range` that are in any pair.
    fn present(&self, range: Range<usize>) -> Vec<usize> {
        range
            .filter(|feature| self.starts[*feature + 1] > self.starts[*feature])
            .collect()
    }

    /// Ranges of features with about as many pairs each.
    fn ranges(&self, parts: usize) -> Vec<Range<usize>> {
        let (features, pairs) = (self.starts.len() - 1, self.rows.len());
        let bound = |part: usize| match part {
            0 => 0,
            _ if part == parts => features,
            _ => self
                .starts
                .partition_point(|start| *start < pairs * part / parts)
                .min(features),
        };
        (0..parts)
            .map(|part| bound(part)..bound(part + 1))
            .collect()
    }
}

/// What is to be multiplied with what.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a, E> {
    pub x: Matrix<'a, E>,
    /// Rows of x, at most [`ROWS`].
    pub rows: &'a [usize],
    /// Features of all rows; those of the r-th end at `ends[r]`.
    pub features: &'a [u32],
    pub ends: &'a [usize],
    pub w: Matrix<'a, E>,
    pub sum: Sum,
}

/// `<x[row], w[feature]>` for each feature of each row, in their order.
pub(super) fn products<E: Element>(
    wanted: Wanted<'_, E>,
    options: Options,
    cancel: &Cancel,
) -> Result<Vec<f64>> {
    let (features, w) = (wanted.features, wanted.w);
    let pairs = Pairs::new(features, wanted.ends, w.rows());
    let work = features.len().saturating_mul(w.width()) >> 18;
    let parts = options.threads.min(work).max(1);
    let mut sums = vec![0.0_f64; features.len()];
    let mut rest = &mut sums[..];
    let mut tasks = Vec::new();
    for range in pairs.ranges(parts) {
        let (part, after) = rest.split_at_mut(pairs.starts[range.end] - pairs.starts[range.start]);
        tasks.push((range, part));
        rest = after;
    }
    let results = pool::map(tasks, |(range, sums)| {
        products_of(wanted, &pairs, range, sums, options, cancel)
    });
    results.into_iter().collect::<Result<()>>()?;
    let mut output = vec![0.0; features.len()];
    for (slot, sum) in pairs.slots.iter().zip(sums) {
        output[*slot as usize] = sum;
    }
    Ok(output)
}

/// The products of a range of features, in the order of `pairs`.
fn products_of<E: Element>(
    wanted: Wanted<'_, E>,
    pairs: &Pairs,
    range: Range<usize>,
    sums: &mut [f64],
    options: Options,
    cancel: &Cancel,
) -> Result<()> {
    let Wanted { x, w, sum, .. } = wanted;
    let width = w.width();
    // As many blocks of dimensions at once as keep all rows' in the cache.
    let blocks = (CACHED / wanted.rows.len().max(1) / BLOCK).max(1);
    let span = (blocks * BLOCK).min(width.next_multiple_of(BLOCK));
    let mut block_of_x = Lines::new(E::default(), wanted.rows.len() * span);
    let base = pairs.starts[range.start];
    let present = pairs.present(range);
    for start in (0..width).step_by(span.max(1)) {
        let here = span.min(width - start);
        for (row, block) in wanted.rows.iter().zip(block_of_x.chunks_exact_mut(span)) {
            block[..here].copy_from_slice(&x.row(*row)[start..start + here]);
        }
        for (at, feature) in present.iter().enumerate() {
            if at % 256 == 0 {
                cancel.check()?;
            }
            let (from, to) = (pairs.starts[*feature], pairs.starts[*feature + 1]);
            // The next feature's numbers lie far away, in pieces too short to be foreseen.
            let next = present.get(at + 1).unwrap_or(feature);
            let next = &w.row(*next)[start..start + here];
            let w = &w.row(*feature)[start..start + here];
            let groups = pairs.rows[from..to].chunks(GROUP);
            let groups = groups.zip(sums[from - base..to - base].chunks_mut(GROUP));
            for (group, (rows, sums)) in groups.enumerate() {
                for block in (0..here).step_by(BLOCK) {
                    let end = (block + BLOCK).min(here);
                    let ahead = if group == 0 {
                        &next[block..]
                    } else {
                        &w[block..]
                    };
                    let mut parts: [&[E]; GROUP] = [&[]; GROUP];
                    for (part, row) in parts.iter_mut().zip(rows) {
                        let row = *row as usize * span;
                        *part = &block_of_x[row + block..row + end];
                    }
                    let found = dots(
                        &w[block..end],
                        ahead.as_ptr(),
                        &parts,
                        rows.len(),
                        sum,
                        options.simd,
                    );
                    for (total, found) in sums.iter_mut().zip(found) {
                        *total += found;
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Level, Simd};

    #[test]
    fn products_are_those_of_one_pair_at_a_time() {
        let (rows, d_sae, width) = (70, 31, 700);
        let number = |at: usize| ((at * 7919 % 10_007) as f32 - 5000.0) / 777.0;
        let x: Vec<f32> = (0..rows * width).map(number).collect();
        let w: Vec<f32> = (0..d_sae * width).map(|at| number(at + 13)).collect();
        let x = Matrix::new(&x, rows, width).unwrap();
        let w = Matrix::new(&w, d_sae, width).unwrap();
        let (mut features, mut ends) = (Vec::new(), Vec::new());
        for row in 0..rows {
            features.extend((row as u32 % 3..d_sae as u32).step_by(3));
            ends.push(features.len());
        }
        let numbers: Vec<usize> = (0..rows).collect();
        for simd in Level::ALL.into_iter().filter_map(Simd::new) {
            for threads in [1, 3] {
                let options = Options {
                    simd,
                    threads,
                    check_finite: true,
                };
                let all = Wanted {
                    x,
                    rows: &numbers,
                    features: &features,
                    ends: &ends,
                    w,
                    sum: Sum::Exact,
                };
                let found = products(all, options, &Cancel::new()).unwrap();
                let mut at = 0;
                for (row, end) in ends.iter().enumerate() {
                    while at < *end {
                        let one = Wanted {
                            rows: &[row],
                            features: &features[at..=at],
                            ends: &[1],
                            ..all
                        };
                        let one = products(one, options, &Cancel::new());
                        assert_eq!(found[at].to_bits(), one.unwrap()[0].to_bits());
                        at += 1;
                    }
                }
            }
        }
    }
}
