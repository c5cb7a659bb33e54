"""Triton kernels of r1sae-fast (shipped as ``r1sae_fast.triton_kernels``).

One kernel family a file, its launcher below it. Empty until the first kernel lands; every
operation has a plain torch reference in :mod:`r1sae_fast.ops` that the kernels are tested against.
"""
