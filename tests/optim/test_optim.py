"""Adam and clipping on factored gradients against torch's on dense ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1sae_fast import FastSAE, _core, ops
from r1sae_fast.optim import Adam, FactoredGradient, clip_grad_norm_, factored_gradient

SMAPS = Path("/proc/self/smaps")

LEVELS = ops.simd_info().available


@pytest.fixture(autouse=True)
def _auto_simd() -> Iterator[None]:
    yield
    ops.set_simd("auto")


def sae(d_in: int, d_sae: int, mode: str, tied: bool, seed: int) -> FastSAE:
    torch.manual_seed(seed)
    made = FastSAE(d_in, d_sae, min(3, d_sae), mode, tied=tied)  # type: ignore[arg-type]  # tests
    with torch.no_grad():
        made.b_enc.normal_(std=0.1)
        made.b_dec.normal_(std=0.1)
    return made


def loss_of(model: FastSAE, x: Tensor) -> Tensor:
    reconstruction, _ = model(x)
    loss: Tensor = (reconstruction - x).square().mean()
    return loss


def gradients(model: FastSAE) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        factored = factored_gradient(parameter)
        if factored is not None:
            assert parameter.grad is None
            dense = factored.to_dense()
            found[name] = dense.T if name == "W_enc" else dense
        elif parameter.grad is not None:
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["topk", "batch_topk"])
@settings(deadline=None, max_examples=10)
@given(
    rows=st.integers(0, 30),
    d_in=st.sampled_from([1, 7, 63]),
    d_sae=st.sampled_from([1, 40, 123]),
    seed=st.integers(0, 2**31),
)
def test_factored_gradients_are_autograds(
    tied: bool, mode: str, rows: int, d_in: int, d_sae: int, seed: int
) -> None:
    model = sae(d_in, d_sae, mode, tied, seed)
    x = torch.randn(rows, d_in, requires_grad=True)
    weight = torch.randn(rows, d_in)
    (model(x)[0] * weight).sum().backward()
    expected, of_x = gradients(model), x.grad
    assert expected.keys() == dict(model.named_parameters()).keys()
    for level in LEVELS:
        ops.set_simd(level)
        model.zero_grad()
        x.grad = None
        model.sparse_grad = True
        for parameter in model.parameters():
            parameter.factored_grad = None  # type: ignore[attr-defined]
        # In two parts, which add up.
        for part in (slice(0, rows // 2), slice(rows // 2, rows)):
            if mode == "topk":
                (model(x[part])[0] * weight[part]).sum().backward()
        if mode == "batch_topk":
            (model(x)[0] * weight).sum().backward()
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad, of_x, rtol=1e-4, atol=1e-4)
        model.sparse_grad = False


def test_a_gradient_as_a_sparse_tensor() -> None:
    model = sae(16, 123, "topk", False, 0)
    model.sparse_grad = True
    loss_of(model, torch.randn(4, 16)).backward()
    gradient = factored_gradient(model.W_dec)
    assert gradient is not None
    sparse = gradient.to_sparse()
    assert sparse.layout == torch.sparse_coo
    assert 3 <= sparse.values().shape[0] <= 12
    assert torch.equal(sparse.to_dense(), gradient.to_dense())
    assert "codes=12" in repr(gradient)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_training_is_that_of_torchs_adam(level: str, threads: int, tied: bool) -> None:
    ops.set_simd(level)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mine, theirs = (sae(63, 123, "topk", tied, 1) for _ in range(2))
        mine.sparse_grad = True
        optimizer = Adam(mine.parameters(), lr=1e-2, betas=(0.8, 0.99), eps=1e-3)
        reference = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.8, 0.99), eps=1e-3)
        for step in range(10):
            x = torch.randn(20, 63, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            reference.zero_grad()
            losses = loss_of(mine, x), loss_of(theirs, x)
            for loss in losses:
                loss.backward()
            torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
            optimizer.step()
            reference.step()
        optimizer.state_dict()  # gives the moments of rows that rest what they missed
        for (name, found), expected in zip(
            mine.named_parameters(), theirs.parameters(), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)
            for part in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(
                    optimizer.state[found][part], reference.state[expected][part],
                    rtol=1e-3, atol=1e-6,
                )  # fmt: skip
        # State dicts go both ways.
        fresh = torch.optim.Adam(theirs.parameters())
        fresh.load_state_dict({**reference.state_dict(), "state": optimizer.state_dict()["state"]})
        optimizer.load_state_dict(
            {**optimizer.state_dict(), "state": reference.state_dict()["state"]}
        )
        loss_of(mine, x).backward()
        optimizer.step()
    finally:
        torch.set_num_threads(before)


def test_a_screen_follows_the_steps() -> None:
    """Adam writes where torch doesn't see it; codes must be those of the weights as they are."""
    model = sae(64, 512, "topk", False, 0)
    model.sparse_grad = True
    model.screen = "int8"
    optimizer = Adam(model.parameters(), lr=0.1)
    x = torch.randn(40, 64)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        with torch.no_grad():
            found = model.encode_sparse(x)
            expected = ops.topk(model.pre_activations(x), 3)
        # To the last bits of the values, which two orders of summation part.
        torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-4, atol=1e-4)


def test_rows_that_never_fired_are_moved_by_no_bit_but_by_momentum() -> None:
    model = sae(16, 64, "topk", False, 0)
    model.sparse_grad = True
    start = model.W_dec.detach().clone()
    optimizer = Adam(model.parameters(), lr=1e-2)
    loss_of(model, torch.randn(3, 16)).backward()
    fired = factored_gradient(model.W_dec).to_dense().any(1)  # type: ignore[union-attr]
    optimizer.step()
    assert torch.equal(model.W_dec[~fired], start[~fired])
    assert not torch.equal(model.W_dec[fired], start[fired])


@pytest.mark.parametrize("untouched", ["decay", "freeze"])
def test_rows_without_codes(untouched: str) -> None:
    """Against torch.optim.Adam and torch.optim.SparseAdam."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 5, generator=generator)
    mine, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    optimizer = Adam([mine], lr=0.1, untouched=untouched)  # type: ignore[arg-type]  # parametrized
    kind = torch.optim.Adam if untouched == "decay" else torch.optim.SparseAdam
    reference = kind([theirs], lr=0.1)
    for step in range(6):
        features = torch.tensor([[0, 3, 4], [3, 8], [1]][step % 3])
        # Away from 0: SparseAdam's eps comes before the correction of the bias, Adam's after it.
        rows = torch.rand(len(features), 5, generator=generator) + 0.5
        rows *= torch.randint(0, 2, rows.shape, generator=generator) * 2 - 1
        gradient = FactoredGradient(9, 5)
        gradient.add_rows(features, rows)
        mine.factored_grad = gradient  # type: ignore[attr-defined]
        sparse = torch.sparse_coo_tensor(
            features[None], rows, (9, 5), is_coalesced=True, check_invariants=True
        )
        theirs.grad = sparse.to_dense() if untouched == "decay" else sparse
        optimizer.step()
        reference.step()
        torch.testing.assert_close(mine, theirs)


def test_rows_that_rest_for_long_are_torchs_too() -> None:
    """They sleep, they wake, and a learning rate that rises wakes them all."""
    mine, theirs = (torch.nn.Parameter(torch.arange(1.0, 28).reshape(9, 3)) for _ in range(2))
    optimizer, reference = Adam([mine], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    sleepers = []
    for step in range(1200):
        touched = torch.tensor([8] if step % 400 else list(range(1, 9)))
        for each in (optimizer, reference):
            # A warm-up after rows have fallen asleep, and a decay.
            each.param_groups[0]["lr"] = 0.1 if step < 450 else 0.5 if step < 900 else 0.01
        gradient = FactoredGradient(9, 3)
        gradient.add_rows(touched, torch.randn(len(touched), 3))
        mine.factored_grad = gradient  # type: ignore[attr-defined]
        theirs.grad = gradient.to_dense()
        optimizer.step()
        reference.step()
        sleepers.append(int((optimizer.state[mine]["asleep"] > 0).sum()))
        if step == 700:
            optimizer.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    # Row 0 never had a code, and the others woke at step 0.
    assert sleepers[0] == sleepers[10] == sleepers[30] == 1
    assert sleepers[399] == sleepers[799] == sleepers[1199] == 8
    assert sleepers[400] == 1
    assert torch.equal(mine[0], torch.arange(1.0, 4))


def test_torchs_adam_goes_on_from_rows_that_sleep() -> None:
    mine, theirs = (torch.nn.Parameter(torch.arange(1.0, 28).reshape(9, 3)) for _ in range(2))
    optimizer, reference = Adam([mine], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    generator = torch.Generator().manual_seed(0)

    def step(touched: torch.Tensor, taken: torch.optim.Optimizer) -> None:
        gradient = FactoredGradient(9, 3)
        gradient.add_rows(touched, torch.randn(len(touched), 3, generator=generator))
        theirs.grad = gradient.to_dense()
        if taken is optimizer:
            mine.factored_grad = gradient  # type: ignore[attr-defined]
        else:
            mine.grad = theirs.grad.clone()
        taken.step()
        reference.step()

    for number in range(1500):
        step(torch.tensor([8] if number else list(range(1, 9))), optimizer)
    assert int((optimizer.state[mine]["asleep"] > 0).sum()) == 8
    torchs = torch.optim.Adam([mine], lr=0.1)
    torchs.load_state_dict({**torchs.state_dict(), "state": optimizer.state_dict()["state"]})
    mine.factored_grad = None  # type: ignore[attr-defined]
    for _ in range(3):
        step(torch.arange(9), torchs)
    # Without the decays, rows 1 to 7 would hardly move: their squares would be 4.5 times too large.
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dense_gradients_take_the_same_step(dtype: torch.dtype) -> None:
    shapes = [(), (7,), (5, 3), (2, 3, 4)]
    mine, theirs = ([torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes] for _ in "ab")
    mine.append(torch.nn.Parameter(torch.ones(3, 6, dtype=dtype).T))
    theirs.append(torch.nn.Parameter(torch.ones(6, 3, dtype=dtype)))
    optimizer, reference = Adam(mine, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for step in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(
                a.shape, generator=torch.Generator().manual_seed(step)
            ).to(dtype)  # fmt: skip
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    tolerance = {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {}
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("dense", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.float64)]
)
def test_unit_rows_stay_so_and_only_turn(dense: bool, dtype: torch.dtype) -> None:
    weight = torch.nn.functional.normalize(torch.randn(9, 63, dtype=dtype), dim=1)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = Adam([{"params": [parameter], "unit_rows": True}], lr=0.1)
    # Along the rows alone: nothing turns.
    gradient = 3 * weight
    if dense:
        parameter.grad = gradient
    else:
        factored = FactoredGradient(9, 63)
        factored.add_rows(torch.arange(9), gradient)
        parameter.factored_grad = factored  # type: ignore[attr-defined]
        assert clip_grad_norm_([parameter], 1e-3, unit_rows=[parameter]) < 1e-4
    # Adam makes a step of what rounding left; a large eps doesn't.
    optimizer.param_groups[0]["eps"] = 1.0
    optimizer.step()
    torch.testing.assert_close(parameter.data, weight)
    parameter.grad = torch.randn(9, 63, dtype=dtype)
    parameter.factored_grad = None  # type: ignore[attr-defined]
    optimizer.step()
    assert float((parameter.detach() - weight).abs().max()) > 1e-3
    torch.testing.assert_close(parameter.norm(dim=1), torch.ones(9, dtype=dtype))


@given(seed=st.integers(0, 2**31), max_norm=st.sampled_from([1e-3, 0.3, 1e3]))
def test_clipping(seed: int, max_norm: float) -> None:
    model = sae(16, 40, "topk", False, seed)
    x = torch.randn(12, 16)
    loss_of(model, x).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    expected = gradients(model)
    model.zero_grad()
    model.sparse_grad = True
    loss_of(model, x).backward()
    found = clip_grad_norm_(model.parameters(), max_norm)
    if found is None:
        assert norm <= max_norm
    else:
        assert found == pytest.approx(norm, rel=1e-4)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_clipping_sees_what_is_not_a_number() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    gradient = FactoredGradient(3, 2)
    gradient.add_rows(torch.tensor([1]), torch.full((1, 2), float("nan")))
    parameter.factored_grad = gradient  # type: ignore[attr-defined]
    norm = clip_grad_norm_([parameter], 1.0)
    assert norm is not None
    assert norm != norm


def test_products_count_in_norms_steps_and_dense_forms() -> None:
    features = torch.tensor([1, 4, 5])
    left, right = torch.randn(20, 3), torch.randn(20, 7)
    factored = FactoredGradient(9, 7)
    factored.add_rows(torch.tensor([0, 8]), torch.ones(2, 7))
    factored.add_product(features, left, right)
    dense = torch.zeros(9, 7)
    dense[[0, 8]] = 1.0
    dense[features] = left.T @ right
    torch.testing.assert_close(factored.to_dense(), dense)
    torch.testing.assert_close(factored.to_sparse().to_dense(), dense)
    weight = torch.randn(9, 7)
    assert factored.norm(weight) == pytest.approx(float(dense.norm()), rel=1e-5)
    assert factored.norm_bound() >= float(dense.norm())
    mine, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    mine.factored_grad = factored  # type: ignore[attr-defined]
    theirs.grad = dense
    Adam([mine], lr=0.1).step()
    torch.optim.Adam([theirs], lr=0.1).step()
    torch.testing.assert_close(mine, theirs)
    factored.scale_(0.5)
    torch.testing.assert_close(factored.to_dense(), dense / 2)


def test_a_step_twice_with_the_same_gradient_counts_both_once() -> None:
    """Dense and factored gradients add up, and taking the step changes neither."""
    parameter, twin = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    gradient = FactoredGradient(3, 2)
    gradient.add_rows(torch.tensor([1]), torch.ones(1, 2))
    parameter.factored_grad = gradient  # type: ignore[attr-defined]
    parameter.grad = torch.full((3, 2), 2.0)
    twin.grad = torch.full((3, 2), 2.0) + gradient.to_dense()
    optimizer, reference = Adam([parameter], lr=0.1, eps=1.0), torch.optim.Adam([twin], 0.1, eps=1)
    for _ in range(2):
        optimizer.step()
        reference.step()
    torch.testing.assert_close(parameter, twin)
    optimizer.zero_grad()
    assert parameter.grad is None
    assert factored_gradient(parameter) is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_what_else_adds_to_the_rows_of_a_product(unit_rows: bool, transposed: bool) -> None:
    """Codes, a second product and a dense gradient: one sum, one step, one norm."""
    torch.manual_seed(0)
    weight = torch.randn(9, 7)
    weight /= weight.norm(dim=1, keepdim=True)
    factored = FactoredGradient(9, 7)
    dense = torch.zeros(9, 7)
    for features in ([1, 4, 5], [0, 4, 5]):
        left, right = torch.randn(20, 3), torch.randn(20, 7)
        factored.add_product(torch.tensor(features), left, right)
        dense[features] += left.T @ right
    rows = torch.randn(3, 7)
    factored.add_rows(torch.tensor([1, 4, 8]), rows)
    dense[[1, 4, 8]] += rows
    torch.testing.assert_close(factored.to_dense(), dense)
    torch.testing.assert_close(factored.to_sparse().to_dense(), dense)
    assert factored.norm(weight) == pytest.approx(float(dense.norm()), rel=1e-5)
    assert factored.norm_bound() >= float(dense.norm())
    further = torch.randn(9, 7)
    mine, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    if transposed:
        mine = torch.nn.Parameter(weight.clone().T)
    mine.factored_grad, mine.grad = factored, further.T if transposed else further  # type: ignore[attr-defined]
    theirs.grad = dense + further
    groups = [{"params": [mine], "unit_rows": unit_rows and not transposed}]
    if groups[0]["unit_rows"]:
        theirs.grad -= (theirs.grad * weight).sum(1, keepdim=True) * weight
    norm = float(theirs.grad.norm())
    found = clip_grad_norm_([mine], norm / 2, unit_rows=[mine] if groups[0]["unit_rows"] else [])
    assert found == pytest.approx(norm, rel=1e-5)
    theirs.grad /= 2
    Adam(groups, lr=0.1).step()
    torch.optim.Adam([theirs], lr=0.1).step()
    if groups[0]["unit_rows"]:
        theirs.data /= theirs.data.norm(dim=1, keepdim=True)
    torch.testing.assert_close(mine.T if transposed else mine, theirs)


@pytest.mark.skipif(
    not SMAPS.exists() or "Rss:" not in SMAPS.read_text(),
    reason="the system doesn't tell a process's own pages",
)
def test_moments_of_features_that_never_fire_take_no_memory() -> None:
    """Nor does a state dict make them take any."""
    weight = torch.nn.Parameter(torch.ones(8192, 1024))
    gradient = FactoredGradient(*weight.shape)
    gradient.add_rows(torch.tensor([5]), torch.ones(1, 1024))
    weight.factored_grad = gradient  # type: ignore[attr-defined]
    optimizer = Adam([weight])
    for _ in range(2):
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        # Of 32 MiB; two pages hold the row, and mappings that lie side by side count as one.
        assert resident_bytes(state[name].data_ptr()) <= 1 << 20
        assert state[name].count_nonzero() == 1024


def resident_bytes(address: int) -> int:
    """Of the mapping that holds the address; pages that were only read are not counted."""
    holds = False
    for line in SMAPS.read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            start, end = (int(part, 16) for part in name.split("-"))
            holds = start <= address < end
        elif holds and name == "Rss:":
            return int(rest[0]) * 1024
    raise AssertionError(f"no mapping holds {address:x}")


# -- bad input ------------------------------------------------------------------------------------


def test_bad_settings_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    for settings_, message in (
        ({"lr": -1.0}, "lr is -1.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"untouched": "rest"}, "untouched is 'rest'"),
    ):
        with pytest.raises(ValueError, match=message):
            Adam([parameter], **settings_)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match=r"unit_rows for a parameter of shape \(3,\)"):
        Adam([{"params": [parameter], "unit_rows": True}])
    with pytest.raises(ValueError, match=r"max_norm is 0\.0"):
        clip_grad_norm_([parameter], 0.0)


def test_gradients_that_do_not_fit_are_refused() -> None:
    gradient = FactoredGradient(3, 2)
    left, right = torch.ones(4, 2), torch.ones(4, 2)
    for features in ([1, 1], [2, 1], [-1, 1], [1, 3]):
        with pytest.raises(ValueError, match="rise from at least 0 to at most 2, each once"):
            gradient.add_product(torch.tensor(features), left, right)
    with pytest.raises(ValueError, match=r"features are torch\.int32"):
        gradient.add_product(torch.tensor([0, 1], dtype=torch.int32), left, right)
    with pytest.raises(ValueError, match=r"expected \[n\], \[rows, n\] and \[rows, 2\]"):
        gradient.add_product(torch.tensor([0]), left, right)
    lists = _core.FeatureLists(
        torch.tensor([1], dtype=torch.int32).numpy(), torch.tensor([0, 1]).numpy(), 3
    )
    with pytest.raises(ValueError, match="the codes ask for"):
        gradient.add(lists, torch.ones(2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="the codes ask for"):
        gradient.add(lists, torch.ones(1), torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"rows is torch\.float64"):
        gradient.add(lists, torch.ones(1), torch.ones(1, 2, dtype=torch.float64))
    parameter = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    parameter.factored_grad = gradient  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"factored gradient for a parameter of torch\.bfloat16"):
        Adam([parameter]).step()
    with pytest.raises(ValueError, match="row 0 names feature 3"):
        gradient.add_rows(torch.tensor([3]), torch.ones(1, 2))


def test_sparse_grad_of_another_dtype_is_refused() -> None:
    model = sae(4, 8, "topk", False, 0).bfloat16()
    model.sparse_grad = True
    with pytest.raises(TypeError, match=r"sparse_grad with parameters of torch\.bfloat16"):
        model(torch.randn(3, 4))
    with torch.no_grad():
        model(torch.randn(3, 4))
