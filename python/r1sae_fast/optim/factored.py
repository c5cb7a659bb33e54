"""The gradient of an SAE's matrix, kept as what it is a sum of.

With ``a`` the gradient of the loss in the codes' values and ``e`` that in the reconstruction, row
``f`` of the encoder's gradient (feature-major) is the sum of ``a[i] * x[r]`` over the codes ``i``
of ``f`` (rows ``r``), that of the decoder's the sum of ``values[i] * e[r]``. Both are told by a
number a code and the batch's rows: megabytes, where the matrix is a gigabyte at R1's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1sae_fast import _core

__all__ = [
    "FactoredGradient",
    "Leave",
    "Product",
    "RustSource",
    "as_rows",
    "factored_gradient",
    "feature_major",
    "leave_at",
]

Leave = Callable[[_core.FeatureLists, Tensor, Tensor], None]
"""Takes a matrix's gradient: codes by feature, a coefficient a code, and rows."""

RustSource = tuple[_core.FeatureLists, list[tuple[NDArray[np.float32], NDArray[np.float32]]]]

_BLOCK_NUMBERS = 1 << 24
"""Of a product's rows so many numbers are made at a time: 64 MiB."""


class Product(NamedTuple):
    """``gradient[features] = left.T @ right``: for features that nearly every row has."""

    features: Tensor
    """``[n]`` int64, rising."""
    left: Tensor
    """``[rows, n]``."""
    right: Tensor
    """``[rows, d_in]``."""


class FactoredGradient:
    """A float32 gradient ``[d_sae, d_in]`` on the CPU, as a sum over sparse codes.

    Args:
        d_sae, d_in: its shape, feature by feature, whichever way round the parameter lies.
    """

    def __init__(self, d_sae: int, d_in: int) -> None:
        self.d_sae, self.d_in = d_sae, d_in
        self._sources: list[tuple[_core.FeatureLists, Tensor, Tensor]] = []
        self._products: list[Product] = []

    def __repr__(self) -> str:
        codes = sum(lists.nnz for lists, _, _ in self._sources)
        return f"FactoredGradient(d_sae={self.d_sae}, d_in={self.d_in}, codes={codes})"

    def add(self, lists: _core.FeatureLists, coefficients: Tensor, rows: Tensor) -> None:
        """Adds ``sum of coefficients[i] * rows[r]`` over each feature's codes.

        Args:
            lists: the codes by feature.
            coefficients: ``[nnz]`` float32, in order of rows.
            rows: ``[rows, d_in]`` float32; kept, not copied.

        Raises:
            TypeError: not float32 on the CPU.
            ValueError: shapes that don't fit.
        """
        expected = (lists.d_sae, (lists.nnz,), (lists.rows, self.d_in))
        found = (self.d_sae, tuple(coefficients.shape), tuple(rows.shape))
        if expected != found:
            raise ValueError(
                f"d_sae, coefficients and rows are of {found}; the codes ask for {expected}"
            )
        for name, tensor in (("coefficients", coefficients), ("rows", rows)):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise TypeError(
                    f"{name} is {tensor.dtype} on {tensor.device}; expected float32 on the CPU"
                )
        coefficients, rows = coefficients.detach().contiguous(), rows.detach().contiguous()
        self._sources.append((lists, coefficients, rows))

    def add_rows(self, features: Tensor, rows: Tensor) -> None:
        """Adds ``rows [n, d_in]`` (kept, not copied) to the rows ``features [n]``."""
        lists = _core.FeatureLists(
            features.to(torch.int32).numpy(), np.arange(features.shape[0] + 1), self.d_sae
        )
        self.add(lists, torch.ones(features.shape[0]), rows)

    def add_dense(self, gradient: Tensor) -> None:
        """Adds ``gradient [d_sae, d_in]``, kept, not copied."""
        self.add_rows(torch.arange(self.d_sae), gradient)

    def add_product(self, features: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds ``left.T @ right`` to the rows ``features`` (int64, rising).

        Worth it where more than some percent of ``left [rows, n]`` are not 0.

        Raises:
            ValueError: shapes that don't fit, or features that don't rise from 0 to below d_sae.
        """
        count = left.shape[-1]
        shapes = (tuple(features.shape), tuple(left.shape), tuple(right.shape))
        if shapes != ((count,), (left.shape[0], count), (left.shape[0], self.d_in)):
            raise ValueError(
                f"features, left and right have shapes {', '.join(map(str, shapes))}; expected "
                f"[n], [rows, n] and [rows, {self.d_in}]"
            )
        rising = bool((features[1:] > features[:-1]).all())
        inside = not count or (int(features[0]) >= 0 and int(features[-1]) < self.d_sae)
        if features.dtype != torch.int64 or not (rising and inside):
            raise ValueError(
                f"features are {features.dtype}, rising: {rising}; expected int64 that rise from "
                f"at least 0 to at most {self.d_sae - 1}, each once"
            )
        self._products.append(Product(features, left, right))

    def extend(self, other: FactoredGradient) -> None:
        """Adds another one of the same shape."""
        self._sources += other._sources
        self._products += other._products

    # -- what the optimiser reads -----------------------------------------------------------------

    @property
    def products(self) -> list[Product]:
        """Those of :meth:`add_product`."""
        return self._products

    def rust_sources(self) -> list[RustSource]:
        """The rest, as the Rust core takes it."""
        return [
            (lists, [(coefficients.numpy(), rows.numpy())])
            for lists, coefficients, rows in self._sources
        ]

    def scale_(self, factor: float) -> None:
        """Multiplies the gradient by ``factor``."""
        self._sources = [
            (lists, coefficients * factor, rows) for lists, coefficients, rows in self._sources
        ]
        self._products = [
            Product(features, left * factor, right) for features, left, right in self._products
        ]

    def norm_bound(self) -> float:
        """A number that :meth:`norm` doesn't exceed, at a hundredth of its cost."""
        of_sources = _core.gradient_norm_bound(
            self.rust_sources(), self.d_sae, self.d_in, torch.get_num_threads()
        )
        parts = [float(left.norm()) * float(right.norm()) for _, left, right in self._products]
        if self._overlaps():
            bound = float(np.sqrt(of_sources)) + sum(parts)
        else:
            bound = float(np.sqrt(of_sources + sum(part**2 for part in parts)))
        # Room for the rounding of all.
        return 1.001 * bound

    def norm(self, weight: Tensor, *, unit_rows: bool = False) -> float:
        """The Frobenius norm, from sums that are made and dropped.

        Args:
            weight: ``[d_sae, d_in]``, what this is the gradient of.
            unit_rows: its rows are of norm 1, and only what turns them counts.
        """
        if self._overlaps():
            # Rows of sums of different kinds: none can be told from its parts' norms.
            squared, blocks = 0.0, self._blocks(self.touched().nonzero().flatten())
        else:
            squared = _core.gradient_squared_norm(
                self.rust_sources(), _array(weight), unit_rows, torch.get_num_threads()
            )
            blocks = self.product_rows()
        for features, block in blocks:
            if unit_rows:
                block = turning(block, weight.detach()[features])
            squared += float(block.norm()) ** 2
        return float(np.sqrt(squared))

    def in_products(self) -> Tensor:
        """Which features have a product, ``[d_sae]`` bool."""
        found = torch.zeros(self.d_sae, dtype=torch.bool)
        for product in self._products:
            found[product.features] = True
        return found

    def product_rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The features that have a product and their gradient's rows, all that is added to them
        included; some at a time, each once."""
        if self._overlaps():
            yield from self._blocks(self.in_products().nonzero().flatten())
            return
        for features, left, right in self._products:
            step = self._block_rows()
            for start in range(0, features.shape[0], step):
                some = slice(start, start + step)
                yield features[some], left[:, some].T @ right

    def _overlaps(self) -> bool:
        """Whether anything else adds to the rows of a product."""
        if not self._products:
            return False
        taken = torch.zeros(self.d_sae, dtype=torch.bool)
        for product in self._products:
            if bool(taken[product.features].any()):
                return True
            taken[product.features] = True
        return bool((self._in_sources() & taken).any())

    def _block_rows(self) -> int:
        return max(1, _BLOCK_NUMBERS // max(1, self.d_in))

    # -- what a user may look at ------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """``[d_sae, d_in]``."""
        return self._rows(torch.arange(self.d_sae))

    def touched(self) -> Tensor:
        """Which features have codes, ``[d_sae]`` bool: all other rows are 0."""
        return self._in_sources() | self.in_products()

    def _in_sources(self) -> Tensor:
        found = torch.zeros(self.d_sae, dtype=torch.bool)
        for lists, _, _ in self._sources:
            ones = np.ones(lists.nnz, dtype=np.float32)
            found |= torch.from_numpy(lists.sums(ones)) > 0
        return found

    def to_sparse(self) -> Tensor:
        """A hybrid ``torch.sparse_coo`` tensor that holds the rows of features with codes."""
        features = self.touched().nonzero().flatten()
        return torch.sparse_coo_tensor(
            features[None],
            self._rows(features),
            (self.d_sae, self.d_in),
            is_coalesced=True,
            check_invariants=True,
        )

    def _rows(self, features: Tensor) -> Tensor:
        """``[features, d_in]``; ``features`` int64, rising."""
        flat = _core.gradient_rows(
            self.rust_sources(), features.numpy(), self.d_sae, self.d_in, torch.get_num_threads()
        )
        rows = torch.from_numpy(flat).reshape(features.shape[0], self.d_in)
        for product in self._products:
            here = torch.isin(product.features, features)
            places = torch.searchsorted(features, product.features[here])
            rows[places] += product.left[:, here].T @ product.right
        return rows

    def _blocks(self, features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """:meth:`_rows`, some at a time, with their features."""
        for some in torch.split(features, self._block_rows()):
            yield some, self._rows(some)


def turning(gradient: Tensor, weight: Tensor) -> Tensor:
    """What is left of ``gradient`` without its part along each row of ``weight``, of norm 1."""
    along = (gradient * weight).sum(1, keepdim=True)
    return gradient.addcmul(weight, along, value=-1.0)


def factored_gradient(parameter: Tensor) -> FactoredGradient | None:
    """The factored gradient that a backward pass left at ``parameter``, if any."""
    found: Any = getattr(parameter, "factored_grad", None)
    return found if isinstance(found, FactoredGradient) else None


def leave_at(parameter: Tensor, d_sae: int, d_in: int) -> Leave:
    """A function that adds what it is given to the factored gradient of ``parameter``."""

    def leave(lists: _core.FeatureLists, coefficients: Tensor, rows: Tensor) -> None:
        gradient = factored_gradient(parameter)
        if gradient is None:
            gradient = FactoredGradient(d_sae, d_in)
            # torch's .grad takes tensors of the parameter's shape only.
            parameter.factored_grad = gradient  # type: ignore[attr-defined]
        gradient.add(lists, coefficients, rows)

    return leave


def feature_major(matrix: Tensor) -> Tensor | None:
    """``matrix`` or its transpose, whichever lies row after row; None if neither does."""
    if matrix.dim() != 2:
        return None
    if matrix.is_contiguous():
        return matrix
    return matrix.T if matrix.T.is_contiguous() else None


def as_rows(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A dense gradient, laid out as Rust takes its parameter: feature by feature, or in one row."""
    if parameter.dim() != 2:
        return gradient.reshape(1, -1)
    return gradient if parameter.is_contiguous() else gradient.T


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().numpy()
    return array
