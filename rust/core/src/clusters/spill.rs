//! A file of buckets, each of whole features, whose sizes are known beforehand.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bytemuck::{Pod, Zeroable};

use crate::{Cancel, Error, Result};

/// One activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Record {
    /// Which feature.
    pub feature: u32,
    /// The number of its row in the order of places.
    pub row: u32,
    /// The bits of its strength.
    pub bits: u32,
}

const RECORD: u64 = size_of::<Record>() as u64;
/// Records between two looks whether to stop: about a millisecond's.
pub(super) const STRETCH: usize = 1 << 16;

/// The file, and how far each bucket is filled.
#[derive(Debug)]
pub struct Spill {
    path: PathBuf,
    /// The first feature of each bucket, and the one after the last.
    starts: Vec<u32>,
    /// `[features]`.
    bucket_of: Vec<u32>,
    /// The first record of each bucket, and the one after the last.
    bases: Vec<u64>,
    shared: Mutex<Shared>,
}

#[derive(Debug)]
struct Shared {
    file: File,
    filled: Vec<u64>,
}

impl Spill {
    /// Opens the file for features that are active `counts` times, in buckets of at most
    /// `records` each (a feature that is active more often has one of its own). `filled`: how far
    /// each bucket was filled by an earlier run; None begins anew.
    pub fn open(
        path: &Path,
        counts: &[u64],
        records: u64,
        filled: Option<Vec<u64>>,
    ) -> Result<Self> {
        if u32::try_from(counts.len()).is_err() {
            return Err(Error::InvalidArgument(format!(
                "d_sae is {}, expected less than 2^32",
                counts.len()
            )));
        }
        let (mut starts, mut bases) = (Vec::new(), Vec::new());
        let mut bucket_of = Vec::with_capacity(counts.len());
        let (mut total, mut held) = (0_u64, 0_u64);
        for (feature, &count) in counts.iter().enumerate() {
            if starts.is_empty() || (held > 0 && held.saturating_add(count) > records) {
                starts.push(feature as u32);
                bases.push(total);
                held = 0;
            }
            bucket_of.push(starts.len() as u32 - 1);
            held = held.saturating_add(count);
            total = total.saturating_add(count);
        }
        let buckets = starts.len();
        starts.push(counts.len() as u32);
        bases.push(total);
        let fresh = filled.is_none();
        let filled = filled.unwrap_or_else(|| vec![0; buckets]);
        if filled.len() != buckets
            || (0..buckets).any(|bucket| filled[bucket] > bases[bucket + 1] - bases[bucket])
        {
            return Err(Error::InvalidArgument(format!(
                "{}: was filled in other buckets than these {buckets}; remove it and begin anew",
                path.display()
            )));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(fresh)
            .truncate(fresh)
            .open(path)
            .map_err(|source| io(path, source))?;
        Ok(Self {
            path: path.to_owned(),
            starts,
            bucket_of,
            bases,
            shared: Mutex::new(Shared { file, filled }),
        })
    }

    /// How many buckets.
    pub fn buckets(&self) -> usize {
        self.starts.len() - 1
    }

    /// The features of a bucket.
    pub fn features(&self, bucket: usize) -> Range<u32> {
        self.starts[bucket]..self.starts[bucket + 1]
    }

    /// How many features in all.
    pub fn d_sae(&self) -> usize {
        self.bucket_of.len()
    }

    /// How many records a bucket has when it is full.
    pub fn size(&self, bucket: usize) -> u64 {
        self.bases[bucket + 1] - self.bases[bucket]
    }

    /// How far each bucket is filled.
    pub fn filled(&self) -> Vec<u64> {
        self.lock().filled.clone()
    }

    /// Waits until all that was written is on the disk.
    pub fn sync(&self) -> Result<()> {
        let result = self.lock().file.sync_data();
        result.map_err(|source| io(&self.path, source))
    }

    /// One thread's way of adding records; `memory` bytes at most are held back.
    pub fn writer(&self, memory: usize) -> Writer<'_> {
        Writer {
            spill: self,
            most: (memory / size_of::<Record>()).max(1),
            held: 0,
            buffers: vec![Vec::new(); self.buckets()],
        }
    }

    /// All records of a bucket.
    pub fn read(&self, bucket: usize, cancel: &Cancel) -> Result<Vec<Record>> {
        let size = self.size(bucket);
        let mut shared = self.lock();
        if shared.filled[bucket] != size {
            return Err(Error::InvalidArgument(format!(
                "{}: bucket {bucket} holds {} activations, expected {size}: the codes changed \
                 after they were counted; begin anew",
                self.path.display(),
                shared.filled[bucket]
            )));
        }
        let mut records: Vec<Record> = Vec::new();
        usize::try_from(size)
            .ok()
            .and_then(|size| records.try_reserve_exact(size).ok())
            .ok_or_else(|| self.too_large(bucket, size))?;
        records.resize(size as usize, Record::zeroed());
        let start = SeekFrom::Start(self.bases[bucket] * RECORD);
        let sought = shared.file.seek(start);
        sought.map_err(|source| io(&self.path, source))?;
        for some in records.chunks_mut(STRETCH) {
            cancel.check()?;
            let read = shared.file.read_exact(bytemuck::cast_slice_mut(some));
            read.map_err(|source| io(&self.path, source))?;
        }
        Ok(records)
    }

    /// What to say where there is no memory for the `size` activations of a bucket.
    pub(super) fn too_large(&self, bucket: usize, size: u64) -> Error {
        let features = self.features(bucket);
        let whose = match features.len() {
            1 => format!("feature {}", features.start),
            _ => format!("features {} to {}", features.start, features.end - 1),
        };
        Error::InvalidArgument(format!(
            "the {size} activations of {whose} need more memory to be sorted than this machine \
             gives (44 bytes each); free some, or build from fewer tokens"
        ))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, bucket: usize, records: &[Record]) -> Result<()> {
        let mut shared = self.lock();
        let filled = shared.filled[bucket];
        if filled + records.len() as u64 > self.size(bucket) {
            return Err(Error::InvalidArgument(format!(
                "{}: bucket {bucket} was made for {} activations and more came: the codes changed \
                 after they were counted; begin anew",
                self.path.display(),
                self.size(bucket)
            )));
        }
        let start = SeekFrom::Start((self.bases[bucket] + filled) * RECORD);
        let bytes = bytemuck::cast_slice(records);
        let written = shared.file.seek(start);
        written
            .and_then(|_| shared.file.write_all(bytes))
            .map_err(|source| io(&self.path, source))?;
        shared.filled[bucket] += records.len() as u64;
        Ok(())
    }
}

/// See [`Spill::writer`]. Those of two threads lie side by side, and each record counts: in lines of
/// the cache of their own.
#[derive(Debug)]
#[repr(align(128))]
pub struct Writer<'s> {
    spill: &'s Spill,
    /// So many records may be held back.
    most: usize,
    held: usize,
    buffers: Vec<Vec<Record>>,
}

impl Writer<'_> {
    /// Adds a record; its feature must be below `d_sae`, its strength positive and finite.
    #[inline]
    pub fn push(&mut self, record: Record) -> Result<()> {
        let strength = f32::from_bits(record.bits);
        let Some(&bucket) = self.spill.bucket_of.get(record.feature as usize) else {
            return Err(Error::InvalidArgument(format!(
                "feature {} in row {} is not below d_sae = {}",
                record.feature,
                record.row,
                self.spill.d_sae()
            )));
        };
        if !(strength > 0.0 && strength.is_finite()) {
            return Err(Error::InvalidArgument(format!(
                "strength {strength} of feature {} in row {}; strengths must be positive and \
                 finite (apply a relu before selecting codes)",
                record.feature, record.row
            )));
        }
        self.buffers[bucket as usize].push(record);
        self.held += 1;
        if self.held == self.most {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes what is held back. Without it some is lost.
    pub fn flush(&mut self) -> Result<()> {
        let share = self.most / self.buffers.len().max(1);
        for (bucket, buffer) in self.buffers.iter_mut().enumerate() {
            if !buffer.is_empty() {
                self.spill.write(bucket, buffer)?;
                buffer.clear();
                // Another bucket may get more the next time.
                buffer.shrink_to(2 * share);
            }
        }
        self.held = 0;
        Ok(())
    }
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Io {
        path: path.to_owned(),
        source,
    }
}
