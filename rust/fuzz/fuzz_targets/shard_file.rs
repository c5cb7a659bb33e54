//! Any bytes, opened as a shard of either kind: an error or a sound view, never a crash.
//!
//! From the repository's root, with the hostile files as seeds (new finds go to the first folder):
//!
//! ```sh
//! mkdir -p rust/fuzz/corpus/shard_file
//! cargo +nightly fuzz run --fuzz-dir rust/fuzz shard_file \
//!     rust/fuzz/corpus/shard_file tests/shards/hostile
//! ```

#![no_main]

use libfuzzer_sys::fuzz_target;
use r1sae_core::shard::activations::ActivationView;
use r1sae_core::shard::CodeView;
use r1sae_core::Cancel;

fuzz_target!(|data: &[u8]| {
    // As a mapping would be: aligned for every element type.
    let mut words = vec![0_u64; data.len().div_ceil(8)];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
    bytes[..data.len()].copy_from_slice(data);
    let file = &bytes[..data.len()];
    if let Ok(view) = ActivationView::parse(file) {
        for row in 0..view.rows().min(64) {
            assert_eq!(view.row(row).len(), view.row_bytes());
        }
        assert!(view.scales.is_empty() || view.scales.len() == view.rows());
    }
    if let Ok(view) = CodeView::parse(file) {
        let sound = matches!(view.validate(1000, &Cancel::new()), Ok(Ok(())));
        let mut codes = 0;
        for row in 0..view.rows() {
            match view.span(row..row + 1) {
                Ok(span) => codes += span.len(),
                Err(_) => assert!(!sound),
            }
        }
        assert!(!sound || codes == view.values.len());
    }
});
