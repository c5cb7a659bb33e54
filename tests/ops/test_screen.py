"""Screens against the definition of exact codes, and their bookkeeping."""

import copy
import pickle
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from r1sae_fast import FastSAE, SparseCodes, _core, ops
from r1sae_fast.errors import NonFiniteError

KINDS: tuple[ops.ScreenKind, ...] = ("int8", "bf16")
KERNELS = [(kind, kernel) for kind in KINDS for kernel in _core.screen_kernels(kind)[1]]
DTYPES = [torch.float32, torch.bfloat16]
RULES = ["topk", "batch_topk", "threshold"]


@pytest.fixture(autouse=True)
def _auto_simd() -> Iterator[None]:
    yield
    ops.set_simd("auto")


def exact(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pre-activations by the definition: summed in float64, rounded."""
    product = x.double() @ W.double().T
    if W.dtype == torch.float32:
        return (product + b.double()).float()
    return product.float().to(W.dtype) + b


def select(rule: str, pre: torch.Tensor, k: int, theta: torch.Tensor) -> SparseCodes:
    if rule == "threshold":
        return ops.threshold(pre, theta)
    return ops.topk(pre, k) if rule == "topk" else ops.batch_topk(pre, k)


def encode(
    screen: ops.Screen, rule: str, x: torch.Tensor, k: int, theta: torch.Tensor
) -> SparseCodes:
    if rule == "threshold":
        return screen.threshold(x, theta)
    return screen.topk(x, k) if rule == "topk" else screen.batch_topk(x, k)


def equal(left: SparseCodes, right: SparseCodes) -> bool:
    names = ("values", "indices", "row_offsets")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


def small(
    rows: int, d_in: int, d_sae: int, seed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole numbers, so that products are exact in any order and ties abound."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    return draw(rows, d_in), draw(d_sae, d_in), draw(d_sae)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 40),
    st.sampled_from([1, 16, 63, 64, 65, 123]),
    st.sampled_from([1, 31, 63, 64, 123]),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_every_kernel_gives_the_codes_of_the_definition(
    dtype: torch.dtype, rows: int, d_in: int, d_sae: int, share: float, seed: int
) -> None:
    x, W, b = small(rows, d_in, d_sae, seed, dtype)
    k = round(share * d_sae)
    theta = torch.linspace(-1, 9, d_sae)
    pre = exact(x, W, b)
    for kind, kernel in KERNELS:
        screen = ops.Screen(W, b, kind, kernel=kernel)
        for rule in RULES:
            found = encode(screen, rule, x, k, theta)
            assert equal(found.check(), select(rule, pre, k, theta)), (kernel, rule)
        assert screen.explain().violations == 0


@pytest.mark.parametrize("level", ops.simd_info().available)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_rows_at_every_level(level: str, rule: str, kind: ops.ScreenKind) -> None:
    ops.set_simd(level)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 96, generator=generator)
    x[0] = 0
    x[1] = 1e-42
    x[2] *= 1e12
    x[3, 17] = 4e4
    x[:, 50] += 30
    W = torch.randn(300, 96, generator=generator)
    W[1:60] = W[0]
    W[30:60, 3] *= 1 + 1e-7
    W[70], W[71], W[72] = 0, 1e-30, 1e11
    b = torch.randn(300, generator=generator) / 10
    theta = torch.tensor(4.0)
    screen = ops.Screen(W, b, kind)
    for k in (0, 1, 59, 300):
        found = encode(screen, rule, x, k, theta)
        expected = select(rule, exact(x, W, b), k, theta)
        assert torch.equal(found.row_offsets, expected.row_offsets)
        assert torch.equal(found.to_dense() != 0, expected.to_dense() != 0)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=0)
    assert screen.explain().violations == 0
    assert screen.explain().exact_rows >= 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_beyond_all_bounds_stays_a_candidate(rule: str, kind: ops.ScreenKind) -> None:
    """Its product is small beside its weights, and still the largest of all."""
    W, b = torch.randn(300, 256, generator=torch.Generator().manual_seed(2)), torch.zeros(300)
    W[7] = 1e30
    b[100:164] = 1e20
    x, theta = 1e-7 * torch.ones(4, 256), torch.tensor(1e20)
    found = encode(ops.Screen(W, b, kind), rule, x, 8, theta)
    assert (found.to_dense()[:, 7] > 1e25).all()
    assert equal(found, select(rule, exact(x, W, b), 8, theta))


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_zeros_take_no_products(rule: str) -> None:
    x, W, b = small(50, 64, 200, 3, torch.float32)
    x[10:] = 0
    for bias in (b, torch.zeros(200)):
        screen = ops.Screen(W, bias, "int8")
        theta = torch.tensor(0.01)
        found = encode(screen, rule, x, 9, theta)
        assert equal(found, select(rule, exact(x, W, bias), 9, theta))
        report = screen.explain()
        assert (report.exact_rows, report.violations) == (0, 0)
        assert report.candidates <= 10 * 200


@pytest.mark.parametrize("kind", KINDS)
def test_changed_weights_are_rounded_again(kind: ops.ScreenKind) -> None:
    x, W, b = small(100, 64, 200, 3, torch.float32)
    screen = ops.Screen(W, b, kind)
    assert equal(screen.topk(x, 9), ops.topk(exact(x, W, b), 9))
    W.neg_()
    assert equal(screen.topk(x, 9), ops.topk(exact(x, W, b), 9))
    b.add_(1)
    assert equal(screen.topk(x, 9), ops.topk(exact(x, W, b), 9))
    # What torch doesn't count is for refresh.
    W.numpy()[5:8] += 2
    screen.refresh(torch.tensor([5, 6, 7]))
    assert equal(screen.topk(x, 9), ops.topk(exact(x, W, b), 9))
    assert screen.explain().violations == 0
    with pytest.raises(ValueError, match="200"):
        screen.refresh(torch.tensor([200]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bf16_bounds_without_a_chance_of_failing(dtype: torch.dtype) -> None:
    """Numbers that vary over 2^40 in each row, which no 8-bit unit fits."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        sizes = torch.rand(shape, generator=generator) * 40 - 20
        return (torch.randn(shape, generator=generator) * sizes.exp2()).to(dtype)

    x, W, b = draw(30, 200), draw(2000, 200), torch.zeros(2000, dtype=dtype)
    screens = [ops.Screen(W, b, kind, seed=1) for kind in KINDS]
    expected = screens[0].topk(x, 8)
    assert equal(screens[1].topk(x, 8), expected)
    assert torch.equal(expected.indices, ops.topk(exact(x, W, b), 8).indices)
    int8, bf16 = (screen.explain() for screen in screens)
    assert (bf16.kind, bf16.violations, bf16.exact_rows) == ("bf16", 0, 0)
    assert bf16.candidates < int8.candidates
    assert bf16.bytes == 2 * 2016 * 224


def test_the_seed_is_the_systems_unless_given() -> None:
    x, W, b = small(40, 64, 3000, 3, torch.float32)
    x, W = x + torch.rand(40, 64), W + torch.rand(3000, 64)
    counts = []
    for seed in (1, 1, 1 << 127, None, None):
        screen = ops.Screen(W, b, "int8", seed=seed)
        assert equal(screen.topk(x, 9), ops.topk(exact(x, W, b), 9))
        counts.append(screen.explain().candidates)
    assert counts[0] == counts[1]
    seeds = {ops.Screen(W, b, "int8")._seed for _ in range(4)}
    assert len(seeds) == 4
    for wrong in (-1, 1 << 128):
        with pytest.raises(ValueError, match="seed is"):
            ops.Screen(W, b, "int8", seed=wrong)


def test_rows_of_tiny_numbers_are_computed_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    x, W = torch.randn(20, 32, generator=generator), torch.randn(2000, 32, generator=generator)
    x[:15] *= 1e-14
    x[:5] *= 1e-28
    b = torch.zeros(2000)
    screen = ops.Screen(W, b, "int8")
    assert equal(screen.topk(x, 5), ops.topk(exact(x, W, b), 5))
    assert screen.explain().exact_rows == 15
    assert screen.explain().violations == 0


def test_gradients_are_those_of_the_dense_path() -> None:
    x, W, b = (t.requires_grad_() for t in small(20, 64, 200, 5, torch.float32))
    codes = ops.with_gradient(ops.Screen(W, b, "int8").topk(x, 9), x, W, b)
    dense = ops.topk(x @ W.T + b, 9)
    gradient = torch.randint(-3, 4, (codes.nnz,)).float()
    found = torch.autograd.grad(codes.values, [x, W, b], gradient)
    expected = torch.autograd.grad(dense.values, [x, W, b], gradient)
    assert all(map(torch.equal, found, expected))


def test_what_can_not_be_screened_says_why() -> None:
    W, b = torch.randn(8, 6), torch.zeros(8)
    assert "fewer than" in ops.Screen(W, b).explain().reason
    assert ops.Screen(W, b, "none").explain().kind == "none"
    with pytest.raises(ValueError, match="float64"):
        ops.Screen(W.double(), b.double(), "int8")
    with pytest.raises(ValueError, match="feature-major"):
        ops.Screen(torch.randn(6, 8).T, b, "int8")
    with pytest.raises(ValueError, match="kind is 'fp8'"):
        ops.Screen(W, b, "fp8")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match="unknown kernel"):
        ops.Screen(W, b, "int8", kernel="mmx").topk(torch.randn(2, 6), 1)
    with pytest.raises(ValueError, match="not one of int8 products"):
        ops.Screen(W, b, "int8", kernel="scalar_bf16")
    with pytest.raises(TypeError, match="bfloat16"):
        ops.Screen(W, b, "int8").topk(torch.randn(2, 6).bfloat16(), 1)


@pytest.mark.parametrize(("d_sae", "d_in", "rows", "dtype", "kind"), [
    (1 << 13, 512, 1, torch.float32, "bf16"),
    (1 << 13, 513, 1, torch.float32, "int8"),
    (1 << 16, 512, 1, torch.bfloat16, "int8"),
    (1 << 12, 256, 1, torch.float32, "bf16"),
    (1 << 11, 512, 1, torch.float32, "none"),
    (1 << 11, 512, 512, torch.float32, "bf16"),
    (1 << 12, 255, 512, torch.float32, "none"),
])  # fmt: skip
def test_short_rows_are_screened_by_bf16_and_many_from_fewer_weights_on(
    monkeypatch: pytest.MonkeyPatch,
    d_sae: int,
    d_in: int,
    rows: int,
    dtype: torch.dtype,
    kind: str,
) -> None:
    kernels: dict[str, tuple[str, list[str]]]
    kernels = {"int8": ("amx_int8", []), "bf16": ("amx_bf16", [])}
    monkeypatch.setattr(_core, "screen_kernels", lambda kind="int8": kernels[kind])
    W, b = torch.zeros(d_sae, d_in, dtype=dtype), torch.zeros(d_sae, dtype=dtype)
    assert ops.Screen(W, b, rows=rows).kind == kind
    kernels["bf16"] = ("avx512_bf16", [])
    eight = {"bf16": "int8" if rows > 1 or W.numel() > 1 << 20 else "none"}
    assert ops.Screen(W, b, rows=rows).kind == eight.get(kind, kind)
    kernels["int8"] = ("avx2", [])
    assert ops.Screen(W, b, rows=rows).kind == "none"


def test_non_finite_rows_are_named() -> None:
    W, b = torch.randn(40, 6), torch.zeros(40)
    x = torch.randn(5, 6)
    x[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="row 3"):
        ops.Screen(W, b, "int8").topk(x, 2)
    assert ops.Screen(W, b, "int8").topk(x, 2, check_finite=False).counts[3] == 0


def test_an_sae_screens_and_copies() -> None:
    sae = FastSAE(64, 200, 7, "topk")
    sae.screen = "int8"
    x = torch.randn(3, 5, 64)
    codes = sae.encode_sparse(x)
    assert sae.explain().kind == "int8"
    assert sae.explain().rows == 15
    assert "8-bit" in str(sae.explain()) or "as asked for" in str(sae.explain())
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):  # noqa: S301 - our own
        assert equal(other.encode_sparse(x), codes)
    sae.screen = "none"
    dense = sae.encode_sparse(x)
    assert torch.equal(dense.to_dense() != 0, codes.to_dense() != 0)
