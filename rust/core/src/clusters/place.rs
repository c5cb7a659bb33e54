//! What token each row is, in the order of (sequence, position).

use bytemuck::{Pod, Zeroable};

use crate::{Error, Result};

/// One token. As a NumPy record: `sequence i8, position i4, token i4, marks u4`, packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Place {
    sequence: [u32; 2],
    /// Place within the sequence.
    pub position: i32,
    /// Its id.
    pub token: i32,
    marks: u32,
}

/// Segments that are told apart; the last is "unknown".
pub const SEGMENTS: usize = 4;
/// Bins of positions: 0, 1, 2..4, 4..8, ... 65536..131072, and beyond.
pub const POSITION_BINS: usize = 19;
/// Token ids must be below this.
const VOCABULARY: usize = 1 << 22;
const BEFORE: u32 = 4;
const AFTER: u32 = 8;

impl Place {
    /// A place. `before`: whether the row before is the place before it; `after`: likewise.
    pub fn new(
        sequence: i64,
        position: i32,
        token: i32,
        segment: u32,
        before: bool,
        after: bool,
    ) -> Self {
        let sequence = sequence as u64;
        Self {
            sequence: [sequence as u32, (sequence >> 32) as u32],
            position,
            token,
            marks: segment | (u32::from(before) * BEFORE) | (u32::from(after) * AFTER),
        }
    }

    /// Rows from their bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<&[Self]> {
        if bytes.is_empty() {
            return Ok(&[]); // which may lie anywhere
        }
        bytemuck::try_cast_slice(bytes).map_err(|error| {
            Error::InvalidArgument(format!(
                "places are {} bytes that hold no records of {} ({error})",
                bytes.len(),
                size_of::<Self>()
            ))
        })
    }

    /// Which sequence it is of.
    #[inline]
    pub fn sequence(&self) -> i64 {
        (u64::from(self.sequence[1]) << 32 | u64::from(self.sequence[0])) as i64
    }

    /// Whether the row before is the place before it.
    pub fn follows(&self) -> bool {
        self.marks & BEFORE != 0
    }

    /// Which segment.
    #[inline]
    pub fn segment(&self) -> usize {
        (self.marks % SEGMENTS as u32) as usize
    }
}

/// The bin of a position.
#[inline]
pub fn position_bin(position: i32) -> usize {
    match position {
        ..=0 => 0,
        position => (position.ilog2() as usize + 1).min(POSITION_BINS - 1),
    }
}

/// All rows.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    rows: &'a [Place],
}

impl<'a> Places<'a> {
    /// From rows that rise in (sequence, position).
    pub fn new(rows: &'a [Place]) -> Result<Self> {
        super::scatter::require_rows(rows.len() as u64)?;
        for (row, place) in rows.iter().enumerate() {
            if usize::try_from(place.token).map_or(true, |token| token >= VOCABULARY) {
                return Err(Error::InvalidArgument(format!(
                    "row {row} is of token {}, expected an id from 0 to {}",
                    place.token,
                    VOCABULARY - 1
                )));
            }
        }
        let key = |place: &Place| (place.sequence(), place.position);
        if let Some(row) = rows
            .windows(2)
            .position(|pair| key(&pair[0]) >= key(&pair[1]))
        {
            return Err(Error::InvalidArgument(format!(
                "places must rise in sequence and position, but row {} does not",
                row + 1
            )));
        }
        Ok(Self { rows })
    }

    /// From rows of which [`Places::new`] was made before.
    pub fn checked_before(rows: &'a [Place]) -> Self {
        Self { rows }
    }

    /// The rows.
    pub fn rows(&self) -> &'a [Place] {
        self.rows
    }

    /// The row of a place. `hint`: the row of the one asked for before; most are there or next.
    #[inline]
    pub fn locate(&self, sequence: i64, position: i32, hint: usize) -> Option<usize> {
        let is = |row: usize| {
            let found = self.rows.get(row);
            found.is_some_and(|at| at.position == position && at.sequence() == sequence)
        };
        if is(hint) {
            return Some(hint);
        }
        if is(hint + 1) {
            return Some(hint + 1);
        }
        let key = (sequence, position);
        let row = self
            .rows
            .partition_point(|at| (at.sequence(), at.position) < key);
        is(row).then_some(row)
    }

    /// The token `offset` (-1, 0 or 1) from a row's, where the text has one.
    #[inline]
    pub fn token(&self, row: usize, offset: i32) -> Option<usize> {
        let at = match offset {
            -1 if self.rows[row].marks & BEFORE != 0 => row.wrapping_sub(1),
            0 => row,
            1 if self.rows[row].marks & AFTER != 0 => row + 1,
            _ => return None,
        };
        self.rows.get(at).map(|place| place.token as usize)
    }
}

/// Where a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spot {
    /// Its sequence.
    pub sequence: i64,
    /// Place within the sequence.
    pub position: i32,
    /// In which segment.
    pub segment: usize,
}

/// Rows of one segment that follow each other in a text.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    first: u32,
    position: i32,
    sequence: i64,
    segment: u32,
}

/// Where each row is, told by the few stretches that texts consist of: a feature is active all over
/// the rows, whose records fit into no cache, while these do.
#[derive(Debug)]
pub struct Stretches {
    /// Empty where there are too many of them to be of any use.
    all: Vec<Stretch>,
    /// Of each [`BLOCK`] rows the stretch in which they begin.
    index: Vec<u32>,
}

/// Rows between two entries of the index.
const BLOCK: usize = 64;
/// Stretches of fewer rows on average are not kept.
const SHORT: usize = 16;

impl Stretches {
    /// Of rows.
    pub fn of(places: &Places<'_>) -> Self {
        let rows = places.rows();
        let (mut all, mut index): (Vec<Stretch>, Vec<u32>) = (Vec::new(), Vec::new());
        for (row, place) in rows.iter().enumerate() {
            let goes_on = row > 0 && {
                let before = &rows[row - 1];
                before.sequence() == place.sequence()
                    && before.position.checked_add(1) == Some(place.position)
                    && before.segment() == place.segment()
            };
            if !goes_on {
                all.push(Stretch {
                    first: row as u32,
                    position: place.position,
                    sequence: place.sequence(),
                    segment: place.segment() as u32,
                });
            }
            if row % BLOCK == 0 {
                index.push(all.len() as u32 - 1);
            }
            if all.len() > rows.len() / SHORT + 1 {
                return Self {
                    all: Vec::new(),
                    index: Vec::new(),
                };
            }
        }
        Self { all, index }
    }

    /// Where a row is; `places` are those of which these were made, and have such a row.
    #[inline]
    pub fn spot(&self, places: &Places<'_>, row: usize) -> Spot {
        let Some(&start) = self.index.get(row / BLOCK) else {
            let place = &places.rows()[row];
            return Spot {
                sequence: place.sequence(),
                position: place.position,
                segment: place.segment(),
            };
        };
        let mut at = start as usize;
        while self
            .all
            .get(at + 1)
            .is_some_and(|next| next.first as usize <= row)
        {
            at += 1;
        }
        let stretch = &self.all[at];
        Spot {
            sequence: stretch.sequence,
            position: stretch.position + (row as u32 - stretch.first) as i32,
            segment: stretch.segment as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spots_fit(rows: &[Place]) -> Stretches {
        let places = Places::new(rows).unwrap();
        let stretches = Stretches::of(&places);
        for (row, place) in rows.iter().enumerate() {
            let spot = stretches.spot(&places, row);
            assert_eq!(
                (spot.sequence, spot.position, spot.segment),
                (place.sequence(), place.position, place.segment())
            );
        }
        stretches
    }

    #[test]
    fn rows_are_found_by_their_stretches() {
        // Texts of 1, 2, ... tokens with a gap and a change of segment in each; also one that ends
        // at the largest position.
        let mut rows = Vec::new();
        for sequence in 0..150_i64 {
            for position in 0..sequence as i32 {
                let gap = if position > 70 { 5 } else { 0 };
                let segment = u32::from(position > 30) + u32::from(position > 99);
                rows.push(Place::new(
                    sequence << 33,
                    position + gap,
                    0,
                    segment,
                    false,
                    false,
                ));
            }
        }
        rows.push(Place::new(i64::MAX, i32::MAX, 0, 3, false, false));
        let stretches = spots_fit(&rows);
        assert!(!stretches.all.is_empty());
    }

    #[test]
    fn rows_far_apart_are_found_by_their_records() {
        let row = |at| Place::new(1, 2 * at, 0, 1, false, false);
        let rows: Vec<_> = (0..5000).map(row).collect();
        assert!(spots_fit(&rows).all.is_empty());
        spots_fit(&rows[..1]);
        spots_fit(&[]);
    }

    #[test]
    fn places_are_located() {
        let rows: Vec<_> = (0..100)
            .map(|at| Place::new(at / 10, 3 * (at % 10) as i32, 0, 0, false, false))
            .collect();
        let places = Places::new(&rows).unwrap();
        for hint in [0, 7, 99, 1000] {
            for (row, place) in rows.iter().enumerate() {
                let found = places.locate(place.sequence(), place.position, hint);
                assert_eq!(found, Some(row));
                assert_eq!(
                    places.locate(place.sequence(), place.position + 1, hint),
                    None
                );
            }
        }
    }

    #[test]
    fn rows_out_of_order_and_strange_tokens_are_refused() {
        let row =
            |sequence, position, token| Place::new(sequence, position, token, 0, false, false);
        assert!(Places::new(&[row(0, 1, 0), row(0, 1, 0)]).is_err());
        assert!(Places::new(&[row(1, 0, 0), row(0, 1, 0)]).is_err());
        assert!(Places::new(&[row(0, 0, -1)]).is_err());
        assert!(Places::new(&[row(0, 0, VOCABULARY as i32)]).is_err());
        assert!(Places::new(&[row(0, 0, VOCABULARY as i32 - 1)]).is_ok());
    }
}
