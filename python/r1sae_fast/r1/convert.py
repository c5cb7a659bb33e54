"""A checkpoint from block fp8 to bf16, or from bf16 to block fp8.

Tensor by tensor and band by band, so memory is bounded whatever the model; shards keep their
names and tensors. Everything is written under temporary names and renamed, the config last: a
folder without it is no checkpoint. What a killed conversion has finished, the next one keeps.

What holds of the numbers: to bf16, every weight is q * scale in float32, rounded once. Back to
fp8, bf16 weights that came from fp8 get the very same codes (their rounding, 2^-9, is less than a
quarter of e4m3's half step), wherever a block's largest code was 448 as every quantiser makes it;
scales come back within 2^-8, and from then on both directions repeat to the bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

import torch
from torch import Tensor

from r1sae_fast.atomic import replacing, sync, temporary_name, write_bytes
from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.checkpoint import QUANTIZATION
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8 import BLOCK_SIZE, quantize_blocks, scale_shape
from r1sae_fast.r1.layout import TensorSpec, block_specs, embedding_specs, head_specs
from r1sae_fast.r1.shard_file import DTYPES, Entry, read_header
from r1sae_fast.r1.weights import CONFIG_NAME, INDEX_NAME, CheckpointReader

Target = Literal["bf16", "fp8"]
_MARK = ".r1sae-convert.json"
_SCALE = "_scale_inv"


@dataclass(frozen=True)
class _Output:
    """A tensor of a shard to be written, from the source's tensor ``source``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    job: Literal["copy", "dequantise", "quantise", "round", "scales"]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Conversion:
    """What was done: bytes written now, bytes an earlier run had finished, shards in all."""

    written: int
    kept: int
    shards: int


def convert_checkpoint(
    source: Path | str,
    target: Path | str,
    to: Target,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conversion:
    """Writes ``source``, a DeepSeek-V3/R1 checkpoint, to the folder ``target`` in another form.

    To "bf16": quantised tensors become bf16 (the multi-token-prediction block's too), and the
    config loses its quantization_config: what vLLM and transformers load anywhere. To "fp8": the
    projections become e4m3 in blocks of 128 x 128 with float32 scales, as R1's are. Norms,
    routers, embedding and head stay as they are, but that float32 becomes bf16 in either form
    (not the routers' correction biases). Tokenizer and further files are copied.

    Args:
        source: the folder.
        target: made if need be; empty, or begun by an earlier call with the same arguments.
        to: "bf16" or "fp8".
        progress: called with the bytes done and the bytes in all.

    Raises:
        FileNotFoundError, CheckpointError: ``source`` is not as it should be (named), or has the
            form asked for already.
        FileExistsError: ``target`` holds anything else.
        ValueError: an unknown ``to``, or both folders are one.
        OSError: the disk is full, or too small for the result; what was finished is kept.
    """
    if to not in get_args(Target):
        raise ValueError(f"to is {to!r}, expected one of {', '.join(get_args(Target))}")
    source, target = Path(source), Path(target)
    if target.exists() and source.resolve() == target.resolve():
        raise ValueError(f"{target}: is the checkpoint itself; give another folder")
    with CheckpointReader(source) as reader:
        config = R1Config.from_dict(reader.config, str(source / CONFIG_NAME))
        plan = _plan(reader, config, to)
        _begin(reader, target, to)
        sizes = {shard: _header(outputs)[1] for shard, outputs in plan.items()}
        ready = {shard for shard in plan if _is_ready(target / shard, plan[shard])}
        _check_room(target, sum(size for shard, size in sizes.items() if shard not in ready))
        total = sum(sizes.values())
        kept = done = sum(sizes[shard] for shard in ready)
        progress(done, total)
        for shard, outputs in plan.items():
            if shard in ready:
                continue
            with replacing(target / shard) as temporary, temporary.open("wb") as file:
                for step in _write_shard(file, reader, outputs):
                    done += step
                    progress(done, total)
        _finish(reader, target, plan, to)
    return Conversion(total - kept, kept, len(plan))


def _plan(reader: CheckpointReader, config: R1Config, to: Target) -> dict[str, list[_Output]]:
    """Each shard's tensors; checks all of the source by its headers."""
    specs = {spec.name: spec for spec in _all_specs(reader, config)}
    for name, spec in specs.items():
        if not spec.name.startswith(f"model.layers.{config.num_hidden_layers}."):
            reader.is_fp8(spec)  # every tensor of the model is there, and well
        elif name in reader.shards:
            reader.is_fp8(spec)
    plan: dict[str, list[_Output]] = {}
    changed = False
    for name, shard in sorted(reader.shards.items(), key=lambda item: (item[1], item[0])):
        entry = reader.entry(name)
        outputs = list(_outputs(reader, name, entry, specs.get(name), to))
        changed |= [output.job for output in outputs] != ["copy"]
        plan.setdefault(shard, []).extend(outputs)
    if not changed:
        raise CheckpointError(f"{reader.directory}: is in {to} already; nothing to convert")
    # Larger elements first, so that every tensor is aligned.
    for outputs in plan.values():
        outputs.sort(key=lambda output: (-DTYPES[output.dtype].itemsize, output.name))
    return plan


def _all_specs(reader: CheckpointReader, config: R1Config) -> Iterator[TensorSpec]:
    """The model's tensors, and those of multi-token-prediction blocks that have a block's names."""
    yield from embedding_specs(config)
    for index in range(config.num_hidden_layers):
        yield from block_specs(config, index)
    yield from head_specs(config)
    numbers = {
        int(match[1])
        for name in reader.shards
        if (match := re.match(r"model\.layers\.(\d+)\.", name))
    }
    for index in sorted(numbers):
        if index >= config.num_hidden_layers:
            yield from (s for s in block_specs(config, index) if s.name in reader.shards)


def _outputs(
    reader: CheckpointReader, name: str, entry: Entry, spec: TensorSpec | None, to: Target
) -> Iterator[_Output]:
    """What becomes of one tensor of the source."""
    weight = name.removesuffix(_SCALE)
    is_scale = name.endswith(_SCALE) and weight in reader.shards
    if is_scale and reader.entry(weight).dtype == "F8_E4M3":
        if to == "fp8":
            yield _Output(name, entry.dtype, entry.shape, name, "copy")
        return
    if entry.dtype == "F8_E4M3" and to == "bf16":
        _check_scales(reader, name, entry)
        yield _Output(name, "BF16", entry.shape, name, "dequantise")
    elif spec is not None and spec.quantised and entry.dtype != "F8_E4M3" and to == "fp8":
        yield _Output(name, "F8_E4M3", entry.shape, name, "quantise")
        shape = scale_shape(entry.shape, BLOCK_SIZE)
        yield _Output(f"{name}{_SCALE}", "F32", shape, name, "scales")
    elif spec is not None and not spec.float32 and entry.dtype in ("F32", "F16"):
        yield _Output(name, "BF16", entry.shape, name, "round")
    else:
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{reader.directory / reader.shards[name]}: {name!r} is {entry.dtype}, "
                f"expected one of {', '.join(DTYPES)}"
            )
        yield _Output(name, entry.dtype, entry.shape, name, "copy")


def _check_scales(reader: CheckpointReader, name: str, entry: Entry) -> None:
    """A quantised tensor that the layout does not know is checked as one that it knows."""
    if len(entry.shape) != 2:
        raise CheckpointError(
            f"{reader.directory / reader.shards[name]}: {name!r} is fp8 of shape {entry.shape}; "
            "only matrices have scales a block"
        )
    reader.is_fp8(_spec_of(name, entry))


def _spec_of(name: str, entry: Entry) -> TensorSpec:
    return TensorSpec(name, entry.shape, name, quantised=True)


def _begin(reader: CheckpointReader, target: Path, to: Target) -> None:
    """Claims the folder, or finds that an earlier run of the same conversion has."""
    digest = hashlib.sha256(json.dumps(reader.config, sort_keys=True).encode())
    for shard in sorted(set(reader.shards.values())):
        path = reader.directory / shard
        digest.update(f"{shard} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    mark = {"source": digest.hexdigest(), "to": to}
    path = target / _MARK
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != mark:
            raise FileExistsError(
                f"{target}: another conversion was begun here; "
                "finish that one, or remove the folder"
            )
        return
    target.mkdir(parents=True, exist_ok=True)
    others = sorted(entry.name for entry in target.iterdir() if entry != temporary_name(path))
    if others:
        raise FileExistsError(
            f"{target}: holds {others[0]!r}{' and more' if len(others) > 1 else ''}; "
            "give an empty folder or one that does not exist"
        )
    write_bytes(path, json.dumps(mark).encode())


def _header(outputs: list[_Output]) -> tuple[bytes, int]:
    """A shard's first bytes, and its size."""
    lines: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in outputs:
        lines[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [at, at + output.nbytes],
        }
        at += output.nbytes
    text = json.dumps(lines, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


def _is_ready(path: Path, outputs: list[_Output]) -> bool:
    """Whether an earlier run finished the shard: it is renamed when it is, so the header tells."""
    try:
        found = read_header(path)
    except (OSError, CheckpointError):
        return False
    return [(name, entry.dtype, entry.shape) for name, entry in found.items()] == [
        (output.name, output.dtype, output.shape) for output in outputs
    ]


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed > free:
        raise OSError(
            f"{target}: {needed / 1e9:,.1f} GB still to be written, but the disk has "
            f"{free / 1e9:,.1f} GB left; free some, or give a folder elsewhere"
        )


def _write_shard(
    file: IO[bytes], reader: CheckpointReader, outputs: list[_Output]
) -> Iterator[int]:
    """Writes a shard, yielding the bytes of each step."""
    header, _ = _header(outputs)
    file.write(header)
    yield len(header)
    places = {}
    at = len(header)
    for output in outputs:
        places[output.name] = at
        at += output.nbytes
    for output in outputs:
        if output.job == "scales":
            continue  # written beside their codes
        at = places[output.name]
        scales_at = places.get(f"{output.name}{_SCALE}", 0)
        for part, scales in _bands(reader, output):
            at += _put(file, at, part)
            step = part.nbytes
            if scales is not None:
                scales_at += _put(file, scales_at, scales)
                step += scales.nbytes
            yield step


def _put(file: IO[bytes], at: int, part: Tensor) -> int:
    file.seek(at)
    file.write(part.contiguous().view(torch.uint8).numpy().data)
    return part.nbytes


def _bands(reader: CheckpointReader, output: _Output) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A tensor's rows in bands, with their scales where they are quantised here."""
    name = output.source
    if output.job == "dequantise":
        spec = _spec_of(name, reader.entry(name))
        for _, part in reader.dequantized_bands(spec, torch.bfloat16):
            yield part, None
        return
    for _, part in reader.bands(name, BLOCK_SIZE[0]):
        if output.job == "copy":
            yield part, None
            continue
        rounded = part.bfloat16() if output.job == "round" else part.float()
        if not bool(torch.isfinite(rounded).all()):
            raise CheckpointError(
                f"{reader.directory / reader.shards[name]}: {name!r} holds a NaN, an infinity or "
                "a number beyond bf16's largest; it can't be converted"
            )
        yield (rounded, None) if output.job == "round" else quantize_blocks(rounded)


def _finish(
    reader: CheckpointReader, target: Path, plan: Mapping[str, list[_Output]], to: Target
) -> None:
    """Index, further files, and last the config; then the mark of an unfinished folder goes."""
    own = {CONFIG_NAME, INDEX_NAME, _MARK}
    for path in sorted(reader.directory.iterdir()):
        if path.is_file() and path.name not in own and path.suffix != ".safetensors":
            with replacing(target / path.name) as temporary:
                shutil.copyfile(path, temporary)
    if (reader.directory / INDEX_NAME).is_file():
        places = {output.name: shard for shard, outputs in plan.items() for output in outputs}
        total = sum(output.nbytes for outputs in plan.values() for output in outputs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        _write_json(target / INDEX_NAME, index)
    config = dict(reader.config)
    config.pop("quantization_config", None)
    if to == "fp8":
        config["quantization_config"] = QUANTIZATION
    _write_json(target / CONFIG_NAME, config)
    (target / _MARK).unlink()
    sync(target)


def _write_json(path: Path, value: object) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())
