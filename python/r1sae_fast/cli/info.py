"""``r1sae info``: what is installed, what this machine offers, how the core was built."""

import os
import platform
from importlib import metadata

import typer

PACKAGES = ("numpy", "safetensors", "tokenizers", "duckdb", "huggingface_hub", "pyarrow")


def info() -> None:
    """Shows versions, CPU features and the build: paste it into a bug report."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts():
        table.add_row(name, value)
    Console().print(table)


def facts() -> list[tuple[str, str]]:
    """Name and value of everything that ``r1sae info`` shows."""
    from r1sae_fast import _core

    return [
        ("r1sae-fast", _core.__version__),
        ("core", "debug build (slow)" if _core.DEBUG_BUILD else "release build"),
        ("cpu", f"{platform.machine()}, {os.cpu_count()} logical cores"),
        ("simd", _simd()),
        ("encoding", _encoding()),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("system", platform.platform()),
        *_torch_facts(),
        *((name, _version(name)) for name in PACKAGES),
    ]


def _simd() -> str:
    """The level in use, and the others this CPU has."""
    from r1sae_fast import _core

    try:
        active, available = _core.simd_info()
    except ValueError as error:  # R1SAE_SIMD names a level that is not there
        return str(error)
    others = [level for level in available if level != active]
    return f"{active} in use" + (f" (also here: {', '.join(others)})" if others else "")


def _encoding() -> str:
    """How codes of large SAEs are computed on this CPU."""
    try:
        from r1sae_fast import _core, ops

        kind, kernel = ops.best_screen()
        kernels, of_bf16 = (", ".join(_core.screen_kernels(kind)[1]) for kind in ("int8", "bf16"))
    except (
        ImportError,
        ValueError,
    ) as error:  # no torch; R1SAE_SIMD names a level that is not there
        return str(error)
    chosen = f"{kind} screen by {kernel}" if kernel else "dense products, no screen"
    return f"{chosen} (8-bit products here: {kernels}; of bf16: {of_bf16})"


def _torch_facts() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        return [("torch", f"can't be imported: {error}")]
    if torch.cuda.is_available():
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        devices = "none"
    return [
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("gpu", devices),
    ]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def register(app: typer.Typer) -> None:
    """Adds the command to the root app."""
    app.command("info", rich_help_panel="About")(info)
