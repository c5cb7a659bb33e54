"""The sizes at which benches run: small ones for CI, those of R1's SAEs where asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One size of everything; benches take what they need."""

    name: str
    rows: int
    d_in: int
    d_sae: int
    k: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.d_in} x {self.d_sae}, k={self.k}"


SHAPES = {
    "small": Shape("small", 256, 1024, 8192, 32),
    "r1": Shape("r1", 1024, 7168, 28_672, 64),
}
