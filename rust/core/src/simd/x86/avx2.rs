//! AVX2 with FMA: 8 lanes.

use std::arch::x86_64::{
    __m256, __m256i, _mm256_add_ps, _mm256_and_si256, _mm256_castps_si256, _mm256_cmp_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_epi32, _mm256_max_ps, _mm256_movemask_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_storeu_ps,
    _mm256_storeu_si256, _CMP_GE_OQ, _CMP_GT_OQ, _CMP_UNORD_Q,
};

use super::super::{key_of, scalar, Element, Stored};
use super::fetch_ahead;

const LANES: usize = 8;
/// Vectors whose masks are joined before they are looked at: nearly all are empty.
const BLOCK: usize = 4 * LANES;

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn group_maxima<E: Element>(row: &[E], maxima: &mut [f32]) -> bool {
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let mut largest = _mm256_setzero_si256();
    let mut finite = true;
    for chunk in row.chunks(maxima.len().max(1)) {
        let whole = chunk.len() - chunk.len() % LANES;
        for start in (0..whole).step_by(LANES) {
            // SAFETY: start + 8 <= whole <= chunk.len() <= maxima.len().
            unsafe {
                let values = E::load_8(chunk.as_ptr().add(start));
                let at = maxima.as_mut_ptr().add(start);
                // max returns its second operand when the first is NaN.
                _mm256_storeu_ps(at, _mm256_max_ps(values, _mm256_loadu_ps(at)));
                let bits = _mm256_and_si256(_mm256_castps_si256(values), magnitude);
                largest = _mm256_max_epi32(largest, bits);
            }
        }
        finite &= scalar::group_maxima(&chunk[whole..], &mut maxima[whole..chunk.len()]);
    }
    finite & are_finite_magnitudes(largest)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn all_finite<E: Element>(row: &[E]) -> bool {
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let mut largest = _mm256_setzero_si256();
    let whole = row.len() - row.len() % LANES;
    for start in (0..whole).step_by(LANES) {
        // SAFETY: start + 8 <= whole <= row.len().
        let values = unsafe { E::load_8(row.as_ptr().add(start)) };
        let bits = _mm256_and_si256(_mm256_castps_si256(values), magnitude);
        largest = _mm256_max_epi32(largest, bits);
    }
    are_finite_magnitudes(largest) && scalar::all_finite(&row[whole..])
}

/// Whether the bits of each `|v|` are below those of infinity.
#[target_feature(enable = "avx2,fma,f16c")]
fn are_finite_magnitudes(largest: __m256i) -> bool {
    let mut lanes = [0_i32; LANES];
    // SAFETY: the array holds the 32 bytes that are stored.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), largest) };
    lanes.iter().all(|bits| *bits < 0x7f80_0000)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn collect_above<E: Element>(row: &[E], bound: f32, keys: &mut Vec<u64>) {
    let bounds = _mm256_set1_ps(bound);
    let whole = row.len() - row.len() % BLOCK;
    for start in (0..whole).step_by(BLOCK) {
        let mut mask = 0_u32;
        for vector in 0..4 {
            let offset = vector * LANES;
            // SAFETY: start + 32 <= whole <= row.len(), and offset + 8 <= 32.
            let values = unsafe { E::load_8(row.as_ptr().add(start + offset)) };
            mask |= above(values, bounds) << offset;
        }
        push_marked(row, start, mask, keys);
    }
    push_tail(row, whole, keys, |_| bound);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn collect_finite_above<E: Element>(
    row: &[E],
    bound: f32,
    keys: &mut Vec<u64>,
) -> bool {
    let bounds = _mm256_set1_ps(bound);
    let zero = _mm256_setzero_ps();
    // What is finite times 0 is 0; what isn't, NaN, which no sum loses.
    let mut zeros = [zero; 4];
    let whole = row.len() - row.len() % BLOCK;
    for start in (0..whole).step_by(BLOCK) {
        let mut mask = 0_u32;
        fetch_ahead(row, start, BLOCK);
        for (vector, zeros) in zeros.iter_mut().enumerate() {
            let offset = vector * LANES;
            // SAFETY: start + 32 <= whole <= row.len(), and offset + 8 <= 32.
            let values = unsafe { E::load_8(row.as_ptr().add(start + offset)) };
            mask |= above(values, bounds) << offset;
            *zeros = _mm256_fmadd_ps(values, zero, *zeros);
        }
        push_marked(row, start, mask, keys);
    }
    push_tail(row, whole, keys, |_| bound);
    let sum = _mm256_add_ps(
        _mm256_add_ps(zeros[0], zeros[1]),
        _mm256_add_ps(zeros[2], zeros[3]),
    );
    let unordered = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(sum, sum));
    (unordered == 0) & scalar::all_finite(&row[whole..])
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn count_reaching(values: &[f32], bound: f32) -> usize {
    let bounds = _mm256_set1_ps(bound);
    let (vectors, rest) = values.as_chunks::<LANES>();
    let mut count = scalar::count_reaching(rest, bound);
    for vector in vectors {
        // SAFETY: a chunk holds 8 f32.
        let values = unsafe { _mm256_loadu_ps(vector.as_ptr()) };
        let reaching = _mm256_cmp_ps::<_CMP_GE_OQ>(values, bounds);
        count += _mm256_movemask_ps(reaching).count_ones() as usize;
    }
    count
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn collect_above_each<E: Element>(
    row: &[E],
    bounds: &[f32],
    keys: &mut Vec<u64>,
) {
    let row = &row[..row.len().min(bounds.len())];
    let whole = row.len() - row.len() % BLOCK;
    for start in (0..whole).step_by(BLOCK) {
        let mut mask = 0_u32;
        for vector in 0..4 {
            let offset = vector * LANES;
            // SAFETY: start + 32 <= whole <= row.len() <= bounds.len(), and offset + 8 <= 32.
            let (values, bounds) = unsafe {
                (
                    E::load_8(row.as_ptr().add(start + offset)),
                    _mm256_loadu_ps(bounds.as_ptr().add(start + offset)),
                )
            };
            mask |= above(values, bounds) << offset;
        }
        push_marked(row, start, mask, keys);
    }
    push_tail(row, whole, keys, |index| bounds[index]);
}

/// One bit a lane; false for NaN.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn above(values: __m256, bounds: __m256) -> u32 {
    _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(values, bounds)) as u32
}

#[inline]
fn push_marked<E: Element>(row: &[E], start: usize, mut mask: u32, keys: &mut Vec<u64>) {
    while mask != 0 {
        let index = start + mask.trailing_zeros() as usize;
        keys.push(key_of(row[index].to_f32(), index));
        mask &= mask - 1;
    }
}

#[inline]
fn push_tail<E: Element>(
    row: &[E],
    start: usize,
    keys: &mut Vec<u64>,
    bound: impl Fn(usize) -> f32,
) {
    for (index, value) in row.iter().enumerate().skip(start) {
        let value = value.to_f32();
        if value > bound(index) {
            keys.push(key_of(value, index));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn add_scaled<E: Stored>(sum: &mut [f32], scale: f32, row: &[E]) {
    let len = sum.len().min(row.len());
    let whole = len - len % LANES;
    let scales = _mm256_set1_ps(scale);
    for start in (0..whole).step_by(LANES) {
        // SAFETY: start + 8 <= whole <= both lengths.
        unsafe {
            let at = sum.as_mut_ptr().add(start);
            let values = E::load_8(row.as_ptr().add(start));
            _mm256_storeu_ps(at, _mm256_fmadd_ps(scales, values, _mm256_loadu_ps(at)));
        }
    }
    for (sum, value) in sum[whole..len].iter_mut().zip(&row[whole..len]) {
        *sum = scale.mul_add(value.to_f32(), *sum);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn add_scaled_4<E: Stored>(
    sum: &mut [f32],
    scales: [f32; 4],
    rows: [&[E]; 4],
) {
    let len = rows.iter().fold(sum.len(), |len, row| len.min(row.len()));
    let whole = len - len % LANES;
    let [a, b, c, d] = scales.map(|scale| _mm256_set1_ps(scale));
    for start in (0..whole).step_by(LANES) {
        // SAFETY: start + 8 <= whole <= all five lengths.
        unsafe {
            let at = sum.as_mut_ptr().add(start);
            let mut sums = _mm256_loadu_ps(at);
            sums = _mm256_fmadd_ps(a, E::load_8(rows[0].as_ptr().add(start)), sums);
            sums = _mm256_fmadd_ps(b, E::load_8(rows[1].as_ptr().add(start)), sums);
            sums = _mm256_fmadd_ps(c, E::load_8(rows[2].as_ptr().add(start)), sums);
            sums = _mm256_fmadd_ps(d, E::load_8(rows[3].as_ptr().add(start)), sums);
            _mm256_storeu_ps(at, sums);
        }
    }
    for (index, sum) in sum[..len].iter_mut().enumerate().skip(whole) {
        for (scale, row) in scales.iter().zip(rows) {
            *sum = scale.mul_add(row[index].to_f32(), *sum);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn dot<E: Stored>(left: &[f32], right: &[E]) -> f32 {
    let len = left.len().min(right.len());
    let whole = len - len % BLOCK;
    // Four sums hide the latency of the multiply-add.
    let mut sums = [_mm256_setzero_ps(); 4];
    for start in (0..whole).step_by(BLOCK) {
        for (vector, sum) in sums.iter_mut().enumerate() {
            let at = start + vector * LANES;
            // SAFETY: at + 8 <= start + 32 <= whole <= both lengths.
            let (l, r) = unsafe {
                (
                    _mm256_loadu_ps(left.as_ptr().add(at)),
                    E::load_8(right.as_ptr().add(at)),
                )
            };
            *sum = _mm256_fmadd_ps(l, r, *sum);
        }
    }
    let halves = (
        _mm256_add_ps(sums[0], sums[1]),
        _mm256_add_ps(sums[2], sums[3]),
    );
    let mut lanes = [0.0_f32; LANES];
    // SAFETY: the array holds the 32 bytes that are stored.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), _mm256_add_ps(halves.0, halves.1)) };
    let tail = left[whole..len].iter().zip(&right[whole..len]);
    tail.fold(lanes.iter().sum(), |sum, (l, r)| l.mul_add(r.to_f32(), sum))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn dot_4<E: Stored>(left: [&[f32]; 4], right: &[E]) -> [f32; 4] {
    // Cut to one length, which also is a check.
    let left = left.map(|left| &left[..right.len()]);
    let whole = right.len() - right.len() % (2 * LANES);
    // Two sums each hide the latency of the multiply-add.
    let mut sums = [[_mm256_setzero_ps(); 2]; 4];
    for start in (0..whole).step_by(2 * LANES) {
        for half in 0..2 {
            let at = start + half * LANES;
            // SAFETY: at + 8 <= whole <= the length of all five.
            let value = unsafe { E::load_8(right.as_ptr().add(at)) };
            for (left, sums) in left.iter().zip(&mut sums) {
                // SAFETY: as above.
                let query = unsafe { _mm256_loadu_ps(left.as_ptr().add(at)) };
                sums[half] = _mm256_fmadd_ps(query, value, sums[half]);
            }
        }
    }
    let sum = sums.map(|[a, b]| _mm256_add_ps(a, b));
    let mut totals = sum.map(|sum| {
        let mut lanes = [0.0_f32; LANES];
        // SAFETY: the array holds the 32 bytes that are stored.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
        lanes.iter().sum()
    });
    for (total, left) in totals.iter_mut().zip(left) {
        let tail = left[whole..].iter().zip(&right[whole..]);
        *total = tail.fold(*total, |sum, (l, r)| l.mul_add(r.to_f32(), sum));
    }
    totals
}

/// Vectors of each of four sums that are kept in registers.
const MIXED: usize = 2;

#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn mix_4<E: Element>(
    mut sums: [&mut [f32]; 4],
    weights: [&[f32]; 4],
    rows: &[E],
    stride: usize,
) {
    const COLUMNS: usize = MIXED * LANES;
    let (width, count) = (sums[0].len(), weights[0].len());
    let whole = width - width % COLUMNS;
    for start in (0..whole).step_by(COLUMNS) {
        let mut held = [[_mm256_setzero_ps(); MIXED]; 4];
        for (held, sum) in held.iter_mut().zip(&sums) {
            for (vector, held) in held.iter_mut().enumerate() {
                // SAFETY: start + COLUMNS <= whole <= width, which Simd::mix_4 found each sum to be.
                *held = unsafe { _mm256_loadu_ps(sum.as_ptr().add(start + vector * LANES)) };
            }
        }
        for row in 0..count {
            let scales = weights.map(|weights| _mm256_set1_ps(weights[row]));
            for vector in 0..MIXED {
                let at = row * stride + start + vector * LANES;
                // SAFETY: row < count and start + COLUMNS <= width; Simd::mix_4 found the last
                // row's end, (count - 1) * stride + width, to lie within the rows.
                let value = unsafe { E::load_8(rows.as_ptr().add(at)) };
                for (held, scale) in held.iter_mut().zip(scales) {
                    held[vector] = _mm256_fmadd_ps(scale, value, held[vector]);
                }
            }
        }
        for (held, sum) in held.iter().zip(&mut sums) {
            for (vector, held) in held.iter().enumerate() {
                // SAFETY: as for the loads.
                unsafe { _mm256_storeu_ps(sum.as_mut_ptr().add(start + vector * LANES), *held) };
            }
        }
    }
    for (sum, weights) in sums.into_iter().zip(weights) {
        for (row, weight) in weights.iter().enumerate() {
            let values = &rows[row * stride..][whole..width];
            for (sum, value) in sum[whole..].iter_mut().zip(values) {
                *sum = weight.mul_add(value.to_f32(), *sum);
            }
        }
    }
}
