"""Benches time a path only after it has given the reference's result: no speed of a wrong answer.

Shapes are those of the released SAEs on R1 (d_in 7168, d_sae 28,672), fewer rows. Compare
within one run: each group holds the reference and the path that stands for it.
"""

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """The same numbers in every run."""
    return torch.Generator().manual_seed(0)
