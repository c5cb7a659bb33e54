"""R1's residuals on a machine that can't hold R1: layer-major prefill from the disk.

Many sequences (a pass) go through block 0 together, then through block 1, and so on up to the
tapped layer; a block's weights are read while the block before it computes, and are then
overwritten. Between two blocks the hidden states are in a scratch file, so that a run killed at
any moment goes on from the last finished block. The products are those of the resident engine on
the same micro-batches, and so are the residuals, to the bit.

Source of the idea: layer-wise execution with offloaded weights and large batches, as in FlexGen
(Sheng et al. 2023, arXiv:2303.06865), here for prefill alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from r1sae_fast import _core
from r1sae_fast.r1.blocks import Fp8Mode, check_fp8, empty_block
from r1sae_fast.r1.chat import Tokenizer
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.engines.base import (
    Engine,
    checkpoint_name,
    describe_fp8,
    fingerprint,
    resolve_checkpoint,
)
from r1sae_fast.r1.fp8_linear import fp8_kernels
from r1sae_fast.r1.layout import block_specs
from r1sae_fast.r1.stream.batches import MicroBatch, identity, micro_batches, shape_of
from r1sae_fast.r1.stream.forward import StreamForward
from r1sae_fast.r1.stream.loader import ReadAhead
from r1sae_fast.r1.stream.plan import Budget, Model, Shape, StreamPlan, make_plan
from r1sae_fast.r1.stream.probe import measure
from r1sae_fast.r1.stream.process import MemoryKeeper, resident_bytes
from r1sae_fast.r1.stream.scratch import Hidden, MemoryHidden, ScratchFolder
from r1sae_fast.r1.stream.speeds import Speeds
from r1sae_fast.r1.stream.weights import StoppableReader, Weights
from r1sae_fast.r1.weights import CheckpointReader

PASS_TOKENS = 2**20
_UNKNOWN_BASE = 512 << 20
_ANY_SPEEDS = Speeds(disk=1e9, flops=1e12, expert_flops=1e12, dequantize=1e9)


@dataclass(frozen=True)
class StreamProgress:
    """How far a pass is: micro-batches done in this block, and the blocks before it.

    Attributes:
        block, blocks: the block under way, counted from 0, and how many there are to run.
        batch, batches: micro-batches done in it, and in all.
    """

    block: int
    blocks: int
    batch: int
    batches: int


def shard_buffer_bytes(rows: int, width: int, itemsize: int) -> int:
    """What a writer of shards of so many rows holds: a buffer that grows by doubling, and the
    one that it outgrew."""
    return 3 * rows * width * itemsize


class StreamEngine(Engine):
    """Reads texts with a DeepSeek-V3/R1 checkpoint that does not fit in memory.

    It gives residuals and no text. A context manager: leaving it gives the scratch folder free.
    """

    has_head = False

    def __init__(
        self,
        checkpoint: Path | str,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        *,
        fp8: Fp8Mode = "w8a8",
        max_memory: int | None = None,
        pass_tokens: int = PASS_TOKENS,
        scratch: Path | str | None = None,
        reserve: int = 0,
        speeds: Speeds | None = None,
        on_plan: Callable[[StreamPlan], None] | None = None,
        on_progress: Callable[[StreamProgress], None] | None = None,
    ) -> None:
        """Reads the checkpoint's headers; weights are read as they are needed.

        Args:
            checkpoint: the folder, or ``"tiny-r1"``.
            dtype: of the residual stream and of all weights that are not kept in fp8.
            device: where products are computed.
            fp8: as in :meth:`LocalEngine.from_pretrained`.
            max_memory: bytes that this process may hold at any time (anonymous and shared
                pages: Python and torch's own among them, the system's cache of files not);
                on an accelerator, bytes of its memory. Default: no cap.
            pass_tokens: harvesting gives so many tokens at a time: the weights are read once
                for them.
            scratch: folder for the hidden states between blocks, twice 14 KB a token for R1;
                a killed run goes on from what is there. None: they are kept in memory, and a
                killed run begins its pass again.
            reserve: bytes that the caller needs for itself; for a shard's buffer see
                :func:`shard_buffer_bytes`.
            speeds: of this machine; default: measured, in a second or two, before the first
                pass.
            on_plan: is told the plan of each pass before it starts.
            on_progress: is told after every micro-batch of every block.

        Raises:
            FileNotFoundError: no checkpoint or tokenizer there.
            CheckpointError: something in the folder is malformed.
            ValueError: ``pass_tokens``, ``max_memory`` or ``fp8`` is none.
        """
        check_fp8(fp8)
        for name, value in (("pass_tokens", pass_tokens), ("max_memory", max_memory)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.directory = resolve_checkpoint(checkpoint)
        self._stack = contextlib.ExitStack()
        self._reader = self._stack.enter_context(CheckpointReader(self.directory))
        self.config = R1Config.from_dict(self._reader.config, str(self.directory / "config.json"))
        self.tokenizer = Tokenizer.from_pretrained(self.directory)
        self.name = checkpoint_name(checkpoint)
        self.fingerprint = fingerprint(self.directory)
        self.pass_tokens = pass_tokens
        self.fp8: Fp8Mode = fp8
        self._dtype, self._device = dtype, torch.device(device)
        self._max_memory, self.reserve = max_memory, reserve
        self._speeds, self._on_plan, self._on_progress = speeds, on_plan, on_progress
        self._scratch_path = None if scratch is None else Path(scratch)
        self._scratch: ScratchFolder | None = None
        # torch imports half of itself when it first works without data; not at the plan's cost.
        empty_block(self._reader, self.config, 0, dtype=dtype, device="meta", fp8=fp8)
        self._base = resident_bytes() or _UNKNOWN_BASE

    # -- the model ----------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        """Blocks of the whole model."""
        return self.config.num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.vocab_size

    @property
    def context(self) -> int:
        """Most tokens that a sequence may have."""
        return self.config.max_position_embeddings

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where rows come out."""
        return self._device

    @property
    def eos_id(self) -> int:
        """The config's end of sentence."""
        return self.config.eos_token_id

    def __enter__(self) -> StreamEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the checkpoint and the scratch folder free."""
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        self._stack.close()

    def describe(self) -> dict[str, Any]:
        """As the resident engine: the rows are the same, so one may go on where the other
        stopped."""
        fp8 = describe_fp8(self.fp8, self._device) if self._is_quantised else {}
        return {**super().describe(), **fp8}

    @property
    def _is_quantised(self) -> bool:
        return any(
            self._reader.is_fp8(spec) for spec in block_specs(self.config, 0) if spec.quantised
        )

    def check_head(self) -> None:
        """Raises ValueError: there is never a head."""
        raise ValueError(
            "the streaming engine reads texts (mode 'prefill') and writes none; let another "
            "engine write them, or harvest given texts"
        )

    # -- running ------------------------------------------------------------------------------

    def plan(self, shape: Shape, layer: int, *, in_memory: bool | None = None) -> StreamPlan:
        """How a pass of that shape would be run, up to ``layer``.

        Raises:
            ValueError: the memory cap is too small; the smallest that would do is named.
        """
        model = Model(
            self.config,
            layer,
            self.fp8,
            self._dtype.itemsize,
            self._reader.is_fp8,
            fp8_kernels(self._device) is not None,
        )
        memory = self._scratch_path is None if in_memory is None else in_memory
        budget = Budget(self._max_memory, self._base, self.reserve, memory)
        if self._speeds is None:
            make_plan(model, shape, budget, _ANY_SPEEDS)  # a cap too small is told at once
            self._speeds = measure(
                self.directory, self._reader, model, shape, self._dtype, self._device, self.fp8
            )
        return make_plan(model, shape, budget, self._speeds)

    def rows(
        self,
        sequences: Sequence[Sequence[int]],
        layer: int,
        *,
        batch_size: int,
        skip: int = 0,
    ) -> Iterator[tuple[int, Tensor]]:
        """See :meth:`Engine.rows`: the sequences are one pass, planned anew.

        Raises:
            ValueError: no such layer, or the memory cap is too small.
            OSError: no room for the hidden states on the disk.
            ShardError: another run is at work in the scratch folder.
        """
        self.check_layer(layer)
        batches = micro_batches(sequences, batch_size, self.width_of)
        begin = skip // batch_size
        if begin >= len(batches):
            return
        plan = self.plan(shape_of(batches[begin:]), layer)
        if self._on_plan is not None:
            self._on_plan(plan)
        hidden = self._hidden(batches, batches[begin].first, layer, batch_size)
        try:
            for batch, x in self._run(plan, batches[begin:], hidden, layer):
                yield len(batch.sequences), x[batch.present(x.device)]
        finally:
            hidden.close()

    def _hidden(
        self, batches: Sequence[MicroBatch], start: int, layer: int, batch_size: int
    ) -> Hidden:
        rows = batches[-1].first + batches[-1].rows
        if layer == 0:  # nothing comes between blocks
            return MemoryHidden(0, self.hidden_size, self._dtype)
        if self._scratch_path is None:
            return MemoryHidden(rows, self.hidden_size, self._dtype)
        if self._scratch is None:
            self._scratch = ScratchFolder(self._scratch_path)
        settings = {
            "version": _core.__version__,
            "model": self.fingerprint,
            "layer": layer,
            "batch_size": batch_size,
            **self.describe(),
        }
        name = identity(json.dumps(settings, sort_keys=True), batches)
        return self._scratch.open(name, rows, self.hidden_size, self._dtype, start)

    def _run(
        self, plan: StreamPlan, batches: Sequence[MicroBatch], hidden: Hidden, layer: int
    ) -> Iterator[tuple[MicroBatch, Tensor]]:
        reader = StoppableReader(self.directory)
        weights = Weights(
            reader,
            self.config,
            dtype=self._dtype,
            device=self._device,
            fp8=self.fp8,
            weight_cache="once" if plan.weight_cache == "once" else "call",
        )
        blocks = range(hidden.blocks, layer + 1)
        jobs = weights.jobs(blocks, plan.group, plan.chunks)
        with reader, ReadAhead(jobs, ahead=plan.ahead) as parts:
            reader.stopping = parts.stopping
            parts.start()
            keeper = MemoryKeeper(self._max_memory, plan.step)
            forward = StreamForward(
                self.config, self._reader, self._dtype, self._device, parts, hidden, keeper
            )
            for index in blocks:
                done = forward.block(index, batches, plan)
                for count, (batch, x) in enumerate(done, 1):
                    if index < layer:
                        hidden.write(batch.first, x.reshape(-1, x.shape[-1]).cpu())
                    else:
                        yield batch, x
                    if self._on_progress is not None:
                        self._on_progress(StreamProgress(index, layer + 1, count, len(batches)))
                if index < layer:
                    hidden.finish_block()

    def committed(self) -> None:
        """The pass's rows are on disk: its hidden states can go."""
        if self._scratch is not None:
            self._scratch.clear()

    def finished(self, folder: Path) -> None:
        """A run that was killed between its last shard and :meth:`committed` has left hidden
        states; they go, if they are the folder's own."""
        path = self._scratch_path
        if path is None or folder.resolve() not in path.resolve().parents or not path.is_dir():
            return
        if self._scratch is None:
            self._scratch = ScratchFolder(path)
        self._scratch.clear()

    def residuals(
        self,
        token_ids: Tensor | Sequence[Sequence[int]],
        layer: int,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The residual stream after block ``layer`` of one micro-batch: [batch, seq, hidden],
        zeros at padding. All weights up to there are read for it; for more, see :meth:`rows`.
        """
        self.check_layer(layer)
        token_ids = torch.as_tensor(token_ids, dtype=torch.int64, device="cpu")
        if token_ids.ndim != 2:
            raise ValueError(f"token_ids has the shape {tuple(token_ids.shape)}, expected 2 axes")
        batch, seq = token_ids.shape
        whole = [seq] * batch if lengths is None else torch.as_tensor(lengths).tolist()
        result = torch.zeros(batch, seq, self.hidden_size, dtype=self._dtype, device=self._device)
        if token_ids.numel() == 0:
            return result
        if len(whole) != batch or not all(0 <= length <= seq for length in whole):
            raise ValueError(f"lengths is {whole}, expected {batch} numbers from 0 to {seq}")
        self.check_ids([0] * seq)
        present = torch.arange(seq) < torch.tensor(whole)[:, None]
        tokens = torch.where(present, token_ids, 0)
        self.check_ids([int(tokens.min()), int(tokens.max())])
        micro = [MicroBatch(0, tokens.tolist(), seq)]
        plan = self.plan(shape_of(micro), layer, in_memory=True)
        hidden = MemoryHidden(batch * seq, self.hidden_size, self._dtype)
        for _, x in self._run(plan, micro, hidden, layer):
            result = x.masked_fill(~present.to(x.device)[..., None], 0)
        return result
