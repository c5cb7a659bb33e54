//! Sparse codes as slices, and the checks that make them safe to scan.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m512i, _mm256_loadu_si256, _mm512_cvtepu16_epi32, _mm512_loadu_si512, _mm512_slli_epi32,
};
use std::ops::Range;
use std::path::Path;

use crate::memory::populate_for_reading;
use crate::shard::{CodeShardReader, Indices, Values};
use crate::{Error, Result};

/// A stored feature id.
pub(super) trait Index: Copy + Sync {
    /// At most `u32::MAX`.
    fn feature(self) -> usize;

    /// 16 ids, as 32-bit numbers.
    ///
    /// # Safety
    /// There are as many at `from`, and the CPU has AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(from: *const Self) -> __m512i;
}

impl Index for u16 {
    #[inline]
    fn feature(self) -> usize {
        usize::from(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const Self) -> __m512i {
        // SAFETY: the caller vouches for 16 numbers, 256 bits.
        _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(from.cast()) })
    }
}

impl Index for u32 {
    #[inline]
    fn feature(self) -> usize {
        self as usize
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const Self) -> __m512i {
        // SAFETY: the caller vouches for 16 numbers, 512 bits.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
}

/// A stored strength.
pub(super) trait Value: Copy + Sync {
    /// The bits of the strength as an f32.
    fn bits(self) -> u32;

    /// The bits of 16 strengths.
    ///
    /// # Safety
    /// There are as many at `from`, and the CPU has AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(from: *const Self) -> __m512i;

    #[inline]
    fn strength(self) -> f32 {
        f32::from_bits(self.bits())
    }
}

impl Value for f32 {
    #[inline]
    fn bits(self) -> u32 {
        self.to_bits()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const Self) -> __m512i {
        // SAFETY: the caller vouches for 16 numbers, 512 bits.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
}

impl Value for u16 {
    // The upper half of an f32's.
    #[inline]
    fn bits(self) -> u32 {
        u32::from(self) << 16
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const Self) -> __m512i {
        // SAFETY: the caller vouches for 16 numbers, 256 bits.
        let upper = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(from.cast()) });
        _mm512_slli_epi32::<16>(upper)
    }
}

/// The codes of consecutive rows: row `first_row + r` holds the codes
/// `row_offsets[r]..row_offsets[r + 1]`.
#[derive(Debug, Clone, Copy)]
pub struct CodesView<'a> {
    values: Values<'a>,
    indices: Indices<'a>,
    row_offsets: &'a [i64],
    first_row: i64,
    /// The file that they are in, for messages.
    source: Option<&'a Path>,
}

impl<'a> CodesView<'a> {
    /// Checks that the arrays fit each other. Offsets between the first and the
    /// last are checked as they are used.
    pub fn new(
        values: Values<'a>,
        indices: Indices<'a>,
        row_offsets: &'a [i64],
        first_row: i64,
    ) -> Result<Self> {
        let view = Self {
            values,
            indices,
            row_offsets,
            first_row,
            source: None,
        };
        view.check_sizes()?;
        Ok(view)
    }

    /// The codes of a shard whose first row has the id `first_row`.
    pub fn of_shard(shard: &'a CodeShardReader, first_row: i64) -> Result<Self> {
        let view = Self {
            values: shard.values(),
            indices: shard.indices(),
            row_offsets: shard.row_offsets(),
            first_row,
            source: Some(shard.path()),
        };
        view.check_sizes()?;
        Ok(view)
    }

    fn check_sizes(&self) -> Result<()> {
        let (nnz, offsets) = (self.values.len(), self.row_offsets);
        let problem = if self.indices.len() != nnz {
            format!("{nnz} values but {} indices", self.indices.len())
        } else if offsets.first() != Some(&0) {
            format!("row_offsets begin with {:?}, expected 0", offsets.first())
        } else if offsets.last().map(|&last| usize::try_from(last)) != Some(Ok(nnz)) {
            format!(
                "row_offsets end with {:?}, expected {nnz}, the number of codes",
                offsets.last()
            )
        } else if self.first_row < 0 || self.first_row.checked_add(offsets.len() as i64).is_none() {
            format!(
                "first_row is {}, expected a row number >= 0",
                self.first_row
            )
        } else {
            return Ok(());
        };
        Err(self.bad(problem))
    }

    /// The error that these codes have `problem`.
    fn bad(&self, problem: String) -> Error {
        match self.source {
            Some(path) => Error::BadShard {
                path: path.to_owned(),
                problem,
            },
            None => Error::InvalidArgument(format!("codes: {problem}")),
        }
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.row_offsets.len() - 1
    }

    /// How many codes.
    pub fn nnz(&self) -> usize {
        self.values.len()
    }

    pub(super) fn values(&self) -> Values<'a> {
        self.values
    }

    pub(super) fn indices(&self) -> Indices<'a> {
        self.indices
    }

    pub(super) fn row_offsets(&self) -> &'a [i64] {
        self.row_offsets
    }

    /// The id of the view's row `row`.
    #[inline]
    pub(super) fn row_id(&self, row: usize) -> i64 {
        self.first_row + row as i64
    }

    /// Where the codes of `rows` lie, once their offsets are known to rise.
    pub(super) fn span(&self, rows: Range<usize>) -> Result<Range<usize>> {
        let offsets = &self.row_offsets[rows.start..=rows.end];
        let nnz = self.nnz() as i64;
        if let Some(row) = offsets.windows(2).position(|pair| pair[0] > pair[1]) {
            return Err(self.bad(format!(
                "row_offsets must not fall, but row {} begins at {} and ends at {}",
                self.row_id(rows.start + row),
                offsets[row],
                offsets[row + 1],
            )));
        }
        let (start, end) = (offsets[0], offsets[offsets.len() - 1]);
        if start < 0 || end > nnz {
            return Err(self.bad(format!(
                "row_offsets point at codes {start}..{end} of {nnz}"
            )));
        }
        Ok(start as usize..end as usize)
    }

    /// Has the system map the codes of `rows`, if they lie in a file. What is wrong with their offsets
    /// is told when they are read.
    pub(super) fn map(&self, rows: Range<usize>) {
        let Ok(span) = self.span(rows) else {
            return;
        };
        match self.values {
            Values::F32(values) => populate_for_reading(&values[span.clone()]),
            Values::Bf16(values) => populate_for_reading(&values[span.clone()]),
        }
        match self.indices {
            Indices::U16(indices) => populate_for_reading(&indices[span]),
            Indices::U32(indices) => populate_for_reading(&indices[span]),
        }
    }

    /// Refuses NaN, infinite and negative strengths, feature ids outside `0..d_sae`
    /// (`seen` is made for that many) and features active twice in a row among the
    /// codes of `rows`; returns where those codes lie.
    pub(super) fn check(&self, rows: Range<usize>, seen: &mut Seen) -> Result<Range<usize>> {
        let d_sae = seen.stamps.len();
        let span = self.span(rows.clone())?;
        let bad = match self.values {
            Values::F32(values) => first_bad_value(&values[span.clone()]),
            Values::Bf16(values) => first_bad_value(&values[span.clone()]),
        };
        if let Some((at, strength)) = bad {
            let row = self.row_of(span.start + at, rows);
            return Err(match self.source {
                None if !strength.is_finite() => Error::NonFinite {
                    what: "codes",
                    row: row as usize,
                },
                _ => self.bad(format!(
                    "strength {strength} in row {row}; strengths must be positive and finite \
                     (apply a relu before selecting codes)"
                )),
            });
        }
        let bad = match self.indices {
            Indices::U16(indices) => first_bad_index(&indices[span.clone()], d_sae),
            Indices::U32(indices) => first_bad_index(&indices[span.clone()], d_sae),
        };
        if let Some((at, feature)) = bad {
            return Err(self.bad(format!(
                "feature id {feature} in row {}; with d_sae = {d_sae} ids must lie in 0..{d_sae}",
                self.row_of(span.start + at, rows)
            )));
        }
        let offsets = &self.row_offsets[rows.start..=rows.end];
        let twice = match (self.values, self.indices) {
            (Values::F32(v), Indices::U16(i)) => seen.first_twice(v, i, offsets),
            (Values::F32(v), Indices::U32(i)) => seen.first_twice(v, i, offsets),
            (Values::Bf16(v), Indices::U16(i)) => seen.first_twice(v, i, offsets),
            (Values::Bf16(v), Indices::U32(i)) => seen.first_twice(v, i, offsets),
        };
        if let Some((row, feature)) = twice {
            return Err(self.bad(format!(
                "feature {feature} is active twice in row {}; a row must hold each feature at most \
                 once",
                self.row_id(rows.start + row)
            )));
        }
        Ok(span)
    }

    /// The id of the row, one of `rows`, that holds code `at`.
    fn row_of(&self, at: usize, rows: Range<usize>) -> i64 {
        let ends = &self.row_offsets[rows.start + 1..=rows.end];
        self.row_id(rows.start + ends.partition_point(|&end| end as usize <= at))
    }
}

/// Which features a row has shown so far.
#[derive(Debug)]
pub(super) struct Seen {
    /// `[d_sae]`: the number of the row, counted by `row`, that showed a feature last.
    stamps: Vec<u32>,
    row: u32,
}

impl Seen {
    pub(super) fn new(d_sae: usize) -> Self {
        Self {
            stamps: vec![0; d_sae],
            row: 0,
        }
    }

    /// The first row (of those that `offsets` bound) and feature that is active
    /// twice there. Offsets and feature ids must have been checked.
    fn first_twice<V: Value, I: Index>(
        &mut self,
        values: &[V],
        indices: &[I],
        offsets: &[i64],
    ) -> Option<(usize, usize)> {
        for (row, ends) in offsets.windows(2).enumerate() {
            if self.row == u32::MAX {
                self.stamps.fill(0);
                self.row = 0;
            }
            self.row += 1;
            let span = ends[0] as usize..ends[1] as usize;
            for (value, index) in values[span.clone()].iter().zip(&indices[span]) {
                // A stored zero is no activation: rows may be padded with them.
                if value.strength() > 0.0 {
                    let stamp = &mut self.stamps[index.feature()];
                    if *stamp == self.row {
                        return Some((row, index.feature()));
                    }
                    *stamp = self.row;
                }
            }
        }
        None
    }
}

/// Whole blocks are judged without branches, so that the loop is vectorised.
const BLOCK: usize = 1024;

fn first_bad_value<V: Value>(values: &[V]) -> Option<(usize, f32)> {
    let good = |strength: f32| (0.0..f32::INFINITY).contains(&strength);
    for (block, chunk) in values.chunks(BLOCK).enumerate() {
        if !chunk
            .iter()
            .fold(true, |all, value| all & good(value.strength()))
        {
            let at = chunk.iter().position(|value| !good(value.strength()))?;
            return Some((block * BLOCK + at, chunk[at].strength()));
        }
    }
    None
}

fn first_bad_index<I: Index>(indices: &[I], d_sae: usize) -> Option<(usize, usize)> {
    for (block, chunk) in indices.chunks(BLOCK).enumerate() {
        if !chunk
            .iter()
            .fold(true, |all, index| all & (index.feature() < d_sae))
        {
            let at = chunk.iter().position(|index| index.feature() >= d_sae)?;
            return Some((block * BLOCK + at, chunk[at].feature()));
        }
    }
    None
}
