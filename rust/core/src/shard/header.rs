//! What a safetensors file claims to hold, checked against its real size.
//!
//! The parsing is the `safetensors` crate's; this adds a small bound on the
//! header, messages that tell a truncated file from a padded one, and strictness:
//! a shard holds exactly the tensors of its kind.

use std::collections::HashMap;
use std::ops::Range;

use bytemuck::AnyBitPattern;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors};

/// Our headers take a few hundred bytes. A foreign one may take more, but there
/// is no reason to parse the 100 MB that the format allows.
const MAX_HEADER: usize = 1 << 20;
/// The little-endian header length that opens a safetensors file.
const PREFIX: usize = 8;

const REDO: &str = "copy the file again from its source, or write the shard again";

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Element type.
    pub dtype: Dtype,
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// Bytes of the file that hold the elements.
    pub range: Range<usize>,
}

/// The tensors of a file that are not yet spoken for.
#[derive(Debug)]
pub struct Header {
    entries: HashMap<String, Entry>,
}

impl Header {
    /// Parses the header of `file` (all its bytes) and checks that the tensors
    /// cover the rest of the file exactly. The error says what is wrong.
    pub fn parse(file: &[u8]) -> Result<Self, String> {
        let length = file.len();
        let Some(prefix) = file.first_chunk::<PREFIX>() else {
            return Err(format!(
                "truncated: {length} bytes are too few for a safetensors file; {REDO}"
            ));
        };
        let header = usize::try_from(u64::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
        if header > MAX_HEADER {
            return Err(format!(
                "not a shard: its first 8 bytes announce a header of {header} bytes, \
                 where a shard's takes at most {MAX_HEADER}; remove the file or {REDO}"
            ));
        }
        let Some(json) = file.get(PREFIX..PREFIX + header) else {
            return Err(format!(
                "truncated: the header alone takes {} bytes, the file has {length}; {REDO}",
                PREFIX + header
            ));
        };
        let metadata = match SafeTensors::read_metadata(file) {
            Ok((_, metadata)) => metadata,
            Err(SafeTensorError::MetadataIncompleteBuffer) => {
                return Err(wrong_length(json, PREFIX + header, length));
            }
            Err(error) => {
                return Err(format!("not a safetensors file ({error}); {REDO}"));
            }
        };
        let start = PREFIX + header;
        let entries = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let (from, to) = info.data_offsets;
                let entry = Entry {
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    range: start + from..start + to,
                };
                (name, entry)
            })
            .collect();
        Ok(Self { entries })
    }

    /// Whether a tensor of that name is (still) there.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Takes the tensor `name`, which must have one of `dtypes`.
    pub fn take(&mut self, name: &str, dtypes: &[Dtype]) -> Result<Entry, String> {
        let Some(entry) = self.entries.remove(name) else {
            let mut names: Vec<_> = self.entries.keys().cloned().collect();
            names.sort_unstable();
            return Err(format!(
                "not a shard of this kind: no tensor `{name}` (it holds {}); \
                 remove the file or {REDO}",
                if names.is_empty() {
                    "nothing else".to_owned()
                } else {
                    names.join(", ")
                }
            ));
        };
        if !dtypes.contains(&entry.dtype) {
            let expected: Vec<_> = dtypes.iter().map(ToString::to_string).collect();
            return Err(format!(
                "tensor `{name}` has dtype {}, expected {}; {REDO}",
                entry.dtype,
                expected.join(" or ")
            ));
        }
        Ok(entry)
    }

    /// [`Header::take`] of a one-dimensional tensor; `length` is checked if given.
    pub fn take_column(
        &mut self,
        name: &str,
        dtypes: &[Dtype],
        length: Option<usize>,
    ) -> Result<Entry, String> {
        let entry = self.take(name, dtypes)?;
        match (entry.shape.as_slice(), length) {
            (&[found], Some(expected)) if found != expected => Err(format!(
                "tensor `{name}` has {found} elements, expected {expected}; {REDO}"
            )),
            (&[_], _) => Ok(entry),
            (shape, _) => Err(format!(
                "tensor `{name}` has shape {shape:?}, expected one dimension; {REDO}"
            )),
        }
    }

    /// Fails if a tensor is left that no one took.
    pub fn finish(self) -> Result<(), String> {
        match self.entries.keys().min() {
            None => Ok(()),
            Some(name) => Err(format!(
                "not a shard of this kind: it also holds a tensor `{name}`; \
                 remove the file or {REDO}"
            )),
        }
    }
}

/// The message for a file that is shorter or longer than its header says.
fn wrong_length(json: &[u8], start: usize, length: usize) -> String {
    let Ok(metadata) = serde_json::from_slice::<Metadata>(json) else {
        return format!("its header does not fit its {length} bytes; {REDO}");
    };
    let expected = start.saturating_add(metadata.data_len());
    let what = if length < expected {
        "truncated"
    } else {
        "oversized"
    };
    format!("{what}: its header describes {expected} bytes, the file has {length}; {REDO}")
}

impl Entry {
    /// Checks that the tensor `name` can be viewed in place as elements of type `T`.
    pub(crate) fn check<T: AnyBitPattern>(&self, file: &[u8], name: &str) -> Result<(), String> {
        let bytes = file.get(self.range.clone()).unwrap_or_default();
        match bytemuck::try_cast_slice::<u8, T>(bytes) {
            Ok(_) => Ok(()),
            Err(error) => Err(format!(
                "tensor `{name}` can't be read in place ({error}); \
                 write the file again with this package, which aligns each tensor"
            )),
        }
    }

    /// The elements, of the same `file` and type that passed [`Entry::check`]; that
    /// is why neither the range nor the cast can fail here.
    pub(crate) fn view<'a, T: AnyBitPattern>(&self, file: &'a [u8]) -> &'a [T] {
        bytemuck::cast_slice(&file[self.range.clone()])
    }
}
