"""User errors are one line, ctrl-c exits 130 and says how to go on, bugs keep their traceback."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner, Result

from r1sae_fast.cli.guard import GuardedGroup
from r1sae_fast.cli.main import app, root
from r1sae_fast.errors import NonFiniteError, R1SaeError, ShardError

runner = CliRunner()


def invoke(raise_it: Callable[[], None], *options: str) -> Result:
    """Runs a command that does `raise_it` below the real root command."""
    group = typer.Typer(cls=GuardedGroup, pretty_exceptions_enable=False)
    group.callback()(root)
    group.command("harvest")(raise_it)
    return runner.invoke(group, [*options, "harvest"])


@pytest.mark.parametrize(
    "error",
    [
        R1SaeError("shard-000003.safetensors: truncated [red]"),
        ShardError("a"),
        NonFiniteError("row 3 is NaN"),
        ValueError("k is 9, but d_sae is 8"),
        FileNotFoundError(2, "No such file or directory", "acts"),
        PermissionError(13, "Permission denied", "acts"),
    ],
)
def test_user_errors_are_one_line_on_stderr(error: Exception) -> None:
    def fail() -> None:
        raise error

    result = invoke(fail)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"error: {error}\n"


def test_an_error_without_a_message_names_its_type() -> None:
    def fail() -> None:
        raise ValueError

    assert invoke(fail).stderr == "error: ValueError\n"


def test_nothing_in_a_message_moves_the_cursor() -> None:
    def fail() -> None:
        raise ValueError("it has \x1b]0;title\x07\x1b[2J\r\u202etables")

    assert invoke(fail).stderr == "error: it has ␛]0;title␇␛[2J␍⟨U+202E⟩tables\n"


def test_a_long_line_is_not_wrapped() -> None:
    def fail() -> None:
        raise ValueError("x " * 300)

    assert invoke(fail).stderr.count("\n") == 1


def test_traceback_option_raises() -> None:
    def fail() -> None:
        raise ValueError("k is 9")

    assert isinstance(invoke(fail, "--traceback").exception, ValueError)


def test_traceback_variable_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("k is 9")

    monkeypatch.setenv("R1SAE_TRACEBACK", "1")
    assert isinstance(invoke(fail).exception, ValueError)


def test_bugs_keep_their_traceback() -> None:
    def fail() -> None:
        raise ZeroDivisionError("a bug of ours")

    result = invoke(fail)
    assert isinstance(result.exception, ZeroDivisionError)
    assert "error:" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["harvest", "--out", "my acts"],
            "same command goes on: r1sae harvest --out 'my acts'",
        ),
        (["tiny-r1", "train"], "same command goes on: r1sae tiny-r1 train"),
        (["info"], "interrupted\n"),
    ],
)
def test_ctrl_c_exits_130_and_says_how_to_go_on(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["r1sae", *arguments])
    result = invoke(fail)
    assert result.exit_code == 130
    assert line in result.stderr


def test_a_real_sigint_to_a_real_process() -> None:
    code = (
        "import sys, time, typer\n"
        "from r1sae_fast.cli.guard import GuardedGroup\n"
        "app = typer.Typer(cls=GuardedGroup)\n"
        "app.callback()(lambda: None)\n"
        "@app.command('harvest')\n"
        "def harvest() -> None:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "app(['harvest'])"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=1800)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m r1sae_fast.cli.main info | head -n 1"
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=1800, check=True
    )
    assert result.stderr == ""
    assert result.stdout.startswith("r1sae-fast")


def test_usage_errors_exit_2() -> None:
    result = runner.invoke(app, ["no-such-command"])
    assert result.exit_code == 2
    assert "no-such-command" in result.stderr
