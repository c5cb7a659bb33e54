//! The product of up to 32 rows and 32 features, one twin per instruction set.
//!
//! Of 8-bit numbers all add the same integers exactly, so all agree to the bit. Weights are unsigned (128
//! stands for zero), rows signed, which is the mix that every instruction set has. Of bf16 each adds in
//! its own order, in f32.

use std::marker::PhantomData;

#[cfg(any(test, target_arch = "x86_64"))]
use super::layout::STEP;
use super::layout::{PANEL, TILE, TILE_ROWS};
use crate::simd::{Level, Simd};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod bf16;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod vnni;

/// The sums of one block: rows of [`PANEL`] features; of bf16 the bits of f32.
pub(super) type Block = [i32; PANEL * PANEL];

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whole numbers of 8 bits.
    Int8,
    /// The upper halves of f32.
    Bf16,
}

impl Kind {
    /// Bytes of a number.
    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::Int8 => 1,
            Self::Bf16 => 2,
        }
    }
}

/// An instruction set for products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Plain Rust, on any CPU.
    Scalar,
    /// AVX2: pairs are added in 16 bits, so rows have 7 bits only.
    Avx2,
    /// AVX-VNNI: 32 products an instruction.
    AvxVnni,
    /// AVX-512 VNNI: 64 products an instruction.
    Avx512Vnni,
    /// AMX: 16,384 products an instruction.
    Amx,
    /// bf16 in plain Rust, on any CPU.
    ScalarBf16,
    /// The same, compiled for AVX2.
    Avx2Bf16,
    /// AVX-512 BF16: 32 products an instruction.
    Avx512Bf16,
    /// AMX: 8,192 products of bf16 an instruction.
    AmxBf16,
}

impl Kernel {
    /// Every kernel, of each kind slowest first.
    pub const ALL: [Self; 9] = [
        Self::Scalar,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512Vnni,
        Self::Amx,
        Self::ScalarBf16,
        Self::Avx2Bf16,
        Self::Avx512Bf16,
        Self::AmxBf16,
    ];

    /// What it multiplies.
    pub const fn kind(self) -> Kind {
        match self {
            Self::ScalarBf16 | Self::Avx2Bf16 | Self::Avx512Bf16 | Self::AmxBf16 => Kind::Bf16,
            _ => Kind::Int8,
        }
    }

    /// The least level that it belongs to.
    const fn level(self) -> Level {
        match self {
            Self::Scalar | Self::ScalarBf16 => Level::Scalar,
            Self::Avx2 | Self::AvxVnni | Self::Avx2Bf16 => Level::Avx2,
            Self::Avx512Vnni | Self::Amx | Self::Avx512Bf16 | Self::AmxBf16 => Level::Avx512,
        }
    }

    /// The name that users type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx_vnni",
            Self::Avx512Vnni => "avx512_vnni",
            Self::Amx => "amx_int8",
            Self::ScalarBf16 => "scalar_bf16",
            Self::Avx2Bf16 => "avx2_bf16",
            Self::Avx512Bf16 => "avx512_bf16",
            Self::AmxBf16 => "amx_bf16",
        }
    }

    /// Whether this CPU and this system have it.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Scalar | Self::ScalarBf16 => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Bf16 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f")
            }
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx | Self::AmxBf16 => amx::is_supported(self.kind()),
            #[allow(unreachable_patterns, reason = "which are left depends on the target")]
            _ => false,
        }
    }

    /// The fastest of a kind that this CPU has within `simd`'s level.
    pub fn best(kind: Kind, simd: Simd) -> Self {
        let mut fitting = Self::ALL
            .into_iter()
            .rev()
            .filter(|kernel| kernel.kind() == kind && kernel.level() as u8 <= simd.level() as u8);
        fitting
            .find(|kernel| kernel.is_supported())
            .unwrap_or(match kind {
                Kind::Int8 => Self::Scalar,
                Kind::Bf16 => Self::ScalarBf16,
            })
    }

    /// Rows are rounded to whole numbers from minus this to this.
    pub(super) const fn levels(self) -> i32 {
        match self {
            // 255 * 64 * 2 still fits into 16 bits.
            Self::Avx2 => 63,
            _ => 127,
        }
    }

    /// Makes this thread ready; None where the kernel isn't supported.
    pub(super) fn begin(self) -> Option<Session> {
        if !self.is_supported() {
            return None;
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if matches!(self, Self::Amx | Self::AmxBf16) {
            // SAFETY: AMX is supported, which includes the system's permission.
            unsafe { amx::configure() };
        }
        Some(Session(self, PhantomData))
    }
}

/// Proof that this thread can run a kernel.
pub(super) struct Session(Kernel, PhantomData<*const ()>);

impl Drop for Session {
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if matches!(self.0, Kernel::Amx | Kernel::AmxBf16) {
            // SAFETY: a session of AMX exists only where AMX is supported.
            unsafe { amx::release() };
        }
    }
}

/// Tiles that follow one another by dimension, from some step on.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a> {
    /// From the first step wanted of the first tile.
    pub bytes: &'a [u8],
    /// Bytes from a tile to the tile of the next 16 rows or features.
    pub stride: usize,
    /// What is to be read soon after these: kernels may have [`FETCHED`] bytes of it fetched each step.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // only a hint
    pub ahead: &'a [u8],
}

/// See [`Tiles::ahead`].
pub(super) const FETCHED: usize = 256;

impl Session {
    /// `block[r][f] (+)= sum of x[r] * w[f]` over `steps` steps, for 32 features and the first `rows`
    /// rows (up to 32, and to the next multiple of 16); other rows of the block are unspecified.
    pub(super) fn multiply(
        &self,
        x: Tiles<'_>,
        rows: usize,
        w: Tiles<'_>,
        steps: usize,
        block: &mut Block,
        fresh: bool,
    ) {
        assert!(rows <= PANEL);
        let extent = |stride: usize, tiles: usize| (tiles - 1) * stride + steps * TILE;
        let row_tiles = rows.div_ceil(TILE_ROWS).max(1);
        assert!(x.bytes.len() >= extent(x.stride, row_tiles));
        assert!(w.bytes.len() >= extent(w.stride, 2));
        match self.0 {
            Kernel::Scalar => scalar::multiply(x, rows, w, steps, block, fresh),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: AVX2 is supported (a session exists), and the extents were checked.
            Kernel::Avx2 => unsafe { avx2::multiply(x, rows, w, steps, block, fresh) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: AVX-VNNI is supported (a session exists), and the extents were checked.
            Kernel::AvxVnni => unsafe { vnni::multiply_256(x, rows, w, steps, block, fresh) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: AVX-512 VNNI is supported (a session exists), and the extents were checked.
            Kernel::Avx512Vnni => unsafe { vnni::multiply_512(x, rows, w, steps, block, fresh) },
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            // SAFETY: this session has configured AMX on this thread, and the extents were checked.
            Kernel::Amx | Kernel::AmxBf16 => unsafe {
                amx::multiply(x, row_tiles, w, steps, block, fresh, self.0.kind());
            },
            Kernel::ScalarBf16 => bf16::multiply(x, rows, w, steps, block, fresh),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: AVX2 and FMA are supported (a session exists).
            Kernel::Avx2Bf16 => unsafe { bf16::multiply_avx2(x, rows, w, steps, block, fresh) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: AVX-512 BF16 is supported (a session exists), and the extents were checked.
            Kernel::Avx512Bf16 => unsafe { bf16::multiply_512(x, rows, w, steps, block, fresh) },
            #[allow(unreachable_patterns, reason = "which are left depends on the target")]
            _ => scalar::multiply(x, rows, w, steps, block, fresh),
        }
    }
}

/// Where the 4 dimensions `quad` of `step` lie for a row of a tile.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
const fn quad_of(row: usize, step: usize, quad: usize) -> usize {
    step * TILE + row * STEP + 4 * quad
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every kernel against the definition, on numbers as large as there can be.
    #[test]
    fn kernels_add_the_same_integers() {
        let steps = 5;
        for (low, high) in [(0_u8, 255_u8), (1, 255), (255, 255)] {
            let kernels = Kernel::ALL.into_iter();
            for kernel in kernels.filter(|kernel| kernel.kind() == Kind::Int8) {
                let Some(session) = kernel.begin() else {
                    continue;
                };
                let levels = kernel.levels();
                let mut state = 9_u64;
                let mut draw = || {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                    (state >> 33) as usize
                };
                let w: Vec<u8> = (0..2 * steps * TILE)
                    .map(|_| low + (draw() % (usize::from(high - low) + 1)) as u8)
                    .collect();
                let x: Vec<u8> = (0..2 * steps * TILE)
                    .map(|_| (draw() as i32 % (2 * levels + 1) - levels) as i8 as u8)
                    .collect();
                let tiles = |bytes| Tiles {
                    bytes,
                    stride: steps * TILE,
                    ahead: &[],
                };
                for rows in [1, 2, 3, 7, 8, 13, 16, 17, 29, 32] {
                    let mut block = [7; PANEL * PANEL];
                    session.multiply(tiles(&x), rows, tiles(&w), steps, &mut block, true);
                    session.multiply(tiles(&x), rows, tiles(&w), steps - 1, &mut block, false);
                    for row in 0..rows {
                        for feature in 0..PANEL {
                            let term = |dimension: usize| {
                                let (step, at) = (dimension / STEP, dimension % STEP);
                                let of_x = (row / 16 * steps + step) * TILE + row % 16 * 64 + at;
                                let of_w = (feature / 16 * steps + step) * TILE
                                    + at / 4 * 64
                                    + feature % 16 * 4
                                    + at % 4;
                                i32::from(x[of_x] as i8) * i32::from(w[of_w])
                            };
                            let sum = |steps| (0..steps * STEP).map(term).sum::<i32>();
                            let expected = sum(steps) + sum(steps - 1);
                            assert_eq!(
                                block[row * PANEL + feature],
                                expected,
                                "{kernel:?} {rows} {row} {feature}"
                            );
                        }
                    }
                }
            }
        }
    }

    /// Every kernel of bf16 against f64, within what any order of adding up may be off.
    #[test]
    fn kernels_add_the_same_bf16() {
        let steps = 5;
        let mut state = 9_u64;
        let mut draw = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            ((state >> 40) as f32 / (1 << 23) as f32) - 1.0
        };
        let mut numbers = || -> Vec<half::bf16> {
            let numbers = (0..steps * TILE).map(|_| half::bf16::from_f32(draw()));
            numbers.collect()
        };
        let (x, w) = (numbers(), numbers());
        fn tiles(numbers: &[half::bf16], steps: usize) -> Tiles<'_> {
            Tiles {
                bytes: bytemuck::cast_slice(numbers),
                stride: steps * TILE,
                ahead: &[],
            }
        }
        let kernels = Kernel::ALL.into_iter();
        for kernel in kernels.filter(|kernel| kernel.kind() == Kind::Bf16) {
            let Some(session) = kernel.begin() else {
                continue;
            };
            for rows in [1, 2, 3, 7, 8, 13, 16, 17, 29, 32] {
                let mut block = [7; PANEL * PANEL];
                session.multiply(
                    tiles(&x, steps),
                    rows,
                    tiles(&w, steps),
                    3,
                    &mut block,
                    true,
                );
                session.multiply(
                    tiles(&x, steps),
                    rows,
                    tiles(&w, steps),
                    steps,
                    &mut block,
                    false,
                );
                for row in 0..rows {
                    for feature in 0..PANEL {
                        let product = |dimension: usize| {
                            let (step, at) = (dimension / 32, dimension % 32);
                            let of_x = ((row / 16 * steps + step) * TILE + row % 16 * 64) / 2 + at;
                            let of_w = ((feature / 16 * steps + step) * TILE + at / 2 * 64) / 2
                                + feature % 16 * 2
                                + at % 2;
                            f64::from(x[of_x].to_f32()) * f64::from(w[of_w].to_f32())
                        };
                        let terms = || (0..3 * 32).chain(0..steps * 32).map(product);
                        let sum: f64 = terms().sum();
                        let size: f64 = terms().map(f64::abs).sum();
                        let off =
                            f64::from(f32::from_bits(block[row * PANEL + feature] as u32)) - sum;
                        let most = (8 * 32 + 8) as f64 * size / f64::from(1 << 24);
                        assert!(
                            off.abs() <= most,
                            "{kernel:?} {rows} {row} {feature}: {off}"
                        );
                    }
                }
            }
        }
    }
}
