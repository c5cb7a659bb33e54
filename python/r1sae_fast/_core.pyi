"""The Rust extension (crate rust/python). Checked against the built module by stubtest."""

__version__: str
DEBUG_BUILD: bool
