"""The Rust extension (crate rust/python). Checked against the built module by stubtest."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

__version__: str
DEBUG_BUILD: bool

# -- selection and decoding (rust/python/src/ops.rs) --

# float32, or uint16 holding the bits of bf16.
_Floats: TypeAlias = NDArray[np.float32] | NDArray[np.uint16]
_Int32: TypeAlias = NDArray[np.int32]
_Int64: TypeAlias = NDArray[np.int64]
_Codes: TypeAlias = tuple[NDArray[Any], _Int32, _Int64]

def topk(pre_activations: _Floats, k: int, check_finite: bool, threads: int) -> _Codes: ...
def batch_topk(pre_activations: _Floats, k: int, check_finite: bool, threads: int) -> _Codes: ...
def threshold(
    pre_activations: _Floats,
    thresholds: NDArray[np.float32],
    check_finite: bool,
    threads: int,
) -> _Codes: ...
def decode(
    values: _Floats,
    indices: _Int32,
    row_offsets: _Int64,
    w_dec: _Floats,
    b_dec: _Floats | None,
    threads: int,
) -> NDArray[Any]: ...
def decode_gradient_of_values(
    gradient: _Floats,
    indices: _Int32,
    row_offsets: _Int64,
    w_dec: _Floats,
    threads: int,
) -> NDArray[Any]: ...
def decode_gradient_of_weight(
    gradient: _Floats,
    values: _Floats,
    indices: _Int32,
    row_offsets: _Int64,
    d_sae: int,
    threads: int,
) -> NDArray[Any]: ...
def share_openmp(parallel: int) -> None: ...
def simd_info() -> tuple[str, list[str]]: ...
def set_simd(name: str) -> str: ...

# -- screening (rust/python/src/screen.rs) --

def screen_kernels(kind: str = ...) -> tuple[str, list[str]]: ...
def prefer_large_pages(floats: _Floats) -> None: ...

@final
class Screen:
    def __new__(cls, w: _Floats, bias: _Floats, kernel: str, seed: int, threads: int) -> Screen: ...
    def refresh(self, w: _Floats, bias: _Floats, rows: _Int64 | None, threads: int) -> None: ...
    def encode(
        self,
        x: _Floats,
        w: _Floats,
        bias: _Floats,
        rule: str,
        choice: int | NDArray[np.float32],
        check_finite: bool,
        threads: int,
    ) -> _Codes: ...
    @property
    def kernel(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def counts(self) -> tuple[int, int, int, int]: ...
    @property
    def first_bad_feature(self) -> int | None: ...

# -- training (rust/python/src/train.rs) --

@final
class FeatureLists:
    def __new__(cls, indices: _Int32, row_offsets: _Int64, d_sae: int) -> FeatureLists: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def nnz(self) -> int: ...
    def sums(self, values: NDArray[np.float32]) -> NDArray[np.float32]: ...

_Sources: TypeAlias = Sequence[
    tuple[FeatureLists, Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]]
]

def gradient_of_values_by_feature(
    gradient: NDArray[np.float32],
    lists: FeatureLists,
    w_dec: NDArray[np.float32],
    threads: int,
) -> NDArray[np.float32]: ...
def gradient_rows(
    sources: _Sources, features: _Int64, d_sae: int, d_in: int, threads: int
) -> NDArray[np.float32]: ...
def gradient_squared_norm(
    sources: _Sources, weight: NDArray[np.float32], unit_rows: bool, threads: int
) -> float: ...
def gradient_norm_bound(sources: _Sources, d_sae: int, d_in: int, threads: int) -> float: ...
def adam_update(
    w: NDArray[np.float32],
    m: NDArray[np.float32],
    v: NDArray[np.float32],
    asleep: _Int64,
    sources: _Sources,
    features: _Int64 | None,
    *,
    number: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
    unit_rows: bool,
    freeze_idle: bool,
    wake: bool,
    threads: int,
    screen: Screen | None = None,
    bias: NDArray[np.float32] | None = None,
) -> None: ...

# -- shards (rust/python/src/shards.rs) --

_Bytes: TypeAlias = NDArray[np.uint8]
_Rows: TypeAlias = tuple[int, int] | NDArray[np.int64]

def write_shard(
    path: str | PathLike[str], tensors: Sequence[tuple[str, str, Sequence[int], _Bytes]]
) -> tuple[int, str]: ...
def checksum_file(path: str | PathLike[str]) -> tuple[int, str]: ...
def permutation(rows: int, seed: int, epoch: int, start: int, stop: int) -> NDArray[np.int64]: ...
def block_permutation(
    rows: int, seed: int, epoch: int, blocks: tuple[int, int], start: int, stop: int
) -> NDArray[np.int64]: ...
def block_window(
    rows: int, seed: int, epoch: int, blocks: tuple[int, int], place: int
) -> tuple[list[tuple[int, int]], int | None]: ...
def repeated_feature(
    indices: NDArray[np.int32], row_offsets: NDArray[np.int64], d_sae: int
) -> tuple[int, int] | None: ...

@final
class FolderLock:
    def __new__(cls, folder: str | PathLike[str]) -> FolderLock: ...
    def release(self) -> None: ...

@final
class BufferPool:
    def __new__(cls, keep: int, most: int) -> BufferPool: ...
    def take(self, bytes: int) -> _Bytes: ...

@final
class ActivationSet:
    def __new__(
        cls, files: Sequence[tuple[str | PathLike[str], int, int]], d_in: int, dtype: str
    ) -> ActivationSet: ...
    @property
    def rows(self) -> int: ...
    def gather(
        self, rows: _Rows, output: str, out: _Bytes, columns: tuple[NDArray[Any], ...]
    ) -> None: ...
    @property
    def is_cold(self) -> bool: ...
    def will_be_read(self, start: int, stop: int) -> None: ...
    def columns(self, rows: _Rows, columns: tuple[NDArray[Any], ...]) -> None: ...
    def map_private(self, start: int, stop: int) -> _Bytes | None: ...

@final
class CodeSet:
    def __new__(
        cls, files: Sequence[tuple[str | PathLike[str], int, int]], d_sae: int, dtype: str
    ) -> CodeSet: ...
    @property
    def rows(self) -> int: ...
    @property
    def nnz(self) -> int: ...
    def row_offsets(self, rows: _Rows) -> NDArray[np.int64]: ...
    def gather(
        self,
        rows: _Rows,
        row_offsets: NDArray[np.int64],
        values: NDArray[Any],
        indices: NDArray[np.int32],
        columns: tuple[NDArray[Any], ...],
    ) -> None: ...
    def validate(self, shard: int) -> None: ...

# -- fp8 (rust/python/src/fp8.rs) --

def fp8_fake_quantize(
    input: NDArray[Any], group: int, output: NDArray[Any], threads: int
) -> None: ...
def fp8_quantize_blocks(
    weight: NDArray[Any],
    block: tuple[int, int],
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    threads: int,
) -> None: ...
def fp8_dequantize_blocks(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    block: tuple[int, int],
    output: NDArray[Any],
    threads: int,
) -> None: ...

# -- r1 (rust/python/src/r1.rs) --

def r1_rms_norm(
    input: NDArray[Any], weight: NDArray[Any], eps: float, output: NDArray[Any], threads: int
) -> None: ...
def r1_rotate(
    queries: NDArray[Any], head: int, table: NDArray[np.float32], threads: int
) -> None: ...
def r1_latents(
    rows: NDArray[Any], weight: NDArray[Any], eps: float, table: NDArray[np.float32], threads: int
) -> None: ...
def r1_route(
    logits: NDArray[np.float32],
    bias: NDArray[np.float32],
    groups: int,
    kept_groups: int,
    normalise: bool,
    scale: float,
    chosen: NDArray[np.int64],
    weights: NDArray[np.float32],
    threads: int,
) -> None: ...
def r1_attend(
    rows: NDArray[Any],
    absorbed: NDArray[Any],
    query: NDArray[Any],
    slots: NDArray[np.int64],
    cache: NDArray[Any],
    output: NDArray[Any],
    rank: int,
    scale: float,
    threads: int,
) -> None: ...

# -- examples (rust/python/src/examples.rs) --

_ExampleParts = tuple[
    NDArray[np.float32],
    NDArray[np.int64],
    NDArray[np.uint64],
    NDArray[np.uint64],
    NDArray[np.int64],
    NDArray[np.float32],
    NDArray[np.int64],
    int,
]

@final
class ExampleAccumulator:
    def __new__(cls, d_sae: int, n: int, samples: int, seed: int) -> ExampleAccumulator: ...
    @staticmethod
    def from_parts(parts: _ExampleParts, samples: int, seed: int) -> ExampleAccumulator: ...
    def add(
        self,
        values: NDArray[np.float32] | NDArray[np.uint16],
        indices: NDArray[np.uint32],
        row_offsets: NDArray[np.int64],
        first_row: int,
        threads: int,
    ) -> None: ...
    def add_shards(
        self, shards: Sequence[tuple[PathLike[str], int, int]], threads: int
    ) -> None: ...
    def merge(self, other: ExampleAccumulator) -> None: ...
    def parts(self) -> _ExampleParts: ...
    @property
    def scanned(self) -> int: ...

def example_histogram_edges() -> NDArray[np.float32]: ...
def example_sample_ranks(rows: NDArray[np.int64], seed: int) -> NDArray[np.uint64]: ...

# -- activations by feature (rust/python/src/clusters.rs) --

_Shards: TypeAlias = Sequence[tuple[PathLike[str], int, int]]

def count_activations(shards: _Shards, counts: NDArray[np.uint64], threads: int) -> None: ...
def contexts_json(
    codes: NDArray[np.int32],
    strengths: NDArray[np.float64],
    bins: NDArray[np.float64],
    texts: Sequence[str],
    ranges: Sequence[tuple[int, int]],
) -> list[bytes]: ...
def pair_tiles(d_sae: int, bytes: int) -> list[tuple[int, int]]: ...
def cluster_bucket(
    spill: ActivationSpill,
    bucket: int,
    places: TokenPlaces,
    options: tuple[int, int, int, int, int, int, int, int],
    activations: bool,
    threads: int,
    cancel: Cancel,
) -> dict[str, dict[str, NDArray[Any]]]: ...

@final
class Cancel:
    def __new__(cls) -> Cancel: ...
    def cancel(self) -> None: ...
    @property
    def cancelled(self) -> bool: ...

@final
class ActivationSpill:
    def __new__(
        cls,
        path: PathLike[str],
        counts: NDArray[np.uint64],
        records: int,
        filled: Sequence[int] | None,
    ) -> ActivationSpill: ...
    @property
    def buckets(self) -> int: ...
    @property
    def filled(self) -> list[int]: ...
    def features(self, bucket: int) -> tuple[int, int]: ...
    def size(self, bucket: int) -> int: ...
    def sync(self) -> None: ...
    def add_shards(
        self, shards: _Shards, ranks: NDArray[np.uint32] | None, threads: int
    ) -> None: ...
    def add(
        self,
        places: TokenPlaces,
        features: _Int32,
        sequences: _Int64,
        positions: _Int32,
        strengths: NDArray[np.float32],
    ) -> int | None: ...

@final
class TokenPlaces:
    def __new__(cls, bytes: NDArray[np.uint8]) -> TokenPlaces: ...

@final
class PairCounts:
    def __new__(cls, d_sae: int, start: int, end: int) -> PairCounts: ...
    def add_shards(self, shards: _Shards, block: int, threads: int) -> None: ...

@final
class PairPartners:
    def __new__(cls, d_sae: int, n: int) -> PairPartners: ...
    def add(
        self, pairs: PairCounts, counts: NDArray[np.uint64], least: int, threads: int
    ) -> None: ...
    def columns(self) -> tuple[_Int32, _Int32, _Int32, _Int64]: ...
