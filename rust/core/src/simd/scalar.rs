//! The truth: each loop in its plainest form.

use super::{key_of, Element, Stored};

pub(super) fn group_maxima<E: Element>(row: &[E], maxima: &mut [f32]) -> bool {
    let mut finite = true;
    for chunk in row.chunks(maxima.len().max(1)) {
        for (value, maximum) in chunk.iter().zip(maxima.iter_mut()) {
            let value = value.to_f32();
            finite &= value.is_finite();
            // False for NaN.
            if value > *maximum {
                *maximum = value;
            }
        }
    }
    finite
}

pub(super) fn all_finite<E: Element>(row: &[E]) -> bool {
    // No early exit: finite rows are the rule, and this form vectorises.
    row.iter()
        .fold(true, |finite, value| finite & value.to_f32().is_finite())
}

pub(super) fn collect_above<E: Element>(row: &[E], bound: f32, keys: &mut Vec<u64>) {
    for (index, value) in row.iter().enumerate() {
        let value = value.to_f32();
        if value > bound {
            keys.push(key_of(value, index));
        }
    }
}

pub(super) fn collect_finite_above<E: Element>(row: &[E], bound: f32, keys: &mut Vec<u64>) -> bool {
    collect_above(row, bound, keys);
    all_finite(row)
}

pub(super) fn count_reaching(values: &[f32], bound: f32) -> usize {
    values.iter().filter(|value| **value >= bound).count()
}

pub(super) fn collect_above_each<E: Element>(row: &[E], bounds: &[f32], keys: &mut Vec<u64>) {
    for (index, (value, bound)) in row.iter().zip(bounds).enumerate() {
        let value = value.to_f32();
        if value > *bound {
            keys.push(key_of(value, index));
        }
    }
}

pub(super) fn add_scaled<E: Stored>(sum: &mut [f32], scale: f32, row: &[E]) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum += scale * value.to_f32();
    }
}

pub(super) fn add_scaled_4<E: Stored>(sum: &mut [f32], scales: [f32; 4], rows: [&[E]; 4]) {
    // Cut to one length first, so that the loop has no bounds checks.
    let len = rows.iter().fold(sum.len(), |len, row| len.min(row.len()));
    let [a, b, c, d] = rows.map(|row| &row[..len]);
    for (i, sum) in sum[..len].iter_mut().enumerate() {
        *sum += scales[0] * a[i].to_f32();
        *sum += scales[1] * b[i].to_f32();
        *sum += scales[2] * c[i].to_f32();
        *sum += scales[3] * d[i].to_f32();
    }
}

pub(super) fn dot<E: Stored>(left: &[f32], right: &[E]) -> f32 {
    // Eight partial sums: the compiler may not reorder one sum by itself.
    let len = left.len().min(right.len());
    let (left, right) = (&left[..len], &right[..len]);
    let mut sums = [0.0_f32; 8];
    let (left_chunks, right_chunks) = (left.chunks_exact(8), right.chunks_exact(8));
    let tail: f32 = left_chunks
        .remainder()
        .iter()
        .zip(right_chunks.remainder())
        .map(|(l, r)| l * r.to_f32())
        .sum();
    for (l, r) in left_chunks.zip(right_chunks) {
        for i in 0..8 {
            sums[i] += l[i] * r[i].to_f32();
        }
    }
    sums.iter().sum::<f32>() + tail
}

pub(super) fn dot_4<E: Stored>(left: [&[f32]; 4], right: &[E]) -> [f32; 4] {
    left.map(|left| dot(left, right))
}

pub(super) fn mix_4<E: Element>(
    sums: [&mut [f32]; 4],
    weights: [&[f32]; 4],
    rows: &[E],
    stride: usize,
) {
    for (sum, weights) in sums.into_iter().zip(weights) {
        for (row, weight) in weights.iter().enumerate() {
            add_scaled(sum, *weight, &rows[row * stride..]);
        }
    }
}
