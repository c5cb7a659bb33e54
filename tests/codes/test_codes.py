"""SparseCodes against the dense tensors that they stand for."""

import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from r1sae_fast.codes import SparseCodes


def dense_codes(shape: tuple[int, ...], seed: int, levels: int = 4) -> torch.Tensor:
    """Mostly zeros; few distinct values, so that ties are common; some rows empty."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(-levels * 2, levels, shape, generator=generator).clamp_min(0).float()
    keep = torch.rand(shape[:-1], generator=generator) > 0.25
    return table * keep[..., None]


shapes = st.lists(st.integers(0, 4), max_size=3).flatmap(
    lambda leading: st.integers(0, 9).map(lambda d_sae: (*leading, d_sae))
)


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 2**31))
def test_round_trip_and_invariants(shape: tuple[int, ...], seed: int) -> None:
    dense = dense_codes(shape, seed)
    codes = SparseCodes.from_dense(dense).check()
    assert codes.shape == dense.shape
    assert codes.nnz == int((dense != 0).sum())
    assert torch.equal(codes.to_dense(), dense)
    assert torch.equal(codes.counts, (dense != 0).sum(-1))
    if 0 not in shape:
        csr = codes.to_sparse_csr()
        assert torch.equal(csr.to_dense(), dense.reshape(-1, shape[-1]))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_are_chosen_as_from_the_dense_tensor(data: st.DataObject) -> None:
    dense = dense_codes((5, 3, 7), data.draw(st.integers(0, 2**31)))
    codes = SparseCodes.from_dense(dense)
    bound = st.one_of(st.none(), st.integers(-7, 7))
    step = st.sampled_from([None, 1, 2])
    key = data.draw(
        st.one_of(
            st.integers(-5, 4),
            st.builds(slice, bound, bound, step),
            st.tuples(st.integers(-5, 4), st.integers(-3, 2)),
            st.tuples(st.builds(slice, bound, bound, step), st.integers(-3, 2)),
            st.lists(st.integers(-5, 4), max_size=6).map(
                lambda rows: torch.tensor(rows, dtype=torch.int64)
            ),
            st.lists(st.booleans(), min_size=5, max_size=5).map(torch.tensor),
            st.just(Ellipsis),
        )
    )
    chosen = codes[key].check()
    assert torch.equal(chosen.to_dense(), dense[key])


def test_a_slice_with_negative_step_reverses() -> None:
    dense = dense_codes((5, 7), 0)
    assert torch.equal(SparseCodes.from_dense(dense)[::-1].to_dense(), dense.flip(0))


def test_iteration_ends() -> None:
    dense = dense_codes((4, 3, 6), 1)
    parts = list(SparseCodes.from_dense(dense))
    assert torch.equal(torch.stack([part.to_dense() for part in parts]), dense)


def test_a_plain_slice_shares_memory() -> None:
    codes = SparseCodes.from_dense(dense_codes((6, 9), 2))
    part = codes[2:5]
    start = int(codes.row_offsets[2])
    assert part.values.data_ptr() == codes.values[start:].data_ptr()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 2**31))
def test_cat_equals_dense_cat(sizes: list[int], seed: int) -> None:
    tables = [dense_codes((n, 2, 5), seed + n) for n in sizes]
    joined = SparseCodes.cat([SparseCodes.from_dense(table) for table in tables]).check()
    assert torch.equal(joined.to_dense(), torch.cat(tables))


def test_order_is_by_falling_value_then_lower_feature() -> None:
    codes = SparseCodes.from_dense(torch.tensor([[1.0, 3.0, 0.0, 3.0, 2.0]]))
    assert codes.indices.tolist() == [1, 3, 4, 0]
    assert codes.values.tolist() == [3.0, 3.0, 2.0, 1.0]


def test_single_vector_has_no_leading_dimension() -> None:
    codes = SparseCodes.from_dense(torch.tensor([0.0, 2.0]))
    assert codes.shape == (2,)
    assert codes.rows == 1
    assert codes.to_dense().tolist() == [0.0, 2.0]
    with pytest.raises(TypeError, match="single row"):
        len(codes)


def test_gradients_reach_the_dense_tensor_and_the_values() -> None:
    dense = dense_codes((3, 4), 3).double().requires_grad_()
    weight = torch.randn(3, 4, dtype=torch.float64)
    (SparseCodes.from_dense(dense).to_dense() * weight).sum().backward()
    assert torch.equal(dense.grad, weight * (dense.detach() != 0))
    codes = SparseCodes.from_dense(dense.detach())
    values = codes.values.requires_grad_()
    (SparseCodes(values, codes.indices, codes.row_offsets, 4).to_dense() * weight).sum().backward()
    assert torch.equal(values.grad, weight[codes.row_ids, codes.indices.long()])


def test_uniform_view() -> None:
    codes = SparseCodes.from_dense(torch.tensor([[[1.0, 0, 2], [0, 3, 4]]]))
    values, indices = codes.uniform()
    assert codes.uniform_k == 2
    assert values.tolist() == [[[2.0, 1.0], [4.0, 3.0]]]
    assert indices.tolist() == [[[2, 0], [2, 1]]]
    ragged = SparseCodes.from_dense(torch.tensor([[1.0, 0], [2.0, 3.0]]))
    assert ragged.uniform_k is None
    with pytest.raises(ValueError, match="unequal"):
        ragged.uniform()


def test_to_moves_values_only_between_floating_dtypes() -> None:
    codes = SparseCodes.from_dense(dense_codes((3, 4), 4))
    assert codes.to(torch.float32) is codes
    half = codes.to(torch.bfloat16)
    assert (half.dtype, half.indices.dtype, half.row_offsets.dtype) == (
        torch.bfloat16,
        torch.int32,
        torch.int64,
    )
    with pytest.raises(TypeError, match="int64"):
        codes.to(torch.int64)


def test_reshape_and_flatten() -> None:
    dense = dense_codes((2, 3, 5), 5)
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.flatten().to_dense(), dense.reshape(6, 5))
    assert torch.equal(codes.reshape(3, -1).to_dense(), dense.reshape(3, 2, 5))
    with pytest.raises(ValueError, match="6 rows"):
        codes.reshape(4)


def test_repr_names_what_matters() -> None:
    codes = SparseCodes.from_dense(torch.tensor([[1.0, 0], [2.0, 3.0]]))
    text = repr(codes)
    for part in ("(2, 2)", "nnz=3", "mean_l0=1.5", "torch.float32", "'cpu'"):
        assert part in text


def test_pickle_keeps_everything() -> None:
    codes = SparseCodes.from_dense(dense_codes((2, 2, 5), 6))
    again = pickle.loads(pickle.dumps(codes))  # noqa: S301 - our own bytes
    assert torch.equal(again.to_dense(), codes.to_dense())


def vectors(
    values: list[float], indices: list[int], offsets: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.tensor(values, dtype=torch.float32),
        torch.tensor(indices, dtype=torch.int32),
        torch.tensor(offsets, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((*vectors([1.0], [0, 1], [0, 1]), 4), ValueError, "1 codes but indices 2"),
        ((*vectors([1.0], [0], [0, 2]), 4), ValueError, "from 0 to 2"),
        ((*vectors([1.0], [0], []), 4), ValueError, "empty"),
        ((*vectors([1.0], [0], [0, 1]), -1), ValueError, "d_sae is -1"),
        ((*vectors([1.0], [0], [0, 1]), 2.0), TypeError, "d_sae is 2.0"),
        ((*vectors([1.0], [0], [0, 1]), 4, (2,)), ValueError, "2 rows"),
        ((torch.tensor([1]), *vectors([], [0], [0, 1])[1:], 4), TypeError, "values is torch.int64"),
        ((torch.ones(1), torch.tensor([0]), torch.tensor([0, 1]), 4), TypeError, "indices is"),
        ((torch.ones(1, 1), *vectors([], [0], [0, 1])[1:], 4), ValueError, "one dimension"),
        (([1.0], *vectors([], [0], [0, 1])[1:], 4), TypeError, "list"),
    ],
)
def test_bad_construction_is_refused(arguments: tuple, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        SparseCodes(*arguments)


def test_tensors_on_two_devices_are_refused() -> None:
    values, indices, offsets = vectors([1.0], [0], [0, 1])
    with pytest.raises(ValueError, match="cpu, meta"):
        SparseCodes(values.to("meta"), indices, offsets, 4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (vectors([1.0], [4], [0, 1]), "row 0 names feature 4"),
        (vectors([1.0], [-1], [0, 0, 1]), "row 1 names feature -1"),
        (vectors([2.0, 1.0], [3, 3], [0, 2]), "row 0 names feature 3 more than once"),
        (vectors([1.0, 2.0], [0, 1], [0, 2]), "row 0 is out of order"),
        (vectors([1.0, 1.0], [1, 0], [0, 0, 2]), "row 1 is out of order"),
        (vectors([1.0, 1.0], [1, 0], [0, 2, 1, 2]), "falls after row 1"),
    ],
)
def test_full_check_names_the_row(arguments: tuple, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SparseCodes(*arguments, 4).check()


def test_bad_cat_and_bad_dense() -> None:
    codes = SparseCodes.from_dense(dense_codes((2, 5), 7))
    with pytest.raises(ValueError, match="nothing"):
        SparseCodes.cat([])
    with pytest.raises(ValueError, match="part 1 has shape"):
        SparseCodes.cat([codes, SparseCodes.from_dense(dense_codes((2, 6), 7))])
    with pytest.raises(ValueError, match="reshape"):
        SparseCodes.cat([codes[0]])
    with pytest.raises(IndexError):
        codes[7]
    with pytest.raises(IndexError):
        codes[0, 0]
    with pytest.raises(TypeError, match="int64"):
        SparseCodes.from_dense(torch.tensor([1]))
    with pytest.raises(ValueError, match="no dimensions"):
        SparseCodes.from_dense(torch.tensor(1.0))
