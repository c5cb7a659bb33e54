//! The scan's loop for CPUs that gather and scatter fast: 16 codes of a row at a time, from checks
//! to counts, with hardly a branch that depends on the data.
//!
//! A row shows no feature twice, so the lines that a vector changes are distinct. Where a bad row
//! does, within one vector, one of the two is lost from the line's sum; so the sum of all lines,
//! compared with that of all terms, tells (see [`super::scan::Scan::settle`]).

use std::arch::x86_64::*;

use super::codes::{Index, Value};
use super::histogram::MANTISSA;
use super::lines::{class_of, stamped, Lines, CLASS, FLOOR, ONE};
use super::queue::{Queue, AT_ONCE, WRAPPED};
use super::scan::{Batch, Cursor};
use super::stage::{
    last_feature, BIN_SHIFT, COARSE_SHIFT, FIRST, LINE, MANTISSA_BITS, SUM, WINDOW,
};

/// Codes that are counted at a time.
pub(super) const WIDTH: usize = 16;
/// How many codes ahead the CPU is told to fetch lines.
const AHEAD: usize = 48;
/// How many codes ahead it is told to fetch codes: the hardware does so, but not beyond a page.
const FAR: usize = 1024;
/// Where the highest of four bytes begins.
const TOP: u32 = 24;
/// Lines of so many bytes stay in a core's second cache, and need no fetching.
const NEAR: usize = 5 << 18;

/// Why a scan has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// All rows are counted.
    End,
    /// The queue is.
    Full,
    /// Among the row's next codes, as many as are counted at a time, is one that is no ordinary
    /// activation. Nothing was done for them.
    Unusual,
    /// A feature was active before in its row.
    Twice,
}

/// Proof that this CPU has what the loop needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scatter(());

impl Scatter {
    /// If this CPU can do it at all.
    pub fn possible() -> Option<Self> {
        let can = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("popcnt");
        can.then_some(Self(()))
    }

    /// If it can, and fast. Those with half precision can (Intel's Sapphire Rapids and later):
    /// earlier ones gather slowly since a flaw was mended, and AMD's scatter in microcode.
    pub fn fast() -> Option<Self> {
        Self::possible().filter(|_| is_x86_feature_detected!("avx512fp16"))
    }

    /// Counts rows from the cursor on. What may need more is put into the queue. `added` rises by
    /// what the lines' sums do.
    pub fn scan<V: Value, I: Index>(
        self,
        lines: &mut Lines,
        batch: &Batch<'_, V, I>,
        cursor: &mut Cursor,
        queue: &mut Queue,
        added: &mut u64,
    ) -> Stop {
        // SAFETY: there is a Scatter only where the CPU's features were detected.
        unsafe {
            if lines.len() * LINE <= NEAR {
                scan::<false, V, I>(lines, batch, cursor, queue, added)
            } else {
                scan::<true, V, I>(lines, batch, cursor, queue, added)
            }
        }
    }
}

/// 32-bit numbers, all the same.
#[target_feature(enable = "avx512f")]
#[inline]
fn all(number: u32) -> __m512i {
    _mm512_set1_epi32(number as i32)
}

/// One half, as 64-bit numbers.
#[target_feature(enable = "avx512f")]
#[inline]
fn half<const HIGH: bool>(numbers: __m512i) -> __m256i {
    if HIGH {
        _mm512_extracti64x4_epi64::<1>(numbers)
    } else {
        _mm512_castsi512_si256(numbers)
    }
}

/// The strengths and features of the codes `at..end`, [`WIDTH`] of them at most, in the first lanes.
#[cold]
#[target_feature(enable = "avx512f")]
fn load_part<V: Value, I: Index>(
    batch: &Batch<'_, V, I>,
    at: usize,
    end: usize,
) -> (__m512i, __m512i, __mmask16) {
    let left = WIDTH.min(end - at);
    let (mut values, mut indices) = ([batch.values[at]; WIDTH], [batch.indices[at]; WIDTH]);
    values[..left].copy_from_slice(&batch.values[at..at + left]);
    indices[..left].copy_from_slice(&batch.indices[at..at + left]);
    // SAFETY: there are as many numbers, and the CPU has AVX-512F.
    let (bits, features) = unsafe { (V::load(values.as_ptr()), I::load(indices.as_ptr())) };
    (bits, features, ((1_u32 << left) - 1) as __mmask16)
}

#[target_feature(enable = "avx512f,popcnt")]
fn scan<const FETCH: bool, V: Value, I: Index>(
    lines: &mut Lines,
    batch: &Batch<'_, V, I>,
    cursor: &mut Cursor,
    queue: &mut Queue,
    added: &mut u64,
) -> Stop {
    const { assert!(LINE == 1 << 5 && WIDTH <= AT_ONCE) };
    if lines.len() == 0 {
        // No code is of a feature then; rows without codes are nothing to see.
        while cursor.row < batch.earliness.len() {
            if cursor.at < batch.offsets[cursor.row + 1] as usize {
                return Stop::Unusual;
            }
            cursor.row += 1;
        }
        return Stop::End;
    }
    let layout = lines.layout();
    // SAFETY: the table has 16 numbers.
    let to_bins = unsafe { _mm512_loadu_si512(layout.to_bins().as_ptr().cast()) };
    let last = all(last_feature(lines.len()));
    let lowest = all(layout.lowest());
    let bottom = all(layout.lowest() << MANTISSA_BITS);
    let sum_bits = _mm512_set1_epi64(SUM as i64);
    let window = all(WINDOW as u32);
    let start = lines.as_mut_ptr().cast::<u8>();
    let length = batch.values.len().min(batch.indices.len());
    let (mut terms, mut stop) = (_mm512_setzero_si512(), Stop::End);
    'rows: while let Some(&earliness) = batch.earliness.get(cursor.row) {
        let end = (batch.offsets[cursor.row + 1] as usize).min(length);
        let row_class = all(u32::from(class_of(earliness)) << TOP);
        let row_stamp = stamped(batch.stamp + cursor.row as u16);
        let stamp = _mm512_set1_epi64(row_stamp as i64);
        while cursor.at < end {
            let at = cursor.at;
            if queue.is_full() {
                stop = Stop::Full;
                break 'rows;
            }
            _mm_prefetch::<_MM_HINT_T0>(batch.values.as_ptr().wrapping_add(at + FAR).cast());
            _mm_prefetch::<_MM_HINT_T0>(batch.indices.as_ptr().wrapping_add(at + FAR).cast());
            if FETCH {
                if let Some(later) = batch.indices.get(at + AHEAD..at + AHEAD + WIDTH) {
                    for index in later {
                        let line = start.wrapping_add(index.feature() * LINE);
                        _mm_prefetch::<_MM_HINT_T0>(line.cast());
                    }
                }
            }
            let (bits, features, lanes) = if end - at >= WIDTH {
                // SAFETY: there are as many numbers from here (the end is at most the shorter
                // length), and the CPU has AVX-512F.
                unsafe {
                    let (values, indices) = (batch.values.as_ptr(), batch.indices.as_ptr());
                    (V::load(values.add(at)), I::load(indices.add(at)), !0)
                }
            } else {
                load_part(batch, at, end)
            };
            // Zeros wrap around; negative and infinite strengths are larger to begin with.
            let most = all(f32::INFINITY.to_bits() - 2);
            let sound = _mm512_mask_cmple_epu32_mask(lanes, _mm512_sub_epi32(bits, all(1)), most);
            if _mm512_mask_cmple_epu32_mask(sound, features, last) != lanes {
                stop = Stop::Unusual;
                break 'rows;
            }

            let bucket = _mm512_srli_epi32::<{ MANTISSA_BITS - 4 }>(bits);
            let shifted = _mm512_add_epi32(bits, _mm512_permutexvar_epi32(bucket, to_bins));
            let bin = _mm512_srli_epi32::<BIN_SHIFT>(shifted);
            let inside = _mm512_mask_cmplt_epu32_mask(lanes, bin, window);
            let line = _mm512_slli_epi32::<5>(features);
            let within = _mm512_maskz_add_epi32(inside, bin, all(FIRST as u32));
            let place = _mm512_add_epi32(line, within);
            // Bits of the mantissa, and the one before them: a | b & c.
            let whole = all(MANTISSA + 1);
            let mantissa = _mm512_ternarylogic_epi32::<0xF8>(whole, bits, all(MANTISSA));
            let octave = _mm512_sub_epi32(_mm512_srli_epi32::<MANTISSA_BITS>(bits), lowest);
            let term = _mm512_maskz_sllv_epi32(inside, mantissa, octave);
            let coarse = _mm512_srli_epi32::<COARSE_SHIFT>(_mm512_sub_epi32(bits, bottom));
            let mut twice = 0;
            macro_rules! half {
                ($high:literal) => {
                    let shift = if $high { WIDTH / 2 } else { 0 };
                    let inside = (inside >> shift) as __mmask8;
                    let offsets = half::<$high>(line);
                    let term = _mm512_cvtepu32_epi64(half::<$high>(term));
                    terms = _mm512_add_epi64(terms, term);
                    // SAFETY: features are below the number of lines, so offsets are those of
                    // lines, and of their first words.
                    let before = unsafe { _mm512_i32gather_epi64::<1>(offsets, start.cast()) };
                    // (a & c) | b
                    let same = _mm512_ternarylogic_epi64::<0xEC>(before, stamp, sum_bits);
                    twice |= _mm512_mask_cmpeq_epi64_mask(inside, same, before);
                    let after = _mm512_add_epi64(same, term);
                    // SAFETY: as above.
                    unsafe {
                        _mm512_mask_i32scatter_epi64::<1>(start.cast(), inside, offsets, after);
                    }
                };
            }
            half!(false);
            half!(true);

            // SAFETY: as above; a floor is followed by two bytes more of its line.
            let floor = unsafe { _mm512_i32gather_epi32::<1>(line, start.add(FLOOR).cast()) };
            let floor = _mm512_and_si512(floor, all(u16::MAX.into()));
            let strong = _mm512_cmpge_epu32_mask(coarse, floor);
            // Cells are the highest byte of what is gathered; what comes before them is of the same
            // line, whose sums were scattered before.
            let bytes = start.wrapping_sub(TOP as usize / 8);
            let none = _mm512_setzero_si512();
            // SAFETY: places inside are those of cells, with more than three bytes of their line
            // before them.
            let cells =
                unsafe { _mm512_mask_i32gather_epi32::<1>(none, inside, place, bytes.cast()) };
            let more = _mm512_add_epi32(cells, all(u32::from(ONE) << TOP));
            // SAFETY: as above.
            unsafe { _mm512_mask_i32scatter_epi32::<1>(bytes.cast(), inside, place, more) };
            let wrapped = _mm512_mask_cmplt_epu32_mask(inside, more, all(u32::from(ONE) << TOP));
            let class = _mm512_and_si512(cells, all(u32::from(CLASS) << TOP));
            let early = _mm512_cmple_epu32_mask(class, row_class);
            let need = (strong | early | wrapped | !inside) & lanes;
            let place = _mm512_mask_or_epi32(place, wrapped, place, all(WRAPPED));
            let [places_end, bits_end, rows_end] = queue.ends();
            // SAFETY: the queue isn't full, so it has room for WIDTH.
            unsafe {
                let row = all(cursor.row as u32);
                _mm512_storeu_si512(places_end.cast(), _mm512_maskz_compress_epi32(need, place));
                _mm512_storeu_si512(bits_end.cast(), _mm512_maskz_compress_epi32(need, bits));
                _mm512_storeu_si512(rows_end.cast(), row);
            }
            queue.grow(need.count_ones() as usize);

            let outside = !inside & lanes;
            if twice != 0 || outside != 0 && !stamp_each(lines, features, outside, row_stamp) {
                stop = Stop::Twice;
                break 'rows;
            }
            cursor.at = end.min(at + WIDTH);
        }
        cursor.row += 1;
    }
    *added = added.wrapping_add(_mm512_reduce_add_epi64(terms) as u64);
    stop
}

/// Stamps the lines of some features, one at a time. False if one has the stamp already.
#[cold]
#[target_feature(enable = "avx512f")]
fn stamp_each(lines: &mut Lines, features: __m512i, which: __mmask16, stamp: u64) -> bool {
    let mut each = [0_u32; WIDTH];
    // SAFETY: there is room for as many.
    unsafe { _mm512_storeu_si512(each.as_mut_ptr().cast(), features) };
    let chosen = each
        .iter()
        .enumerate()
        .filter(|(lane, _)| which >> lane & 1 == 1);
    for (_, &feature) in chosen {
        let Some(line) = lines.get_mut(feature as usize) else {
            return false;
        };
        if line.sum & !SUM == stamp {
            return false;
        }
        line.sum = line.sum & SUM | stamp;
    }
    true
}
