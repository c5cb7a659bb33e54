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
pub fn decode_f32(codes: &[u8], scale: f32, out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = E4M3[usize::from(code)] * scale;
    }
}

/// [`decode_f32`] rounded to the nearest bfloat16, ties to even.
pub fn decode_bf16(codes: &[u8], scale: f32, out: &mut [bf16]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = bf16::from_f32(E4M3[usize::from(code)] * scale);
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
    fn codes_rise_with_the_value() {
        assert!((0..0x7E).all(|code| E4M3[code] < E4M3[code + 1]));
    }
}
