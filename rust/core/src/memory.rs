//! Wishes about the pages that memory lies on.
//!
//! Decoding and exact products read features here and there in hundreds of megabytes: with pages of 4
//! KiB each piece costs a look-up of its address, which takes as long as the piece itself.

/// Asks the system to put a slice on large pages where it isn't on any yet (Linux; elsewhere nothing).
/// Only a wish: nothing tells whether it was granted.
pub fn prefer_large_pages<T>(slice: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const LARGE: usize = 2 << 20;
        let start = slice.as_ptr() as usize;
        let first = start.next_multiple_of(LARGE);
        let last = (start + size_of_val(slice)) / LARGE * LARGE;
        if first < last {
            // SAFETY: the range lies within the slice; the advice changes neither its contents nor who
            // may read or write it.
            unsafe {
                libc::madvise(
                    first as *mut libc::c_void,
                    last - first,
                    libc::MADV_HUGEPAGE,
                );
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = slice;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_stay_as_they_are() {
        let numbers: Vec<u32> = (0..3 << 20).collect();
        prefer_large_pages(&numbers);
        prefer_large_pages(&numbers[..9]);
        prefer_large_pages::<u8>(&[]);
        assert!(numbers
            .iter()
            .enumerate()
            .all(|(at, number)| at == *number as usize));
    }
}
