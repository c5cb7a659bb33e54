"""Greedy generation in a batch of 32 beside transformers' generate, the same weights and stop."""

import pytest
import torch

BATCH, NEW = 32, 128


@pytest.mark.parametrize("stop", [True, False], ids=["eos", "no-stop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_generate(versus, tiny_pair, dtype, stop: bool) -> None:
    engine, twin = tiny_pair(dtype)
    prompts = [
        engine.encode_prompt(f"What is {a} plus {3 * a % 50} minus 5?")
        for a in range(10, 10 + BATCH)
    ]
    longest = max(map(len, prompts))
    # transformers pads on the left.
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    stop_ids = engine.default_stop_ids if stop else frozenset()
    options = {
        "attention_mask": mask,
        "do_sample": False,
        "max_new_tokens": NEW,
        "eos_token_id": sorted(stop_ids) or None,
        "pad_token_id": 0,
    }

    def ours() -> list[list[int]]:
        found = engine.generate(prompts, greedy=True, max_new_tokens=NEW, stop_ids=stop_ids)
        return [one.tokens[one.prompt_length :] for one in found]

    written = ours()
    if dtype == torch.float32:  # in bf16 two models of other rounding soon differ in a token
        theirs = twin.generate(padded, **options)[:, longest:].tolist()
        assert [row[: len(mine)] for row, mine in zip(theirs, written, strict=True)] == written
    versus(
        f"TinyR1 greedy generation, {BATCH} x {NEW}, {'eos' if stop else 'no stop'}, {dtype}",
        ours=ours,
        torch=lambda: twin.generate(padded, **options),
        work=(sum(map(len, written)), "tokens"),
    )
