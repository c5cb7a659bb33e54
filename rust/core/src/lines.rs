//! Buffers that begin at a cache line, so that a vector register's worth of numbers never lies on two:
//! what malloc gives begins 16 bytes beyond one, and every load and store of 64 bytes would touch both.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Numbers of which the first begins a cache line.
#[derive(Debug)]
pub(crate) struct Lines<T> {
    numbers: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy> Lines<T> {
    /// `len` times `value`; `T` must divide a cache line.
    pub(crate) fn new(value: T, len: usize) -> Self {
        let spare = LINE / size_of::<T>().max(1);
        let numbers = vec![value; len + spare];
        // In principle it need not be known; then nothing is aligned, which is slower.
        let start = numbers.as_ptr().align_offset(LINE).min(spare);
        Self {
            numbers,
            start,
            len,
        }
    }
}

impl<T> Deref for Lines<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        &self.numbers[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Lines<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.numbers[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_begin_at_lines() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let mut numbers = Lines::new(7_i32, len);
            assert_eq!(numbers.as_ptr() as usize % LINE, 0);
            assert_eq!(*numbers, *vec![7; len]);
            numbers.fill(3);
            assert_eq!(*numbers, *vec![3; len]);
        }
    }
}
