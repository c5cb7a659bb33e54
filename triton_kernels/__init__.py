"""Triton kernels of r1sae-fast, shipped as ``r1sae_fast.triton_kernels``.

One kernel family a file, its launcher below it; each family has a plain torch reference of the same
name in :mod:`r1sae_fast.ops` (or :mod:`r1sae_fast.r1`), and is tested against it.

- ``launch``: the one door to a kernel, which can also record what would be launched;
- ``targets``: the GPU architectures, their limits and peak rates;
- ``configs``: launch settings by family and architecture, each with its reason;
- ``traffic``: bytes and arithmetic of a launch, promised and tested;
- ``aot``: compiles what the launchers would launch, without a GPU, and reads what came out.

Importing this package imports neither triton nor a kernel.
"""
