"""The picture of findings that have hardly any."""

from pathlib import Path

import pytest

from r1sae_fast.demo.detect import Detector
from r1sae_fast.demo.findings import Findings
from r1sae_fast.demo.picture import write_picture


@pytest.mark.parametrize("fvu", [1e-3, 0.5])
@pytest.mark.parametrize("strengths", [([0.0], [0.0, 0.0]), ([2.0], [2.0]), ([1.0, 3.0], [0.0])])
@pytest.mark.parametrize("density", [[1.0, 1.0], [0.0], [0.001, 0.2]])
def test_all_alike(
    tmp_path: Path, fvu: float, strengths: tuple[list[float], list[float]], density: list[float]
) -> None:
    detector = Detector(
        moment="result", feature=3, auroc=0.5, low=0.4, high=0.6, auroc_where_chosen=0.5,
        probe_auroc=0.5, wrong=1, right=1, fires_on_wrong=0.0, fires_on_right=0.0,
    )  # fmt: skip
    findings = Findings(
        settings={}, reasoning={}, trace=None, sae={"fvu_batch_topk": fvu}, features=[],
        detectors=[detector], headline=0, detector_features=[],
        training=[{"tokens": 10.0, "fvu": fvu, "dead_fraction": 0.0}] * 2, density=density,
        wrong_strengths=strengths[0], right_strengths=strengths[1],
    )  # fmt: skip
    write_picture(findings, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
