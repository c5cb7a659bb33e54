"""SparseCodes: the few non-zero features of each row, without the dense tensor.

The layout is compressed sparse rows (CSR) with a richer order: the codes of row ``r`` are
``values[row_offsets[r]:row_offsets[r + 1]]`` at features ``indices[...]``, strongest first, ties by
lower feature. Each code costs ``4 + itemsize`` bytes against ``d_sae * itemsize`` for a dense row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["SparseCodes"]

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False, repr=False)
class SparseCodes:
    """Sparse codes of any leading shape.

    Args:
        values: ``[nnz]``, floating; gradients flow through it.
        indices: ``[nnz]`` int32, the feature of each value, in ``[0, d_sae)``.
        row_offsets: ``[rows + 1]`` int64, from 0 to nnz, never falling.
        d_sae: the number of features.
        leading_shape: the shape before the feature dimension, with ``rows`` elements in all;
            default ``(rows,)``. ``()`` is one row without a batch dimension.

    Raises:
        TypeError: a dtype other than those above.
        ValueError: sizes, devices or the ends of ``row_offsets`` that disagree. What would take a
            pass over the data (ranges, order, duplicates) is tested by :meth:`check`.
    """

    values: Tensor
    indices: Tensor
    row_offsets: Tensor
    d_sae: int
    leading_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _require_vector("values", self.values, None)
        _require_vector("indices", self.indices, torch.int32)
        _require_vector("row_offsets", self.row_offsets, torch.int64)
        if isinstance(self.d_sae, bool) or not isinstance(self.d_sae, int):
            raise TypeError(f"d_sae is {self.d_sae!r}; expected an int")
        if not 0 <= self.d_sae <= _INT32_MAX:
            raise ValueError(f"d_sae is {self.d_sae}; expected 0 to {_INT32_MAX}")
        nnz = self.values.shape[0]
        if self.indices.shape[0] != nnz:
            raise ValueError(
                f"values holds {nnz} codes but indices {self.indices.shape[0]}; they must be equal"
            )
        devices = {self.values.device, self.indices.device, self.row_offsets.device}
        if len(devices) != 1:
            found = ", ".join(sorted(str(device) for device in devices))
            raise ValueError(f"values, indices and row_offsets lie on {found}; expected one device")
        rows = self.row_offsets.shape[0] - 1
        if rows < 0:
            raise ValueError("row_offsets is empty; expected rows + 1 entries, at least [0]")
        shape = (rows,) if self.leading_shape is None else tuple(int(n) for n in self.leading_shape)
        if any(n < 0 for n in shape) or math.prod(shape) != rows:
            raise ValueError(
                f"leading_shape {shape} has {math.prod(shape)} rows but row_offsets {rows}"
            )
        object.__setattr__(self, "leading_shape", shape)
        # Reading two numbers would stall an accelerator's queue, so only the CPU is tested here.
        if self.row_offsets.device.type == "cpu":
            first, last = int(self.row_offsets[0]), int(self.row_offsets[-1])
            if (first, last) != (0, nnz):
                raise ValueError(
                    f"row_offsets runs from {first} to {last}; expected 0 to {nnz}, "
                    "the number of values"
                )

    # -- what it is ---------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense tensor: leading shape + ``(d_sae,)``."""
        return torch.Size((*self._leading, self.d_sae))

    @property
    def rows(self) -> int:
        """Number of rows: the product of the leading shape."""
        return self.row_offsets.shape[0] - 1

    @property
    def nnz(self) -> int:
        """Number of codes in all rows together."""
        return self.values.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``values``."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where all three tensors lie."""
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are asked of ``values``."""
        return self.values.requires_grad

    @property
    def counts(self) -> Tensor:
        """Codes per row (the L0), int64, in the leading shape."""
        return self.row_offsets.diff().reshape(self._leading)

    @property
    def row_ids(self) -> Tensor:
        """The flat row of each code, ``[nnz]`` int64."""
        rows = torch.arange(self.rows, device=self.device)
        return torch.repeat_interleave(rows, self.row_offsets.diff(), output_size=self.nnz)

    @property
    def uniform_k(self) -> int | None:
        """The number of codes per row when every row has as many, else None (also for no rows)."""
        if self.rows == 0 or self.nnz % self.rows:
            return None
        k = self.nnz // self.rows
        return k if bool((self.row_offsets.diff() == k).all()) else None

    def uniform(self) -> tuple[Tensor, Tensor]:
        """``(values, indices)``, each of shape leading shape + ``(k,)``, as views.

        Raises:
            ValueError: rows hold unequal numbers of codes.
        """
        k = self.uniform_k
        if k is None:
            raise ValueError(
                "rows hold unequal numbers of codes, so there is no [rows, k] view; "
                "use row_offsets, or to_dense()"
            )
        shape = (*self._leading, k)
        return self.values.reshape(shape), self.indices.reshape(shape)

    def check(self) -> SparseCodes:
        """Tests every invariant in one pass over the data, and returns self.

        Raises:
            ValueError: offsets that fall, an index out of range, a feature twice in a row, or codes
                out of order; the row is named.
        """
        sizes = self.row_offsets.diff()
        ends = (int(self.row_offsets[0]), int(self.row_offsets[-1]))
        if ends != (0, self.nnz):
            raise ValueError(
                f"row_offsets runs from {ends[0]} to {ends[1]}; expected 0 to {self.nnz}"
            )
        if bool((sizes < 0).any()):
            raise ValueError(f"row_offsets falls after row {_first(sizes < 0)}; it must not")
        rows, columns = self.row_ids, self.indices.long()
        outside = (columns < 0) | (columns >= self.d_sae)
        if bool(outside.any()):
            at = _first(outside)
            raise ValueError(
                f"row {int(rows[at])} names feature {int(columns[at])}; "
                f"expected 0 to {self.d_sae - 1}"
            )
        flat = (rows * self.d_sae + columns).sort().values
        twice = flat[1:] == flat[:-1]
        if bool(twice.any()):
            row, feature = divmod(int(flat[_first(twice)]), self.d_sae)
            raise ValueError(f"row {row} names feature {feature} more than once")
        values = self.values.detach()
        wrong = (values[1:] > values[:-1]) | (
            (values[1:] == values[:-1]) & (columns[1:] < columns[:-1])
        )
        wrong &= rows[1:] == rows[:-1]
        if bool(wrong.any()):
            raise ValueError(
                f"row {int(rows[_first(wrong)])} is out of order; "
                "expected falling values, ties by lower feature"
            )
        return self

    def __repr__(self) -> str:
        mean = f"{self.nnz / self.rows:.4g}" if self.rows else "0"
        grad = ", requires_grad=True" if self.requires_grad else ""
        return (
            f"SparseCodes(shape={tuple(self.shape)}, nnz={self.nnz}, mean_l0={mean}, "
            f"dtype={self.dtype}, device={str(self.device)!r}{grad})"
        )

    # -- other forms --------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """The dense tensor of :attr:`shape`; differentiable in ``values``."""
        dense = self.values.new_zeros(self.rows, self.d_sae)
        dense = dense.index_put((self.row_ids, self.indices.long()), self.values)
        return dense.reshape(self.shape)

    def to_sparse_csr(self) -> Tensor:
        """torch's own CSR tensor ``[rows, d_sae]`` (features sorted, int64 indices)."""
        columns = self.indices.long()
        # CSR wants rising columns: one stable sort over (row, column) keeps the rows in place.
        order = (self.row_ids * self.d_sae + columns).argsort()
        with warnings.catch_warnings():
            # torch warns once per process that CSR tensors are in beta.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.row_offsets,
                columns[order],
                self.values[order],
                size=(self.rows, self.d_sae),
                check_invariants=False,
            )

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCodes:
        """The non-zero entries of ``dense [..., d_sae]``; differentiable in ``dense``.

        Raises:
            TypeError: not a floating tensor.
            ValueError: a tensor without dimensions.
        """
        if not dense.is_floating_point():
            raise TypeError(f"dense is {dense.dtype}; expected a floating tensor")
        if dense.dim() == 0:
            raise ValueError("dense has no dimensions; expected [..., d_sae]")
        leading, d_sae = tuple(dense.shape[:-1]), dense.shape[-1]
        table = dense.reshape(math.prod(leading), d_sae)
        rows, columns = torch.nonzero(table.detach(), as_tuple=True)
        values = table[rows, columns]
        # nonzero lists rising (row, column); two stable sorts give rising row, falling value.
        order = values.detach().argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        counts = torch.bincount(rows, minlength=table.shape[0])
        return cls(
            values[order],
            columns[order].to(torch.int32),
            _offsets(counts),
            d_sae,
            leading,
        )

    def to(self, *args: Any, **kwargs: Any) -> SparseCodes:
        """As ``Tensor.to``: a device, a floating dtype, or both; the dtype concerns ``values``."""
        values = self.values.to(*args, **kwargs)
        if not values.is_floating_point():
            raise TypeError(f"codes can't be {values.dtype}; expected a floating dtype")
        if values is self.values:
            return self
        device = values.device
        return replace(
            self,
            values=values,
            indices=self.indices.to(device),
            row_offsets=self.row_offsets.to(device),
        )

    def cpu(self) -> SparseCodes:
        """The same codes in main memory."""
        return self.to("cpu")

    def detach(self) -> SparseCodes:
        """The same codes, cut from the graph of gradients."""
        return replace(self, values=self.values.detach())

    def clone(self) -> SparseCodes:
        """A copy that shares no memory."""
        return replace(
            self,
            values=self.values.clone(),
            indices=self.indices.clone(),
            row_offsets=self.row_offsets.clone(),
        )

    def reshape(self, *leading_shape: int) -> SparseCodes:
        """The same rows under another leading shape (one entry may be -1); no copy.

        Raises:
            ValueError: a shape of another number of rows.
        """
        try:
            shape = torch.empty(self.rows, device="meta").reshape(leading_shape).shape
        except RuntimeError:
            raise ValueError(
                f"{self.rows} rows can't take the leading shape {leading_shape}"
            ) from None
        return replace(self, leading_shape=tuple(shape))

    def flatten(self) -> SparseCodes:
        """The same rows under the leading shape ``(rows,)``; no copy."""
        return replace(self, leading_shape=(self.rows,))

    @staticmethod
    def cat(parts: Sequence[SparseCodes]) -> SparseCodes:
        """Joins codes along the first leading dimension.

        Raises:
            ValueError: no parts, a part without a leading dimension, or parts that differ in
                d_sae or in the other leading dimensions.
        """
        if not parts:
            raise ValueError("nothing to join; expected at least one SparseCodes")
        first = parts[0]
        for at, part in enumerate(parts):
            if not part._leading:
                raise ValueError(f"part {at} has no leading dimension; use .reshape(1) first")
            if (part._leading[1:], part.d_sae) != (first._leading[1:], first.d_sae):
                raise ValueError(
                    f"part {at} has shape {tuple(part.shape)}, part 0 {tuple(first.shape)}; "
                    "all but the first dimension must be equal"
                )
        counts = torch.cat([part.row_offsets.diff() for part in parts])
        return SparseCodes(
            torch.cat([part.values for part in parts]),
            torch.cat([part.indices for part in parts]),
            _offsets(counts),
            first.d_sae,
            (sum(part._leading[0] for part in parts), *first._leading[1:]),
        )

    # -- rows ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        if not self._leading:
            raise TypeError("these codes are a single row without a leading dimension")
        return self._leading[0]

    def __iter__(self) -> Iterator[SparseCodes]:
        return (self[at] for at in range(len(self)))

    def __getitem__(self, key: Any) -> SparseCodes:
        """Chooses rows as a tensor of the leading shape would be indexed.

        Ints, slices, tuples, masks and index tensors over the leading dimensions; a plain slice of
        the first dimension makes views, all else copies.

        Raises:
            IndexError: out of range, or more indices than leading dimensions.
        """
        if isinstance(key, slice) and self._leading:
            chosen = range(*key.indices(self._leading[0]))
            if chosen.step == 1:
                return self._row_range(chosen)
            key = torch.tensor(chosen, dtype=torch.int64)
        # On the CPU whatever the codes' device: indexing row numbers is small work.
        numbers = torch.arange(self.rows).reshape(self._leading)
        if isinstance(key, Tensor):
            key = key.cpu()
        elif isinstance(key, tuple):
            key = tuple(part.cpu() if isinstance(part, Tensor) else part for part in key)
        picked = numbers[key]
        rows = picked.reshape(-1).to(self.device)
        starts = self.row_offsets[:-1][rows]
        counts = self.row_offsets.diff()[rows]
        offsets = _offsets(counts)
        total = int(offsets[-1])
        shift = torch.repeat_interleave(starts - offsets[:-1], counts, output_size=total)
        at = shift + torch.arange(total, device=self.device)
        return SparseCodes(
            self.values[at], self.indices[at], offsets, self.d_sae, tuple(picked.shape)
        )

    def _row_range(self, chosen: range) -> SparseCodes:
        inner = self._leading[1:]
        size = math.prod(inner)
        start, stop = chosen.start * size, max(chosen.stop, chosen.start) * size
        offsets = self.row_offsets[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return SparseCodes(
            self.values[first:last],
            self.indices[first:last],
            offsets - first,
            self.d_sae,
            (len(chosen), *inner),
        )

    @property
    def _leading(self) -> tuple[int, ...]:
        # __post_init__ has put the default in place of None.
        assert self.leading_shape is not None
        return self.leading_shape


def _require_vector(name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    if dtype is None and not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; expected a floating dtype")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected one dimension")


def _offsets(counts: Tensor) -> Tensor:
    """``[rows]`` counts to ``[rows + 1]`` offsets."""
    offsets = counts.new_zeros(counts.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def _first(mask: Tensor) -> int:
    return int(mask.to(torch.uint8).argmax())
