"""FastSAE against a dense autoencoder written out in torch."""

import copy
import math
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from r1sae_fast import FastSAE, R1SaeError, SparseCodes
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.sae import MODES, Mode

PARAMETERS = ["W_dec", "b_enc", "b_dec"]


def make(
    mode: Mode = "batch_topk",
    *,
    d_in: int = 12,
    d_sae: int = 30,
    k: int = 4,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> FastSAE:
    """With weights that no symmetry makes alike, and a threshold."""
    generator = torch.Generator().manual_seed(seed)
    sae = FastSAE(d_in, d_sae, k, mode, tied=tied, dtype=dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    sae.threshold = torch.tensor(0.75)
    return sae


def dense_encode(sae: FastSAE, x: torch.Tensor) -> torch.Tensor:
    """The obvious encoder: dense throughout, ties to the lower flat index."""
    pre = torch.relu(x.to(sae.dtype) @ sae.W_enc + sae.b_enc)
    rows = math.prod(x.shape[:-1])
    if sae.mode == "threshold":
        return torch.where(pre > sae.threshold, pre, 0)
    flat = pre.reshape(rows, sae.d_sae) if sae.mode == "topk" else pre.reshape(1, -1)
    count = sae.k if sae.mode == "topk" else sae.k * rows
    order = flat.detach().argsort(dim=-1, descending=True, stable=True)[:, :count]
    mask = torch.zeros_like(flat).scatter(1, order, 1)
    return (flat * mask).reshape(pre.shape)


def same_codes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """The same features, and values that differ by rounding at most (one row alone is added up in
    another order than a batch)."""
    return torch.equal(left != 0, right != 0) and torch.allclose(left, right)


modes = st.sampled_from(MODES)
leading_shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(deadline=None)
@given(modes, st.booleans(), leading_shapes, st.integers(0, 30), st.integers(0, 2**31))
def test_equals_the_dense_autoencoder(
    mode: Mode, tied: bool, leading: tuple[int, ...], k: int, seed: int
) -> None:
    sae = make(mode, tied=tied, k=k, seed=seed)
    x = torch.randn(*leading, 12, generator=torch.Generator().manual_seed(seed))
    expected = dense_encode(sae, x)
    codes = sae.encode_sparse(x)
    assert torch.equal(codes.check().to_dense(), expected)
    assert torch.equal(sae.encode(x), expected)
    reconstruction, same_codes = sae(x)
    assert reconstruction.shape == x.shape
    assert torch.equal(same_codes.to_dense(), expected)
    truth = expected.double() @ sae.W_dec.double() + sae.b_dec.double()
    torch.testing.assert_close(reconstruction.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(expected), reconstruction, rtol=1e-5, atol=1e-5)
    assert torch.equal(sae.decode(codes), reconstruction)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_the_dense_autoencoder(mode: Mode, tied: bool) -> None:
    sae = make(mode, tied=tied)
    twin = copy.deepcopy(sae).double()
    x = torch.randn(3, 5, 12, requires_grad=True)
    weight = torch.randn(3, 5, 12)
    reconstruction, codes = sae(x)
    ((reconstruction * weight).sum() + codes.values.square().sum()).backward()
    wide = x.detach().double().requires_grad_()
    dense = dense_encode(twin, wide)
    output = dense @ twin.W_dec + twin.b_dec
    ((output * weight.double()).sum() + dense.square().sum()).backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
    names = [name for name, _ in sae.named_parameters()]
    assert sorted(names) == sorted(PARAMETERS + ["W_enc"] * (not tied))
    for name, parameter in sae.named_parameters():
        exact = twin.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_in_float64(mode: Mode, tied: bool) -> None:
    sae = make(mode, d_in=3, d_sae=7, k=2, tied=tied, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = [name for name, _ in sae.named_parameters()]

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = dict(zip(names, parameters, strict=True))
        reconstruction, codes = torch.func.functional_call(sae, state, (x,))
        return reconstruction, codes.values

    inputs = [x.requires_grad_(), *sae.parameters()]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_every_dtype(mode: Mode, dtype: torch.dtype) -> None:
    sae = make(mode, dtype=dtype, d_in=64, d_sae=200, k=8)
    x = torch.randn(5, 64)
    with torch.no_grad():
        reconstruction, codes = sae(x)
        expected = dense_encode(sae, x)
    assert (reconstruction.dtype, codes.dtype) == (dtype, dtype)
    assert torch.equal(codes.to_dense(), expected)
    exact = expected.double() @ sae.W_dec.double() + sae.b_dec.double()
    # A sum of n terms in any order errs by at most n roundings of the sum of their sizes (Higham
    # 2002, section 4.2); n + 1 with that of the result to its dtype.
    terms = 1 + expected.count_nonzero(dim=1)
    sizes = expected.double().abs() @ sae.W_dec.double().abs() + sae.b_dec.double().abs()
    bound = (terms + 1)[:, None] * torch.finfo(dtype).eps / 2 * sizes
    assert ((reconstruction.double() - exact).abs() <= 1.01 * bound).all()


def test_x_is_cast_to_the_dtype_of_the_parameters() -> None:
    sae = make(dtype=torch.bfloat16)
    x = torch.randn(4, 12)
    assert torch.equal(sae.encode(x), sae.encode(x.bfloat16()))


def test_a_relation_of_modes_one_row_and_its_batch() -> None:
    topk, batch = make("topk", dtype=torch.float64), make("batch_topk", dtype=torch.float64)
    x = torch.randn(6, 12)
    rows = torch.stack([batch.encode(row) for row in x])
    assert same_codes(rows, topk.encode(x))
    # In company rows compete, as in the release.
    assert not same_codes(batch.encode(x), rows)
    assert batch.encode_sparse(x).nnz == 4 * 6


def test_zeros_are_never_codes() -> None:
    sae = make("topk", k=30)
    with torch.no_grad():
        sae.b_enc.fill_(-1000.0)
    reconstruction, codes = sae(torch.randn(3, 12))
    assert codes.nnz == 0
    assert torch.equal(reconstruction, sae.b_dec.expand(3, 12))


def test_new_weights() -> None:
    torch.manual_seed(0)
    sae = FastSAE(16, 40, 3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    torch.manual_seed(0)
    assert torch.equal(FastSAE(16, 40, 3).W_dec, sae.W_dec)


@pytest.mark.parametrize("tied", [False, True])
def test_encoder_is_feature_major_and_tied_means_one_storage(tied: bool) -> None:
    sae = make(tied=tied)
    for moved in (sae, copy.deepcopy(sae), copy.deepcopy(sae).bfloat16()):
        assert moved.W_enc.shape == (12, 30)
        assert moved.W_enc.stride() == (1, 12)
        shared = moved.W_enc.data_ptr() == moved.W_dec.data_ptr()
        assert shared is tied
    adam = torch.optim.Adam(sae.parameters())
    sae(torch.randn(4, 12))[0].square().sum().backward()
    adam.step()
    assert sae.W_enc.stride() == (1, 12)


def test_training_lowers_the_error() -> None:
    torch.manual_seed(0)
    x = torch.relu(torch.randn(256, 16) - 1) @ torch.randn(16, 12)
    sae = FastSAE(12, 24, 4)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    errors = []
    for _ in range(60):
        error = (sae(x)[0] - x).square().mean()
        adam.zero_grad()
        error.backward()
        adam.step()
        errors.append(error.item())
    assert errors[-1] < errors[0] / 4


def test_threshold_stays_float32_and_on_the_device() -> None:
    sae = make("threshold")
    sae.threshold = torch.tensor(0.7501)
    assert sae.bfloat16().threshold == torch.tensor(0.7501)
    assert sae.double().threshold.dtype == torch.float32
    assert sae.to("meta").threshold.device.type == "meta"


def test_threshold_per_feature() -> None:
    sae = make("threshold")
    sae.threshold = torch.linspace(0, 2, 30)
    x = torch.randn(5, 12)
    assert torch.equal(sae.encode(x), dense_encode(sae, x))


def test_calibration_keeps_the_codes_of_its_batch() -> None:
    sae = make("batch_topk", dtype=torch.float64)
    sae.threshold = torch.tensor(-1.0)
    x = torch.randn(50, 12)
    codes = sae.encode(x)
    bound = sae.calibrate_threshold(x)
    assert bound == sae.threshold
    sae.mode = "threshold"
    assert torch.equal(sae.encode(x), codes)
    # Company doesn't matter any more.
    assert same_codes(torch.stack([sae.encode(row) for row in x]), codes)
    halves = sae.calibrate_threshold([x[:25], x[25:], x[:0]])
    parts = [sae.calibrate_threshold(part) for part in (x[:25], x[25:])]
    assert halves == pytest.approx(sum(parts) / 2)
    with pytest.raises(ValueError, match="no rows"):
        sae.calibrate_threshold(x[:0])
    x[7, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="row 7"):
        sae.calibrate_threshold(x)


def test_k_and_mode_may_change_within_bounds() -> None:
    sae = make()
    sae.k = 30
    sae.mode = "topk"
    assert sae.encode_sparse(torch.randn(2, 12)).shape == (2, 30)
    with pytest.raises(ValueError, match="k is 31; expected 0 to d_sae = 30"):
        sae.k = 31
    with pytest.raises(ValueError, match="jumprelu"):
        sae.mode = "jumprelu"
    assert (sae.k, sae.mode) == (30, "topk")


def test_pickle_and_repr() -> None:
    sae = make(tied=True)
    again = pickle.loads(pickle.dumps(sae))  # noqa: S301 - our own bytes
    x = torch.randn(3, 12)
    assert torch.equal(again.encode(x), sae.encode(x))
    assert "d_in=12, d_sae=30, k=4, mode='batch_topk', tied=True" in repr(sae)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((12, 30, 31), {}, ValueError, "k is 31; expected 0 to d_sae = 30"),
        ((12, 30, -1), {}, ValueError, "k is -1"),
        ((12, 30, 2.0), {}, TypeError, r"k is 2\.0"),
        ((12, 30, True), {}, TypeError, "k is True"),
        ((0, 30, 1), {}, ValueError, "d_in is 0"),
        ((12, 0, 0), {}, ValueError, "d_sae is 0"),
        ((12, 2**31, 0), {}, ValueError, "d_sae is 2147483648"),
        ((12, 30, 4, "relu"), {}, ValueError, "'relu'; expected one of topk, batch_topk"),
        ((12, 30, 4), {"tied": 1}, TypeError, "tied is 1"),
        ((12, 30, 4), {"dtype": torch.int8}, TypeError, r"torch\.int8; expected one of float32"),
    ],
)
def test_bad_construction(arguments: tuple, options: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        FastSAE(*arguments, **options)


@pytest.mark.parametrize("method", ["encode", "encode_sparse", "forward", "pre_activations"])
def test_bad_input(method: str) -> None:
    call = getattr(make(), method)
    with pytest.raises(ValueError, match=r"x has shape \(3, 11\); expected \[\.\.\., 12\], d_in"):
        call(torch.randn(3, 11))
    with pytest.raises(ValueError, match=r"shape \(\)"):
        call(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"x is torch\.int64; .*use \.to\(torch\.float32\)"):
        call(torch.ones(3, 12, dtype=torch.int64))
    with pytest.raises(TypeError, match="x is a list"):
        call([[0.0] * 12])
    with pytest.raises(ValueError, match=r"x lies on meta but this SAE on cpu; use x\.to\('cpu'\)"):
        call(torch.empty(3, 12, device="meta"))


def test_from_tensors_shares_them_and_checks_their_shapes() -> None:
    sae = make()
    tensors = {name: tensor.detach() for name, tensor in sae.named_parameters()}
    twin = FastSAE.from_tensors(sae.config, **tensors)
    assert twin.W_dec.data_ptr() == sae.W_dec.data_ptr()
    x = torch.randn(3, 12)
    assert torch.equal(twin.encode(x), sae.encode(x))
    assert twin.threshold < 0
    for changes, text in [
        ({"W_enc": sae.W_enc.T}, r"W_enc has shape \(30, 12\); expected \(12, 30\)"),
        ({"W_enc": None}, "W_enc is missing"),
        ({"threshold": torch.ones(2)}, r"threshold has shape \(2,\); expected \(\) or \(30,\)"),
        ({"b_enc": sae.b_enc.half()}, r"b_enc is torch\.float16 on cpu but W_dec torch\.float32"),
    ]:
        with pytest.raises(ValueError, match=text):
            FastSAE.from_tensors(sae.config, **{**tensors, **changes})
    with pytest.raises(ValueError, match="expected none, as it is tied"):
        FastSAE.from_tensors(make(tied=True).config, **tensors)


def test_bad_codes() -> None:
    sae = make()
    with pytest.raises(ValueError, match=r"codes has shape \(3, 29\); expected \[\.\.\., 30\]"):
        sae.decode(torch.randn(3, 29))
    with pytest.raises(TypeError, match=r"codes is torch\.int32"):
        sae.decode(torch.ones(3, 30, dtype=torch.int32))
    with pytest.raises(ValueError, match="the codes have d_sae 5; expected 30"):
        sae.decode(SparseCodes.from_dense(torch.ones(2, 5)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_rows_are_named(mode: Mode, dtype: torch.dtype, bad: float) -> None:
    sae = make(mode, dtype=dtype)
    x = torch.randn(2, 3, 12, dtype=dtype)
    x[1, 1, 5] = bad
    with pytest.raises(NonFiniteError, match=r"^x holds .* row 4, at \(1, 1\)") as caught:
        sae.encode_sparse(x)
    assert isinstance(caught.value, R1SaeError)
    assert isinstance(caught.value, ValueError)
    sae.check_finite = False
    assert sae.encode_sparse(x[0]).nnz > 0


def test_weights_that_are_not_finite_are_blamed_themselves() -> None:
    sae = make()
    with torch.no_grad():
        sae.W_dec[3, 2] = float("nan")
        sae.b_enc[3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"x itself is finite in torch\.float32: the weights"):
        sae.encode(torch.randn(3, 12))


def test_threshold_must_be_calibrated() -> None:
    sae = FastSAE(12, 30, 4, "threshold")
    with pytest.raises(ValueError, match="calibrate_threshold"):
        sae.encode(torch.randn(2, 12))


def test_compiles_whole() -> None:
    sae = make()
    x = torch.randn(4, 12)

    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        pre = x @ sae.W_enc + sae.b_enc
        values, indices, offsets = torch.ops.r1sae_fast.topk(pre, 4, True)
        return torch.ops.r1sae_fast.decode(values, indices, offsets, sae.W_dec, sae.b_dec)

    compiled = torch.compile(reconstruct, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), reconstruct(x))
