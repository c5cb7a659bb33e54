"""Which machine this is: what a result must say so that another can be compared with it."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

FEATURES = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
# The first that a CPU has names its class: what decides which path is taken.
TIERS = (
    ("amx", {"amx_int8", "amx_bf16"}),
    ("avx512vnni", {"avx512bw", "avx512_vnni"}),
    ("avx512", {"avx512bw"}),
    ("avx2", {"avx2", "fma"}),
    ("i8mm", {"i8mm"}),
    ("neon", {"asimd"}),
)


class OthersShare:
    """What part of the CPUs' time others took while the block ran: other programs, and the host of
    a virtual machine. 0 where the system doesn't tell (all but Linux)."""

    def __init__(self) -> None:
        self.share = 0.0

    def __enter__(self) -> OthersShare:
        self._before = _cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        after = _cpu_seconds()
        assert after is not None
        all_, busy, ours = (now - then for now, then in zip(after, self._before, strict=True))
        self.share = max(0.0, busy - ours) / all_ if all_ > 0 else 0.0


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds of all CPUs: that have passed, that something ran or was held up by the host, and
    that this process and its finished children ran."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user.
    fields = [int(word) for word in path.read_text().split("\n", 1)[0].split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    ours = os.times()
    mine = ours.user + ours.system + ours.children_user + ours.children_system
    return sum(fields) / tick, (sum(fields) - sum(fields[3:5])) / tick, mine


def cpu() -> dict[str, Any]:
    """Vendor, family, model, name, and the features of :data:`FEATURES` that this CPU has."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        first = path.read_text().split("\n\n", 1)[0]
        for line in first.splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "vendor": fields.get("vendor_id") or fields.get("CPU implementer") or platform.system(),
        "family": fields.get("cpu family") or fields.get("CPU architecture") or "",
        "model": fields.get("model") or fields.get("CPU part") or platform.machine(),
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in FEATURES if name in flags],
        "cores": os.cpu_count(),
    }


def facts() -> dict[str, Any]:
    """Everything about the machine and the software that a ratio may depend on."""
    from r1sae_fast import __version__, ops

    return {
        "cpu": cpu(),
        "class": cpu_class(),
        "threads": torch.get_num_threads(),
        "simd": ops.simd_info().active,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "r1sae_fast": __version__,
    }


def cpu_class(cpu_facts: dict[str, Any] | None = None, threads: int | None = None) -> str:
    """The name under which ratios are comparable: ``genuineintel-6-167-amx-2t``."""
    found = cpu() if cpu_facts is None else cpu_facts
    threads = torch.get_num_threads() if threads is None else threads
    features = set(found["features"])
    tier = next((name for name, needed in TIERS if needed <= features), "plain")
    parts = [str(found["vendor"]), str(found["family"]), str(found["model"]), tier, f"{threads}t"]
    words = (re.sub(r"[^a-z0-9]+", "_", part.lower()).strip("_") for part in parts)
    return "-".join(word for word in words if word)
