//! AMX (Sapphire Rapids and later): eight registers of 1024 bytes.
//!
//! The intrinsics aren't stable, so the instructions are written out; the compiler itself never uses
//! these registers.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::{Block, Kind, Tiles, FETCHED};
use crate::screen::layout::{PANEL, TILE, TILE_ROWS};

/// Whether the CPU has AMX's products of this kind and the system lets this process use them.
pub(super) fn is_supported(kind: Kind) -> bool {
    static TILES: OnceLock<bool> = OnceLock::new();
    // Of CPUID leaf 7 (Intel SDM): bit 24 tiles, bit 25 8-bit products, bit 22 those of bf16.
    let product = match kind {
        Kind::Int8 => 25,
        Kind::Bf16 => 22,
    };
    let has = |bit: u32| features() >> bit & 1 == 1;
    *TILES.get_or_init(|| has(24) && system_saves_tiles() && ask_permission()) && has(product)
}

/// The CPU's features by CPUID leaf 7, edx; none where there is no AVX-512.
fn features() -> u32 {
    if !is_x86_feature_detected!("avx512f") || __cpuid_count(0, 0).eax < 7 {
        return 0;
    }
    __cpuid_count(7, 0).edx
}

/// Whether the system saves the tiles when it changes threads: bits 17 and 18 of XCR0.
fn system_saves_tiles() -> bool {
    let low: u32;
    // SAFETY: every system that runs AVX-512 code has xgetbv; it only reads a register.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags));
    }
    low >> 17 & 0b11 == 0b11
}

/// Linux gives the tiles to those who ask: `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`.
/// The permission is the process's and passes to its threads and forks.
fn ask_permission() -> bool {
    let result: i64;
    // SAFETY: a system call by x86-64 Linux's convention, which clobbers rcx and r11 alone; this one
    // writes to no memory.
    unsafe {
        asm!("syscall", inlateout("rax") 158_i64 => result, in("rdi") 0x1023_i64, in("rsi") 18_i64,
            out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

#[repr(C, align(64))]
struct Configuration([u8; 64]);

/// Eight tiles of 16 rows of 64 bytes.
///
/// # Safety
/// AMX is supported.
pub(super) unsafe fn configure() {
    let mut configuration = Configuration([0; 64]);
    let bytes = &mut configuration.0;
    bytes[0] = 1; // the palette
    for tile in 0..8 {
        bytes[16 + 2 * tile] = 64; // bytes a row
        bytes[48 + tile] = TILE_ROWS as u8;
    }
    // SAFETY: AMX is supported; the 64 bytes are read only.
    unsafe { asm!("ldtilecfg [{}]", in(reg) bytes.as_ptr(), options(nostack, readonly)) };
}

/// # Safety
/// AMX is supported.
pub(super) unsafe fn release() {
    // SAFETY: AMX is supported; no tile is in use once a session ends.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// # Safety
/// AMX is configured on this thread; `row_tiles` tiles of x and two of w are readable for `steps` steps.
pub(super) unsafe fn multiply(
    x: Tiles<'_>,
    row_tiles: usize,
    w: Tiles<'_>,
    steps: usize,
    block: &mut Block,
    fresh: bool,
    kind: Kind,
) {
    // SAFETY: as the caller says.
    unsafe {
        match (kind, row_tiles) {
            (Kind::Int8, 2) => int8::four(x, w, steps, block, fresh),
            (Kind::Int8, _) => int8::two(x, w, steps, block, fresh),
            (Kind::Bf16, 2) => bf16::four(x, w, steps, block, fresh),
            (Kind::Bf16, _) => bf16::two(x, w, steps, block, fresh),
        }
    }
}

/// Bytes between two rows of a block.
const ROW: usize = PANEL * 4;

/// The loops, for one instruction that multiplies tiles: all tiles lie alike, whatever they hold.
macro_rules! loops {
    ($name:ident, $product:literal) => {
        mod $name {
            use super::*;

            /// Two tiles of rows by two of features.
            ///
            /// # Safety
            /// As for [`multiply`].
            pub(super) unsafe fn four(x: Tiles<'_>, w: Tiles<'_>, steps: usize, block: &mut Block, fresh: bool) {
                let (x, x_stride) = (x.bytes.as_ptr(), x.stride);
                let (w, w_stride, ahead) = (w.bytes.as_ptr(), w.stride, w.ahead.as_ptr());
                let at = block.as_mut_ptr().cast::<u8>();
                // SAFETY: a block holds four tiles: rows of 128 bytes, of which a tile takes 64; the tiles that are
                // read are readable, as the caller says. What is fetched ahead may lie beyond: that never faults.
                unsafe {
                    if fresh {
                        asm!(
                            "tilezero tmm0",
                            "tilezero tmm1",
                            "tilezero tmm2",
                            "tilezero tmm3",
                            options(nostack, nomem)
                        );
                    } else {
                        asm!(
                            "tileloadd tmm0, [{c} + {row}]", "tileloadd tmm1, [{c} + {row} + 64]",
                            "tileloadd tmm2, [{d} + {row}]", "tileloadd tmm3, [{d} + {row} + 64]",
                            c = in(reg) at, d = in(reg) at.add(TILE_ROWS * ROW), row = in(reg) ROW,
                            options(nostack, readonly));
                    }
                    if steps > 0 {
                        asm!(
                            "2:",
                            "prefetcht1 [{ahead}]", "prefetcht1 [{ahead} + 64]", "prefetcht1 [{ahead} + 128]", "prefetcht1 [{ahead} + 192]",
                            "tileloadd tmm4, [{x0} + {line}]",
                            "prefetcht0 [{x0} + 1024]", "prefetcht0 [{x0} + 1088]", "prefetcht0 [{x0} + 1152]", "prefetcht0 [{x0} + 1216]",
                            "tileloadd tmm6, [{w0} + {line}]",
                            "prefetcht0 [{x0} + 1280]", "prefetcht0 [{x0} + 1344]", "prefetcht0 [{x0} + 1408]", "prefetcht0 [{x0} + 1472]",
                            concat!($product, " tmm0, tmm4, tmm6"),
                            "prefetcht0 [{x0} + 1536]", "prefetcht0 [{x0} + 1600]", "prefetcht0 [{x0} + 1664]", "prefetcht0 [{x0} + 1728]",
                            "tileloadd tmm7, [{w1} + {line}]",
                            "prefetcht0 [{x0} + 1792]", "prefetcht0 [{x0} + 1856]", "prefetcht0 [{x0} + 1920]", "prefetcht0 [{x0} + 1984]",
                            concat!($product, " tmm1, tmm4, tmm7"),
                            "prefetcht0 [{x1} + 1024]", "prefetcht0 [{x1} + 1088]", "prefetcht0 [{x1} + 1152]", "prefetcht0 [{x1} + 1216]",
                            "tileloadd tmm5, [{x1} + {line}]",
                            "prefetcht0 [{x1} + 1280]", "prefetcht0 [{x1} + 1344]", "prefetcht0 [{x1} + 1408]", "prefetcht0 [{x1} + 1472]",
                            concat!($product, " tmm2, tmm5, tmm6"),
                            "prefetcht0 [{x1} + 1536]", "prefetcht0 [{x1} + 1600]", "prefetcht0 [{x1} + 1664]", "prefetcht0 [{x1} + 1728]",
                            concat!($product, " tmm3, tmm5, tmm7"),
                            "prefetcht0 [{x1} + 1792]", "prefetcht0 [{x1} + 1856]", "prefetcht0 [{x1} + 1920]", "prefetcht0 [{x1} + 1984]",
                            "add {x0}, {tile}", "add {x1}, {tile}", "add {w0}, {tile}", "add {w1}, {tile}",
                            "add {ahead}, {fetched}",
                            "dec {steps}",
                            "jnz 2b",
                            x0 = inout(reg) x => _, x1 = inout(reg) x.add(x_stride) => _,
                            w0 = inout(reg) w => _, w1 = inout(reg) w.add(w_stride) => _,
                            steps = inout(reg) steps => _, ahead = inout(reg) ahead => _, line = in(reg) 64_usize, tile = const TILE,
                            fetched = const FETCHED,
                            options(nostack, readonly));
                    }
                    asm!(
                        "tilestored [{c} + {row}], tmm0", "tilestored [{c} + {row} + 64], tmm1",
                        "tilestored [{d} + {row}], tmm2", "tilestored [{d} + {row} + 64], tmm3",
                        c = in(reg) at, d = in(reg) at.add(TILE_ROWS * ROW), row = in(reg) ROW,
                        options(nostack));
                }
            }

            /// One tile of rows by two of features.
            ///
            /// # Safety
            /// As for [`multiply`].
            pub(super) unsafe fn two(x: Tiles<'_>, w: Tiles<'_>, steps: usize, block: &mut Block, fresh: bool) {
                let (x, w, w_stride) = (x.bytes.as_ptr(), w.bytes.as_ptr(), w.stride);
                let at = block.as_mut_ptr().cast::<u8>();
                // SAFETY: as in `four`; the upper half of a block is two tiles.
                unsafe {
                    if fresh {
                        asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem));
                    } else {
                        asm!("tileloadd tmm0, [{c} + {row}]", "tileloadd tmm1, [{c} + {row} + 64]",
                            c = in(reg) at, row = in(reg) ROW, options(nostack, readonly));
                    }
                    if steps > 0 {
                        asm!(
                            "2:",
                            "tileloadd tmm4, [{x0} + {line}]",
                            "tileloadd tmm6, [{w0} + {line}]",
                            concat!($product, " tmm0, tmm4, tmm6"),
                            "tileloadd tmm7, [{w1} + {line}]",
                            concat!($product, " tmm1, tmm4, tmm7"),
                            "add {x0}, {tile}", "add {w0}, {tile}", "add {w1}, {tile}",
                            "dec {steps}",
                            "jnz 2b",
                            x0 = inout(reg) x => _, w0 = inout(reg) w => _, w1 = inout(reg) w.add(w_stride) => _,
                            steps = inout(reg) steps => _, line = in(reg) 64_usize, tile = const TILE,
                            options(nostack, readonly));
                    }
                    asm!("tilestored [{c} + {row}], tmm0", "tilestored [{c} + {row} + 64], tmm1",
                        c = in(reg) at, row = in(reg) ROW, options(nostack));
                }
            }
        }
    };
}

loops!(int8, "tdpbsud");
loops!(bf16, "tdpbf16ps");
