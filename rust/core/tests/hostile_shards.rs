//! The properties that fuzzing looks at, on the hostile files and on changes of them and of sound
//! files: what `make fuzz` does for minutes, in a second and without a nightly compiler.

#[path = "../../fuzz/src/lib.rs"]
mod properties;

use std::path::Path;

use r1sae_core::shard::write::{write_shard, Tensor};
use r1sae_core::shard::Dtype;
use r1sae_core::Cancel;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (x ^ (x >> 31)) as usize % limit.max(1)
    }
}

fn hostile_files() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/shards/hostile");
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "safetensors"))
        .collect();
    paths.sort();
    assert!(paths.len() > 40, "only {} hostile files found", paths.len());
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

/// A file of two rows that is sound, with these tensors beside the columns.
fn sound_file(tensors: Vec<Tensor<'_>>) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shard.safetensors");
    let columns = [
        ("tokens", Dtype::I32, 8),
        ("sequence_id", Dtype::I64, 16),
        ("position", Dtype::I32, 8),
        ("segment", Dtype::U8, 2),
    ];
    let columns = columns.map(|(name, dtype, bytes)| Tensor {
        name: name.to_owned(),
        dtype,
        shape: vec![2],
        bytes: &[0; 16][..bytes],
    });
    let all = tensors.into_iter().chain(columns).collect();
    write_shard(&path, all, &Cancel::new()).unwrap();
    std::fs::read(path).unwrap()
}

fn tensor<'a>(name: &str, dtype: Dtype, shape: &[usize], bytes: &'a [u8]) -> Tensor<'a> {
    Tensor {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        bytes,
    }
}

#[test]
fn any_bytes_are_an_error_or_a_sound_view() {
    let values: Vec<u8> = [3.0_f32, 2.0, 1.0]
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let offsets: Vec<u8> = [0_i64, 2, 3]
        .iter()
        .flat_map(|offset| offset.to_le_bytes())
        .collect();
    let codes = sound_file(vec![
        tensor("values", Dtype::F32, &[3], &values),
        tensor("indices", Dtype::U16, &[3], &[5, 0, 7, 0, 5, 0]),
        tensor("row_offsets", Dtype::I64, &[3], &offsets),
    ]);
    let fp8 = sound_file(vec![
        tensor("activations", Dtype::F8_E4M3, &[2, 3], &[1, 2, 3, 4, 5, 6]),
        tensor("scales", Dtype::F32, &[2], &values[..8]),
    ]);
    assert!(properties::code_shard(&codes));
    assert!(properties::activation_shard(&fp8));
    let mut random = Random(1);
    let files = hostile_files();
    for file in files.iter().chain([&codes, &fp8]) {
        for change in 0..200 {
            let mut changed = file.clone();
            match change {
                0 => {}
                1..=40 => changed.truncate(random.below(file.len())),
                _ => {
                    for _ in 0..=random.below(4) {
                        let at = random.below(changed.len());
                        let byte = random.below(256) as u8;
                        if let Some(old) = changed.get_mut(at) {
                            *old = byte;
                        }
                    }
                }
            }
            properties::activation_shard(&changed);
            properties::code_shard(&changed);
        }
    }
}
