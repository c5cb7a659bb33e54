"""What a harvest keeps in its manifest, and what a resumed one must share with it."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1sae_fast.harvest.sequences import HarvestSequence, Mode, item_bytes
from r1sae_fast.prompts import Item
from r1sae_fast.r1.engines.base import Engine
from r1sae_fast.r1.sampling import Sampling
from r1sae_fast.shards import ManifestWarning
from r1sae_fast.shards.manifest import MANIFEST, Manifest


def harvest_metadata(
    engine: Engine, layer: int, mode: Mode, batch_size: int, sampling: Sampling
) -> dict[str, Any]:
    """What decides the rows besides the prompts."""
    settings: dict[str, Any] = {
        "model": engine.name,
        "model_fingerprint": engine.fingerprint,
        "layer": layer,
        "hook_point": f"model.layers.{layer}",
        "mode": mode,
        **engine.describe(),
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
    flat: dict[str, Any] = {}
    if "activations" in settings and "mode" in settings:  # codes: both parts have a mode
        settings = {**settings, "sae_mode": settings["mode"]}
        del settings["mode"]
    for key, value in settings.items():
        flat.update(_flat(value) if isinstance(value, dict) else {key: value})
    return flat


def refuse_other_settings(out_dir: Path, metadata: dict[str, Any], dtype: str) -> None:
    """Raises ValueError, naming each difference, where a run into the folder began otherwise."""
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


@dataclass
class Done:
    """What is written or on its way to the shards.

    Attributes:
        sequences, rows: so many.
        pass_start, pass_rows: the same where the pass that is under way began; between two
            passes, where the next one will.
        digest: running checksum over the prompts done.
        again: of an earlier run that stopped within a pass, that pass's prompts done: the pass
            is formed anew, and what is done of it left out.
    """

    sequences: int = 0
    rows: int = 0
    pass_start: int = 0
    pass_rows: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    again: list[Item] = field(default_factory=list)

    @property
    def between_passes(self) -> bool:
        """Whether nothing of the pass that comes next is done."""
        return self.pass_start == self.sequences

    def add(self, sequences: Iterable[HarvestSequence]) -> None:
        """Counts finished sequences."""
        for sequence in sequences:
            self.digest.update(item_bytes(sequence.item))
            self.sequences += 1
            self.rows += len(sequence.tokens)

    def skip_pass(self, sequences: Sequence[HarvestSequence]) -> None:
        """Says that a whole pass is of what an earlier run has done."""
        self.pass_start += len(sequences)
        self.pass_rows += sum(len(sequence.tokens) for sequence in sequences)

    def end_pass(self) -> None:
        """Says that the next sequences begin a pass."""
        self.pass_start, self.pass_rows = self.sequences, self.rows

    def extra(self) -> dict[str, Any]:
        """For the manifest's line of a shard that ends here."""
        known = {"sequences": self.sequences, "prompts": self.digest.hexdigest()[:16]}
        if self.between_passes:
            return known
        return {**known, "pass": {"sequences": self.pass_start, "rows": self.pass_rows}}


def skip_done(
    source: Iterator[Item], extra: dict[str, Any] | None, rows: int, out_dir: Path
) -> Done:
    """Moves ``source`` past the prompts of earlier runs, of which ``extra`` and ``rows`` tell.

    Raises:
        ValueError: the shards are not a harvest's, or of other prompts.
    """
    done = Done()
    if extra is None:
        return done
    count, digest = extra.get("sequences"), extra.get("prompts")
    begun = extra.get("pass", {"sequences": count, "rows": rows})
    if not isinstance(count, int) or not isinstance(digest, str) or not isinstance(begun, dict):
        raise ValueError(f"{out_dir}: its shards are no harvest's; give another folder")
    done.pass_start, done.pass_rows = int(begun["sequences"]), int(begun["rows"])
    for item in itertools.islice(source, count):
        done.digest.update(item_bytes(item))
        if done.sequences >= done.pass_start:
            done.again.append(item)
        done.sequences += 1
    if done.sequences < count or done.digest.hexdigest()[:16] != digest:
        raise ValueError(
            f"{out_dir}: the first {count} prompts are not those that were harvested there; "
            "give the same prompts (more may follow) to go on, or another folder"
        )
    done.rows = rows
    return done
