use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::shard::fp8::E4M3;
use crate::simd::Level;

fn levels() -> impl Iterator<Item = Simd> {
    Level::ALL.into_iter().filter_map(Simd::new)
}

/// The nearest e4m3 number by looking at all of them; ties to the even code.
fn nearest(value: f32) -> f32 {
    let mut best = 0_u8;
    for code in 0..0x7F_u8 {
        let (distance, least) = (
            (f64::from(E4M3[usize::from(code)]) - f64::from(value.abs())).abs(),
            (f64::from(E4M3[usize::from(best)]) - f64::from(value.abs())).abs(),
        );
        if distance < least || (distance == least && code % 2 == 0) {
            best = code;
        }
    }
    E4M3[usize::from(best)].copysign(value)
}

#[test]
fn rounding_is_to_the_nearest_even() {
    for code in 0..0x7E_usize {
        let (low, high) = (E4M3[code], E4M3[code + 1]);
        let middle = (low + high) / 2.0;
        for value in [
            low,
            middle,
            middle.next_down(),
            middle.next_up(),
            high.next_down(),
        ] {
            assert_eq!(loops::round(value), nearest(value), "{value}");
            assert_eq!(loops::round(-value), nearest(-value), "-{value}");
        }
    }
    assert!(loops::round(f32::NAN).is_nan());
    assert_eq!(loops::round(f32::MIN_POSITIVE), 0.0);
}

#[test]
fn codes_and_values_are_inverse() {
    for simd in levels() {
        let codes: Vec<u8> = (0..=255).collect();
        let matrix = Matrix::new(&codes, 2, 128).unwrap();
        let block = Block::new(128, 128).unwrap();
        let mut values = vec![0_f32; 256];
        dequantize_blocks(matrix, &[1.0], block, &mut values, simd, 1).unwrap();
        for (code, (&value, expected)) in values.iter().zip(E4M3).enumerate() {
            let same = value.to_bits() == expected.to_bits();
            assert!(same || (value.is_nan() && expected.is_nan()), "{code}");
        }
        values[0x7F] = 448.0;
        values[0xFF] = -448.0;
        let (mut again, mut scales) = (vec![9; 256], vec![9.0]);
        let matrix = Matrix::new(&values, 2, 128).unwrap();
        quantize_blocks(matrix, block, &mut again, &mut scales, simd, 1).unwrap();
        assert_eq!(scales, [1.0]);
        let expected = codes
            .iter()
            .map(|&code| if code & 0x7F == 0x7F { code - 1 } else { code });
        assert_eq!(again, expected.collect::<Vec<_>>());
    }
}

/// The plain definition, one group.
fn fake_group(group: &[f32]) -> Vec<f32> {
    let most = group
        .iter()
        .fold(0.0_f32, |most, value| most.max(value.abs()));
    let scale = if most / 448.0 > 0.0 {
        most / 448.0
    } else {
        1.0
    };
    let one = |value: &f32| nearest((value / scale).clamp(-448.0, 448.0)) * scale;
    group.iter().map(one).collect()
}

proptest! {
    #[test]
    fn elements_round_to_bf16_as_half_does(bits in any::<u32>()) {
        let value = f32::from_bits(bits);
        prop_assert_eq!(
            <bf16 as Element>::from_f32(value).to_bits(),
            bf16::from_f32(value).to_bits()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn fake_quantising_follows_the_definition(
        width in 1_usize..150,
        rows in 0_usize..4,
        group in 1_usize..150,
        exponent in -44_i32..38,
        seed in any::<u64>(),
    ) {
        let mut state = seed;
        let values: Vec<f32> = (0..rows * width).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 10_f32.powi(exponent)
        }).collect();
        let matrix = Matrix::new(&values, rows, width).unwrap();
        let expected: Vec<f32> = values
            .chunks(width)
            .flat_map(|row| row.chunks(group).flat_map(fake_group))
            .collect();
        for simd in levels() {
            for threads in [1, 3] {
                let mut output = vec![f32::NAN; values.len()];
                fake_quantize(matrix, group, &mut output, simd, threads).unwrap();
                prop_assert_eq!(&output, &expected);
            }
            let halves: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            let exact: Vec<f32> = halves.iter().map(|value| value.to_f32()).collect();
            let wanted: Vec<bf16> = exact
                .chunks(width)
                .flat_map(|row| row.chunks(group).flat_map(fake_group))
                .map(bf16::from_f32)
                .collect();
            let mut output = vec![bf16::NAN; values.len()];
            let matrix = Matrix::new(&halves, rows, width).unwrap();
            fake_quantize(matrix, group, &mut output, simd, 1).unwrap();
            prop_assert_eq!(output, wanted);
        }
    }
}

#[test]
fn what_is_not_finite_spoils_its_group_only() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![1.0_f32; 300];
        values[130] = bad;
        let matrix = Matrix::new(&values, 1, 300).unwrap();
        for simd in levels() {
            let mut output = vec![0.0; 300];
            fake_quantize(matrix, 128, &mut output, simd, 1).unwrap();
            assert!(output[128..256].iter().all(|value| value.is_nan()));
            assert!(output[..128]
                .iter()
                .chain(&output[256..])
                .all(|&value| value == 1.0));
            let block = Block::new(128, 128).unwrap();
            let (mut codes, mut scales) = (vec![0; 300], vec![0.0; 3]);
            let error = quantize_blocks(matrix, block, &mut codes, &mut scales, simd, 1);
            assert!(error.unwrap_err().to_string().contains("row 0"));
        }
    }
}

#[test]
fn ragged_blocks_agree_with_single_ones() {
    let (rows, width) = (37, 41);
    let values: Vec<f32> = (0..rows * width)
        .map(|i| ((i * 7919) % 1000) as f32 - 300.0)
        .collect();
    let matrix = Matrix::new(&values, rows, width).unwrap();
    let block = Block::new(16, 32).unwrap();
    assert_eq!(block.grid(rows, width), (3, 2));
    for simd in levels() {
        for threads in [1, 4] {
            let (mut codes, mut scales) = (vec![0; rows * width], vec![0.0; 6]);
            quantize_blocks(matrix, block, &mut codes, &mut scales, simd, threads).unwrap();
            let mut output = vec![f32::NAN; rows * width];
            let coded = Matrix::new(&codes, rows, width).unwrap();
            dequantize_blocks(coded, &scales, block, &mut output, simd, threads).unwrap();
            for row in 0..rows {
                for column in 0..width {
                    let part: Vec<f32> = (0..rows * width)
                        .filter(|i| i / width / 16 == row / 16 && i % width / 32 == column / 32)
                        .map(|i| values[i])
                        .collect();
                    let place = (0..rows * width)
                        .filter(|i| i / width / 16 == row / 16 && i % width / 32 == column / 32)
                        .position(|i| i == row * width + column)
                        .unwrap();
                    assert_eq!(output[row * width + column], fake_group(&part)[place]);
                }
            }
        }
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let simd = Simd::best();
    let values = [1.0_f32; 6];
    let matrix = Matrix::new(&values, 2, 3).unwrap();
    assert!(fake_quantize(matrix, 0, &mut [0.0; 6], simd, 1).is_err());
    assert!(fake_quantize(matrix, 2, &mut [0.0; 5], simd, 1).is_err());
    assert!(Block::new(0, 1).is_err());
    let block = Block::new(2, 2).unwrap();
    assert!(quantize_blocks(matrix, block, &mut [0; 6], &mut [0.0; 1], simd, 1).is_err());
    assert!(quantize_blocks(matrix, block, &mut [0; 5], &mut [0.0; 2], simd, 1).is_err());
    let codes = Matrix::new(&[0_u8; 6], 2, 3).unwrap();
    assert!(dequantize_blocks(codes, &[1.0], block, &mut [0.0_f32; 6], simd, 1).is_err());
    assert!(dequantize_blocks(codes, &[1.0; 2], block, &mut [0.0_f32; 7], simd, 1).is_err());
    let empty = Matrix::<f32>::new(&[], 0, 3).unwrap();
    quantize_blocks(empty, block, &mut [], &mut [], simd, 1).unwrap();
}
