"""Harvesting: run the model over many prompts and write its residual stream to shards.

Every shard holds whole sequences, and its line in the manifest says how many prompts are done. A
run that was stopped, at any moment and in any way, goes on from there, and ends with the very
rows that an undisturbed run would have written: batches are the same consecutive prompts, and a
sequence's random draws depend on the seed and its number only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r1sae_fast.errors import NonFiniteError
from r1sae_fast.harvest.output import Output, attach, open_output, stored_dtype
from r1sae_fast.harvest.sequences import MODES, HarvestSequence, Mode, plain, take_pass
from r1sae_fast.harvest.settings import Done, harvest_metadata, refuse_other_settings, skip_done
from r1sae_fast.prompts import Item
from r1sae_fast.r1.engines.base import Engine
from r1sae_fast.r1.sampling import Sampling
from r1sae_fast.sae import FastSAE
from r1sae_fast.sae import Mode as SaeMode
from r1sae_fast.shards.activations import first_non_finite

__all__ = ["MODES", "HarvestProgress", "Mode", "harvest"]


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


def harvest(
    engine: Engine,
    prompts: Iterable[Item],
    layer: int,
    out_dir: Path | str,
    *,
    mode: Mode = "generate",
    dtype: str | torch.dtype | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 1024,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int = 0,
    greedy: bool = False,
    token_budget: int | None = None,
    rows_per_shard: int = 16384,
    resume: bool = True,
    sae: FastSAE | None = None,
    sae_mode: SaeMode | None = None,
    norm_limit: float | None = None,
    progress: Callable[[HarvestProgress], None] | None = None,
) -> HarvestProgress:
    """Writes the residual stream after block ``layer`` of every token to activation shards; or,
    with an SAE, its codes to code shards, and then nothing else leaves the engine's device.

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
        dtype: of the stored activations (default bfloat16) or codes (default float32).
        batch_size: sequences that run together.
        max_new_tokens, temperature, top_p, seed, greedy: for mode "generate", as in
            :meth:`LocalEngine.generate`.
        token_budget: stop after the sequence with which this many rows are reached.
        rows_per_shard: a shard is finished after the batch with which it has this many rows.
        resume: go on where an earlier run into the same folder stopped.
        sae: of the model's width, on the engine's device.
        sae_mode: how it chooses codes: default its own mode, "threshold" instead of "batch_topk".
            In "batch_topk" codes depend on the ``batch_size`` sequences that run together, so it
            must be asked for.
        norm_limit: rows of a larger norm get no codes, as in
            :func:`r1sae_fast.encode.encode_shards`.
        progress: called after every batch.

    Returns:
        The final counts.

    Raises:
        ValueError: no such layer or mode, a prompt that is empty or longer than the context, or
            an earlier run into the folder with other settings or other prompts (named); an
            engine with taps attached, of which the manifest could not tell.
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
    if getattr(engine, "attached", ()):
        raise ValueError("the engine has taps attached; harvest outside the with block")
    if sae is None and (sae_mode is not None or norm_limit is not None):
        raise ValueError("sae_mode and norm_limit are of an SAE, but there is none")
    attached = None if sae is None else attach(engine, sae, sae_mode, norm_limit)
    out_dir = Path(out_dir)
    stored = stored_dtype(dtype, attached)
    metadata = harvest_metadata(engine, layer, mode, batch_size, sampling)
    if attached is not None:
        metadata = {**attached.describe(), "activations": metadata}
    if resume:
        refuse_other_settings(out_dir, metadata, stored)

    with open_output(out_dir, engine, metadata, stored, attached, resume) as output:
        writer = output.writer
        source: Iterator[Item] = map(plain, prompts)
        done = skip_done(source, writer.last_extra, writer.rows, out_dir)
        run = _Run(engine, output, layer, done, time.monotonic(), writer.rows)
        source = itertools.chain(done.again, source)
        skip = len(done.again)
        try:
            while skip or token_budget is None or done.rows < token_budget:
                left = None if token_budget is None else token_budget - done.pass_rows
                taken = take_pass(
                    *(engine, source, mode, sampling),
                    first=done.pass_start,
                    batch_size=batch_size,
                    rows=left,
                )
                if not taken:
                    break
                if len(taken) <= skip:  # passes were larger before the run was stopped
                    skip -= len(taken)
                    done.skip_pass(taken)
                    continue
                for place in run.chunks(taken, batch_size, skip):
                    at_end = place == len(taken)
                    if at_end:
                        done.end_pass()
                    if writer.pending >= rows_per_shard or (at_end and engine.pass_tokens):
                        run.finish()
                    if progress is not None:
                        progress(run.state())
                skip = 0
        except BaseException:
            # Only rows of finished batches are kept, so that going on changes nothing. A shard
            # that could not be written is not tried again: it counts as no finished batches.
            if run.whole and run.whole == writer.pending:
                run.finish()
            raise
        if writer.pending:
            run.finish()
        if done.between_passes:
            engine.finished(out_dir)
        return run.state()


@dataclass
class _Run:
    """One call of :func:`harvest`, from the folder's opening on."""

    engine: Engine
    output: Output
    layer: int
    done: Done
    started: float
    earlier_rows: int
    whole: int = 0  # pending rows that belong to finished batches

    def chunks(self, taken: Sequence[HarvestSequence], batch_size: int, skip: int) -> Iterator[int]:
        """Writes a pass's rows, whole batches at a time; yields how many sequences are done."""
        place = skip
        tokens = [sequence.tokens for sequence in taken]
        for count, rows in self.engine.rows(tokens, self.layer, batch_size=batch_size, skip=skip):
            part = taken[place : place + count]
            self._write(part, rows)
            self.whole = self.output.writer.pending
            self.done.add(part)
            place += count
            yield place

    def _write(self, sequences: Sequence[HarvestSequence], rows: Tensor) -> None:
        first = self.done.sequences
        lengths = torch.tensor([len(sequence.tokens) for sequence in sequences])
        place = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
        position = torch.arange(len(place)) - (lengths.cumsum(0) - lengths)[place]
        bad = first_non_finite(rows)
        if bad is not None:
            raise NonFiniteError(
                f"the residual after layer {self.layer} of sequence {first + int(place[bad])} "
                f"holds a NaN or an infinity at position {int(position[bad])}; the checkpoint is "
                "damaged, or its numbers leave the range of this dtype: try an engine in float32"
            )
        columns = {
            "tokens": torch.tensor([t for sequence in sequences for t in sequence.tokens]),
            "sequence_id": place + first,
            "position": position,
            "segment": torch.tensor([s for sequence in sequences for s in sequence.segments]),
        }
        self.output.write(rows, columns)

    def finish(self) -> None:
        """Ends the shard after the last finished batch."""
        self.whole = 0
        self.output.writer.finish_shard(self.done.extra())
        if self.done.between_passes:
            self.engine.committed()

    def state(self) -> HarvestProgress:
        """Now."""
        rows = self.output.writer.rows + self.output.writer.pending
        seconds = time.monotonic() - self.started
        return HarvestProgress(self.done.sequences, rows, rows - self.earlier_rows, seconds)
