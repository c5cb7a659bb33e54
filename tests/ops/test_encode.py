"""Encoding as one operation, and the sums over features: against the product and a selection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from r1sae_fast import FastSAE, SparseCodes, ops
from r1sae_fast.errors import NonFiniteError
from r1sae_fast.ops import int8

RULES = ["topk", "batch_topk", "threshold"]


def problem(dtype: torch.dtype = torch.float32, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """x, W_features, b_enc."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((rows, 12), (30, 12), (30,))
    x, W, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return x, W, b


def encode(rule: str, x: Tensor, W: Tensor, b: Tensor, *, check: bool = True) -> SparseCodes:
    if rule == "threshold":
        return ops.encode_threshold(x, W, b, torch.linspace(0, 2, 30), check_finite=check)
    function = ops.encode_topk if rule == "topk" else ops.encode_batch_topk
    return function(x, W, b, 4, check_finite=check)


def select(rule: str, pre: Tensor) -> SparseCodes:
    if rule == "threshold":
        return ops.threshold(pre, torch.linspace(0, 2, 30))
    return (ops.topk if rule == "topk" else ops.batch_topk)(pre, 4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_is_the_product_and_a_selection(rule: str, dtype: torch.dtype) -> None:
    given = [tensor.requires_grad_() for tensor in problem(dtype)]
    found = encode(rule, *given)
    found.values.square().sum().backward()
    gradients = [tensor.grad for tensor in given]
    own = [tensor.detach().clone().requires_grad_() for tensor in given]
    expected = select(rule, own[0] @ own[1].T + own[2])
    expected.values.square().sum().backward()
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.row_offsets, expected.row_offsets)
    for mine, theirs in zip(gradients, (tensor.grad for tensor in own), strict=True):
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * 10)


# torch's own tester reads .grad of tensors that are no leaves, whatever the operation.
NO_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@NO_LEAF
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule: str, gradient: bool) -> None:
    given = [tensor.requires_grad_(gradient) for tensor in problem()]
    choice = torch.linspace(0, 2, 30) if rule == "threshold" else 4
    own = torch.ops.r1sae_fast
    torch.library.opcheck(getattr(own, f"encode_{rule}").default, (*given, choice, True))
    rounded = int8.weights(given[1].detach())
    bounds = choice if isinstance(choice, Tensor) else torch.zeros(1)
    arguments = (*given, *rounded, rule, 4, bounds, True)
    torch.library.opcheck(own.int8_encode.default, arguments)


@NO_LEAF
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck_of_sums(gradient: bool) -> None:
    x, W, b = problem()
    codes = encode("topk", x, W, b)
    sparse = (codes.indices, codes.row_offsets)
    upstream = torch.ones(codes.nnz).requires_grad_(gradient)
    own = torch.ops.r1sae_fast
    x.requires_grad_(gradient)
    torch.library.opcheck(own.int8_weights.default, (W,))
    torch.library.opcheck(own.sums_by_feature.default, (x, upstream, *sparse, 30))
    for features in (None, torch.tensor([29, 3, 0])):
        arguments = (x, upstream, x, codes.values, *sparse, 30, features)
        torch.library.opcheck(own.code_gradients.default, arguments)


def test_sums_are_linear_maps_whose_gradients_are_right() -> None:
    x, W, b = (tensor.double() for tensor in problem())
    codes = encode("topk", x, W, b)
    sparse = (codes.indices, codes.row_offsets)
    values = torch.rand(codes.nnz, dtype=torch.float64).requires_grad_()
    x.requires_grad_()
    some = torch.tensor([29, 3, 0])

    def sums(x: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return ops.sums_by_feature(x, values, *sparse, 30)

    def both(x: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return ops.code_gradients(x, values, 2 * x, values * 3, *sparse, 30, some)

    functions: list[Callable[..., tuple[Tensor, ...]]] = [sums, both]
    for function in functions:
        assert torch.autograd.gradcheck(function, (x, values))
    whole = ops.code_gradients(x, values, 2 * x, values * 3, *sparse, 30)
    for part, all_of_it in zip(both(x, values), whole, strict=True):
        assert torch.equal(part, all_of_it[some])


@pytest.mark.parametrize("rule", RULES)
def test_compiles_to_one_node(rule: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    x, W, b = problem()
    choice = torch.linspace(0, 2, 30) if rule == "threshold" else 4
    operation = getattr(torch.ops.r1sae_fast, f"encode_{rule}")

    def run(x: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = operation(x, W, b, choice, True)
        return found

    compiled = torch.compile(run, fullgraph=True, backend=keep)
    for mine, theirs in zip(compiled(x), run(x), strict=True):
        assert torch.equal(mine, theirs)
    (graph,) = graphs
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    # Beside it only what says how many codes there may be.
    about_sizes = ("sym_size", "_assert_scalar", "built-in")
    rest = [name for name in called if not any(part in name for part in about_sizes)]
    assert rest == [f"r1sae_fast.encode_{rule}"]


class Called(TorchDispatchMode):
    """Lists the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["topk", "batch_topk"])
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_gpu_makes_no_dense_pre_activations(mode: str, dtype: torch.dtype) -> None:
    """On tensors that claim to lie on CUDA: one operation encodes, one decodes, none multiplies."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        sae = FastSAE(64, 512, 4, mode, device="cuda", dtype=dtype)  # type: ignore[arg-type]  # a mode
        x = torch.empty(8, 64, device="cuda", dtype=dtype)
        with Called() as called:
            reconstruction, codes = sae(x)
        report = sae.explain()
    assert reconstruction.device.type == codes.device.type == "cuda"
    assert codes.values.requires_grad
    own = [name for name in called.names if name.startswith("r1sae_fast")]
    assert own == [f"r1sae_fast.encode_{mode}.default", "r1sae_fast.decode.default"]
    assert not [name for name in called.names if "mm" in name or "matmul" in name]
    assert report.kind == "none"


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_gpu_screens_large_float32_weights() -> None:
    pytest.importorskip("triton")
    with FakeTensorMode(shape_env=ShapeEnv()):
        sae = FastSAE(7168, 28672, 64, "topk", device="cuda", dtype=torch.float32)
        report = sae.explain()
        assert (report.kind, report.kernel) == ("int8", "triton")
        assert "tensor cores" in report.reason
        half = FastSAE(7168, 28672, 64, "topk", device="cuda", dtype=torch.bfloat16).explain()
        assert (half.kind, half.kernel) == ("none", "triton")
        sae.screen = "none"
        assert sae.explain().kind == "none"


def test_arguments_that_do_not_fit() -> None:
    x, W, b = problem()
    with pytest.raises(ValueError, match=r"x has shape \(6, 11\); expected \[..., 12\]"):
        ops.encode_topk(x[:, 1:], W, b, 4)
    with pytest.raises(ValueError, match=r"expected \[d_sae, d_in\] and \[d_sae\]"):
        ops.encode_topk(x, W, b[1:], 4)
    with pytest.raises(TypeError, match=r"x is torch\.float32 but W_features torch\.float64"):
        ops.encode_topk(x, W.double(), b.double(), 4)
    with pytest.raises(ValueError, match="k is 31; expected 0 to 30"):
        ops.encode_batch_topk(x, W, b, 31)
    with pytest.raises(ValueError, match=r"threshold has shape \(2,\)"):
        ops.encode_threshold(x, W, b, torch.ones(2))
    x[4, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="row 4"):
        ops.encode_topk(x, W, b, 4)
    assert ops.encode_topk(x, W, b, 4, check_finite=False).counts[4] == 0
