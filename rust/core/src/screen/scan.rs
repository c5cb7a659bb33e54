//! Which of a panel's scores reach a row's bound.

use super::candidates::List;
use super::certificate::{FeatureBounds, RowBound};
use super::kernel::Kind;
use super::layout::PANEL;
#[cfg(any(test, target_arch = "x86_64"))]
use crate::simd::Level;
use crate::simd::Simd;

/// The bounds of one panel's features, gathered so that each begins a cache line.
#[repr(C, align(64))]
pub(super) struct PanelBounds {
    pub scale: [f32; PANEL],
    pub shift: [f32; PANEL],
    pub error2: [f32; PANEL],
    pub norm2: [f32; PANEL],
    pub bias: [f32; PANEL],
    /// What a pre-activation must exceed, whatever the others.
    pub floor: [f32; PANEL],
    /// The first feature.
    pub first: usize,
}

impl PanelBounds {
    /// Of panel `panel`; None beyond the last.
    pub(super) fn new(bounds: &FeatureBounds, floor: &[f32], panel: usize) -> Option<Self> {
        let part = |all: &[f32]| all.get(panel * PANEL..)?.first_chunk().copied();
        Some(Self {
            scale: part(&bounds.scale)?,
            shift: part(&bounds.shift)?,
            error2: part(&bounds.error2)?,
            norm2: part(&bounds.norm2)?,
            bias: part(&bounds.bias)?,
            floor: part(floor)?,
            first: panel * PANEL,
        })
    }
}

/// Turns a row's sums into upper scores, and adds to `list` the features whose score and margin reach
/// both `bound` and their floor.
#[inline]
pub(super) fn add_passing(
    sums: &[i32; PANEL],
    panel: &PanelBounds,
    row: &RowBound,
    bound: f32,
    list: &mut List,
    kind: Kind,
    simd: Simd,
) {
    list.reserve();
    match (simd.level(), kind) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a Simd of this level is only made after AVX-512F was detected.
        (Level::Avx512, Kind::Int8) => unsafe {
            x86::avx512::<false>(sums, panel, row, bound, list);
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a Simd of this level is only made after AVX-512F was detected.
        (Level::Avx512, Kind::Bf16) => unsafe {
            x86::avx512::<true>(sums, panel, row, bound, list);
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a Simd of this level is only made after AVX2 and FMA were detected.
        (Level::Avx2, Kind::Int8) => unsafe {
            x86::avx2::<false>(sums, panel, row, bound, list);
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a Simd of this level is only made after AVX2 and FMA were detected.
        (Level::Avx2, Kind::Bf16) => unsafe {
            x86::avx2::<true>(sums, panel, row, bound, list);
        },
        (_, Kind::Int8) => scalar::<false>(sums, panel, row, bound, list),
        (_, Kind::Bf16) => scalar::<true>(sums, panel, row, bound, list),
    }
}

/// The truth (`FLOATS`: the sums are the bits of f32); the twins may differ in the last bits of a score, which the margins allow for.
fn scalar<const FLOATS: bool>(
    sums: &[i32; PANEL],
    panel: &PanelBounds,
    row: &RowBound,
    bound: f32,
    list: &mut List,
) {
    let (mut scores, mut margins2) = ([0.0; PANEL], [0.0; PANEL]);
    let mut mask = 0;
    for lane in 0..PANEL {
        let sum = if FLOATS {
            f32::from_bits(sums[lane] as u32)
        } else {
            (sums[lane] - row.offset) as f32
        };
        let sum = sum + (panel.shift[lane] + row.shift);
        let score = sum * (panel.scale[lane] * row.scale) + panel.bias[lane];
        scores[lane] = score;
        let short = (bound.max(panel.floor[lane]) - score).max(0.0);
        let margin2 = panel.error2[lane] * row.norm2 + panel.norm2[lane] * row.error2;
        margins2[lane] = margin2;
        mask |= u32::from(short * short <= margin2) << lane;
    }
    list.push(mask, panel.first, &scores, &margins2);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_add_ps, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cvtepi32_ps, _mm256_fmadd_ps,
        _mm256_loadu_ps, _mm256_loadu_si256, _mm256_max_ps, _mm256_movemask_ps, _mm256_mul_ps,
        _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps, _mm256_sub_epi32,
        _mm256_sub_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
        _mm512_cvtepi32_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_maskz_compress_epi32, _mm512_maskz_compress_ps, _mm512_max_ps, _mm512_mul_ps,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
        _mm512_storeu_si512, _mm512_sub_epi32, _mm512_sub_ps, _CMP_LE_OQ,
    };

    use super::{List, PanelBounds, RowBound, PANEL};

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512<const FLOATS: bool>(
        sums: &[i32; PANEL],
        panel: &PanelBounds,
        row: &RowBound,
        bound: f32,
        list: &mut List,
    ) {
        debug_assert!(list.features.capacity() - list.features.len() >= PANEL);
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let mut len = list.features.len();
        for start in [0, 16] {
            // SAFETY: start + 16 <= 32, the length of each array. The lists have room for 32 more (they
            // were reserved together), of which each half writes 16 from at most its start on.
            unsafe {
                let sum = _mm512_loadu_si512(sums.as_ptr().add(start).cast());
                let sum = if FLOATS {
                    _mm512_castsi512_ps(sum)
                } else {
                    _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(row.offset)))
                };
                let shift = _mm512_loadu_ps(panel.shift.as_ptr().add(start));
                let sum = _mm512_add_ps(sum, _mm512_add_ps(shift, _mm512_set1_ps(row.shift)));
                let scale = _mm512_loadu_ps(panel.scale.as_ptr().add(start));
                let scale = _mm512_mul_ps(scale, _mm512_set1_ps(row.scale));
                let bias = _mm512_loadu_ps(panel.bias.as_ptr().add(start));
                let score = _mm512_fmadd_ps(sum, scale, bias);
                let floor = _mm512_loadu_ps(panel.floor.as_ptr().add(start));
                let bound = _mm512_max_ps(floor, _mm512_set1_ps(bound));
                let short = _mm512_max_ps(_mm512_sub_ps(bound, score), _mm512_setzero_ps());
                let error2 = _mm512_loadu_ps(panel.error2.as_ptr().add(start));
                let norm2 = _mm512_loadu_ps(panel.norm2.as_ptr().add(start));
                let margin2 = _mm512_fmadd_ps(
                    norm2,
                    _mm512_set1_ps(row.error2),
                    _mm512_mul_ps(error2, _mm512_set1_ps(row.norm2)),
                );
                let short2 = _mm512_mul_ps(short, short);
                let passing = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(short2, margin2);
                // Written whether or not any passes: most do in some lane, and a branch that can't be
                // foreseen costs more.
                let first = _mm512_set1_epi32((panel.first + start) as i32);
                let features = _mm512_maskz_compress_epi32(passing, _mm512_add_epi32(first, lanes));
                let score = _mm512_maskz_compress_ps(passing, score);
                let margin2 = _mm512_maskz_compress_ps(passing, margin2);
                _mm512_storeu_si512(list.features.as_mut_ptr().add(len).cast(), features);
                _mm512_storeu_ps(list.scores.as_mut_ptr().add(len), score);
                _mm512_storeu_ps(list.margins2.as_mut_ptr().add(len), margin2);
                len += passing.count_ones() as usize;
            }
        }
        // SAFETY: all up to `len` was written, within the capacity.
        unsafe {
            list.features.set_len(len);
            list.scores.set_len(len);
            list.margins2.set_len(len);
        }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2<const FLOATS: bool>(
        sums: &[i32; PANEL],
        panel: &PanelBounds,
        row: &RowBound,
        bound: f32,
        list: &mut List,
    ) {
        let (mut scores, mut margins2) = ([0.0; PANEL], [0.0; PANEL]);
        let mut mask = 0;
        for start in [0, 8, 16, 24] {
            // SAFETY: start + 8 <= 32, the length of each array.
            unsafe {
                let sum = _mm256_loadu_si256(sums.as_ptr().add(start).cast());
                let sum = if FLOATS {
                    _mm256_castsi256_ps(sum)
                } else {
                    _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(row.offset)))
                };
                let shift = _mm256_loadu_ps(panel.shift.as_ptr().add(start));
                let sum = _mm256_add_ps(sum, _mm256_add_ps(shift, _mm256_set1_ps(row.shift)));
                let scale = _mm256_loadu_ps(panel.scale.as_ptr().add(start));
                let scale = _mm256_mul_ps(scale, _mm256_set1_ps(row.scale));
                let bias = _mm256_loadu_ps(panel.bias.as_ptr().add(start));
                let score = _mm256_fmadd_ps(sum, scale, bias);
                let floor = _mm256_loadu_ps(panel.floor.as_ptr().add(start));
                let bound = _mm256_max_ps(floor, _mm256_set1_ps(bound));
                let short = _mm256_max_ps(_mm256_sub_ps(bound, score), _mm256_setzero_ps());
                let error2 = _mm256_loadu_ps(panel.error2.as_ptr().add(start));
                let norm2 = _mm256_loadu_ps(panel.norm2.as_ptr().add(start));
                let margin2 = _mm256_add_ps(
                    _mm256_mul_ps(norm2, _mm256_set1_ps(row.error2)),
                    _mm256_mul_ps(error2, _mm256_set1_ps(row.norm2)),
                );
                let short2 = _mm256_mul_ps(short, short);
                let passing = _mm256_cmp_ps::<_CMP_LE_OQ>(short2, margin2);
                mask |= (_mm256_movemask_ps(passing) as u32) << start;
                _mm256_storeu_ps(scores.as_mut_ptr().add(start), score);
                _mm256_storeu_ps(margins2.as_mut_ptr().add(start), margin2);
            }
        }
        list.push(mask, panel.first, &scores, &margins2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twins_agree_where_every_operation_is_exact() {
        // Whole numbers and powers of two: every operation is exact, so all must agree to the bit.
        let sums: [i32; PANEL] = std::array::from_fn(|lane| (lane as i32 * 37 % 64) - 20);
        let of = |value: f32| [value; PANEL];
        let (scale, shift, error2, norm2) = (of(0.5), of(-2.0), of(4.0), of(2.0));
        let bias: [f32; PANEL] = std::array::from_fn(|lane| (lane % 3) as f32);
        let mut floor = of(0.0);
        floor[5] = f32::MAX;
        floor[6] = 9.0;
        let panel = PanelBounds {
            first: 64,
            scale,
            shift,
            error2,
            norm2,
            bias,
            floor,
        };
        let row = RowBound {
            scale: 1.0,
            offset: 3,
            shift: 1.0,
            norm2: 1.0,
            error2: 2.5,
            is_exact: false,
            is_zero: false,
        };
        for bound in [0.0_f32, 3.0, 12.0] {
            let mut expected = Vec::new();
            for lane in 0..PANEL {
                let score = (sums[lane] - 4) as f32 * 0.5 + bias[lane];
                // The squared margin is 9.
                let passes = score + 3.0 >= bound.max(floor[lane]);
                if passes {
                    expected.push((lane as u32 + 64, score, 9.0));
                }
            }
            for simd in Level::ALL.into_iter().filter_map(Simd::new) {
                let mut list = List::default();
                // The same as whole numbers and as floats.
                add_passing(&sums, &panel, &row, bound, &mut list, Kind::Int8, simd);
                let floats = sums.map(|sum| ((sum - 3) as f32).to_bits() as i32);
                add_passing(&floats, &panel, &row, bound, &mut list, Kind::Bf16, simd);
                let entries = list.features.iter().zip(&list.scores).zip(&list.margins2);
                let found: Vec<_> = entries.map(|((f, s), m)| (*f, *s, *m)).collect();
                assert_eq!(found, [&expected[..], &expected[..]].concat());
            }
        }
    }
}
