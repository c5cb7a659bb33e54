//! What holds within a row of codes: falling values, ties by rising feature, and each
//! feature once.

use crate::{Cancel, Error, Result};

/// Rows that are checked between two looks at the cancel flag.
const CANCEL_ROWS: usize = 4096;

/// Marks the features of one row after another, to find those that come twice.
#[derive(Debug)]
pub struct Seen {
    words: Vec<u64>,
}

impl Seen {
    /// For features below `d_sae`. A bit each, of which only the touched pages take memory.
    pub fn new(d_sae: usize) -> Self {
        Self {
            words: vec![0; d_sae.min(u32::MAX as usize).div_ceil(64)],
        }
    }

    /// A feature that comes again in `row`; those not below `d_sae` may be passed over.
    pub fn repeated(&mut self, row: impl Iterator<Item = u32> + Clone) -> Option<u32> {
        let mut repeated = None;
        for feature in row.clone() {
            if let Some(word) = self.words.get_mut(feature as usize / 64) {
                let bit = 1 << (feature % 64);
                if *word & bit != 0 {
                    repeated = Some(feature);
                    break;
                }
                *word |= bit;
            }
        }
        // Cheaper than clearing all of it, as rows are sparse.
        for feature in row {
            if let Some(word) = self.words.get_mut(feature as usize / 64) {
                *word = 0;
            }
        }
        repeated
    }
}

/// Whether a row's codes are in order.
pub fn in_order(values: impl Iterator<Item = f32>, features: impl Iterator<Item = u32>) -> bool {
    let mut last: Option<(f32, u32)> = None;
    for (value, feature) in values.zip(features) {
        if let Some((before, at)) = last {
            if value > before || (value == before && feature < at) {
                return false;
            }
        }
        last = Some((value, feature));
    }
    true
}

/// The first row of CSR codes that names a feature twice, and the feature. Indices are at
/// least 0 and below `d_sae`.
pub fn first_repeated(
    indices: &[i32],
    row_offsets: &[i64],
    d_sae: usize,
    cancel: &Cancel,
) -> Result<Option<(usize, u32)>> {
    let mut seen = Seen::new(d_sae);
    for (row, ends) in row_offsets.windows(2).enumerate() {
        if row % CANCEL_ROWS == 0 {
            cancel.check()?;
        }
        let codes = match (usize::try_from(ends[0]), usize::try_from(ends[1])) {
            (Ok(start), Ok(end)) => indices.get(start..end),
            _ => None,
        };
        let Some(codes) = codes else {
            return Err(Error::InvalidArgument(format!(
                "row {row} spans codes {}..{} of {}",
                ends[0],
                ends[1],
                indices.len()
            )));
        };
        if let Some(feature) = seen.repeated(codes.iter().map(|&index| index as u32)) {
            return Ok(Some((row, feature)));
        }
    }
    Ok(None)
}
