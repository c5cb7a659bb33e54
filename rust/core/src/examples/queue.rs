//! Activations that a scan has counted and that may need more.

/// How many there can be.
pub(super) const ROOM: usize = 2048;
/// How many are put in at most before anyone asks again whether there is room.
pub(super) const AT_ONCE: usize = 256;

/// See above. Each is told by its place (see [`super::stage::Layout`]; with [`WRAPPED`] if its
/// count has wrapped to 0), its strength's bits, and its row, counted from any that is agreed on.
#[derive(Debug, Clone, Default)]
pub(super) struct Queue {
    places: Vec<u32>,
    bits: Vec<u32>,
    rows: Vec<u32>,
    length: usize,
}

/// A bit that no place has.
pub(super) const WRAPPED: u32 = 1 << 31;

impl Queue {
    pub fn new() -> Self {
        let all = || vec![0; ROOM];
        Self {
            places: all(),
            bits: all(),
            rows: all(),
            length: 0,
        }
    }

    /// Whether less than [`AT_ONCE`] could be put in.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.length + AT_ONCE > self.places.len()
    }

    #[inline]
    pub fn push(&mut self, place: u32, bits: u32, row: u32) {
        self.places[self.length] = place;
        self.bits[self.length] = bits;
        self.rows[self.length] = row;
        self.length += 1;
    }

    /// Where the next place, bits and row go, and [`AT_ONCE`] more unless it is full.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub fn ends(&mut self) -> [*mut u32; 3] {
        [
            self.places[self.length..].as_mut_ptr(),
            self.bits[self.length..].as_mut_ptr(),
            self.rows[self.length..].as_mut_ptr(),
        ]
    }

    /// So many have been written there.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub fn grow(&mut self, by: usize) {
        self.length += by;
    }

    pub fn len(&self) -> usize {
        self.length
    }

    /// All: `(place, bits, row)`.
    #[inline]
    pub fn get(&self, at: usize) -> Option<(u32, u32, usize)> {
        let inside = at < self.length;
        inside.then(|| (self.places[at], self.bits[at], self.rows[at] as usize))
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.length = 0;
    }
}
