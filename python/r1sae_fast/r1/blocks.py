"""One block's weights from a checkpoint, in the form in which the engine keeps them.

The form is ``fp8``: "w8a8" keeps quantised projections in fp8 (:class:`Fp8Linear`,
:class:`Fp8Experts`), "dequantize" turns everything into the engine's dtype. Tensors that the
checkpoint holds unquantised are plain in both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8_experts import Fp8Experts
from r1sae_fast.r1.fp8_linear import Fp8Linear, WeightCache
from r1sae_fast.r1.layout import TensorSpec, block_specs
from r1sae_fast.r1.model import Block
from r1sae_fast.r1.moe import Experts, MoE
from r1sae_fast.r1.weights import CheckpointReader

Fp8Mode = Literal["w8a8", "dequantize"]


def check_fp8(fp8: str) -> None:
    """Raises ValueError if it is no :data:`Fp8Mode`."""
    if fp8 not in get_args(Fp8Mode):
        raise ValueError(f"fp8 is {fp8!r}, expected one of {', '.join(get_args(Fp8Mode))}")


def empty_block(
    reader: CheckpointReader,
    config: R1Config,
    index: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    fp8: Fp8Mode = "w8a8",
    weight_cache: WeightCache = "call",
    experts: int | None = None,
) -> Block:
    """Block ``index`` with room for its weights, for :func:`fill_block` to fill.

    Blocks of the same kind (dense, or mixture of experts) have the same form, so one can be
    filled again and again.

    Args:
        reader: the checkpoint; only headers are read.
        config: its model's shape.
        index: of the block.
        dtype: of what is not kept in fp8.
        device: where the room is.
        fp8: whether projections that are stored in fp8 stay so.
        weight_cache: for fp8 weights on devices without kernels.
        experts: room for so many of the routed experts only; default all.

    Raises:
        FileNotFoundError, CheckpointError: as :class:`CheckpointReader`'s methods, or fp8 and
            plain weights are mixed where "w8a8" can't have it (named).
        ValueError: ``fp8`` is neither.
    """
    check_fp8(fp8)
    block = Block(config, index, "meta", dtype).requires_grad_(False).eval()
    if experts is not None and isinstance(block.mlp, MoE):
        block.mlp.experts = Experts(config, "meta", dtype, experts).requires_grad_(False)
    specs = list(block_specs(config, index))
    if fp8 == "w8a8":
        _keep_fp8(reader, block, config, specs, weight_cache, index)
    else:
        for spec in specs:
            reader.is_fp8(spec)  # every error before any memory is taken
    return block.to_empty(device=device)


def fill_block(
    reader: CheckpointReader,
    block: Block,
    config: R1Config,
    index: int,
    *,
    experts: range | None = None,
    parts: Literal["all", "experts", "rest"] = "all",
) -> None:
    """Reads the weights of block ``index`` into a block of :func:`empty_block`, in place.

    Of the file, at most some 64 MiB are in the process's memory at a time.

    Args:
        reader: the checkpoint.
        block: filled; its earlier weights are gone.
        config: the model's shape.
        index: of the block in the checkpoint.
        experts: read these routed experts into the first places of the block's; default all.
        parts: "experts" reads the routed experts only, "rest" all but them.

    Raises:
        FileNotFoundError, CheckpointError: as :class:`CheckpointReader`'s methods.
        ValueError: the block has no room for so many experts.
    """
    state = block.state_dict()
    prefix = f"layers.{index}."
    if isinstance(block.mlp, MoE):
        experts = range(config.n_routed_experts) if experts is None else experts
        room = block.mlp.experts.gate_up.shape[0]
        if parts != "rest" and len(experts) > room:
            raise ValueError(f"the block has room for {room} experts, asked for {len(experts)}")
    with torch.no_grad():
        for spec in block_specs(config, index):
            if parts == ("rest" if spec.expert is not None else "experts"):
                continue
            if spec.expert is not None:
                assert experts is not None  # only a mixture has specs of experts
                if spec.expert not in experts:
                    continue
                spec = spec.at_expert(experts.index(spec.expert))
            weight = spec.slice_of(state[spec.parameter.removeprefix(prefix)])
            scales = state.get(spec.scale_parameter.removeprefix(prefix))
            if scales is None:
                reader.read_into(spec, weight)
            else:
                reader.read_fp8_into(spec, weight, spec.scale_slice_of(scales))
    for module in block.modules():
        if isinstance(module, (Fp8Linear, Fp8Experts)):
            module.forget_dense()


def _keep_fp8(
    reader: CheckpointReader,
    block: Block,
    config: R1Config,
    specs: Iterable[TensorSpec],
    weight_cache: WeightCache,
    index: int,
) -> None:
    """Puts fp8 modules in the place of those whose weights are stored in fp8."""
    kept: dict[str, list[tuple[TensorSpec, bool]]] = {}
    for spec in specs:
        fp8 = reader.is_fp8(spec)
        if spec.quantised:
            kept.setdefault(_group(spec), []).append((spec, fp8))
    options: dict[str, Any] = {"block_size": reader.block_size, "weight_cache": weight_cache}
    for members in kept.values():
        found = {fp8 for _, fp8 in members}
        if len(found) > 1:
            plain = next(spec.name for spec, fp8 in members if not fp8)
            stored = next(spec.name for spec, fp8 in members if fp8)
            raise CheckpointError(
                f"{reader.directory}: {stored!r} is fp8 but {plain!r} is not, and the two work on "
                "the same activations; load the checkpoint with fp8='dequantize'"
            )
        if found == {False}:
            continue
        for spec, _ in members:
            if spec.expert is not None:
                mixture = block.mlp
                assert isinstance(mixture, MoE)  # only a mixture has specs of experts
                count = mixture.experts.gate_up.shape[0]
                mixture.experts = Fp8Experts(config, "meta", count=count, **options)
                break
            path = spec.parameter.removeprefix(f"layers.{index}.").removesuffix(".weight")
            # Steps on the cache absorb kv_b_proj into query and output and so never quantise what
            # it is applied to; DeepSeek's own inference code dequantises it likewise. Doing so for
            # whole sequences too keeps the two ways equal.
            if path.endswith("kv_b_proj"):
                continue
            parent = block.get_submodule(path.rpartition(".")[0])
            name = path.rpartition(".")[2]
            assert isinstance(getattr(parent, name), nn.Linear)
            setattr(parent, name, Fp8Linear(spec.shape[1], spec.shape[0], "meta", **options))


def _group(spec: TensorSpec) -> str:
    """What a tensor must share its storage with: projections of the same activations, and all
    experts of a block, which are one parameter."""
    if spec.expert is not None:
        return "experts"
    path = spec.parameter.removesuffix(".weight")
    return path.replace("kv_a_proj_with_mqa", "q_a_proj").replace("gate_proj", "up_proj")
