"""The root command: help, version, and that every command has a help page."""

import re

import pytest
import typer
from typer.testing import CliRunner

import r1sae_fast
from r1sae_fast.cli.main import RootGroup, app

runner = CliRunner()


def command_paths() -> list[tuple[str, ...]]:
    """Every command and group below the root, by its path."""
    paths: list[tuple[str, ...]] = []

    def walk(command: object, path: tuple[str, ...]) -> None:
        for name, child in getattr(command, "commands", {}).items():
            paths.append((*path, name))
            walk(child, (*path, name))

    walk(typer.main.get_command(app), ())
    return paths


def names_in_order() -> list[str]:
    """The commands below the root in the order of the help page."""
    root = typer.main.get_command(app)
    assert isinstance(root, RootGroup)
    return root.list_commands(None)


@pytest.mark.parametrize("path", command_paths(), ids=" ".join)
def test_every_command_has_a_help_page(path: tuple[str, ...]) -> None:
    result = runner.invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    assert f"Usage: r1sae {' '.join(path)}" in result.stdout


def test_help_names_every_command() -> None:
    result = runner.invoke(app, ["-h"])
    assert result.exit_code == 0
    first_words = re.findall(r"^[|│] ([a-z][\w-]*) ", result.stdout, re.MULTILINE)
    assert [word for word in first_words if word in names_in_order()] == names_in_order()
    assert set(names_in_order()) == {path[0] for path in command_paths()}


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"r1sae {r1sae_fast.__version__}\n"


def test_info_names_what_a_bug_report_needs() -> None:
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    for name in ("r1sae-fast", "core", "cpu", "simd", "python", "torch", "duckdb"):
        assert f"{name} " in result.stdout
    assert "not installed" not in result.stdout
