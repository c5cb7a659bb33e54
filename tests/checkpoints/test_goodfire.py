"""The release's files against the release's arithmetic, and against what is no such file."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from r1sae_fast import load_logic_sae, load_math_sae
from r1sae_fast.checkpoints import load_goodfire_sae
from r1sae_fast.errors import CheckpointError

# A folder with the release's math/ and logic/ .pt files (1.2 GB), where someone has them.
RELEASED = os.environ.get("R1SAE_RELEASED_SAES", "")
SAMPLE = Path(__file__).parents[2].parent / "shared" / "data" / "sample_acts.pt"


def released_encode(state: dict[str, torch.Tensor], x: torch.Tensor, k: int) -> torch.Tensor:
    """What the release's SAE is described to do: relu, then the k * rows largest of the whole
    flattened tensor. Which of several equal values torch.topk takes is not said."""
    post = torch.relu(x.to(state["W"].dtype) @ state["W"] + state["b_enc"])
    rows = post.numel() // post.shape[-1]
    top = post.reshape(-1).topk(k * rows)
    return (
        torch.zeros(post.numel(), dtype=post.dtype)
        .scatter(0, top.indices, top.values)
        .view(post.shape)
    )


def released_decode(state: dict[str, torch.Tensor], codes: torch.Tensor) -> torch.Tensor:
    return codes @ state["W"].T + state["b_dec"]


def state_of(d_in: int, d_sae: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Multiples of 1/8: products and sums are exact, so that memory layout can't move a bit."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.randint(-8, 9, shape, generator=generator) / 8).to(dtype)

    return {"W": numbers(d_in, d_sae), "b_enc": numbers(d_sae), "b_dec": numbers(d_in)}


def save(state: Any, folder: Path, **options: Any) -> Path:
    path = folder / "DeepSeek-R1-SAE-l37.pt"
    torch.save(state, path, **options)
    return path


def assert_same_codes(found: torch.Tensor, released: torch.Tensor, rows: int, k: int) -> None:
    """Equal to the index, but for the choice among values equal to the weakest code."""
    assert found.shape == released.shape
    edge = released[released > 0].min() if bool((released > 0).any()) else torch.tensor(0.0)
    different = found != released
    assert bool(((found[different] == edge) | (released[different] == edge)).all())
    assert torch.equal(found.flatten().sort().values, released.flatten().sort().values)
    assert int((found > 0).sum()) <= k * rows


leading_shapes = st.lists(st.integers(1, 4), max_size=2).map(tuple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(leading=leading_shapes, k=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_codes_equal_the_release(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    leading: tuple[int, ...],
    k: int,
    seed: int,
) -> None:
    state = state_of(16, 40, dtype, seed)
    sae = load_goodfire_sae(save(state, tmp_path_factory.mktemp("sae")), k)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randint(-8, 9, (*leading, 16), generator=generator) / 8
    released = released_encode(state, x, k)
    rows = x.numel() // 16
    with torch.no_grad():
        assert_same_codes(sae.encode(x), released, rows, k)
        decoded = sae.decode(released)
        sparse = sae(x)[0]
    assert torch.equal(decoded, released_decode(state, released))
    assert sparse.shape == x.shape


@pytest.mark.parametrize(
    ("loader", "k", "dtype"),
    [(load_math_sae, 128, torch.bfloat16), (load_logic_sae, 64, torch.float32)],
)
def test_the_two_loaders_have_the_releases_defaults(
    tmp_path: Path, loader: Any, k: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    d_in, d_sae = 256, 2048
    state = {
        "W": (torch.randn(d_in, d_sae) / 16).to(dtype),
        "b_enc": (torch.randn(d_sae) / 10).to(dtype),
        "b_dec": torch.randn(d_in).to(dtype),
    }
    sae = loader(save(state, tmp_path))
    assert (sae.k, sae.mode, sae.tied, sae.dtype) == (k, "batch_topk", True, dtype)
    assert torch.equal(sae.W_enc, state["W"])
    assert sae.W_dec.is_contiguous()
    x = torch.randn(3, 5, d_in)
    with torch.no_grad():
        found, released = sae.encode(x), released_encode(state, x, k)
        pre = (x.to(dtype) @ state["W"] + state["b_enc"]).double()
    # Random weights: memory layout moves last bits, so codes may differ within these of the edge.
    edge = released[released > 0].min().double()
    near = (pre - edge).abs() <= 2 * torch.finfo(dtype).eps * pre.abs().max()
    different = (found > 0) != (released > 0)
    assert bool(near[different].all())
    assert int(different.sum()) <= 0.05 * k * 15
    torch.testing.assert_close(found[~different], released[~different])
    reconstruction = sae.decode(released).detach()
    exact = released_decode({name: t.double() for name, t in state.items()}, released.double())
    torch_error = (released_decode(state, released).double() - exact).abs().max()
    assert (reconstruction.double() - exact).abs().max() <= 4 * torch_error


def test_dtype_and_legacy_format(tmp_path: Path) -> None:
    state = state_of(8, 100, torch.float32, 0)
    path = save(state, tmp_path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_logic_sae(path).W_enc, state["W"])
    assert load_logic_sae(str(path), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_logic_sae(save(OrderedDict(state), tmp_path)).d_sae == 100
    assert load_goodfire_sae(path, 4).k == 4
    with pytest.raises(ValueError, match="k is 101"):
        load_goodfire_sae(path, 101)


def test_the_file_is_not_written_by_training(tmp_path: Path) -> None:
    path = save(state_of(8, 100, torch.float32, 0), tmp_path)
    before = path.read_bytes()
    sae = load_logic_sae(path)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before


class _Touch:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", ["torch", "torch_legacy", "inside"])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, how: str) -> None:
    made, path = tmp_path / "made", tmp_path / "evil.pt"
    evil = _Touch(made)
    if how == "inside":
        torch.save({**state_of(4, 8, torch.float32, 0), "extra": evil}, path)
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match=r"evil\.pt is not a plain state dict.*nothing in it"):
        load_math_sae(path)
    assert not made.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_is_never_run(tmp_path: Path, protocol: int) -> None:
    made, path = tmp_path / "made", tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(_Touch(made), protocol=protocol))
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        load_math_sae(path)
    assert not made.exists()


GOOD = state_of(4, 8, torch.float32, 0)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "lacks W; found: none"),
        ({**GOOD, "W": GOOD["W"].T}, r"b_enc has shape \(8,\); expected \(4,\)"),
        ({**GOOD, "W": torch.ones(4)}, r"W has shape \(4,\); expected \(d_in, d_sae\)"),
        ({**GOOD, "W": torch.ones(4, 0)}, r"W has shape \(4, 0\)"),
        ({**GOOD, "b_dec": torch.ones(5)}, r"b_dec has shape \(5,\); expected \(4,\)"),
        ({**GOOD, "b_enc": torch.ones(8, 1)}, r"b_enc has shape \(8, 1\)"),
        ({**GOOD, "W": torch.ones(4, 8, dtype=torch.int8)}, r"W is torch\.int8"),
        ({"W": GOOD["W"], "b_enc": GOOD["b_enc"]}, "lacks b_dec; found tensors: W, b_enc"),
        ({**GOOD, "W_dec": torch.ones(8, 4)}, "holds W_dec besides"),
        ({**GOOD, "k": 64}, "'k' is a int; expected a tensor"),
        ({**GOOD, 3: torch.ones(1)}, "3 is a Tensor"),
        ([GOOD], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, state: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_logic_sae(save(state, tmp_path))


# torch says that it looks through the indices.
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    path = save({**GOOD, "W": torch.ones(4, 8).to_sparse()}, tmp_path)
    with pytest.raises(CheckpointError, match=r"W is torch\.sparse_coo; expected a dense tensor"):
        load_logic_sae(path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x80"])
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sae.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"sae\.pt"):
        load_math_sae(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, part: float, legacy: bool) -> None:
    path = save(
        state_of(8, 100, torch.float32, 0), tmp_path, _use_new_zipfile_serialization=not legacy
    )
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointError, match=r"DeepSeek-R1-SAE-l37\.pt"):
        load_math_sae(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist; expected a downloaded"):
        load_math_sae(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is not a file"):
        load_logic_sae(tmp_path)


@pytest.mark.skipif(not RELEASED, reason="R1SAE_RELEASED_SAES names no folder")
@pytest.mark.skipif(not SAMPLE.exists(), reason="the sample activation is not beside this checkout")
@pytest.mark.parametrize(
    ("name", "indices", "values"),
    [
        (
            "math",
            [7464, 3477, 15072, 21848, 4672, 22456, 14579, 16269, 4041, 4002],
            [1.117, 0.797, 0.75],
        ),
        (
            "logic",
            [26850, 14306, 24913, 11430, 11884, 18632, 5205, 17394, 16129, 13864],
            [2.4509, 1.3170, 1.0869, 1.0192],
        ),
    ],
)
def test_the_releases_notebook(name: str, indices: list[int], values: list[float]) -> None:
    """What the release's notebook prints for its sample activation."""
    loader = load_math_sae if name == "math" else load_logic_sae
    sae = loader(Path(RELEASED) / name / "DeepSeek-R1-SAE-l37.pt")
    codes = sae.encode_sparse(torch.load(SAMPLE, weights_only=True))
    assert codes.indices[:10].tolist() == indices
    assert codes.values[: len(values)].tolist() == pytest.approx(values, abs=5e-3)


@pytest.mark.skipif(not SAMPLE.exists(), reason="the sample activation is not beside this checkout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sample_activation_of_the_release(tmp_path: Path, dtype: torch.dtype) -> None:
    """R1's own residual, through stand-in weights (the released ones are 1.2 GB): 7168 wide, with
    outlier dimensions, so that rounding is as rough as it gets."""
    sample = torch.load(SAMPLE, weights_only=True)
    assert sample.shape == (7168,)
    generator = torch.Generator().manual_seed(0)
    state = {
        "W": (torch.randn(7168, 1024, generator=generator) / 85).to(dtype),
        "b_enc": torch.zeros(1024, dtype=dtype),
        "b_dec": torch.zeros(7168, dtype=dtype),
    }
    sae = load_goodfire_sae(save(state, tmp_path), 64)
    codes = sae.encode_sparse(sample).check()
    assert codes.nnz == 64
    exact = torch.relu(sample.to(dtype).double() @ state["W"].double())
    edge = exact.topk(64).values.min()
    missed = (exact > edge) & (codes.to_dense() == 0)
    assert bool((exact[missed] - edge <= 4 * torch.finfo(dtype).eps * exact.max()).all())
    error = (sae.decode(codes).double() - codes.to_dense().double() @ state["W"].double().T).abs()
    assert error.max() <= torch.finfo(dtype).eps * 8
