"""The architectures, a file each: the loss as its paper has it, and its sparse gradients.

Each file has ``definition``, dense, for autograd and for readers, and ``forward``, which says what
the gradients are sums of; :mod:`r1sae_fast.train.gradients` and :mod:`r1sae_fast.train.factored`
take the sums. Each may have a target other than x (``transcoder``). Losses are per activation
number: a paper's loss of a row, over ``d_in``.
"""

from r1sae_fast.train.losses import jumprelu, matryoshka, relu, topk, transcoder
from r1sae_fast.train.losses.base import Definition, Finder, Forward, Part, Sae

LOSSES = {
    "topk": topk,
    "batch_topk": topk,
    "matryoshka": matryoshka,
    "jumprelu": jumprelu,
    "relu": relu,
}
"""By :attr:`r1sae_fast.train.TrainConfig.mode`."""

__all__ = ["LOSSES", "Definition", "Finder", "Forward", "Part", "Sae", "jumprelu", "transcoder"]
