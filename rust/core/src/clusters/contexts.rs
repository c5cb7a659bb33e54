//! Examples with the tokens around them, as JSON in the words of SAEDashboard.

use std::fmt::Write;

use crate::{Error, Result};

/// Examples, each a row of `width` places of which some hold a token.
#[derive(Debug, Clone, Copy)]
pub struct Contexts<'a> {
    /// Places of each example; the example itself is in the middle.
    pub width: usize,
    /// `[examples, width]`: which of `texts`; negative: none.
    pub codes: &'a [i32],
    /// `[examples, width]`
    pub strengths: &'a [f64],
    /// `[examples, 3]`: the interval's least and largest strength, and its share.
    pub bins: &'a [f64],
    /// JSON strings.
    pub texts: &'a [String],
}

impl Contexts<'_> {
    /// Writes examples `start..end` as the entries of a list: three decimals of each strength, and
    /// of what is no number null.
    pub fn write(&self, start: usize, end: usize, out: &mut String) -> Result<()> {
        let cells = end.saturating_mul(self.width);
        let whole = start <= end
            && cells <= self.codes.len()
            && self.codes.len() == self.strengths.len()
            && end.checked_mul(3).is_some_and(|n| n <= self.bins.len());
        if !whole {
            return Err(Error::InvalidArgument(format!(
                "examples {start} to {end} of {} places, with {} codes, {} strengths and {} figures \
                 of intervals; expected as many of each",
                self.width,
                self.codes.len(),
                self.strengths.len(),
                self.bins.len()
            )));
        }
        for example in start..end {
            let here = example * self.width..(example + 1) * self.width;
            let (codes, strengths) = (&self.codes[here.clone()], &self.strengths[here]);
            if example > start {
                out.push_str(", ");
            }
            let bins = &self.bins[example * 3..example * 3 + 3];
            for (name, &figure) in ["{\"bin_min\": ", ", \"bin_max\": ", ", \"bin_contains\": "]
                .iter()
                .zip(bins)
            {
                out.push_str(name);
                push_number(out, figure);
            }
            let before = codes[..self.width / 2].iter().filter(|&&code| code >= 0);
            let _ = write!(out, ", \"qualifying_token_index\": {}", before.count());
            out.push_str(", \"tokens\": [");
            let mut comma = "";
            for &code in codes.iter().filter(|&&code| code >= 0) {
                let Some(text) = self.texts.get(code as usize) else {
                    return Err(Error::InvalidArgument(format!(
                        "there is no text {code} of {}",
                        self.texts.len()
                    )));
                };
                out.push_str(comma);
                out.push_str(text);
                comma = ", ";
            }
            out.push_str("], \"values\": [");
            let mut comma = "";
            for (_, &strength) in codes.iter().zip(strengths).filter(|(&code, _)| code >= 0) {
                out.push_str(comma);
                push_rounded(out, strength);
                comma = ", ";
            }
            out.push_str("]}");
        }
        Ok(())
    }
}

fn push_number(out: &mut String, number: f64) {
    if number.is_finite() {
        let _ = write!(out, "{number:?}"); // writing to a string can't fail
    } else {
        out.push_str("null");
    }
}

/// Three decimals, rounded to the nearest, ties to even, without zeros at the end.
fn push_rounded(out: &mut String, number: f64) {
    if number == 0.0 {
        return out.push_str("0.0");
    }
    if !number.is_finite() || number.abs() >= 1e15 {
        return push_number(out, number); // whole
    }
    if f64::from(number as f32) != number {
        // Its product with 1,000 is not exact.
        let text = format!("{number:.3}");
        let short = text.trim_end_matches('0');
        out.push_str(short);
        if short.ends_with('.') {
            out.push('0');
        }
        return;
    }
    let parts = (number.abs() * 1000.0).round_ties_even() as u64;
    if number < 0.0 {
        out.push('-');
    }
    let mut digits = [b'0'; 24];
    let mut at = digits.len();
    let (mut whole, mut rest) = (parts / 1000, parts % 1000);
    let mut decimals = 3;
    while decimals > 1 && rest % 10 == 0 {
        rest /= 10;
        decimals -= 1;
    }
    for _ in 0..decimals {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    at -= 1;
    digits[at] = b'.';
    loop {
        at -= 1;
        digits[at] = b'0' + (whole % 10) as u8;
        whole /= 10;
        if whole == 0 {
            break;
        }
    }
    out.extend(digits[at..].iter().map(|&digit| char::from(digit)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rounded(number: f64) -> String {
        let mut out = String::new();
        push_rounded(&mut out, number);
        out
    }

    #[test]
    fn numbers_are_written_as_by_python() {
        for (number, text) in [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (0.0625, "0.062"),
            (0.1875, "0.188"),
            (-2.5, "-2.5"),
            (12.34, "12.34"),
            (1234.5678, "1234.568"),
            (0.0004, "0.0"),
            (0.9996, "1.0"),
            (f64::NAN, "null"),
            (f64::INFINITY, "null"),
        ] {
            assert_eq!(rounded(number), text);
        }
        assert_eq!(rounded(3e38).parse::<f64>(), Ok(3e38));
    }

    proptest! {
        #[test]
        fn the_nearest_of_three_decimals(bits: u32) {
            let number = f64::from(f32::from_bits(bits));
            prop_assume!(number.is_finite() && number.abs() < 1e15);
            let expected: f64 = format!("{number:.3}").parse().unwrap();
            prop_assert_eq!(rounded(number).parse::<f64>().unwrap(), expected);
        }
    }

    #[test]
    fn absent_places_are_left_out() {
        let texts = ["\"a\"".to_owned(), "\"b\"".to_owned()];
        let contexts = Contexts {
            width: 3,
            codes: &[-1, 1, 0, 0, 0, -1],
            strengths: &[9.0, 0.5, 0.0, 0.0, 2.0, 9.0],
            bins: &[-1.0, 0.5, -1.0, 0.25, 2.0, 0.125],
            texts: &texts,
        };
        let mut out = String::new();
        contexts.write(0, 2, &mut out).unwrap();
        assert_eq!(
            out,
            "{\"bin_min\": -1.0, \"bin_max\": 0.5, \"bin_contains\": -1.0, \
             \"qualifying_token_index\": 0, \"tokens\": [\"b\", \"a\"], \"values\": [0.5, 0.0]}, \
             {\"bin_min\": 0.25, \"bin_max\": 2.0, \"bin_contains\": 0.125, \
             \"qualifying_token_index\": 1, \"tokens\": [\"a\", \"a\"], \"values\": [0.0, 2.0]}"
        );
        for (start, end) in [(1, 3), (2, 1), (0, usize::MAX)] {
            let problem = contexts
                .write(start, end, &mut out)
                .unwrap_err()
                .to_string();
            assert!(problem.contains("expected as many of each"), "{problem}");
        }
        let few = Contexts {
            texts: &texts[..1],
            ..contexts
        };
        let problem = few.write(0, 1, &mut out).unwrap_err().to_string();
        assert!(problem.contains("no text 1 of 1"), "{problem}");
    }
}
