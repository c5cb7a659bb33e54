//! What must hold of any bytes that are opened as a shard: an error or a sound view, never a crash.
//! The fuzz targets call these on what libFuzzer makes up; `rust/core/tests/hostile_shards.rs`, which
//! needs no nightly compiler, on the hostile files and on changes of them.

use r1sae_core::examples::{collect, Accumulator, CodesView, Keep};
use r1sae_core::shard::activations::{ActivationDtype, ActivationView};
use r1sae_core::shard::fp8;
use r1sae_core::shard::CodeView;
use r1sae_core::Cancel;

const D_SAE: usize = 64;

/// Room for `data` aligned for every element type, as a mapping would be; zeros follow it.
fn aligned(data: &[u8]) -> Vec<u64> {
    let mut words = vec![0_u64; data.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut words)[..data.len()].copy_from_slice(data);
    words
}

/// Opens `data` as an activation shard. Whether it is one.
pub fn activation_shard(data: &[u8]) -> bool {
    let words = aligned(data);
    let file = &bytemuck::cast_slice(&words)[..data.len()];
    let Ok(view) = ActivationView::parse(file) else {
        return false;
    };
    let rows = view.rows();
    assert_eq!(view.activations.len(), rows * view.row_bytes());
    assert!(view.activations.len() <= data.len());
    let columns = &view.columns;
    let lengths = [
        columns.sequence_id.len(),
        columns.position.len(),
        columns.segment.len(),
    ];
    assert_eq!(lengths, [rows; 3]);
    let fp8 = view.dtype == ActivationDtype::Fp8;
    assert_eq!(view.scales.len(), if fp8 { rows } else { 0 });
    for row in (0..rows.min(64)).chain(rows.saturating_sub(1)..rows) {
        let stored = view.row(row);
        assert_eq!(stored.len(), view.row_bytes());
        if fp8 {
            let mut out = vec![0.0; view.d_in];
            fp8::decode_f32(stored, view.scales[row], &mut out);
        }
    }
    true
}

/// Opens `data` as a code shard, validates it and collects examples from it, which checks for itself.
/// Whether it is a shard that validates.
pub fn code_shard(data: &[u8]) -> bool {
    let words = aligned(data);
    let file = &bytemuck::cast_slice(&words)[..data.len()];
    let Ok(view) = CodeView::parse(file) else {
        return false;
    };
    let sound = matches!(view.validate(D_SAE, &Cancel::new()), Ok(Ok(())));
    let mut codes = 0;
    for row in 0..view.rows() {
        match view.span(row..row + 1) {
            Ok(span) => codes += span.len(),
            Err(_) => assert!(!sound),
        }
    }
    assert!(!sound || codes == view.values.len());
    let keep = Keep {
        n: 2,
        samples: 1,
        seed: 0,
    };
    let mut accumulator = Accumulator::new(D_SAE, keep).unwrap();
    let Ok(codes) = CodesView::new(view.values, view.indices, view.row_offsets, 0) else {
        assert!(!sound);
        return false;
    };
    // A negative strength is no example, so a sound shard may be refused here.
    if collect(&mut accumulator, &[codes], 1, &Cancel::new()).is_ok() {
        assert_eq!(accumulator.scanned(), view.rows() as u64);
        let counted: u64 = accumulator.histogram().iter().sum();
        assert!(counted <= view.values.len() as u64);
    } else {
        assert_eq!(accumulator.scanned(), 0);
        assert_eq!(accumulator.histogram().iter().sum::<u64>(), 0);
    }
    sound
}
