"""What a checkpoint folder holds, what a tap needs of it, and what is wrong with it.

Only config, index and the shards' headers are read, so R1's 641 GiB take about a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r1sae_fast.errors import CheckpointError
from r1sae_fast.r1.config import R1Config
from r1sae_fast.r1.fp8 import BLOCK_SIZE
from r1sae_fast.r1.layout import TensorSpec, block_specs, embedding_specs, head_specs
from r1sae_fast.r1.shard_file import Entry
from r1sae_fast.r1.weights import (
    CONFIG_NAME,
    CheckpointReader,
    read_config,
    read_index,
    read_quantization,
)


@dataclass(frozen=True)
class Part:
    """A part of the model: the embedding, a block, the head, or what the model does not use.

    ``bytes`` and ``tensors`` are as stored, scales included; ``dtypes`` has each dtype's bytes;
    ``shards`` are the files that hold them.
    """

    name: str
    tensors: int
    bytes: int
    dtypes: dict[str, int]
    shards: list[str]


@dataclass(frozen=True)
class Tap:
    """What the residual stream after block ``layer`` needs: embedding and blocks 0 to it."""

    layer: int
    tensors: int
    bytes: int
    shards: list[str]
    memory: dict[str, int]
    """Bytes of the weights in memory, by how they are kept: "w8a8", "bfloat16", "float32"."""


@dataclass
class Inspection:
    """The findings; ``problems`` is empty where all is well."""

    directory: str
    architecture: dict[str, Any] = field(default_factory=dict)
    quantization: str = "unknown"
    shards: int = 0
    shard_bytes: int = 0
    parts: list[Part] = field(default_factory=list)
    tap: Tap | None = None
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def inspect_checkpoint(directory: Path | str, layer: int | None = None) -> Inspection:
    """Looks at a checkpoint folder; what is wrong is listed, not raised.

    Args:
        directory: the folder.
        layer: of the tap to report on; default: the last block.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no such layer.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder")
    found = Inspection(str(directory))
    config, block_size = _config(directory, found)
    if config is not None and layer is not None and not 0 <= layer < config.num_hidden_layers:
        raise ValueError(
            f"layer {layer} does not exist: the model has 0 to {config.num_hidden_layers - 1}"
        )
    try:
        index = read_index(directory)
    except (OSError, CheckpointError) as error:
        found.problems.append(str(error))
        return found
    reader = CheckpointReader.of(directory, index, block_size)
    entries = _headers(reader, found)
    if config is not None:
        _parts(reader, config, entries, found)
        found.tap = _tap(config, entries, index, layer)
    return found


def _config(directory: Path, found: Inspection) -> tuple[R1Config | None, tuple[int, int] | None]:
    """The model's shape and the size of fp8 blocks, as far as the config tells them."""
    where = str(directory / CONFIG_NAME)
    try:
        raw = read_config(directory)
    except (OSError, CheckpointError) as error:
        found.problems.append(str(error))
        return None, None
    config = None
    block_size: tuple[int, int] | None = BLOCK_SIZE  # where the config does not say
    try:
        config = R1Config.from_dict(raw, where)
        found.architecture = {
            "model_type": raw.get("model_type", "deepseek_v3"),
            **{k: v for k, v in config.to_dict().items() if k in R1Config.__annotations__},
        }
    except CheckpointError as error:
        found.problems.append(str(error))
    try:
        block_size = read_quantization(raw, where)
        found.quantization = (
            "none" if block_size is None else "fp8 e4m3, blocks of {} x {}".format(*block_size)
        )
    except CheckpointError as error:
        found.problems.append(str(error))
    return config, block_size


def _headers(reader: CheckpointReader, found: Inspection) -> dict[str, Entry]:
    """The tensors that index and shards agree on; whatever they do not agree on is a problem."""
    found.shards = len(set(reader.shards.values()))
    entries: dict[str, Entry] = {}
    members: dict[str, list[str]] = {}
    for name, shard in reader.shards.items():
        members.setdefault(shard, []).append(name)
    for shard, names in sorted(members.items()):
        try:
            header = reader.shard(shard).entries
        except (OSError, CheckpointError) as error:
            found.problems.append(str(error))
            continue
        found.shard_bytes += (reader.directory / shard).stat().st_size
        for name in names:
            if name in header:
                entries[name] = header[name]
            else:
                found.problems.append(
                    f"{reader.directory / shard}: the index places {name!r} here, but the shard "
                    "lacks it; index and shards are of different checkpoints"
                )
        unlisted = sorted(header.keys() - set(names))
        if unlisted:
            found.problems.append(
                f"{reader.directory / shard}: holds {len(unlisted)} tensors that the index does "
                f"not place here, such as {unlisted[0]!r}; index and shards are of different "
                "checkpoints"
            )
    return entries


def _parts(
    reader: CheckpointReader, config: R1Config, entries: Mapping[str, Entry], found: Inspection
) -> None:
    """Checks every tensor of the model and adds up its parts."""
    parts: list[tuple[str, list[TensorSpec]]] = [
        ("embedding", list(embedding_specs(config))),
        *(
            (f"block {index}", list(block_specs(config, index)))
            for index in range(config.num_hidden_layers)
        ),
        ("norm and head", list(head_specs(config))),
    ]
    rest = set(entries)
    for title, specs in parts:
        names = []
        for spec in specs:
            if spec.name in reader.shards and spec.name not in entries:
                continue  # its shard's trouble has been told
            try:
                reader.is_fp8(spec)
            except CheckpointError as error:
                scale_is_told = spec.scale_name in reader.shards and spec.scale_name not in entries
                if not scale_is_told:
                    found.problems.append(str(error))
            except OSError:
                pass  # likewise
            names += [name for name in (spec.name, spec.scale_name) if name in entries]
        rest -= set(names)
        found.parts.append(_part(title, names, entries, reader.shards))
    block = f"model.layers.{config.num_hidden_layers}."
    prediction = sorted(name for name in rest if name.startswith(block))
    for title, names in (
        (f"block {config.num_hidden_layers} (multi-token prediction, not used)", prediction),
        ("other tensors (not used)", sorted(rest.difference(prediction))),
    ):
        if names:
            found.parts.append(_part(title, names, entries, reader.shards))


def _part(
    title: str, names: Iterable[str], entries: Mapping[str, Entry], index: Mapping[str, str]
) -> Part:
    names = list(names)
    dtypes: dict[str, int] = {}
    for name in names:
        entry = entries[name]
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + entry.nbytes
    shards = sorted({index[name] for name in names})
    return Part(title, len(names), sum(dtypes.values()), dict(sorted(dtypes.items())), shards)


def _tap(
    config: R1Config, entries: Mapping[str, Entry], index: Mapping[str, str], layer: int | None
) -> Tap:
    layer = config.num_hidden_layers - 1 if layer is None else layer
    specs = [*embedding_specs(config)]
    for number in range(layer + 1):
        specs += block_specs(config, number)
    names = []
    memory = dict.fromkeys(("w8a8", "bfloat16", "float32"), 0)
    for spec in specs:
        stored = [name for name in (spec.name, spec.scale_name) if name in entries]
        names += stored
        if spec.name not in entries:
            continue
        numbers = math.prod(spec.shape)
        kept = entries[spec.name].dtype == "F8_E4M3" and not spec.parameter.endswith(
            "kv_b_proj.weight"
        )
        plain = 4 if spec.float32 else 2
        memory["w8a8"] += sum(entries[n].nbytes for n in stored) if kept else plain * numbers
        memory["bfloat16"] += plain * numbers
        memory["float32"] += 4 * numbers
    shards = sorted({index[name] for name in names})
    return Tap(layer, len(names), sum(entries[name].nbytes for name in names), shards, memory)
