"""``r1sae eval``: how good SAEs are, on activations and inside the running model."""

from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from r1sae_fast.evals import Answers, InModel
    from r1sae_fast.prompts import Item
    from r1sae_fast.r1 import HfEngine, LocalEngine
    from r1sae_fast.sae import Mode


class Engines(str, Enum):
    """What runs the model."""

    local = "local"
    hf = "hf"


class Computed(str, Enum):
    """What the model computes in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def evaluate(
    saes: Annotated[
        list[Path],
        typer.Argument(
            metavar="SAE...",
            help="Folders of SAEs, as r1sae train writes them; also .json files of earlier "
            "evaluations, to compare with.",
        ),
    ],
    shards: Annotated[
        Path | None,
        typer.Option(help="Activation shards to measure on; best not those trained on."),
    ] = None,
    targets: Annotated[
        Path | None,
        typer.Option(help="Of transcoders: shards of the same tokens that they are to make."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Also put each SAE into this model: a checkpoint folder (with --engine hf also a "
            "repository of the hub); tiny-r1 is the shipped one."
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Block whose output the SAE replaces; default: what it says."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts to predict: .txt (one a line) or .jsonl."),
    ] = None,
    tiny_texts: Annotated[
        int | None,
        typer.Option(min=1, help="Instead: so many traces of problems held out from TinyR1's."),
    ] = None,
    problems: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Held-out problems to solve with the SAE in the loop; default 100 for tiny-r1, "
            "else none.",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="topk, batch_topk or threshold; default: the SAE's own, threshold instead of "
            "batch_topk."
        ),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="At most so many rows, drawn from all.")
    ] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    norm_limit: Annotated[
        float | None,
        typer.Option(
            help="Leave out rows of a larger norm; default: as the SAEs were trained, else 10 "
            "times the median."
        ),
    ] = None,
    similarity: Annotated[
        int, typer.Option(min=0, help="Features whose nearest other direction is looked for.")
    ] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Which texts and problems.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw L0 against FVU and against CE recovered to this PNG."),
    ] = None,
    engine: Annotated[
        Engines,
        typer.Option(help="local: DeepSeek-V3, R1, TinyR1. hf: what transformers loads."),
    ] = Engines.local,
    engine_dtype: Annotated[
        Computed, typer.Option(help="Of the model's arithmetic.")
    ] = Computed.bfloat16,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
) -> None:
    """Evaluate SAEs: on activations, inside the running model, and in what it answers.

    [dim]r1sae eval run/sae --shards run/activations --model tiny-r1 --json eval.json[/]
    """
    from rich.console import Console

    from r1sae_fast.evals import read_report, write_report
    from r1sae_fast.evals.picture import write_picture
    from r1sae_fast.evals.table import make_table

    folders = [path for path in saes if path.suffix != ".json"]
    earlier = [one for path in saes if path.suffix == ".json" for one in read_report(path)["saes"]]
    if targets is not None and shards is None:
        raise ValueError("--targets are made of --shards FOLDER; give both")
    if folders and shards is None and model is None:
        raise ValueError(
            "nothing to evaluate on: give --shards FOLDER for figures on activations, "
            "--model tiny-r1 (or another) for figures inside the model, or both"
        )
    if model is None and any(one is not None for one in (layer, texts, tiny_texts, problems)):
        raise ValueError("--layer, --texts, --tiny-texts and --problems need --model")
    for path in (json_file, picture):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} to")
    entries: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    if folders:
        run = _Run(folders, device, cast("Mode | None", mode), (shards, targets), norm_limit)
        if shards is not None:
            run.on_activations(batch_rows, max_rows)
        if model is not None:
            where = run.layer if layer is None else layer
            run.in_model(
                _load(model, engine, engine_dtype, device),
                where,
                texts,
                tiny_texts,
                seed=seed,
                batch_size=batch_size,
                problems=(100 if model == "tiny-r1" else 0) if problems is None else problems,
            )
        entries = run.entries(similarity)
        settings = run.settings
    if json_file is not None:
        write_report(json_file, entries, settings)
    entries += earlier
    Console().print(make_table(entries))
    if picture is not None:
        write_picture(entries, picture)
        typer.echo(f"{picture}: {len(entries)} SAEs", err=True)


class _Run:
    """SAEs and what has been measured of them so far; all on the same rows and positions."""

    def __init__(
        self,
        folders: "list[Path]",
        device: str,
        mode: "Mode | None",
        data: tuple[Path | None, Path | None],
        norm_limit: float | None,
    ) -> None:
        from r1sae_fast.evals.reconstruction import find_norm_limit
        from r1sae_fast.sae import FastSAE
        from r1sae_fast.shards import ActivationShards, PairedShards

        shards, targets = data
        self.names = [str(folder) for folder in folders]
        self.saes: list[FastSAE] = [FastSAE.load(folder, device=device) for folder in folders]
        self.mode = mode
        self.shards: ActivationShards | PairedShards | None = None
        self.settings: dict[str, Any] = {"mode": mode}
        if shards is not None:
            self.shards = ActivationShards(shards)
            self.settings["shards"] = str(shards)
            if targets is not None:
                self.shards = PairedShards(self.shards, targets)
                self.settings["targets"] = str(targets)
            self.settings["shards_fingerprint"] = self.shards.fingerprint
        if norm_limit is None and self.shards is not None:
            norm_limit = min(find_norm_limit(sae, self.shards) for sae in self.saes)
        self.norm_limit = norm_limit
        self.parts: list[dict[str, Any]] = [{} for _ in folders]

    @property
    def layer(self) -> int:
        """The layer that all SAEs say they were trained on.

        Raises:
            ValueError: they say nothing, or different things.
        """
        layers = {sae.metadata.get("activations", {}).get("layer") for sae in self.saes}
        if len(layers) != 1 or not isinstance(layer := layers.pop(), int):
            raise ValueError(
                "the SAEs do not tell one layer that they were trained on; say --layer N"
            )
        return layer

    def on_activations(self, batch_rows: int, max_rows: int | None) -> None:
        """A pass over the shards for each SAE."""
        from r1sae_fast.evals import evaluate_reconstruction

        assert self.shards is not None  # or there is nothing to go over
        self.settings.update(batch_rows=batch_rows, max_rows=max_rows)
        for name, sae, part in zip(self.names, self.saes, self.parts, strict=True):
            with _named(name):
                part["reconstruction"] = evaluate_reconstruction(
                    sae,
                    self.shards,
                    mode=self.mode,
                    batch_rows=batch_rows,
                    max_rows=max_rows,
                    norm_limit=self.norm_limit,
                )

    def in_model(
        self,
        engine: "LocalEngine | HfEngine",
        layer: int,
        texts: Path | None,
        tiny_texts: int | None,
        *,
        seed: int,
        batch_size: int,
        problems: int,
    ) -> None:
        """The predictions of the texts, and the answers to the problems."""
        from r1sae_fast.evals import evaluate_all_answers, evaluate_all_in_model

        items, told = _texts(engine, texts, tiny_texts, seed)
        self.settings.update(
            model=engine.name, model_fingerprint=engine.fingerprint, **engine.describe()
        )
        self.settings.update(layer=layer, texts=told, problems=problems, seed=seed)
        found: Sequence[InModel] = evaluate_all_in_model(
            self.saes,
            engine,
            items,
            layer,
            mode=self.mode,
            batch_size=batch_size,
            norm_limit=self.norm_limit,
        )
        for part, one in zip(self.parts, found, strict=True):
            part["in_model"] = one
        if problems:
            from r1sae_fast.cli.tiny_r1 import show_progress

            answers: Sequence[Answers] = evaluate_all_answers(
                self.saes,
                engine,
                layer,
                count=problems,
                seed=seed,
                mode=self.mode,
                norm_limit=found[0].norm_limit,
                progress=show_progress,
            )
            for part, answer in zip(self.parts, answers, strict=True):
                part["answers"] = answer

    def entries(self, similarity: int) -> list[dict[str, Any]]:
        """What the report says of each."""
        from r1sae_fast.evals.decoder import decoder_similarity
        from r1sae_fast.evals.report import entry

        return [
            entry(
                name,
                sae,
                decoder=decoder_similarity(sae, max_features=similarity) if similarity else None,
                **part,
            )
            for name, sae, part in zip(self.names, self.saes, self.parts, strict=True)
        ]


@contextmanager
def _named(name: str) -> "Iterator[None]":
    """Errors say which SAE they are about."""
    from r1sae_fast.errors import NonFiniteError

    try:
        yield
    except ValueError as error:
        kind = NonFiniteError if isinstance(error, NonFiniteError) else ValueError
        raise kind(f"{name}: {error}") from None


def _texts(
    engine: "LocalEngine | HfEngine", texts: Path | None, tiny_texts: int | None, seed: int
) -> "tuple[list[Item], str]":
    """What is to be predicted, and how the report names it."""
    from itertools import islice

    from r1sae_fast.demo.traces import written
    from r1sae_fast.prompts import read_prompts

    if texts is not None and tiny_texts is not None:
        raise ValueError("give either --texts FILE or --tiny-texts N")
    if texts is not None:
        return list(read_prompts(texts)), str(texts)
    if tiny_texts is None and engine.name != "tiny-r1":
        raise ValueError("say what the model shall predict: --texts FILE")
    count = 64 if tiny_texts is None else tiny_texts
    traces = written(engine, held_out=True, seed=seed, slip_rate=0.25)
    return list(islice(traces, count)), f"{count} held-out traces of TinyR1, seed {seed}"


def _load(model: str, engine: Engines, dtype: Computed, device: str) -> "LocalEngine | HfEngine":
    import torch

    from r1sae_fast.r1 import HfEngine, LocalEngine

    kind = HfEngine if engine is Engines.hf else LocalEngine
    return kind.from_pretrained(model, dtype=getattr(torch, dtype.value), device=device)


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("eval", rich_help_panel="The chain")(evaluate)
