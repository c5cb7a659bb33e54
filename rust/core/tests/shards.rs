//! Shards written and read back, and files that are not what they should be.

use std::fs;
use std::path::Path;

use half::bf16;
use proptest::prelude::*;
use r1sae_core::shard::activation_set::{ActivationSet, Output};
use r1sae_core::shard::activations::{ActivationDtype, ActivationShardReader, ActivationView};
use r1sae_core::shard::code_order::first_repeated;
use r1sae_core::shard::gather::{ColumnsMut, Listed, Rows};
use r1sae_core::shard::write::{checksum, write_shard, Tensor, Written};
use r1sae_core::shard::{CodeShardReader, CodeView, Dtype, Indices, Values};
use r1sae_core::{Cancel, Error};
use tempfile::TempDir;

fn tensor<'a, T: bytemuck::NoUninit>(
    name: &str,
    dtype: Dtype,
    shape: &[usize],
    data: &'a [T],
) -> Tensor<'a> {
    Tensor {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        bytes: bytemuck::cast_slice(data),
    }
}

/// Columns that count the rows from `first` on.
struct Columns {
    counter: Vec<i32>,
    sequence_id: Vec<i64>,
    segment: Vec<u8>,
}

impl Columns {
    fn counting(first: i32, rows: usize) -> Self {
        let counter: Vec<i32> = (first..).take(rows).collect();
        let sequence_id = counter.iter().map(|&row| i64::from(row) << 33).collect();
        let segment = counter.iter().map(|&row| (row % 3) as u8).collect();
        Self {
            counter,
            sequence_id,
            segment,
        }
    }

    fn tensors(&self) -> Vec<Tensor<'_>> {
        let rows = [self.counter.len()];
        vec![
            tensor("tokens", Dtype::I32, &rows, &self.counter),
            tensor("sequence_id", Dtype::I64, &rows, &self.sequence_id),
            tensor("position", Dtype::I32, &rows, &self.counter),
            tensor("segment", Dtype::U8, &rows, &self.segment),
        ]
    }
}

fn write_activations(path: &Path, first: i32, rows: usize, d_in: usize) -> Written {
    let activations: Vec<f32> = (0..rows * d_in)
        .map(|i| (first as usize * d_in + i) as f32)
        .collect();
    let columns = Columns::counting(first, rows);
    let mut tensors = columns.tensors();
    tensors.push(tensor(
        "activations",
        Dtype::F32,
        &[rows, d_in],
        &activations,
    ));
    write_shard(path, tensors, &Cancel::new()).unwrap()
}

fn write_codes(path: &Path, offsets: &[i64], indices: &[u16], values: &[f32]) {
    let columns = Columns::counting(0, offsets.len() - 1);
    let mut tensors = columns.tensors();
    tensors.push(tensor("row_offsets", Dtype::I64, &[offsets.len()], offsets));
    tensors.push(tensor("indices", Dtype::U16, &[indices.len()], indices));
    tensors.push(tensor("values", Dtype::F32, &[values.len()], values));
    write_shard(path, tensors, &Cancel::new()).unwrap();
}

fn problem(error: &Error) -> String {
    match error {
        Error::BadShard { problem, .. } => problem.clone(),
        other => panic!("expected BadShard, got {other:?}"),
    }
}

#[test]
fn codes_come_back() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("shard.safetensors");
    write_codes(&path, &[0, 2, 2, 3], &[7, 1, 0], &[2.5, 1.5, 0.5]);
    let reader = CodeShardReader::open(&path).unwrap();
    assert_eq!((reader.rows(), reader.nnz()), (3, 3));
    assert_eq!(reader.row_offsets(), [0, 2, 2, 3]);
    assert_eq!(reader.indices(), Indices::U16(&[7, 1, 0]));
    assert_eq!(reader.values(), Values::F32(&[2.5, 1.5, 0.5]));
    reader.validate(8, &Cancel::new()).unwrap();
    let error = reader.validate(7, &Cancel::new()).unwrap_err();
    assert!(problem(&error).contains("feature index 7"), "{error}");
    assert!(error.to_string().contains("shard.safetensors"));
}

#[test]
fn offsets_out_of_order_are_found() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("shard.safetensors");
    for offsets in [
        [0, 3, 2, 3],
        [0, -1, 2, 3],
        [0, 2, i64::MAX, 3],
        [0, i64::MIN, 0, 3],
    ] {
        write_codes(&path, &offsets, &[7, 1, 0], &[2.5, 1.5, 0.5]);
        let reader = CodeShardReader::open(&path).unwrap();
        let error = reader.validate(8, &Cancel::new()).unwrap_err();
        assert!(problem(&error).contains("not in order"), "{error}");
    }
    for offsets in [[1, 2, 3, 3], [0, 1, 2, 2], [0, 1, 2, 4], [-1, 0, 0, 3]] {
        write_codes(&path, &offsets, &[7, 1, 0], &[2.5, 1.5, 0.5]);
        let error = CodeShardReader::open(&path).unwrap_err();
        assert!(problem(&error).contains("expected from 0 to 3"), "{error}");
    }
}

#[test]
fn rows_out_of_order_and_repeated_features_are_found() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("shard.safetensors");
    let check = |offsets: &[i64], indices: &[u16], values: &[f32]| {
        write_codes(&path, offsets, indices, values);
        let reader = CodeShardReader::open(&path).unwrap();
        reader.validate(8, &Cancel::new())
    };
    // Order and repeats matter within a row alone, and zeros of either sign are equal.
    check(&[0, 2, 4], &[7, 1, 1, 7], &[2.0, 1.0, 3.0, 3.0]).unwrap();
    check(&[0, 2, 2], &[1, 7], &[0.0, -0.0]).unwrap();
    for (offsets, indices, values, says) in [
        (
            [0, 1, 3],
            [0, 1, 2],
            [3.0, 1.0, 2.0],
            "row 1 is out of order",
        ),
        (
            [0, 3, 3],
            [0, 2, 1],
            [3.0, 1.0, 1.0],
            "row 0 is out of order",
        ),
        (
            [0, 0, 3],
            [1, 2, 0],
            [1.0, 0.0, -0.0],
            "row 1 is out of order",
        ),
        (
            [0, 0, 3],
            [5, 2, 5],
            [3.0, 2.0, 1.0],
            "row 1 names feature 5",
        ),
        (
            [0, 2, 3],
            [5, 5, 5],
            [3.0, 3.0, 1.0],
            "row 0 names feature 5",
        ),
    ] {
        let error = check(&offsets, &indices, &values).unwrap_err();
        assert!(problem(&error).contains(says), "{error}");
    }
}

#[test]
fn a_cancelled_search_for_repeated_features_stops() {
    let cancel = Cancel::new();
    cancel.cancel();
    let error = first_repeated(&[1, 1], &[0, 2], 8, &cancel).unwrap_err();
    assert!(matches!(error, Error::Interrupted));
    for offsets in [[0, 3], [2, 1], [-1, 2], [i64::MIN, i64::MAX]] {
        let error = first_repeated(&[1, 1], &offsets, 8, &Cancel::new()).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
    }
}

proptest! {
    /// Against a set for each row; the features cross the edges of a word.
    #[test]
    fn repeated_features_are_found(
        rows in proptest::collection::vec(proptest::collection::vec(0..130_i32, 0..12), 0..9),
    ) {
        let mut offsets = vec![0_i64];
        for row in &rows {
            offsets.push(offsets[offsets.len() - 1] + row.len() as i64);
        }
        let wanted = rows.iter().enumerate().find_map(|(number, row)| {
            let mut seen = std::collections::HashSet::new();
            let again = row.iter().find(|&&feature| !seen.insert(feature));
            again.map(|&feature| (number, feature as u32))
        });
        let found = first_repeated(&rows.concat(), &offsets, 130, &Cancel::new()).unwrap();
        prop_assert_eq!(found, wanted);
    }
}

#[test]
fn a_set_gathers_across_shards() {
    let folder = TempDir::new().unwrap();
    let mut listed = Vec::new();
    let mut first = 0;
    for (number, rows) in [5, 0, 3, 1].into_iter().enumerate() {
        let path = folder.path().join(format!("{number}.safetensors"));
        let written = write_activations(&path, first, rows, 3);
        assert_eq!(checksum(&path, &Cancel::new()).unwrap(), written);
        listed.push(Listed {
            path,
            rows,
            bytes: written.bytes,
        });
        first += rows as i32;
    }
    let set = ActivationSet::open(&listed, 3, ActivationDtype::F32, &Cancel::new()).unwrap();
    assert_eq!(set.rows(), 9);
    let wanted = [8_i64, 0, 5, 5, 4, 7];
    let mut out = [f32::NAN; 18];
    let (mut tokens, mut position) = ([-9; 6], [-9; 6]);
    let (mut sequence_id, mut segment) = ([-9; 6], [9; 6]);
    let columns = ColumnsMut {
        tokens: &mut tokens,
        sequence_id: &mut sequence_id,
        position: &mut position,
        segment: &mut segment,
    };
    let bytes = bytemuck::cast_slice_mut(&mut out);
    set.gather(
        &Rows::List(&wanted),
        Output::Stored,
        bytes,
        columns,
        &Cancel::new(),
    )
    .unwrap();
    for (place, &row) in wanted.iter().enumerate() {
        let expected = [3 * row, 3 * row + 1, 3 * row + 2].map(|x| x as f32);
        assert_eq!(out[3 * place..3 * place + 3], expected);
        assert_eq!(
            (i64::from(tokens[place]), sequence_id[place]),
            (row, row << 33)
        );
        assert_eq!(
            (position[place], i64::from(segment[place])),
            (tokens[place], row % 3)
        );
    }
    assert!(set.map_private(2..7).unwrap().is_none());
    let mut mapped = set.map_private(5..8).unwrap().unwrap();
    mapped.fill(0);
    assert_eq!(
        checksum(&listed[2].path, &Cancel::new()).unwrap().bytes,
        listed[2].bytes
    );
    let reader = ActivationShardReader::open(&listed[2].path).unwrap();
    assert_eq!(
        bytemuck::cast_slice::<u8, f32>(reader.view().row(0)),
        [15.0, 16.0, 17.0]
    );
    assert!(Rows::List(&[9]).check(9).is_err() && Rows::List(&[-1]).check(9).is_err());
}

#[test]
fn fp8_rows_are_decoded_with_their_scale() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("shard.safetensors");
    let columns = Columns::counting(0, 2);
    let codes = [0x38_u8, 0x7E, 0xB8, 0x01];
    let scales = [1.0_f32, 0.1];
    let mut tensors = columns.tensors();
    tensors.push(tensor("activations", Dtype::F8_E4M3, &[2, 2], &codes));
    tensors.push(tensor("scales", Dtype::F32, &[2], &scales));
    let written = write_shard(&path, tensors, &Cancel::new()).unwrap();
    let listed = [Listed {
        path,
        rows: 2,
        bytes: written.bytes,
    }];
    let set = ActivationSet::open(&listed, 2, ActivationDtype::Fp8, &Cancel::new()).unwrap();
    let expected = [1.0, 448.0, -0.1, 2.0_f32.powi(-9) * 0.1];
    let (mut tokens, mut position) = ([0; 2], [0; 2]);
    let (mut sequence_id, mut segment) = ([0; 2], [0; 2]);
    let mut wide = [f32::NAN; 4];
    let into = ColumnsMut {
        tokens: &mut tokens,
        sequence_id: &mut sequence_id,
        position: &mut position,
        segment: &mut segment,
    };
    let out = bytemuck::cast_slice_mut(&mut wide);
    set.gather(&Rows::Range(0..2), Output::F32, out, into, &Cancel::new())
        .unwrap();
    assert_eq!(wide, expected);
    let mut narrow = [bf16::NAN; 4];
    let into = ColumnsMut {
        tokens: &mut tokens,
        sequence_id: &mut sequence_id,
        position: &mut position,
        segment: &mut segment,
    };
    let out = bytemuck::cast_slice_mut(&mut narrow);
    set.gather(&Rows::Range(0..2), Output::Bf16, out, into, &Cancel::new())
        .unwrap();
    assert_eq!(narrow, expected.map(bf16::from_f32));
}

#[test]
fn a_failed_write_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("shard.safetensors");
    let cancel = Cancel::new();
    cancel.cancel();
    let columns = Columns::counting(0, 2);
    let error = write_shard(&path, columns.tensors(), &cancel).unwrap_err();
    assert!(matches!(error, Error::Interrupted));
    let wrong = tensor("activations", Dtype::F32, &[2, 3], &[1.0_f32; 5]);
    let error = write_shard(&path, vec![wrong], &Cancel::new()).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument(_)));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// The bytes of a small shard of either kind.
fn small(codes: bool) -> Vec<u8> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("shard.safetensors");
    if codes {
        write_codes(&path, &[0, 2, 2, 3], &[7, 1, 0], &[2.5, 1.5, 0.5]);
    } else {
        write_activations(&path, 0, 3, 5);
    }
    fs::read(path).unwrap()
}

#[test]
fn every_other_length_is_refused() {
    for codes in [false, true] {
        let whole = small(codes);
        for length in 0..whole.len() {
            let cut = whole[..length].to_vec();
            assert!(ActivationView::parse(&cut).is_err() && CodeView::parse(&cut).is_err());
        }
        let mut long = whole.clone();
        long.push(0);
        let problems = [
            ActivationView::parse(&long).map(|_| ()),
            CodeView::parse(&long).map(|_| ()),
        ];
        assert!(problems
            .iter()
            .any(|found| found.as_ref().unwrap_err().contains("oversized")));
        // And each kind refuses the other's file.
        assert_eq!(ActivationView::parse(&whole).is_ok(), !codes);
        assert_eq!(CodeView::parse(&whole).is_ok(), codes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    /// Whatever the bytes, parsing and the full check end with a result, never a panic.
    #[test]
    fn altered_bytes_never_panic(
        codes: bool,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut file = small_once(codes).to_vec();
        for (index, byte) in changes {
            let at = index.index(file.len());
            file[at] = byte;
        }
        if let Ok(view) = ActivationView::parse(&file) {
            for row in 0..view.rows() {
                prop_assert_eq!(view.row(row).len(), view.row_bytes());
            }
        }
        if let Ok(view) = CodeView::parse(&file) {
            let sound = view.validate(8, &Cancel::new()).unwrap().is_ok();
            for row in 0..view.rows() {
                let span = view.span(row..row + 1);
                prop_assert!(span.is_ok() || !sound);
                prop_assert!(span.map_or(true, |span| span.end <= view.values.len()));
            }
        }
    }
}

fn small_once(codes: bool) -> &'static [u8] {
    use std::sync::OnceLock;
    static FILES: [OnceLock<Vec<u8>>; 2] = [OnceLock::new(), OnceLock::new()];
    FILES[usize::from(codes)].get_or_init(|| small(codes))
}
