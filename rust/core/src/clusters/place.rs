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

    /// Which segment.
    #[inline]
    pub fn segment(&self) -> usize {
        (self.marks % SEGMENTS as u32) as usize
    }

    /// The bin of its position.
    #[inline]
    pub fn position_bin(&self) -> usize {
        match self.position {
            ..=0 => 0,
            position => (position.ilog2() as usize + 1).min(POSITION_BINS - 1),
        }
    }
}

/// All rows, and how often each token stands at each offset.
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
