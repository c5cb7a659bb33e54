"""read_train_file() and ``r1sae train run.toml``: keys, types, what the command line overrides."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1sae_fast import FastSAE
from r1sae_fast.cli.main import app
from r1sae_fast.shards import ActivationShards
from r1sae_fast.train import TrainConfig, read_train_file
from r1sae_fast.train.engine_settings import EngineSettings


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_setting(tmp_path: Path) -> None:
    config = TrainConfig(
        d_sae=64, k=4, mode="matryoshka", tied=True, tokens=100, batch_size=7, learning_rate=0.5,
        beta1=0.5, beta2=0.75, adam="sparse", compute_dtype="bfloat16",
        warmup=0.25, decay=0.125, gradient_clip=2.0,
        aux_coefficient=0.5, aux_k=9, dead_after_tokens=11, threshold_decay=0.5,
        outlier_factor=3.0, seed=12, matryoshka_widths=(3, 64),
    )  # fmt: skip
    lines = [
        f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for name, value in config.to_dict().items()
        if value is not None
    ]
    assert len(lines) == 22  # all but those of other modes
    path = write(tmp_path / "run.toml", "\n".join(["shards = 'a'", "out = '/b'", *lines]))
    file = read_train_file(path)
    assert file.config == config
    assert file.shards == tmp_path / "a"
    assert file.out == Path("/b")
    assert (file.device, file.checkpoint_seconds, file.evaluate_rows) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("d_sea = 4", "unknown key 'd_sea'; did you mean 'd_sae'?"),
        ("zzzz = 4", "unknown key 'zzzz'; expected some of shards, out, .* d_sae, "),
        ("d_sae = 4", "lacks shards, out"),
        ("shards = 'a'\nout = 'b'\nd_sae = 4\nk = 5", "k is 5, more than d_sae = 4"),
        ("shards = 'a'\nout = 3\nd_sae = 4\nk = 2", "out is 3; expected a folder's name"),
        (
            "shards = 'a'\nout = 'b'\nd_sae = 4\nk = 2\nevaluate_rows = true",
            "evaluate_rows is True; expected an int",
        ),
        ("[sae]\nd_sae = 4", "unknown key 'sae'"),
        ("d_sae == 4", "not a TOML file: .*line 1"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", text)
    with pytest.raises((TypeError, ValueError), match=f"run.toml: {words}"):
        read_train_file(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"d_sae = \xff")
    with pytest.raises(ValueError, match="not a TOML file"):
        read_train_file(tmp_path / "run.toml")
    with pytest.raises(FileNotFoundError):
        read_train_file(tmp_path / "none.toml")


def test_the_command(shards: ActivationShards, tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.toml",
        f"shards = '{shards.folder}'\nout = 'sae'\nd_sae = 64\nk = 4\ntokens = 2000\n"
        "batch_size = 500\nwarmup = 0.5\nevaluate_rows = 100\n",
    )
    run = CliRunner().invoke(app, ["train", str(path)])
    assert run.exit_code == 0, run.output
    assert "on 100 of its rows" in run.output
    sae = FastSAE.load(tmp_path / "sae")
    assert (sae.d_sae, sae.k) == (64, 4)
    assert sae.metadata["training"]["warmup"] == 0.5
    out = tmp_path / "other"
    run = CliRunner().invoke(app, ["train", str(path), str(out), "-k", "3", "--evaluate-rows", "0"])
    assert run.exit_code == 0, run.output
    assert "rows: FVU" not in run.output
    assert FastSAE.load(out).k == 3
    run = CliRunner().invoke(app, ["train", str(shards.folder)])
    assert run.exit_code == 1
    assert "give the folder for the SAE" in run.output


def test_tables(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.toml",
        "out = 'b'\nlog = ['tensorboard']\n[data]\nengine = 'tiny-r1'\ntexts = 'texts.jsonl'\n"
        "layer = 1\nbuffer_rows = 4096\n[sweep]\nd_sae = [64, 128]\nk = [4, 8]\n",
    )
    file = read_train_file(path)
    assert file.shards is None
    assert file.data == EngineSettings("tiny-r1", "texts.jsonl", 1, buffer_rows=4096)
    assert file.log == ("tensorboard",)
    assert file.sweep is not None
    assert list(file.sweep) == ["d_sae=64,k=4", "d_sae=64,k=8", "d_sae=128,k=4", "d_sae=128,k=8"]
    assert file.sweep["d_sae=128,k=4"] == TrainConfig(128, 4, data_seed=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[data]\nengine = 'a'", r"\[data\] lacks texts"),
        ("[data]\nengin = 'a'", r"unknown key 'engin' in \[data\]; did you mean 'engine'"),
        ("[data]\nengine = 'a'\ntexts = 'b'\nlayer = 'c'", r"\[data\]: layer is 'c'; expected an"),
        (
            "[data]\nengine = 'a'\ntexts = 'b'\nlayer = 1\ndtype = 'int8'",
            r"\[data\]: dtype is 'int8'; expected one of bfloat16, float32",
        ),
        ("shards = 'a'\n[data]\nengine = 'a'", r"has both shards and \[data\]"),
        ("shards = 'a'\n[sweep]\nkk = [1]", "unknown key 'kk' in the sweep"),
        ("shards = 'a'\n[sweep]\nk = 1", "k of the sweep is 1; expected a list"),
        ("shards = 'a'\nsweep = 1", r"sweep is 1; expected a table, \[sweep\]"),
    ],
)
def test_bad_tables(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", f"out = 'b'\nd_sae = 4\nk = 2\n{text}")
    with pytest.raises((TypeError, ValueError), match=f"run.toml: {words}"):
        read_train_file(path)


def test_the_command_with_an_engine_and_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("".join(f"{a} plus {b}\n" for a in "123" for b in "456789"))
    path = write(
        tmp_path / "run.toml",
        "out = 'saes'\ntokens = 300\nbatch_size = 50\nd_sae = 64\n[data]\nengine = 'tiny-r1'\n"
        "texts = 'texts.txt'\nlayer = 1\nbuffer_rows = 100\nbatch_size = 4\n[sweep]\nk = [2, 3]\n",
    )
    run = CliRunner().invoke(app, ["train", str(path)])
    assert run.exit_code == 0, run.output
    assert run.output.count("time: data ") == 2
    assert [FastSAE.load(tmp_path / "saes" / f"k={k}").k for k in (2, 3)] == [2, 3]


def test_a_device_that_there_is_not(tmp_path: Path) -> None:
    text = "shards = 'a'\nout = 'b'\nd_sae = 4\nk = 2\ndevice = 'cudaa'\n"
    run = CliRunner().invoke(app, ["train", str(write(tmp_path / "run.toml", text))])
    assert run.exit_code == 1
    assert "device is 'cudaa', which torch does not know" in run.stderr
