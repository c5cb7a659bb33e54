"""Small random models of R1's architecture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from r1sae_fast.r1.chat import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    PAD,
    THINK,
    USER,
    Tokenizer,
    tokenizer_config,
)
from r1sae_fast.r1.checkpoint import write_checkpoint
from r1sae_fast.r1.config import R1Config, YarnScaling
from r1sae_fast.r1.engines.local import LocalEngine
from r1sae_fast.r1.model import R1Model

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "max_position_embeddings": 256,
    "rope_scaling": YarnScaling(factor=4.0, original_max_position_embeddings=64),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A small model gains nothing from more; other rooms' tests get theirs back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_config(**changes: Any) -> R1Config:
    """A config that runs in milliseconds; unequal widths so that a mixed-up axis shows."""
    return R1Config(**{**SMALL, **changes})


def random_model(config: R1Config, seed: int = 0) -> R1Model:
    """Random float32 weights large enough that every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    model = R1Model(config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("norm.weight", "layernorm.weight")):
            parameter.copy_(1 + 0.2 * noise)
        elif name.startswith("embed"):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


@pytest.fixture
def make_model() -> Callable[..., R1Model]:
    """``make_model(seed=0, **config changes)``."""

    def make(seed: int = 0, **changes: Any) -> R1Model:
        return random_model(small_config(**changes), seed)

    return make


ALPHABET = [*"abcdefghijklmnopqrstuvwxyz", " ", "\n", ".", "?"]
SPECIAL = [BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK]


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer with R1's special tokens; bytes outside ALPHABET are dropped."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    for letter in ALPHABET:
        vocabulary[byte_level.pre_tokenize_str(letter)[0][0]] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(tokenizer_config(), ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in R1's layout with random weights and a tokenizer; do not write into it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    model = random_model(small_config())
    write_checkpoint(directory, model.config, model.state_dict())
    write_tokenizer(directory)
    return directory


@pytest.fixture
def engine(checkpoint: Path) -> LocalEngine:
    """The checkpoint in float32. Dequantised, since rounding to fp8 makes steps of the last bits
    by which batches differ."""
    return LocalEngine.from_pretrained(checkpoint, dtype=torch.float32, fp8="dequantize")


@pytest.fixture
def tokenizer(checkpoint: Path) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer.from_pretrained(checkpoint)


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """``parity(part, error)``: asserts an error relative to transformers' to be at most 1e-4.

    Where R1SAE_PARITY_TABLE names a file, the line of DESIGN.md's table is appended to it.
    """

    def check(part: str, error: float) -> None:
        table = os.environ.get("R1SAE_PARITY_TABLE")
        if table:
            case = request.node.name.removeprefix("test_").replace("_", " ")
            with Path(table).open("a", encoding="utf-8") as file:
                file.write(f"| {case} | {part} | {error:.1e} |\n")
        assert error <= 1e-4, part

    return check
