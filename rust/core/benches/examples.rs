//! Activations a second of the example pass, over codes in memory, once its heaps are full.
//!
//! `cargo bench -p r1sae-core --bench examples -- [millions of codes] [passes] [samples]
//! [threads]`. Each pass gives
//! every feature the strengths that another one had before, so all data are new to it.

use std::time::Instant;

use r1sae_core::examples::{collect, Accumulator, CodesView, Keep};
use r1sae_core::shard::{Indices, Values};
use r1sae_core::Cancel;

const D_SAE: usize = 28_672;
const K: usize = 64;

/// SplitMix64, as a source of numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (x >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Codes as a trained SAE's: strengths of a long tail above a threshold, and (with a `skew` of 4)
/// a tenth of the features having 56% of the activations. Or codes whose features are even (`skew` 1): each of K groups of
/// features gives one, number `u^skew` of the way through it for an even `u`.
fn codes(rows: usize, skew: i32) -> (Vec<f32>, Vec<u16>, Vec<i64>) {
    let mut random = Random(1);
    let table: Vec<[f32; K]> = (0..4096)
        .map(|_| {
            let mut row = [0.0; K].map(|_: f32| (0.3 - (1.0 - random.next()).ln()) as f32);
            row.sort_by(|a, b| b.total_cmp(a));
            row
        })
        .collect();
    let (mut values, mut indices) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let scale = (0.8 + 0.4 * random.next()) as f32;
        values.extend(table[row % table.len()].map(|value| value * scale));
        for group in 0..K {
            let rank = (random.next().powi(skew) * (D_SAE / K) as f64) as usize;
            indices.push((rank * K + group) as u16);
        }
    }
    let offsets = (0..=rows).map(|row| (row * K) as i64).collect();
    (values, indices, offsets)
}

fn main() {
    let mut numbers = std::env::args()
        .skip(1)
        .filter_map(|word| word.parse::<usize>().ok());
    let millions = numbers.next().unwrap_or(8);
    let passes = numbers.next().unwrap_or(5);
    let (some_samples, some_threads) = (numbers.next(), numbers.next());
    let rows = (millions << 20) / K;
    for (name, skew) in [("even features", 1), ("skewed features", 4)] {
        let (values, mut indices, offsets) = codes(rows, skew);
        for samples in [0, 5] {
            for threads in [1, 2] {
                if some_samples.is_some_and(|some| some != samples)
                    || some_threads.is_some_and(|some| some != threads)
                {
                    continue;
                }
                let keep = Keep {
                    n: 20,
                    samples,
                    seed: 0,
                };
                let Ok(mut accumulator) = Accumulator::new(D_SAE, keep) else {
                    return;
                };
                let mut seconds = Vec::new();
                for pass in 0..passes {
                    indices
                        .iter_mut()
                        .for_each(|index| *index = ((usize::from(*index) + K) % D_SAE) as u16);
                    let first = (pass * rows) as i64;
                    let (v, i) = (Values::F32(&values), Indices::U16(&indices));
                    let Ok(view) = CodesView::new(v, i, &offsets, first) else {
                        return;
                    };
                    let start = Instant::now();
                    if collect(&mut accumulator, &[view], threads, &Cancel::new()).is_err() {
                        return;
                    }
                    seconds.push(start.elapsed().as_secs_f64());
                }
                let rate = |seconds: f64| (rows * K) as f64 / seconds / 1e9;
                let last = seconds.split_off(seconds.len() - passes.div_ceil(4));
                let mean = last.iter().sum::<f64>() / last.len() as f64;
                println!(
                    "{name}, samples {samples}, threads {threads}: first pass {:.2} G/s, last quarter {:.2} G/s",
                    rate(seconds.first().copied().unwrap_or(mean)),
                    rate(mean)
                );
            }
        }
    }
}
