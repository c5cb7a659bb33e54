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

/// Has the system find all pages of a slice that is about to be written to for the first time, in one
/// call (Linux; elsewhere nothing). Being told of one page after another takes several times as long.
pub fn populate<T>(slice: &mut [T]) {
    #[cfg(target_os = "linux")]
    populate_by(slice, libc::MADV_POPULATE_WRITE);
    #[cfg(not(target_os = "linux"))]
    let _ = slice;
}

/// Has the system map all pages of a slice that is about to be read, in one call (Linux; elsewhere
/// nothing). For files, which it maps a few pages at a time otherwise, each time interrupting who reads.
pub fn populate_for_reading<T>(slice: &[T]) {
    #[cfg(target_os = "linux")]
    populate_by(slice, libc::MADV_POPULATE_READ);
    #[cfg(not(target_os = "linux"))]
    let _ = slice;
}

/// `advice`: one of those that populate.
#[cfg(target_os = "linux")]
fn populate_by<T>(slice: &[T], advice: libc::c_int) {
    const PAGE: usize = 4096;
    let start = slice.as_ptr() as usize / PAGE * PAGE;
    let end = (slice.as_ptr() as usize + size_of_val(slice)).next_multiple_of(PAGE);
    if size_of_val(slice) >= 2 * PAGE {
        // SAFETY: the pages hold the slice, so they are mapped; the call changes no contents. Where
        // pages are larger or the kernel is older than 5.14, it is refused, and nothing happens.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, advice);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn populated_pages_keep_their_contents() {
        let mut numbers: Vec<u32> = (0..1 << 16).collect();
        populate(&mut numbers);
        populate(&mut numbers[3..5000]);
        populate(&mut numbers[..9]);
        populate::<u8>(&mut []);
        populate_for_reading(&numbers);
        populate_for_reading(&numbers[5..7000]);
        populate_for_reading::<u8>(&[]);
        assert!(numbers
            .iter()
            .enumerate()
            .all(|(at, number)| at == *number as usize));
    }

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
