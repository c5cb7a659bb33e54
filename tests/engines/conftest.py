"""Small random Qwen2 and Llama models, as transformers saves them, with tokenizers made here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from r1sae_fast.r1 import HfEngine

WIDTHS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "tie_word_embeddings": False,
}
# An R1 distillation's, in short: bos in front, thinking opened and stripped from earlier turns.
THINKING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "<|user|>{{ m['content'] }}{% else %}"
    "<|bot|>{{ m['content'].split('</think>')[-1] }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)
# A plain chat model's, without a thinking part.
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A small model gains nothing from more; other rooms' tests get theirs back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_tokenizer(directory: Path, *, thinking: bool) -> None:
    """One token a byte, and special ones; with ``thinking``, bos is put in front of texts."""
    special = ["<|bos|>", "<|eos|>", "<|user|>", "<|bot|>"]
    special += ["<think>", "</think>"] if thinking else []
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    if thinking:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>" if thinking else None, eos_token="<|eos|>"
    )
    fast.chat_template = THINKING_TEMPLATE if thinking else PLAIN_TEMPLATE
    fast.save_pretrained(directory)


def random_decoder(kind: str) -> Any:
    """In float32, with weights large enough that every part of the model matters."""
    config = {
        "qwen2": lambda: transformers.Qwen2Config(**WIDTHS, bos_token_id=0, eos_token_id=1),
        "llama": lambda: transformers.LlamaConfig(**WIDTHS, bos_token_id=0, eos_token_id=1),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    # What a checkpoint recommends must not change what is asked for.
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=0, eos_token_id=[1, 299], do_sample=True, top_k=3, repetition_penalty=1.8
    )
    return model


@pytest.fixture(scope="session", params=["qwen2", "llama"])
def hf_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it; Qwen2 has thinking tokens, Llama none. Do not write."""
    directory = tmp_path_factory.mktemp(request.param)
    random_decoder(request.param).save_pretrained(directory)
    save_tokenizer(directory, thinking=request.param == "qwen2")
    return directory


@pytest.fixture
def hf(hf_checkpoint: Path) -> HfEngine:
    """It in float32."""
    return HfEngine.from_pretrained(hf_checkpoint, dtype=torch.float32)
