"""What lies where in the public bucket (github.com/goodfire-ai/r1-interpretability, README.md)."""

from __future__ import annotations

BUCKET = "goodfire-r1-features"
REGION = "us-east-1"
ENDPOINT_VARIABLE = "R1SAE_S3_ENDPOINT"
"""The environment's endpoint, for mirrors; else Amazon's."""

SETS = ("logic", "math")
SAMPLES = {"0.1%": "-0-1", "1%": "-1", "10%": "-10", "full": ""}


def keys(name: str, sample: str | None, *, labels: bool = True) -> list[str]:
    """The objects of a database: a sample of its tokens (None: none), and its labels.

    Raises:
        ValueError: no such database or sample.
    """
    if name not in SETS:
        raise ValueError(f"no released database {name!r}; expected {' or '.join(SETS)}")
    if sample is not None and sample not in SAMPLES:
        raise ValueError(f"no sample {sample!r}; expected one of {', '.join(SAMPLES)}")
    # Labels first: they are small, and no database is complete without them.
    found = [f"{name}/autointerp.db"] if labels else []
    return found if sample is None else [*found, f"{name}/{name}{SAMPLES[sample]}.ddb"]
