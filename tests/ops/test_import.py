"""What using the operations costs and survives in a process of its own."""

import subprocess
import sys

_LIGHT = """
import sys, torch
from r1sae_fast import FastSAE
sae = FastSAE(8, 16, 2)
sae(torch.randn(3, 8))[0].sum().backward()
sae.save(sys.argv[1])
FastSAE.load(sys.argv[1]).encode(torch.randn(3, 8))
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_use_imports_torchs_compiler(tmp_path: object) -> None:
    """It would cost seconds at the first call."""
    assert run(_LIGHT, str(tmp_path)) == "[]"


_FORK = """
import os, warnings
warnings.simplefilter("ignore")
import torch
from r1sae_fast import ops
torch.set_num_threads(2)
pre = torch.randn(64, 9000)
before = ops.batch_topk(pre, 30)  # starts Rust's threads
child = os.fork()
if child == 0:
    # Here they don't exist: whoever waits for them waits for ever.
    after = ops.batch_topk(pre, 30)
    os._exit(0 if torch.equal(after.indices, before.indices) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_does_not_hang() -> None:
    assert run(_FORK) == "0"
