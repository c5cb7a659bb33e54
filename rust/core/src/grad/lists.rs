//! The codes of a batch, feature by feature.

use crate::decode::SparseRows;
use crate::{Cancel, Error, Result};

/// Codes counted between two looks at the cancel flag.
const BLOCK_CODES: usize = 1 << 20;

/// Which codes each feature has: those of `f` are at `offsets[f]..offsets[f + 1]` of `rows` and
/// `codes`, in rising row. The same lists serve every array that has a number a code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureLists {
    offsets: Vec<usize>,
    /// The row of each code.
    rows: Vec<u32>,
    /// Where the code stands in the arrays in order of rows.
    codes: Vec<u32>,
    row_count: usize,
}

impl FeatureLists {
    /// A counting sort of codes in order of rows.
    ///
    /// # Errors
    /// 2^32 codes or rows and more; `cancel`.
    pub fn new(codes: SparseRows<'_>, cancel: &Cancel) -> Result<Self> {
        for (what, count) in [("codes", codes.nnz()), ("rows", codes.rows())] {
            if u32::try_from(count).is_err() {
                return Err(Error::InvalidArgument(format!(
                    "{count} {what} in one batch; expected fewer than 2**32: give smaller batches"
                )));
            }
        }
        let mut offsets = vec![0_usize; codes.d_sae() + 1];
        for block in codes.indices().chunks(BLOCK_CODES) {
            cancel.check()?;
            for index in block {
                offsets[*index as usize + 1] += 1;
            }
        }
        for feature in 0..codes.d_sae() {
            offsets[feature + 1] += offsets[feature];
        }
        let mut next = offsets.clone();
        let mut rows = vec![0; codes.nnz()];
        let mut places = vec![0; codes.nnz()];
        for row in 0..codes.rows() {
            if row % BLOCK_CODES == 0 {
                cancel.check()?;
            }
            for at in codes.range(row) {
                let slot = &mut next[codes.indices()[at] as usize];
                // Both were found to fit.
                rows[*slot] = row as u32;
                places[*slot] = at as u32;
                *slot += 1;
            }
        }
        Ok(Self {
            offsets,
            rows,
            codes: places,
            row_count: codes.rows(),
        })
    }

    /// Number of features.
    pub fn d_sae(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of codes.
    pub fn nnz(&self) -> usize {
        self.rows.len()
    }

    /// Number of rows that the codes are of.
    pub fn rows(&self) -> usize {
        self.row_count
    }

    /// How many codes `feature` has.
    #[inline]
    pub fn count(&self, feature: usize) -> usize {
        self.offsets[feature + 1] - self.offsets[feature]
    }

    /// The rows and the codes of `feature`, in rising row.
    #[inline]
    pub fn of(&self, feature: usize) -> (&[u32], &[u32]) {
        let range = self.offsets[feature]..self.offsets[feature + 1];
        (&self.rows[range.clone()], &self.codes[range])
    }

    /// Of each feature the sum, in f64, of its codes' `values` (in order of rows).
    ///
    /// # Errors
    /// Not one value a code.
    pub fn sums(&self, values: &[f32]) -> Result<Vec<f32>> {
        self.check_values(values)?;
        let sum = |feature| {
            let (_, codes) = self.of(feature);
            codes
                .iter()
                .map(|code| f64::from(values[*code as usize]))
                .sum::<f64>() as f32
        };
        Ok((0..self.d_sae()).map(sum).collect())
    }

    pub(crate) fn check_values(&self, values: &[f32]) -> Result<()> {
        if values.len() == self.nnz() {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!(
            "{} values; expected {}, one a code",
            values.len(),
            self.nnz()
        )))
    }
}
