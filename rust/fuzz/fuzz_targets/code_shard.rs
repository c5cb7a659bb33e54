//! See `r1sae_fuzz::code_shard`; `make fuzz` runs this with the hostile files as seeds.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    r1sae_fuzz::code_shard(data);
});
