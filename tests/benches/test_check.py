"""``make bench-check`` can fail: a path made slower is found, and the machine's noise is not."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import check, machine, results
from harness.compare import Ratio, compare, read_baseline, write_baseline
from harness.timing import Budget, Result, in_turns

BENCH = """
import os, types
import harness.timing
now = [0.0]  # a clock of its own: a loaded machine's sleeps are longer than asked for
harness.timing.time = types.SimpleNamespace(perf_counter=lambda: now[0])
def sleep(seconds):
    now[0] += seconds
def test_fake(versus):
    flag = os.environ.get("FAKE_SLOW_ONCE")
    slow = os.environ.get("FAKE_SLOW") == "1"
    if flag and os.path.exists(flag):
        os.remove(flag)
        slow = True
    ours = 0.06 if slow else 0.03
    versus("fake", ours=lambda: sleep(ours), torch=lambda: sleep(0.09), rounds=7)
"""


def table(**ratios: float) -> list[dict[str, Any]]:
    """Results as a run gives them, of a reference that takes that many times as long as ours."""
    return [
        Result(name, {"ours": [1.0] * 5, "torch": [ratio] * 5}).summary()
        for name, ratio in ratios.items()
    ]


def baseline_of(**ratios: float) -> dict[str, Ratio]:
    return {name: Ratio(ratio, ratio) for name, ratio in ratios.items()}


@pytest.mark.parametrize(
    ("ratio", "mark"),
    [(5.0, "ok"), (4.01, "ok"), (3.99, "slow"), (3.51, "slow"), (3.49, "SLOW"), (9, "ok")],
)
def test_a_fifth_is_told_and_beyond_chance_it_fails(ratio: float, mark: str) -> None:
    (verdict,) = compare(table(a=ratio), {"a": Ratio(5.0, 5.0, spread=0.1)})
    assert verdict.slow == (mark != "ok")
    assert verdict.failed == (mark == "SLOW")
    assert verdict.line().split()[0] == mark


def test_one_measure_alone_does_not_fail() -> None:
    """A slower path shows in the median and in the best round; noise in one of them."""
    (result,) = table(a=5.0)
    result["ratio"]["torch"] = 2.0
    assert not compare([result], baseline_of(a=5.0))[0].failed
    result["best_ratio"]["torch"] = 2.0
    assert compare([result], baseline_of(a=5.0))[0].failed


def test_new_and_gone() -> None:
    new, gone = compare(table(b=1.0), baseline_of(a=5.0))
    assert not new.failed
    assert "new" in new.line()
    assert gone.failed
    assert "GONE" in gone.line()


def test_a_contest_of_the_disk_is_not_compared() -> None:
    (result,) = table(a=1.0)
    result["compared"] = False
    assert compare([result], {}) == []


def test_a_sleep_in_an_operation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("harness.timing.time", clock)

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def contest(seconds: float) -> dict[str, Any]:
        calls = {"ours": lambda: sleep(seconds), "torch": lambda: sleep(0.006)}
        return in_turns("op", calls, Budget(rounds=7)).summary()

    baseline = {"op": Ratio.of(contest(0.002))}
    assert not compare([contest(0.002)], baseline)[0].failed
    assert compare([contest(0.004)], baseline)[0].failed


def test_a_slow_round_does_not_move_the_ratio() -> None:
    result = Result("a", {"ours": [1.0, 1.0, 9.0, 1.0, 1.0], "torch": [3.0, 3.0, 3.0, 20.0, 3.0]})
    assert result.ratio() == 3.0
    assert result.line() == "a: ours 1 s | torch 3 s = 3.00x"


def test_ours_is_asked_for() -> None:
    with pytest.raises(ValueError, match="no contender is called 'ours'"):
        in_turns("op", {"torch": lambda: None})


def test_baseline_is_the_median_of_runs(tmp_path: Path) -> None:
    runs = [
        {"machine": machine.facts(), "when": "now", "results": table(a=ratio)}
        for ratio in (4.0, 9.0, 5.0)
    ]
    write_baseline(tmp_path / "b.json", runs)
    # The worst of the runs, 4.0, had lost a fifth of the median.
    assert read_baseline(tmp_path / "b.json") == {"a": Ratio(5.0, 5.0, spread=0.2)}
    facts = json.loads((tmp_path / "b.json").read_text())["machine"]
    assert {"cpu", "class", "threads", "torch"} <= facts.keys()
    assert {"name", "features"} <= facts["cpu"].keys()


def test_runs_that_differ_make_no_baseline(tmp_path: Path) -> None:
    runs = [
        {"machine": machine.facts(), "when": "now", "results": table(a=ratio)}
        for ratio in (2.0, 5.0, 5.0)
    ]
    with pytest.raises(ValueError, match="a: runs differ by 60%"):
        write_baseline(tmp_path / "b.json", runs)
    assert not (tmp_path / "b.json").exists()


def test_not_a_baseline(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match="is no baseline"):
        read_baseline(tmp_path / "b.json")
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no bench results"):
        results.read(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("features", "tier"),
    [
        (["avx2", "fma", "avx512bw", "avx512_vnni", "amx_int8", "amx_bf16"], "amx"),
        (["avx2", "fma", "avx512bw", "avx512_vnni"], "avx512vnni"),
        (["avx2", "fma"], "avx2"),
        (["asimd"], "neon"),
        ([], "plain"),
    ],
)
def test_cpu_class(features: list[str], tier: str) -> None:
    facts = {"vendor": "GenuineIntel", "family": "6", "model": "143", "features": features}
    assert machine.cpu_class(facts, 2) == f"genuineintel-6-143-{tier}-2t"


@pytest.mark.slow
def test_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The program, on a bench of its own: without a baseline, once slower, slower."""
    benches = tmp_path / "benches"
    baselines = benches / "baselines"
    baselines.mkdir(parents=True)
    (benches / "conftest.py").write_text("from harness.plugin import *\n")
    (benches / "test_fake.py").write_text(BENCH)
    # Whatever else runs on this machine: sleeps don't mind.
    arguments = [str(benches), "--baselines", str(baselines), "--busy", "1"]

    assert check.main(arguments) == 0
    assert "no baseline for this CPU class" in capfd.readouterr().out
    (recorded,) = (benches / "results").iterdir()
    recorded.rename(baselines / recorded.name)  # what it records is a baseline

    flag = tmp_path / "slow-once"
    flag.touch()
    monkeypatch.setenv("FAKE_SLOW_ONCE", str(flag))
    assert check.main(arguments) == 0
    output = capfd.readouterr().out
    assert "once more" in output
    assert "all well" in output

    monkeypatch.setenv("FAKE_SLOW", "1")
    assert check.main(arguments) == 1
    assert "SLOW  small: fake" in capfd.readouterr().out

    # A busy machine tells nothing; another torch is another reference.
    assert check.main([*arguments[:-1], "-1"]) == 0
    assert "that tells nothing" in capfd.readouterr().out
    (baseline,) = baselines.iterdir()
    content = json.loads(baseline.read_text())
    content["machine"]["torch"] = "1.13.1"
    baseline.write_text(json.dumps(content))
    assert check.main(arguments) == 0
    assert "made with torch 1.13" in capfd.readouterr().out


def test_the_share_of_others() -> None:
    """A part of the whole, whatever else runs."""
    with machine.OthersShare() as others:
        start = time.process_time()
        while time.process_time() - start < 0.2:
            pass
    assert 0.0 <= others.share <= 1.0
