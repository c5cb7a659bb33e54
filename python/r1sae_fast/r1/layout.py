"""Which tensors a DeepSeek-V3/R1 checkpoint holds, and where each belongs in :class:`R1Model`.

One list serves the writer, the reader and whoever wants to count bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from r1sae_fast.r1.config import R1Config


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the checkpoint.

    ``parameter`` is the name in ``R1Model.state_dict()``; where the model stacks its experts,
    ``expert`` and ``rows`` say which slice of that parameter the tensor is.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    quantised: bool = False
    float32: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def at_expert(self, place: int) -> TensorSpec:
        """The same tensor where the model keeps that expert at another place."""
        return replace(self, expert=place)

    @property
    def scale_name(self) -> str:
        """Name of the scales that go with the tensor where it is stored in fp8."""
        return f"{self.name}_scale_inv"

    @property
    def scale_parameter(self) -> str:
        """Name in the model's state of the scales, where the model keeps the weight in fp8."""
        return f"{self.parameter}_scale_inv"

    def scale_slice_of(self, parameter: Tensor) -> Tensor:
        """The view of the model's scales that go with this tensor."""
        if self.expert is not None:
            parameter = parameter[self.expert]
        if self.rows is None:
            return parameter
        # gate and up, each with a grid of its own, since either may end in a ragged block
        half = parameter.shape[0] // 2
        return parameter[:half] if self.rows[0] == 0 else parameter[half:]

    def slice_of(self, parameter: Tensor) -> Tensor:
        """The view of the model's parameter that this tensor fills."""
        if self.expert is not None:
            parameter = parameter[self.expert]
        return parameter if self.rows is None else parameter[self.rows[0] : self.rows[1]]


def _mlp(prefix: str, width: int, inter: int) -> Iterator[TensorSpec]:
    for projection, shape in (
        ("gate_proj", (inter, width)),
        ("up_proj", (inter, width)),
        ("down_proj", (width, inter)),
    ):
        parameter = f"{prefix}.{projection}.weight"
        yield TensorSpec(f"model.{parameter}", shape, parameter, quantised=True)


def _experts(prefix: str, config: R1Config) -> Iterator[TensorSpec]:
    width, inter = config.hidden_size, config.moe_intermediate_size
    for expert in range(config.n_routed_experts):
        name = f"model.{prefix}.experts.{expert}"
        gate_up, down = f"{prefix}.experts.gate_up", f"{prefix}.experts.down"
        for projection, rows in (("gate_proj", (0, inter)), ("up_proj", (inter, 2 * inter))):
            yield TensorSpec(
                f"{name}.{projection}.weight",
                (inter, width),
                gate_up,
                quantised=True,
                expert=expert,
                rows=rows,
            )
        yield TensorSpec(
            f"{name}.down_proj.weight", (width, inter), down, quantised=True, expert=expert
        )


def embedding_specs(config: R1Config) -> Iterator[TensorSpec]:
    """The token embedding."""
    shape = (config.vocab_size, config.hidden_size)
    yield TensorSpec("model.embed_tokens.weight", shape, "embed_tokens.weight")


def block_specs(config: R1Config, index: int) -> Iterator[TensorSpec]:
    """Every tensor of block ``index``."""
    prefix = f"layers.{index}"
    width, heads = config.hidden_size, config.num_attention_heads
    for norm, size in (
        ("input_layernorm", width),
        ("post_attention_layernorm", width),
        ("self_attn.q_a_layernorm", config.q_lora_rank),
        ("self_attn.kv_a_layernorm", config.kv_lora_rank),
    ):
        parameter = f"{prefix}.{norm}.weight"
        yield TensorSpec(f"model.{parameter}", (size,), parameter)
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    for projection, shape in (
        ("q_a_proj", (config.q_lora_rank, width)),
        ("q_b_proj", (heads * config.qk_head_dim, config.q_lora_rank)),
        ("kv_a_proj_with_mqa", (latent, width)),
        ("kv_b_proj", (expanded, config.kv_lora_rank)),
        ("o_proj", (width, heads * config.v_head_dim)),
    ):
        parameter = f"{prefix}.self_attn.{projection}.weight"
        yield TensorSpec(f"model.{parameter}", shape, parameter, quantised=True)
    if index < config.first_k_dense_replace:
        yield from _mlp(f"{prefix}.mlp", width, config.intermediate_size)
        return
    gate = f"{prefix}.mlp.gate"
    yield TensorSpec(f"model.{gate}.weight", (config.n_routed_experts, width), f"{gate}.weight")
    bias = f"{gate}.e_score_correction_bias"
    yield TensorSpec(f"model.{bias}", (config.n_routed_experts,), bias, float32=True)
    yield from _mlp(
        f"{prefix}.mlp.shared_experts",
        width,
        config.moe_intermediate_size * config.n_shared_experts,
    )
    yield from _experts(f"{prefix}.mlp", config)


def head_specs(config: R1Config) -> Iterator[TensorSpec]:
    """The final norm and the output head."""
    yield TensorSpec("model.norm.weight", (config.hidden_size,), "norm.weight")
    yield TensorSpec("lm_head.weight", (config.vocab_size, config.hidden_size), "lm_head.weight")


def model_specs(config: R1Config, last_layer: int | None = None) -> Iterator[TensorSpec]:
    """All tensors of the model, in the order of the forward; with ``last_layer``, only those
    that the residual stream after that block needs."""
    yield from embedding_specs(config)
    blocks = config.num_hidden_layers if last_layer is None else last_layer + 1
    for index in range(blocks):
        yield from block_specs(config, index)
    if last_layer is None:
        yield from head_specs(config)
