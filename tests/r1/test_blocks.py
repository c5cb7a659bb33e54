"""Single blocks from a checkpoint: in place, in parts, in little memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.blocks import Fp8Mode, empty_block, fill_block
from r1sae_fast.r1.checkpoint import load_model, write_checkpoint
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8_experts import Fp8Experts
from r1sae_fast.r1.fp8_linear import Fp8Linear
from r1sae_fast.r1.layout import block_specs
from r1sae_fast.r1.linear import Linear
from r1sae_fast.r1.model import R1Model
from r1sae_fast.r1.moe import MoE
from r1sae_fast.r1.weights import CheckpointReader


def equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value.float(), expected[name].float()), name


@pytest.mark.parametrize("fp8", ["w8a8", "dequantize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_block_serves_for_others_of_its_kind(
    checkpoint: Path, fp8: Fp8Mode, dtype: torch.dtype
) -> None:
    model = load_model(checkpoint, dtype=dtype, fp8=fp8)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotary = torch.zeros(1, 9, 4, 2)
    with CheckpointReader(checkpoint) as reader:
        config = model.config
        block = empty_block(
            reader, config, 1, dtype=dtype, fp8=fp8, weight_cache="once", device="cpu"
        )
        for index in (3, 1, 2):
            fill_block(reader, block, config, index)
            resident = model.layers[index]
            equal(block.state_dict(), resident.state_dict())
            assert torch.equal(block(x, rotary), resident(x, rotary)), index


def test_what_stays_fp8(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    block = model.layers[1]
    assert isinstance(block.mlp, MoE)
    assert isinstance(block.mlp.experts, Fp8Experts)
    assert block.mlp.experts.gate_up.dtype == torch.float8_e4m3fn
    for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"):
        assert isinstance(getattr(block.self_attn, name), Fp8Linear), name
    # Absorbed on the cache, where it meets no activations.
    assert isinstance(block.self_attn.kv_b_proj, Linear)
    assert isinstance(block.mlp.shared_experts.down_proj, Fp8Linear)
    assert block.mlp.gate.weight.dtype == torch.bfloat16
    assert isinstance(model.layers[0].mlp.gate_proj, Fp8Linear)


@pytest.mark.parametrize("fp8", ["w8a8", "dequantize"])
def test_experts_in_groups(checkpoint: Path, fp8: Fp8Mode) -> None:
    model = load_model(checkpoint, fp8=fp8)
    config = model.config
    whole = model.layers[2].mlp.experts.state_dict()
    with CheckpointReader(checkpoint) as reader:
        block = empty_block(reader, config, 2, fp8=fp8, experts=3)
        for value in block.state_dict().values():
            value.view(torch.uint8).fill_(255)  # NaN
        fill_block(reader, block, config, 2, parts="rest")
        rest = block.state_dict()
        for name, value in model.layers[2].state_dict().items():
            if ".experts." not in f".{name}" or "shared" in name:
                assert torch.equal(rest[name].float(), value.float()), name
        assert rest["mlp.experts.gate_up"].isnan().all()
        for group in (range(0, 3), range(3, 6), range(6, 8)):
            fill_block(reader, block, config, 2, experts=group, parts="experts")
            for name, value in block.mlp.experts.state_dict().items():
                expected = whole[name][group.start : group.stop]
                assert torch.equal(value[: len(group)].float(), expected.float()), name
        with pytest.raises(ValueError, match="room for 3 experts, asked for 4"):
            fill_block(reader, block, config, 2, experts=range(4))


def test_a_dense_block_has_no_experts_to_read(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    with CheckpointReader(checkpoint) as reader:
        block = empty_block(reader, model.config, 0, experts=1)
        fill_block(reader, block, model.config, 0, parts="rest")
        fill_block(reader, block, model.config, 0, parts="experts")
    equal(block.state_dict(), model.layers[0].state_dict())


def test_mixed_storage(
    tmp_path: Path, make_model: Callable[..., R1Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain beside fp8 is fine, but not among projections that share activations."""
    from r1sae_fast.r1 import checkpoint as module

    model = make_model()
    stored = module._stored
    plain: set[str] = set()

    def mixed(spec: Any, state: Any, fp8: bool) -> Any:
        return stored(spec, state, fp8 and not any(name in spec.name for name in plain))

    monkeypatch.setattr(module, "_stored", mixed)
    plain.update(("o_proj", "q_a_proj", "kv_a_proj", "layers.1.mlp.experts"))
    write_checkpoint(tmp_path, model.config, model.state_dict())
    loaded = load_model(tmp_path)
    assert isinstance(loaded.layers[0].self_attn.o_proj, Linear)
    assert isinstance(loaded.layers[0].self_attn.q_b_proj, Fp8Linear)
    assert not isinstance(loaded.layers[1].mlp.experts, Fp8Experts)
    assert isinstance(loaded.layers[2].mlp.experts, Fp8Experts)
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    assert loaded.residual(tokens).isfinite().all()
    for names, found in (
        (["gate_proj"], r"0\.mlp\.up_proj\.weight' is fp8 but .*0\.mlp\.gate_proj\.weight' is not"),
        (["q_a_proj"], r"kv_a_proj_with_mqa\.weight' is fp8 but .*q_a_proj\.weight' is not"),
        (["experts.5.down"], r"experts\.0\.gate_proj\.weight' is fp8 but .*experts\.5\.down_proj"),
    ):
        plain.clear()
        plain.update(names)
        write_checkpoint(tmp_path, model.config, model.state_dict())
        with pytest.raises(CheckpointError, match=found):
            load_model(tmp_path)
        assert load_model(tmp_path, fp8="dequantize").residual(tokens).isfinite().all()


def test_pages_of_the_file_are_dropped(tmp_path: Path) -> None:
    """A checkpoint larger than what may stay: only the room for one block remains."""
    maps = Path("/proc/self/smaps")
    if not maps.is_file():
        pytest.skip("the system does not say what is resident")

    def resident() -> int:
        """Bytes of the checkpoint's mappings that are in this process's memory."""
        total, ours = 0, False
        for line in maps.read_text().splitlines():
            if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
                ours = str(tmp_path) in line
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
        return total

    config = R1Config(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=4096,
        moe_intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    )
    model = R1Model(config)
    for value in model.state_dict().values():
        value.uniform_(-1, 1)
    write_checkpoint(tmp_path, config, model.state_dict(), max_shard_bytes=2**23)
    del model
    with CheckpointReader(tmp_path) as reader:
        reader.raw("model.embed_tokens.weight").float()
        if resident() == 0:
            pytest.skip("this file system's mapped pages can't be counted")
        reader.release("model.embed_tokens.weight")
        read, most = 0, 0
        for index in range(3):
            block = empty_block(reader, config, index)
            fill_block(reader, block, config, index)
            specs = block_specs(config, index)
            read += sum(reader.entry(spec.name).nbytes for spec in specs)
            most = max(most, resident())
        assert read > 40 * 2**20
        assert most < read / 4
