//! Rows shared out to threads, in contiguous ranges, so that results never
//! depend on how many there are.

use std::ops::Range;

use crate::{pool, Error, Result};

/// A borrowed row-major matrix.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    width: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// `rows` rows of `width` elements.
    ///
    /// # Errors
    /// `data` is of another length.
    pub fn new(data: &'a [T], rows: usize, width: usize) -> Result<Self> {
        if rows.checked_mul(width) != Some(data.len()) {
            return Err(Error::InvalidArgument(format!(
                "{} elements can't be {rows} rows of {width}",
                data.len()
            )));
        }
        Ok(Self { data, rows, width })
    }

    /// Number of rows.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Elements a row.
    pub fn width(self) -> usize {
        self.width
    }

    /// Row `row`; panics out of range, as a slice does.
    #[inline]
    pub fn row(self, row: usize) -> &'a [T] {
        &self.data[row * self.width..(row + 1) * self.width]
    }
}

/// Elements below which another thread costs more than it saves (tens of microseconds of work).
pub(crate) const MIN_ELEMENTS: usize = 1 << 16;

/// Splits `rows` rows, each of about `cost` elements of work, into at most `threads` ranges.
fn ranges(rows: usize, cost: usize, threads: usize) -> Vec<Range<usize>> {
    let worth = rows.saturating_mul(cost.max(1)) / MIN_ELEMENTS;
    let parts = threads.min(worth).min(rows).max(1);
    (0..parts)
        .map(|part| rows * part / parts..rows * (part + 1) / parts)
        .collect()
}

/// Splits `0..count` into at most `threads` contiguous ranges of about equal total `cost`; none of
/// them is empty.
pub(crate) fn by_cost(
    count: usize,
    threads: usize,
    cost: impl Fn(usize) -> usize,
) -> Vec<Range<usize>> {
    let total = (0..count).fold(0_usize, |sum, at| sum.saturating_add(cost(at)));
    let parts = threads.min(total / MIN_ELEMENTS).max(1);
    let (mut ranges, mut start, mut sum) = (Vec::new(), 0, 0_usize);
    for at in 0..count {
        sum = sum.saturating_add(cost(at));
        let share = (ranges.len() + 1) as u128 * total as u128 / parts as u128;
        if (sum as u128 >= share && ranges.len() + 1 < parts) || at + 1 == count {
            ranges.push(start..at + 1);
            start = at + 1;
        }
    }
    ranges
}

/// Calls `work` on contiguous ranges that cover `0..rows`; the results are in order of rows.
pub(crate) fn map_ranges<R: Send>(
    rows: usize,
    cost: usize,
    threads: usize,
    work: impl Fn(Range<usize>) -> R + Sync + Send,
) -> Vec<R> {
    pool::map(ranges(rows, cost, threads), work)
}

/// As [`map_ranges`]; each call also gets its part of `output`, which holds `width` elements a row.
/// No calls where `output` is empty.
pub(crate) fn map_ranges_mut<T: Send, R: Send>(
    output: &mut [T],
    width: usize,
    cost: usize,
    threads: usize,
    work: impl Fn(Range<usize>, &mut [T]) -> R + Sync + Send,
) -> Vec<R> {
    let rows = output.len().checked_div(width).unwrap_or(0);
    if rows == 0 {
        return Vec::new();
    }
    let mut rest = output;
    let mut parts = Vec::new();
    for range in ranges(rows, cost, threads) {
        let (part, after) = rest.split_at_mut(range.len() * width);
        parts.push((range, part));
        rest = after;
    }
    pool::map(parts, |(range, part)| work(range, part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_every_row_once() {
        for rows in [0, 1, 2, 7, 1000] {
            for threads in [0, 1, 3, 64] {
                let ranges = ranges(rows, MIN_ELEMENTS, threads);
                let covered: Vec<usize> = ranges.iter().cloned().flatten().collect();
                assert_eq!(covered, (0..rows).collect::<Vec<_>>());
                assert!(ranges.len() <= threads.max(1));
            }
        }
    }

    #[test]
    fn small_work_stays_on_one_thread() {
        assert_eq!(ranges(10, 10, 8).len(), 1);
        assert_eq!(ranges(1 << 20, usize::MAX, 8).len(), 8);
    }

    #[test]
    fn ranges_by_cost_cover_every_item_once() {
        for count in [0, 1, 2, 7, 1000] {
            for threads in [0, 1, 3, 64] {
                // One item costs as much as all others together.
                let cost = |at| {
                    if at == 1 {
                        count * MIN_ELEMENTS
                    } else {
                        MIN_ELEMENTS
                    }
                };
                let ranges = by_cost(count, threads, cost);
                let covered: Vec<usize> = ranges.iter().cloned().flatten().collect();
                assert_eq!(covered, (0..count).collect::<Vec<_>>());
                assert!(ranges.len() <= threads.max(1));
                assert!(ranges.iter().all(|range| !range.is_empty()));
            }
        }
        assert_eq!(
            by_cost(100, 2, |at| if at < 10 { 1 << 20 } else { 0 }),
            [0..5, 5..100]
        );
        assert_eq!(by_cost(100, 8, |_| 1).len(), 1);
    }

    #[test]
    fn parts_of_the_output_match_their_rows() {
        let mut output = vec![0; 50];
        map_ranges_mut(&mut output, 5, MIN_ELEMENTS, 4, |range, part| {
            for (row, values) in range.zip(part.chunks_mut(5)) {
                values.fill(row);
            }
        });
        let expected: Vec<usize> = (0..50).map(|at| at / 5).collect();
        assert_eq!(output, expected);
        let mut empty: Vec<i32> = Vec::new();
        assert!(map_ranges_mut(&mut empty, 0, 1, 4, |_, _| ()).is_empty());
    }

    #[test]
    fn a_matrix_of_the_wrong_length_is_refused() {
        assert!(Matrix::new(&[1, 2, 3], 2, 2).is_err());
        assert!(Matrix::<u8>::new(&[], usize::MAX, 2).is_err());
        assert_eq!(Matrix::new(&[1, 2, 3, 4], 2, 2).unwrap().row(1), [3, 4]);
    }
}
