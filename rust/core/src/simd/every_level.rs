//! Loops that the compiler vectorises, once for every level.

/// Makes of each loop a function that picks the level's twin. The code is one and the same, so all
/// levels agree to the bit (Rust never fuses or reorders float operations).
macro_rules! for_every_level {
    ($($(#[$doc:meta])* $name:ident => $body:ident($($argument:ident: $kind:ty),*);)*) => {$(
        $(#[$doc])*
        pub fn $name<E: $crate::simd::Element>(simd: $crate::simd::Simd, $($argument: $kind),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f")]
            fn avx512<E: $crate::simd::Element>($($argument: $kind),*) {
                $body($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2<E: $crate::simd::Element>($($argument: $kind),*) {
                $body($($argument),*)
            }
            match simd.level() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a Simd of this level is only made after AVX-512F was detected.
                $crate::simd::Level::Avx512 => unsafe { avx512($($argument),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: a Simd of this level is only made after AVX2 was detected.
                $crate::simd::Level::Avx2 => unsafe { avx2($($argument),*) },
                _ => $body($($argument),*),
            }
        }
    )*};
}

pub(crate) use for_every_level;
