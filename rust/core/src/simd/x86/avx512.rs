//! AVX-512F: 16 lanes.

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_and_epi32, _mm512_castps_si512, _mm512_cmp_ps_mask,
    _mm512_cmplt_epu64_mask, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mask_add_epi64, _mm512_max_epi32, _mm512_max_ps, _mm512_reduce_add_ps,
    _mm512_reduce_max_epi32, _mm512_set1_epi32, _mm512_set1_epi64, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_storeu_ps, _mm512_storeu_si512, _CMP_GE_OQ,
    _CMP_GT_OQ, _CMP_UNORD_Q,
};

use super::super::{key_of, scalar, Element, Stored};
use super::fetch_ahead;

const LANES: usize = 16;
/// Vectors whose masks are joined before they are looked at: nearly all are empty.
const BLOCK: usize = 4 * LANES;

#[target_feature(enable = "avx512f")]
pub(in super::super) fn group_maxima<E: Element>(row: &[E], maxima: &mut [f32]) -> bool {
    let groups = maxima.len();
    let whole = row.len() - row.len().checked_rem(groups).unwrap_or(0);
    // Up to 16 vectors of maxima at once, so that they stay in registers.
    let mut finite = true;
    let mut start = 0;
    while start < groups {
        let vectors = ((groups - start) / LANES).min(16);
        let (row, maxima) = (&row[..whole], &mut maxima[start..]);
        finite &= match vectors {
            16 => maxima_of_columns::<E, 16>(row, groups, start, maxima),
            12..16 => maxima_of_columns::<E, 12>(row, groups, start, maxima),
            8..12 => maxima_of_columns::<E, 8>(row, groups, start, maxima),
            4..8 => maxima_of_columns::<E, 4>(row, groups, start, maxima),
            1..4 => maxima_of_columns::<E, 1>(row, groups, start, maxima),
            _ => {
                let columns = row.chunks_exact(groups);
                columns.fold(true, |finite, columns| {
                    finite & scalar::group_maxima(&columns[start..], maxima)
                })
            }
        };
        start += match vectors {
            0 => groups,
            1..4 => LANES,
            _ => vectors / 4 * 4 * LANES,
        };
    }
    finite & scalar::group_maxima(&row[whole..], maxima)
}

/// The maxima of `V` vectors' worth of groups, from `start` on; `row` is whole rounds of `groups`.
#[target_feature(enable = "avx512f")]
fn maxima_of_columns<E: Element, const V: usize>(
    row: &[E],
    groups: usize,
    start: usize,
    maxima: &mut [f32],
) -> bool {
    assert!(start + V * LANES <= groups && maxima.len() >= V * LANES);
    let zero = _mm512_setzero_ps();
    let mut largest = [zero; V];
    // What is finite times 0 is 0; what isn't, NaN, which no sum loses.
    let mut zeros = [zero; 4];
    for (vector, largest) in largest.iter_mut().enumerate() {
        // SAFETY: V vectors fit into maxima (asserted).
        *largest = unsafe { _mm512_loadu_ps(maxima.as_ptr().add(vector * LANES)) };
    }
    for columns in row.chunks_exact(groups) {
        for (vector, largest) in largest.iter_mut().enumerate() {
            // SAFETY: start + V vectors <= groups, the length of `columns` (asserted).
            let values = unsafe { E::load_16(columns.as_ptr().add(start + vector * LANES)) };
            // max returns its second operand when the first is NaN.
            *largest = _mm512_max_ps(values, *largest);
            zeros[vector % 4] = _mm512_fmadd_ps(values, zero, zeros[vector % 4]);
        }
    }
    for (vector, largest) in largest.iter().enumerate() {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(maxima.as_mut_ptr().add(vector * LANES), *largest) };
    }
    are_zero(zeros)
}

/// Whether sums of products with 0 say that all factors were finite.
#[inline]
#[target_feature(enable = "avx512f")]
fn are_zero(zeros: [__m512; 4]) -> bool {
    let sum = _mm512_add_ps(
        _mm512_add_ps(zeros[0], zeros[1]),
        _mm512_add_ps(zeros[2], zeros[3]),
    );
    _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(sum, sum) == 0
}

#[target_feature(enable = "avx512f")]
pub(in super::super) fn all_finite<E: Element>(row: &[E]) -> bool {
    let magnitude = _mm512_set1_epi32(i32::MAX);
    let mut largest = _mm512_setzero_si512();
    let whole = row.len() - row.len() % LANES;
    for start in (0..whole).step_by(LANES) {
        // SAFETY: start + 16 <= whole <= row.len().
        let values = unsafe { E::load_16(row.as_ptr().add(start)) };
        let bits = _mm512_and_epi32(_mm512_castps_si512(values), magnitude);
        largest = _mm512_max_epi32(largest, bits);
    }
    is_finite_magnitude(_mm512_reduce_max_epi32(largest)) && scalar::all_finite(&row[whole..])
}

/// Whether the bits of `|v|` are below those of infinity.
fn is_finite_magnitude(bits: i32) -> bool {
    bits < 0x7f80_0000
}

#[target_feature(enable = "avx512f")]
pub(in super::super) fn collect_above<E: Element>(row: &[E], bound: f32, keys: &mut Vec<u64>) {
    let bounds = _mm512_set1_ps(bound);
    let whole = row.len() - row.len() % BLOCK;
    for start in (0..whole).step_by(BLOCK) {
        let mut mask = 0_u64;
        for vector in 0..4 {
            let offset = vector * LANES;
            // SAFETY: start + 64 <= whole <= row.len(), and offset + 16 <= 64.
            let values = unsafe { E::load_16(row.as_ptr().add(start + offset)) };
            mask |= u64::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(values, bounds)) << offset;
        }
        push_marked(row, start, mask, keys);
    }
    push_tail(row, whole, keys, |_| bound);
}

#[target_feature(enable = "avx512f")]
pub(in super::super) fn collect_finite_above<E: Element>(
    row: &[E],
    bound: f32,
    keys: &mut Vec<u64>,
) -> bool {
    let bounds = _mm512_set1_ps(bound);
    let zero = _mm512_setzero_ps();
    let mut zeros = [zero; 4];
    let whole = row.len() - row.len() % BLOCK;
    for start in (0..whole).step_by(BLOCK) {
        let mut mask = 0_u64;
        fetch_ahead(row, start, BLOCK);
        for (vector, zeros) in zeros.iter_mut().enumerate() {
            let offset = vector * LANES;
            // SAFETY: start + 64 <= whole <= row.len(), and offset + 16 <= 64.
            let values = unsafe { E::load_16(row.as_ptr().add(start + offset)) };
            mask |= u64::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(values, bounds)) << offset;
            *zeros = _mm512_fmadd_ps(values, zero, *zeros);
        }
        push_marked(row, start, mask, keys);
    }
    push_tail(row, whole, keys, |_| bound);
    are_zero(zeros) & scalar::all_finite(&row[whole..])
}

/// Keys whose ranks are counted at once, in eight lanes each.
const RANKED: usize = 32;

/// A key's place is the number of smaller ones: so many comparisons, none of which any other waits for.
#[target_feature(enable = "avx512f")]
pub(in super::super) fn keep_smallest(keys: &mut Vec<u64>, keep: usize, scratch: &mut Vec<u64>) {
    let count = keys.len();
    let keep = keep.min(count);
    scratch.clear();
    scratch.resize(keep, 0);
    // No key is as large as these, so that they come last.
    keys.resize(count.next_multiple_of(RANKED), u64::MAX);
    let one = _mm512_set1_epi64(1);
    let (groups, _) = keys.as_chunks::<RANKED>();
    for (first, group) in (0..count).step_by(RANKED).zip(groups) {
        let mut ranks = [_mm512_setzero_si512(); RANKED / 8];
        let mut own = ranks;
        for (vector, own) in own.iter_mut().enumerate() {
            // SAFETY: a group is four times eight u64.
            *own = unsafe { _mm512_loadu_si512(group.as_ptr().add(8 * vector).cast()) };
        }
        for other in &keys[..count] {
            let other = _mm512_set1_epi64(*other as i64);
            for (rank, own) in ranks.iter_mut().zip(own) {
                let is_smaller = _mm512_cmplt_epu64_mask(other, own);
                *rank = _mm512_mask_add_epi64(*rank, is_smaller, *rank, one);
            }
        }
        let mut places = [0_u64; RANKED];
        for (vector, rank) in ranks.into_iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe { _mm512_storeu_si512(places.as_mut_ptr().add(8 * vector).cast(), rank) };
        }
        for (key, place) in group.iter().zip(places).take(count - first) {
            if let Some(slot) = scratch.get_mut(place as usize) {
                *slot = *key;
            }
        }
    }
    std::mem::swap(keys, scratch);
}

#[target_feature(enable = "avx512f")]
pub(in super::super) fn count_reaching(values: &[f32], bound: f32) -> usize {
    let bounds = _mm512_set1_ps(bound);
    let (vectors, rest) = values.as_chunks::<LANES>();
    let mut count = scalar::count_reaching(rest, bound);
    for vector in vectors {
        // SAFETY: a chunk holds 16 f32.
        let values = unsafe { _mm512_loadu_ps(vector.as_ptr()) };
        let reaching = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(values, bounds);
        count += reaching.count_ones() as usize;
    }
    count
}

#[target_feature(enable = "avx512f")]
pub(in super::super) fn collect_above_each<E: Element>(
    row: &[E],
    bounds: &[f32],
    keys: &mut Vec<u64>,
) {
    let row = &row[..row.len().min(bounds.len())];
    let whole = row.len() - row.len() % BLOCK;
    for start in (0..whole).step_by(BLOCK) {
        let mut mask = 0_u64;
        for vector in 0..4 {
            let offset = vector * LANES;
            // SAFETY: start + 64 <= whole <= row.len() <= bounds.len(), and offset + 16 <= 64.
            let (values, bounds) = unsafe {
                (
                    E::load_16(row.as_ptr().add(start + offset)),
                    _mm512_loadu_ps(bounds.as_ptr().add(start + offset)),
                )
            };
            mask |= u64::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(values, bounds)) << offset;
        }
        push_marked(row, start, mask, keys);
    }
    push_tail(row, whole, keys, |index| bounds[index]);
}

#[inline]
fn push_marked<E: Element>(row: &[E], start: usize, mut mask: u64, keys: &mut Vec<u64>) {
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

#[target_feature(enable = "avx512f")]
pub(in super::super) fn add_scaled<E: Stored>(sum: &mut [f32], scale: f32, row: &[E]) {
    let len = sum.len().min(row.len());
    let whole = len - len % LANES;
    let scales = _mm512_set1_ps(scale);
    for start in (0..whole).step_by(LANES) {
        // SAFETY: start + 16 <= whole <= both lengths.
        unsafe {
            let at = sum.as_mut_ptr().add(start);
            let values = E::load_16(row.as_ptr().add(start));
            _mm512_storeu_ps(at, _mm512_fmadd_ps(scales, values, _mm512_loadu_ps(at)));
        }
    }
    for (sum, value) in sum[whole..len].iter_mut().zip(&row[whole..len]) {
        *sum = scale.mul_add(value.to_f32(), *sum);
    }
}

#[target_feature(enable = "avx512f")]
pub(in super::super) fn add_scaled_4<E: Stored>(
    sum: &mut [f32],
    scales: [f32; 4],
    rows: [&[E]; 4],
) {
    let len = rows.iter().fold(sum.len(), |len, row| len.min(row.len()));
    let whole = len - len % LANES;
    let [a, b, c, d] = scales.map(|scale| _mm512_set1_ps(scale));
    for start in (0..whole).step_by(LANES) {
        // SAFETY: start + 16 <= whole <= all five lengths.
        unsafe {
            let at = sum.as_mut_ptr().add(start);
            let mut sums = _mm512_loadu_ps(at);
            sums = _mm512_fmadd_ps(a, E::load_16(rows[0].as_ptr().add(start)), sums);
            sums = _mm512_fmadd_ps(b, E::load_16(rows[1].as_ptr().add(start)), sums);
            sums = _mm512_fmadd_ps(c, E::load_16(rows[2].as_ptr().add(start)), sums);
            sums = _mm512_fmadd_ps(d, E::load_16(rows[3].as_ptr().add(start)), sums);
            _mm512_storeu_ps(at, sums);
        }
    }
    for (index, sum) in sum[..len].iter_mut().enumerate().skip(whole) {
        for (scale, row) in scales.iter().zip(rows) {
            *sum = scale.mul_add(row[index].to_f32(), *sum);
        }
    }
}

#[target_feature(enable = "avx512f")]
pub(in super::super) fn dot<E: Stored>(left: &[f32], right: &[E]) -> f32 {
    let len = left.len().min(right.len());
    let whole = len - len % BLOCK;
    // Four sums hide the latency of the multiply-add.
    let mut sums = [_mm512_setzero_ps(); 4];
    for start in (0..whole).step_by(BLOCK) {
        for (vector, sum) in sums.iter_mut().enumerate() {
            let at = start + vector * LANES;
            // SAFETY: at + 16 <= start + 64 <= whole <= both lengths.
            let (l, r) = unsafe {
                (
                    _mm512_loadu_ps(left.as_ptr().add(at)),
                    E::load_16(right.as_ptr().add(at)),
                )
            };
            *sum = _mm512_fmadd_ps(l, r, *sum);
        }
    }
    let halves = (
        _mm512_add_ps(sums[0], sums[1]),
        _mm512_add_ps(sums[2], sums[3]),
    );
    let total = _mm512_reduce_add_ps(_mm512_add_ps(halves.0, halves.1));
    let tail = left[whole..len].iter().zip(&right[whole..len]);
    tail.fold(total, |sum, (l, r)| l.mul_add(r.to_f32(), sum))
}

#[target_feature(enable = "avx512f")]
pub(in super::super) fn dot_4<E: Stored>(left: [&[f32]; 4], right: &[E]) -> [f32; 4] {
    // Cut to one length, which also is a check.
    let left = left.map(|left| &left[..right.len()]);
    let whole = right.len() - right.len() % (2 * LANES);
    // Two sums each hide the latency of the multiply-add.
    let mut sums = [[_mm512_setzero_ps(); 2]; 4];
    for start in (0..whole).step_by(2 * LANES) {
        for half in 0..2 {
            let at = start + half * LANES;
            // SAFETY: at + 16 <= whole <= the length of all five.
            let value = unsafe { E::load_16(right.as_ptr().add(at)) };
            for (left, sums) in left.iter().zip(&mut sums) {
                // SAFETY: as above.
                let query = unsafe { _mm512_loadu_ps(left.as_ptr().add(at)) };
                sums[half] = _mm512_fmadd_ps(query, value, sums[half]);
            }
        }
    }
    let sum = sums.map(|[a, b]| _mm512_add_ps(a, b));
    let mut totals = sum.map(|sum| _mm512_reduce_add_ps(sum));
    for (total, left) in totals.iter_mut().zip(left) {
        let tail = left[whole..].iter().zip(&right[whole..]);
        *total = tail.fold(*total, |sum, (l, r)| l.mul_add(r.to_f32(), sum));
    }
    totals
}

/// Vectors of each of four sums that are kept in registers.
const MIXED: usize = 4;

#[target_feature(enable = "avx512f")]
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
        let mut held = [[_mm512_setzero_ps(); MIXED]; 4];
        for (held, sum) in held.iter_mut().zip(&sums) {
            for (vector, held) in held.iter_mut().enumerate() {
                // SAFETY: start + COLUMNS <= whole <= width, which Simd::mix_4 found each sum to be.
                *held = unsafe { _mm512_loadu_ps(sum.as_ptr().add(start + vector * LANES)) };
            }
        }
        for row in 0..count {
            let scales = weights.map(|weights| _mm512_set1_ps(weights[row]));
            for vector in 0..MIXED {
                let at = row * stride + start + vector * LANES;
                // SAFETY: row < count and start + COLUMNS <= width; Simd::mix_4 found the last
                // row's end, (count - 1) * stride + width, to lie within the rows.
                let value = unsafe { E::load_16(rows.as_ptr().add(at)) };
                for (held, scale) in held.iter_mut().zip(scales) {
                    held[vector] = _mm512_fmadd_ps(scale, value, held[vector]);
                }
            }
        }
        for (held, sum) in held.iter().zip(&mut sums) {
            for (vector, held) in held.iter().enumerate() {
                // SAFETY: as for the loads.
                unsafe { _mm512_storeu_ps(sum.as_mut_ptr().add(start + vector * LANES), *held) };
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
