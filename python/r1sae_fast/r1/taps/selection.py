"""How an SAE that is attached to a model chooses its codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from r1sae_fast.sae import FastSAE, Mode


def choose_attached_mode(sae: FastSAE, mode: Mode | None) -> Mode:
    """``mode`` if given; else the SAE's own, but "threshold" instead of "batch_topk".

    Raises:
        ValueError: the codes would depend on which tokens run together, and ``mode`` does not
            say that they may; or no such mode, or "threshold" without calibration.
    """
    from r1sae_fast.encode import choose_mode

    chosen = choose_mode(sae, mode)
    if mode is None and chosen == "batch_topk":
        raise ValueError(
            "this SAE chooses its codes by batch_topk: a token's codes would depend on the tokens "
            "that run beside it. Calibrate it (sae.calibrate_threshold(activations)) for mode "
            "'threshold', choose mode 'topk', or say mode 'batch_topk' to have it so"
        )
    return choose_mode(sae, chosen)


@contextmanager
def selecting(sae: FastSAE, mode: Mode) -> Iterator[None]:
    """The SAE in that mode for the time being."""
    before = sae.mode
    if before == mode:
        yield
        return
    sae.mode = mode
    try:
        yield
    finally:
        sae.mode = before
