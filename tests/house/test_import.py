"""``import r1sae_fast`` is silent, quick, leaves torch alone, and every public name loads."""

import importlib
import subprocess
import sys

import pytest

import r1sae_fast

# What a program that only imports the package (or asks for --help) must not pay for.
HEAVY = ("torch", "numpy", "transformers", "duckdb", "matplotlib", "pyarrow", "huggingface_hub")


def run_python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)


@pytest.mark.parametrize("module", ["r1sae_fast", "r1sae_fast.cli.main"])
def test_import_is_silent_and_light(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    result = run_python(code, "-W", "error")
    assert result.stdout == ""
    assert result.stderr == ""


def test_every_public_name_loads_and_is_listed() -> None:
    assert set(r1sae_fast.__all__) <= set(dir(r1sae_fast))
    for name in r1sae_fast.__all__:
        assert getattr(r1sae_fast, name) is not None


def test_the_lazy_table_tells_where_each_name_is_defined() -> None:
    for name, module in r1sae_fast._LAZY.items():
        assert name in r1sae_fast.__all__
        assert getattr(r1sae_fast, name) is getattr(importlib.import_module(module), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'FastSAEE'"):
        r1sae_fast.FastSAEE  # noqa: B018


def test_a_debug_build_warns_at_import() -> None:
    code = (
        "import sys, types\n"
        "core = types.ModuleType('r1sae_fast._core')\n"
        "core.__version__, core.DEBUG_BUILD = '0', True\n"
        "sys.modules['r1sae_fast._core'] = core\n"
        "import r1sae_fast"
    )
    assert "debug build" in run_python(code).stderr


def test_the_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert r1sae_fast.__version__ == version("r1sae-fast")
