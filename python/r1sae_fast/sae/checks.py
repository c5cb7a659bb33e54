"""What an SAE refuses, and the words it does so with."""

from __future__ import annotations

import torch
from torch import Tensor

from r1sae_fast.errors import NonFiniteError
from r1sae_fast.sae.config import SaeConfig, check_dtype

__all__ = ["check_input", "check_parameters", "explained"]


def check_parameters(
    config: SaeConfig,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_enc: Tensor | None,
    threshold: Tensor | None,
    W_skip: Tensor | None,
) -> None:
    """Raises TypeError or ValueError unless these are the tensors of such an SAE."""
    check_dtype(W_dec.dtype)
    d_in, d_sae = config.d_in, config.d_sae
    if W_enc is None and not config.tied:
        raise ValueError("W_enc is missing; an SAE that isn't tied needs it")
    if W_enc is not None and config.tied:
        raise ValueError(f"W_enc has shape {tuple(W_enc.shape)}; expected none, as it is tied")
    if W_skip is None and config.skip_connection:
        raise ValueError("W_skip is missing; the config has a skip connection")
    if W_skip is not None and not config.skip_connection:
        raise ValueError(
            f"W_skip has shape {tuple(W_skip.shape)}; expected none, as it has no skip connection"
        )
    expected: dict[str, tuple[Tensor | None, tuple[tuple[int, ...], ...]]] = {
        "W_dec": (W_dec, ((d_sae, d_in),)),
        "b_enc": (b_enc, ((d_sae,),)),
        "b_dec": (b_dec, ((d_in,),)),
        "W_enc": (W_enc, ((d_in, d_sae),)),
        "threshold": (threshold, ((), (d_sae,))),
        "W_skip": (W_skip, ((d_in, d_in),)),
    }
    for name, (tensor, shapes) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {wanted}")
        same = (tensor.dtype, tensor.device) == (W_dec.dtype, W_dec.device)
        # A threshold stays in float32, whatever the weights are.
        if not same and name != "threshold":
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} but W_dec {W_dec.dtype} on "
                f"{W_dec.device}; they must agree"
            )


def check_input(
    name: str, x: Tensor, width: int, width_name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises TypeError or ValueError unless x is ``[..., width]``, floating and on ``device``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(
            f"{name} is {x.dtype}; expected a floating dtype (integers: use .to({dtype}))"
        )
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected [..., {width}], {width_name} of this SAE"
        )
    if x.device != device:
        raise ValueError(
            f"{name} lies on {x.device} but this SAE on {device}; "
            f"use {name}.to({str(device)!r}) or sae.to({str(x.device)!r})"
        )


def explained(error: NonFiniteError, x: Tensor, dtype: torch.dtype) -> NonFiniteError:
    """``error`` in words that name x ``[..., d_in]`` where it is to blame, else the weights."""
    finite = torch.isfinite(x.detach().to(dtype)).all(-1).reshape(-1)
    if bool(finite.all()):
        return NonFiniteError(
            f"{error} (x itself is finite in {dtype}: the weights hold NaN or infinities, "
            "or the products overflow)"
        )
    row = int((~finite).to(torch.uint8).argmax())
    place = ""
    if x.dim() > 2:
        index = torch.unravel_index(torch.tensor(row), x.shape[:-1])
        place = f", at {tuple(int(i) for i in index)} of its leading dimensions"
    return NonFiniteError(
        f"x holds a NaN or infinite value in row {row}{place}; "
        "remove or mask that row before encoding"
    )
