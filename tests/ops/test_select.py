"""The three selections: Rust at every SIMD level equals the torch reference, to the index."""

from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from r1sae_fast import SparseCodes, ops
from r1sae_fast.errors import NonFiniteError

LEVELS = ops.simd_info().available
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _auto_simd() -> Iterator[None]:
    yield
    ops.set_simd("auto")


def table(rows: int, d_sae: int, seed: int) -> torch.Tensor:
    """Many ties, some rows all negative, some all equal, some spread out."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-6, 7, (rows, d_sae), generator=generator) / 2
    kind = torch.randint(0, 6, (rows, 1), generator=generator)
    values = torch.where(kind == 0, -values.abs(), values)
    values = torch.where(kind == 1, values[:, :1].clone(), values)
    noise = torch.randn((rows, d_sae), generator=generator)
    return torch.where(kind >= 4, noise, values)


def equal(codes: SparseCodes, raw: tuple[torch.Tensor, ...]) -> bool:
    found = (codes.values, codes.indices, codes.row_offsets)
    return all(map(torch.equal, found, raw))


widths = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 123, 256, 1024, 1500])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rust_equals_reference_to_the_index(dtype: torch.dtype, data: st.DataObject) -> None:
    rows, d_sae = data.draw(st.integers(0, 6)), data.draw(widths)
    k = data.draw(st.one_of(st.integers(0, min(d_sae, 24)), st.just(d_sae)))
    pre = table(rows, d_sae, data.draw(st.integers(0, 2**31))).to(dtype)
    bound = torch.tensor([data.draw(st.sampled_from([-1.0, 0.0, 0.5, 0.7, 2.5, float("nan")]))])
    each = torch.linspace(-1, 3, d_sae)
    by_row, by_batch = ops.topk_reference(pre, k), ops.batch_topk_reference(pre, k)
    above = ops.threshold_reference(pre, bound)
    above_each = ops.threshold_reference(pre, each)
    for level in LEVELS:
        ops.set_simd(level)
        assert equal(ops.topk(pre, k).check(), by_row), level
        assert equal(ops.batch_topk(pre, k).check(), by_batch), level
        assert equal(ops.threshold(pre, bound[0]).check(), above), level
        assert equal(ops.threshold(pre, each).check(), above_each), level


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_wide_rows_on_several_threads(dtype: torch.dtype, threads: int) -> None:
    pre = table(37, 9000, 0).to(dtype)
    expected = ops.topk_reference(pre, 40), ops.batch_topk_reference(pre, 40)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for level in LEVELS:
            ops.set_simd(level)
            assert equal(ops.topk(pre, 40), expected[0]), level
            assert equal(ops.batch_topk(pre, 40), expected[1]), level
    finally:
        torch.set_num_threads(before)


def brute_force(pre: list[list[float]], wanted: int) -> list[tuple[int, int, float]]:
    """No torch at all: (row, feature, value) of the ``wanted`` largest, ties by flat index."""
    entries = [(r, f, v) for r, row in enumerate(pre) for f, v in enumerate(row) if v > 0]
    kept = sorted(entries, key=lambda e: (-e[2], e[0], e[1]))[:wanted]
    return sorted(kept, key=lambda e: (e[0], -e[2], e[1]))


def entries_of(codes: SparseCodes) -> list[tuple[int, int, float]]:
    return list(
        zip(codes.row_ids.tolist(), codes.indices.tolist(), codes.values.tolist(), strict=True)
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31), st.data())
def test_both_equal_a_sort_without_torch(
    rows: int, d_sae: int, seed: int, data: st.DataObject
) -> None:
    pre = table(rows, d_sae, seed)
    k = data.draw(st.integers(0, d_sae))
    whole = brute_force(pre.tolist(), k * rows)
    by_row = [(r, f, v) for r, row in enumerate(pre.tolist()) for _, f, v in brute_force([row], k)]
    assert entries_of(ops.batch_topk(pre, k)) == whole
    assert entries_of(ops.topk(pre, k)) == by_row
    raw = ops.batch_topk_reference(pre, k)
    assert entries_of(SparseCodes(*raw, d_sae)) == whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    pre = table(4, 100, 1).to(dtype)
    assert equal(ops.topk(pre, 7), ops.topk_reference(pre, 7))
    assert ops.batch_topk(pre, 7).dtype == dtype


SELECTIONS: list[Callable[[torch.Tensor], SparseCodes]] = [
    lambda pre: ops.topk(pre, 3),
    lambda pre: ops.batch_topk(pre, 3),
    lambda pre: ops.threshold(pre, 0.5),
]


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (2, 0, 3), (1, 1, 1)])
def test_any_leading_shape(
    select: Callable[[torch.Tensor], SparseCodes], leading: tuple[int, ...]
) -> None:
    pre = torch.randn(*leading, 20)
    codes = select(pre)
    assert codes.shape == pre.shape
    flat = select(pre.reshape(-1, 20)) if pre.numel() else select(torch.zeros(0, 20))
    assert torch.equal(codes.to_dense().reshape(-1), flat.to_dense().reshape(-1))


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_rows_are_named(
    select: Callable[[torch.Tensor], SparseCodes], dtype: torch.dtype, bad: float
) -> None:
    pre = torch.randn(5, 80, dtype=dtype)
    pre[3, 79] = bad
    pre[4, 0] = bad
    for level in LEVELS:
        ops.set_simd(level)
        with pytest.raises(NonFiniteError, match="row 3"):
            select(pre)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_unchecked_nan_is_never_a_code(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    pre = torch.tensor([[nan, 1, inf, -inf, 2], [nan] * 5], dtype=dtype)
    for level in LEVELS:
        ops.set_simd(level)
        for codes in (
            ops.topk(pre, 5, check_finite=False),
            ops.batch_topk(pre, 5, check_finite=False),
            ops.threshold(pre, 0.5, check_finite=False),
        ):
            assert codes.indices.tolist() == [2, 4, 1]
            assert codes.row_offsets.tolist() == [0, 3, 3]


def test_strided_input_is_read_right() -> None:
    pre = torch.randn(60, 9).T
    assert not pre.is_contiguous()
    assert equal(ops.topk(pre, 5), ops.topk_reference(pre, 5))


def test_input_is_left_alone() -> None:
    pre = table(4, 300, 2)
    before = pre.clone()
    for select in SELECTIONS:
        select(pre)
    assert torch.equal(pre, before)


def test_bad_arguments_are_refused() -> None:
    pre = torch.randn(2, 8)
    for select in (ops.topk, ops.batch_topk):
        with pytest.raises(ValueError, match="k is 9; expected 0 to 8"):
            select(pre, 9)
        with pytest.raises(ValueError, match="k is -1"):
            select(pre, -1)
        with pytest.raises(TypeError, match=r"k is 2\.0"):
            select(pre, 2.0)
        with pytest.raises(TypeError, match=r"torch\.int64"):
            select(torch.ones(2, 8, dtype=torch.int64), 1)
        with pytest.raises(TypeError, match="list"):
            select([[1.0]], 1)
        with pytest.raises(ValueError, match="no dimensions"):
            select(torch.tensor(1.0), 1)
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(\) or \(8,\)"):
        ops.threshold(pre, torch.zeros(3))
    with pytest.raises(ValueError, match="meta"):
        ops.threshold(pre, torch.empty((), device="meta"))


def test_bf16_is_compared_with_the_threshold_in_float32() -> None:
    # 1.001 rounds to 1.0 in bf16; comparing there would call 1.0 above it, or not, by chance.
    pre = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    for level in LEVELS:
        ops.set_simd(level)
        assert ops.threshold(pre, torch.tensor(1.001)).indices.tolist() == [1]
        assert ops.threshold(pre, 0.999).indices.tolist() == [1, 0]


@pytest.mark.parametrize("select", SELECTIONS)
def test_gradients(select: Callable[[torch.Tensor], SparseCodes]) -> None:
    # No two values within eps of each other, nor of 0 or the threshold.
    pre = (torch.randperm(40).double() / 10 - 1.03).reshape(4, 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: select(p).values, pre, eps=1e-6)
    assert torch.autograd.gradgradcheck(lambda p: select(p).values.square(), pre, eps=1e-6)
    single = pre.detach().float().requires_grad_()
    weight = torch.randn(4, 10)
    codes = select(single)
    (codes.to_dense() * weight).sum().backward()
    chosen = codes.detach().to_dense() != 0
    assert torch.equal(single.grad, torch.where(chosen, weight, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["topk", "batch_topk", "threshold"])
# torch's own tester reads .grad of tensors that are no leaves, whatever the operation.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(name: str, gradient: bool, dtype: torch.dtype) -> None:
    pre = table(3, 20, 5).to(dtype).requires_grad_(gradient)
    bound = torch.tensor([0.5], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    operation = getattr(torch.ops.r1sae_fast, name).default
    torch.library.opcheck(operation, (pre, bound if name == "threshold" else 4, True))
