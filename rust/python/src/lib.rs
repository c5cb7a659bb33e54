//! `r1sae_fast._core`: the binding of `r1sae-core`. Each function extracts its
//! arguments, releases the GIL around the work and converts the result.

use pyo3::prelude::*;

mod clusters;
mod errors;
mod examples;
mod floats;
mod fp8;
mod interrupt;
mod ops;
mod r1;
mod screen;
mod shards;
mod train;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("DEBUG_BUILD", cfg!(debug_assertions))?;
    clusters::register(module)?;
    ops::register(module)?;
    fp8::register(module)?;
    r1::register(module)?;
    screen::register(module)?;
    shards::register(module)?;
    train::register(module)?;
    module.add_class::<examples::ExampleAccumulator>()?;
    module.add_function(wrap_pyfunction!(examples::example_histogram_edges, module)?)?;
    module.add_function(wrap_pyfunction!(examples::example_sample_ranks, module)?)?;
    Ok(())
}
