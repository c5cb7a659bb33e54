"""See the package: `prepare`, then `run`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
_BEFORE, _AFTER = 5, 5  # tokens around an example of SAEDashboard's


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dashboards", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    first = verbs.add_parser("prepare")
    first.add_argument("demo", type=Path)
    first.add_argument("work", type=Path)
    first.add_argument("--windows", type=int, default=2048)
    second = verbs.add_parser("run")
    second.add_argument("work", type=Path)
    second.add_argument("--sae-dashboard", metavar="PYTHON")
    second.add_argument("--delphi", metavar="PYTHON")
    second.add_argument("--features", type=int, help="SAEDashboard's; default: all")
    given = parser.parse_args()
    if given.verb == "prepare":
        from dashboards.data import prepare

        prepare(given.demo, given.work, given.windows)
        return
    ours = run([sys.executable, str(HERE / "ours.py"), str(given.work)])
    print(f"ours           {tell(ours)}", flush=True)
    rows = dict(np.load(given.work / "ours.npz"))
    if given.sae_dashboard:
        count = given.features or ours["features"]
        command = [given.sae_dashboard, str(HERE / "sae_dashboard_run.py")]
        theirs = run([*command, str(given.work), str(count)])
        print(f"SAEDashboard   {tell(theirs)}: {ratios(theirs, ours)}")
        print(f"               {compare(rows, given.work, 'sae_dashboard', by_window=False)}")
    if given.delphi:
        theirs = run([given.delphi, str(HERE / "delphi_run.py"), str(given.work)])
        print(f"delphi         {tell(theirs)}: {ratios(theirs, ours)}")
        print(f"               {compare(rows, given.work, 'delphi', by_window=True)}")


def run(command: list[str]) -> dict[str, Any]:
    """A tool's own line about itself."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def tell(told: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {s:.2f}" for name, s in told.get("parts", {}).items())
    return f"{told['seconds']:.2f} s, {told['features']} features{f' ({parts})' if parts else ''}"


def ratios(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Their time a feature beside ours, of the database alone and with the pages."""
    theirs_each, database = theirs["seconds"] / theirs["features"], ours["parts"]
    alone = (database["encode"] + database["build"]) / ours["features"]
    whole = ours["seconds"] / ours["features"]
    return (
        f"a feature {theirs_each / alone:.1f}x our database, {theirs_each / whole:.1f}x our pages"
    )


def compare(rows: dict[str, Any], work: Path, name: str, *, by_window: bool) -> str:
    """Of how many features the top examples are the same: strengths and the tokens around them.

    delphi takes a window once, by its strongest token; SAEDashboard takes tokens, but those near a
    window's ends. Strengths are equal but for rounding (delphi stores float16); where they tie
    within it at the last place, either example will do.
    """
    from safetensors.numpy import load_file

    theirs = np.load(work / f"{name}.npz")
    tokens = load_file(work / "data.safetensors")["tokens"]
    strengths, shown = theirs["strengths"], theirs["tokens"].astype(tokens.dtype)
    places = np.arange(tokens.shape[1]) if by_window else np.arange(-_BEFORE, _AFTER + 1)
    if not by_window:
        inside = (rows["token_idx"] > _BEFORE) & (rows["token_idx"] < tokens.shape[1] - _AFTER)
        rows = {key: column[inside] for key, column in rows.items()}
    starts = np.searchsorted(rows["feature_id"], np.arange(len(strengths) + 1))
    same = examples = 0
    for feature in range(len(strengths)):
        part = slice(starts[feature], starts[feature + 1])
        sequence, at, strength = (rows[k][part] for k in ("sequence_id", "token_idx", "strength"))
        if by_window:  # the strongest of each
            first = np.sort(np.unique(sequence, return_index=True)[1])
            sequence, at, strength = sequence[first], 0 * at[first], strength[first]
        top = min(strengths.shape[1], len(strength))
        found = np.sort(strengths[feature, :top])[::-1]
        # A unit of float16's eleven bits; four decimals; and sums of 256 products in float32.
        tolerance = 2.0**-10 * strength[:top] + 1e-3
        edge = strength[top - 1] + tolerance[-1] if top else 0.0
        around = [tokens[s, a + places].tobytes() for s, a in zip(sequence, at, strict=True)]
        wanted = {text for text, value in zip(around, strength, strict=True) if value > edge}
        last = edge - 3 * tolerance[-1] if top else 0.0
        allowed = {text for text, value in zip(around, strength, strict=True) if value >= last}
        got = {window.tobytes() for window in shown[feature, :top]}
        equal = bool((np.abs(found - strength[:top]) <= tolerance).all())
        same += equal and wanted <= got <= allowed
        examples += top
    return f"the same top examples of {same} of {len(strengths)} features, {examples} in all"


if __name__ == "__main__":
    main()
