//! 8-bit floats as activations are stored in: E4M3 without infinities ("e4m3fn"),
//! with one f32 scale a row. Definition: OCP 8-bit floating point, revision 1.0.

use half::bf16;

/// The value of each of the 256 codes.
pub static E4M3: [f32; 256] = table();

const fn table() -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let exponent = (code >> 3) & 15;
        let mantissa = code & 7;
        // All steps below are exact: at most 4 significant bits, powers of two.
        let magnitude = if exponent == 15 && mantissa == 7 {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            (8 + mantissa) as f32 * ((1_u32 << exponent) as f32 / 1024.0)
        };
        values[code] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    values
}

/// `out[i] = value(codes[i]) * scale`, in f32.
///
/// What rounding would carry beyond the largest finite number becomes that number, here and in
/// [`decode_bf16`]: a row that was finite when written is finite when read.
pub fn decode_f32(codes: &[u8], scale: f32, out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = (E4M3[usize::from(code)] * scale).clamp(f32::MIN, f32::MAX);
    }
}

/// [`decode_f32`] rounded to the nearest finite bfloat16, ties to even.
pub fn decode_bf16(codes: &[u8], scale: f32, out: &mut [bf16]) {
    let largest = bf16::MAX.to_f32();
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = bf16::from_f32((E4M3[usize::from(code)] * scale).clamp(-largest, largest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corners_of_the_table() {
        assert_eq!(E4M3[0x7E], 448.0);
        assert_eq!(E4M3[0xFE], -448.0);
        assert_eq!(E4M3[0x01], 2.0_f32.powi(-9));
        assert_eq!(E4M3[0x08], 2.0_f32.powi(-6));
        assert_eq!(E4M3[0x38], 1.0);
        assert!(E4M3[0x7F].is_nan() && E4M3[0xFF].is_nan());
        assert_eq!(E4M3[0x80].to_bits(), (-0.0_f32).to_bits());
    }

    #[test]
    fn what_was_finite_stays_finite() {
        let (mut wide, mut half) = ([0.0; 3], [bf16::ZERO; 3]);
        for scale in [f32::MAX / 448.0, (f32::MAX / 448.0).next_up()] {
            decode_f32(&[0x7E, 0xFE, 0x38], scale, &mut wide);
            assert!(wide.iter().all(|value| value.is_finite()));
            assert!(wide[0] >= f32::MAX * 0.9999 && wide[1] == -wide[0] && wide[2] == scale);
            decode_bf16(&[0x7E, 0xFE, 0x38], scale, &mut half);
            assert_eq!((half[0], half[1]), (bf16::MAX, bf16::MIN));
        }
        decode_f32(&[0x7F, 0xFF, 0], 1.0, &mut wide);
        assert!(wide[0].is_nan() && wide[1].is_nan());
    }

    #[test]
    fn codes_rise_with_the_value() {
        assert!((0..0x7E).all(|code| E4M3[code] < E4M3[code + 1]));
    }
}
