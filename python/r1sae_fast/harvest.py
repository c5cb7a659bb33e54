"""Harvesting: run the model over many prompts and write its residual stream to shards.

Every shard holds whole sequences, and its line in the manifest says how many prompts are done. A
run that was stopped, at any moment and in any way, goes on from there, and ends with the very
rows that an undisturbed run would have written: batches are the same consecutive prompts, and a
sequence's random draws depend on the seed and its number only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from r1sae_fast.errors import NonFiniteError
from r1sae_fast.prompts import Item
from r1sae_fast.r1.chat import THINK
from r1sae_fast.r1.engines.local import LocalEngine
from r1sae_fast.r1.generate import pad_right
from r1sae_fast.r1.sampling import Sampling
from r1sae_fast.shards import ActivationWriter, ManifestWarning
from r1sae_fast.shards.activations import dtype_name, first_non_finite
from r1sae_fast.shards.manifest import MANIFEST, Manifest

Mode = Literal["generate", "prefill"]
MODES = ("generate", "prefill")


@dataclass(frozen=True)
class HarvestProgress:
    """How far a harvest is; the counts include what earlier runs into the folder did.

    Attributes:
        sequences: prompts done.
        rows: rows (tokens) written.
        new_rows: of these, by this run.
        seconds: since this run began.
    """

    sequences: int
    rows: int
    new_rows: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Of this run."""
        return self.new_rows / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class _Sequence:
    tokens: list[int]
    segments: list[int]


def harvest(
    engine: LocalEngine,
    prompts: Iterable[Item],
    layer: int,
    out_dir: Path | str,
    *,
    mode: Mode = "generate",
    dtype: str | torch.dtype = "bfloat16",
    batch_size: int = 64,
    max_new_tokens: int = 1024,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int = 0,
    greedy: bool = False,
    token_budget: int | None = None,
    rows_per_shard: int = 16384,
    resume: bool = True,
    progress: Callable[[HarvestProgress], None] | None = None,
) -> HarvestProgress:
    """Writes the residual stream after block ``layer`` of every token to activation shards.

    Rows carry tokens, ``sequence_id`` (the prompt's number), ``position`` and ``segment``.
    ctrl-c, a bad prompt or any other error keeps every finished batch; only after a full disk or
    a kill is work since the last shard repeated.

    Args:
        engine: the model. In mode "prefill" it need not be loaded beyond ``layer``.
        prompts: texts, conversations or token ids; may be endless if there is a ``token_budget``.
        layer: block whose output is harvested, from 0; hook point ``model.layers.{layer}``.
        out_dir: folder of the shards; made if need be.
        mode: "generate" lets the model answer each prompt and harvests prompt and answer;
            "prefill" harvests the given texts themselves. There, a text is taken raw (with the
            beginning-of-sentence token in front), and a conversation may end with the
            assistant's message, thinking included.
        dtype: of the stored activations.
        batch_size: sequences that run together.
        max_new_tokens, temperature, top_p, seed, greedy: for mode "generate", as in
            :meth:`LocalEngine.generate`.
        token_budget: stop after the sequence with which this many rows are reached.
        rows_per_shard: a shard is finished after the batch with which it has this many rows.
        resume: go on where an earlier run into the same folder stopped.
        progress: called after every batch.

    Returns:
        The final counts.

    Raises:
        ValueError: no such layer or mode, a prompt that is empty or longer than the context, or
            an earlier run into the folder with other settings or other prompts (named).
        FileExistsError: the folder holds shards and ``resume`` is False, or other files.
        NonFiniteError: a residual holds a NaN or an infinity; sequence and position are named.
        ShardError: another writer is at work in the folder, or its shards are damaged.
        OSError: the disk is full; what was finished is kept.
    """
    engine.check_layer(layer)
    if isinstance(prompts, str):
        raise ValueError("prompts is a single text, expected an iterable of prompts")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    for name, value in (("batch_size", batch_size), ("rows_per_shard", rows_per_shard)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}, expected at least 1")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, greedy)
    if mode == "generate":
        engine.check_head()
    out_dir = Path(out_dir)
    metadata = _metadata(engine, layer, mode, batch_size, sampling)
    if resume:
        _refuse_other_settings(out_dir, metadata, dtype_name(dtype))

    start = time.monotonic()
    with ActivationWriter(
        out_dir,
        engine.config.hidden_size,
        dtype,
        metadata,
        explicit_shards=True,
        resume=resume,
        check_finite=False,  # checked here, where the sequence can be named
    ) as writer:
        earlier_rows = writer.rows
        source = map(_plain, prompts)
        done, digest = _skip_done(source, writer.last_extra, out_dir)

        def finish() -> None:
            writer.finish_shard({"sequences": done, "prompts": digest.hexdigest()[:16]})

        def state() -> HarvestProgress:
            rows = writer.rows + writer.pending
            return HarvestProgress(done, rows, rows - earlier_rows, time.monotonic() - start)

        whole = 0  # pending rows that belong to finished batches
        try:
            while token_budget is None or writer.rows + writer.pending < token_budget:
                batch = list(itertools.islice(source, batch_size))
                if not batch:
                    break
                sequences = _run(engine, batch, mode, sampling, done)
                left = None if token_budget is None else token_budget - writer.rows - whole
                sequences = _within(sequences, left)
                _write(writer, engine, sequences, layer, done)
                for item in batch[: len(sequences)]:
                    digest.update(_item_bytes(item))
                done += len(sequences)
                whole = writer.pending
                if whole >= rows_per_shard:
                    whole = 0
                    finish()
                if progress is not None:
                    progress(state())
        except BaseException:
            # Only rows of finished batches are kept, so that going on changes nothing. A shard
            # that could not be written is not tried again: it counts as no finished batches.
            if whole and whole == writer.pending:
                finish()
            raise
        if writer.pending:
            finish()
        return state()


def _metadata(
    engine: LocalEngine, layer: int, mode: Mode, batch_size: int, sampling: Sampling
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": engine.name,
        "model_fingerprint": engine.fingerprint,
        "layer": layer,
        "hook_point": f"model.layers.{layer}",
        "mode": mode,
        "engine_dtype": str(engine.model.dtype).removeprefix("torch."),
        # It enters the rows by the rounding of larger or smaller products.
        "batch_size": batch_size,
    }
    if mode == "generate":
        settings["sampling"] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "greedy": sampling.greedy,
        }
    return settings


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    nested = settings.get("sampling") or {}
    return {**{key: value for key, value in settings.items() if key != "sampling"}, **nested}


def _refuse_other_settings(out_dir: Path, metadata: dict[str, Any], dtype: str) -> None:
    if not (out_dir / MANIFEST).is_file():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ManifestWarning)  # the writer says it
        header = Manifest.read(out_dir).header
    found = {"dtype": header.dtype, **_flat(header.metadata)}
    wanted = {"dtype": dtype, **_flat(metadata)}
    differences = [
        f"{key} was {found.get(key)!r} and is now {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differences:
        raise ValueError(
            f"{out_dir}: begun with other settings: {'; '.join(differences)}. "
            "Use the same settings to go on, or another folder"
        )


def _plain(item: Any) -> Item:
    """The prompt in types that JSON knows: token ids may come as an array or a tensor."""
    if isinstance(item, str):
        return item
    return item.tolist() if hasattr(item, "tolist") else list(item)


def _item_bytes(item: Item) -> bytes:
    return json.dumps(item, ensure_ascii=False).encode() + b"\n"


def _skip_done(
    source: Iterator[Item], extra: dict[str, Any] | None, out_dir: Path
) -> tuple[int, Any]:
    """Moves past the prompts of earlier runs: how many, and the running checksum over them."""
    digest = hashlib.sha256()
    if extra is None:
        return 0, digest
    done = extra.get("sequences")
    if not isinstance(done, int) or not isinstance(extra.get("prompts"), str):
        raise ValueError(f"{out_dir}: its shards are no harvest's; give another folder")
    skipped = 0
    for item in itertools.islice(source, done):
        digest.update(_item_bytes(item))
        skipped += 1
    if skipped < done or digest.hexdigest()[:16] != extra["prompts"]:
        raise ValueError(
            f"{out_dir}: the first {done} prompts are not those that were harvested there; "
            "give the same prompts (more may follow) to go on, or another folder"
        )
    return done, digest


def _run(
    engine: LocalEngine, batch: Sequence[Item], mode: Mode, sampling: Sampling, first: int
) -> list[_Sequence]:
    """The batch's finished sequences."""
    if mode == "prefill":
        return [_given(engine, item, first + place) for place, item in enumerate(batch)]
    for place, item in enumerate(batch):
        if _answer(item) is not None:
            raise ValueError(
                f"prompt {first + place} has a response already; harvest it in mode 'prefill'"
            )
    generations = engine.generate(
        batch,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        greedy=sampling.greedy,
        batch_size=len(batch),
        first_number=first,
    )
    return [_Sequence(g.tokens, g.segments) for g in generations]


def _answer(item: Item) -> str | None:
    """The last message of a conversation, if it is the assistant's."""
    last = item[-1] if item else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        return last.get("content", "")
    return None


def _given(engine: LocalEngine, item: Item, number: int) -> _Sequence:
    """A given text, conversation or token ids as a sequence."""
    try:
        return _encode_given(engine, item)
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from None


def _encode_given(engine: LocalEngine, item: Item) -> _Sequence:
    if isinstance(item, str):
        tokenizer = engine.require_tokenizer()
        ids = tokenizer.encode(item)
        if not ids:
            raise ValueError("the text is empty")
        if ids[0] != tokenizer.bos_id:
            ids = [tokenizer.bos_id, *ids]
        return _Sequence(engine.encode_prompt(ids), engine.segments(ids))
    answer = _answer(item)
    if answer is None:
        ids = engine.encode_prompt(item)
        conversation = isinstance(item[0], dict)
        return _Sequence(ids, engine.segments(ids, len(ids) if conversation else None))
    tokenizer = engine.require_tokenizer()
    prompt = engine.encode_prompt(item[:-1])
    # The template has opened <think> already.
    answer = answer.removeprefix(THINK).removeprefix("\n")
    ids = engine.encode_prompt([*prompt, *tokenizer.encode(answer), tokenizer.eos_id])
    return _Sequence(ids, engine.segments(ids, len(prompt)))


def _within(sequences: list[_Sequence], rows: int | None) -> list[_Sequence]:
    """As many of the sequences as it takes to reach ``rows`` rows."""
    if rows is None:
        return sequences
    total = itertools.accumulate(len(sequence.tokens) for sequence in sequences)
    enough = next((place for place, sum_ in enumerate(total, 1) if sum_ >= rows), len(sequences))
    return sequences[:enough]


def _write(
    writer: ActivationWriter,
    engine: LocalEngine,
    sequences: list[_Sequence],
    layer: int,
    first: int,
) -> None:
    """One pass over finished sequences, all their rows in one write."""
    tokens = pad_right([sequence.tokens for sequence in sequences], engine.device)
    lengths = torch.tensor([len(sequence.tokens) for sequence in sequences])
    residuals = engine.residuals(tokens, layer, lengths)
    present = torch.arange(tokens.shape[1]) < lengths[:, None]
    rows = residuals[present.to(residuals.device)].cpu()
    place, position = present.nonzero(as_tuple=True)
    bad = first_non_finite(rows)
    if bad is not None:
        raise NonFiniteError(
            f"the residual after layer {layer} of sequence {first + int(place[bad])} holds a NaN "
            f"or an infinity at position {int(position[bad])}; the checkpoint is damaged, or its "
            "numbers leave the range of this dtype: try an engine in float32"
        )
    writer.write(
        rows,
        tokens=tokens.cpu()[present],
        sequence_id=place + first,
        position=position,
        segment=torch.tensor([s for sequence in sequences for s in sequence.segments]),
    )
