"""Adam on gradients that are sums over sparse codes, never written out as matrices."""

from r1sae_fast.optim.adam import Adam
from r1sae_fast.optim.clip import clip_grad_norm_
from r1sae_fast.optim.factored import FactoredGradient, factored_gradient

__all__ = ["Adam", "FactoredGradient", "clip_grad_norm_", "factored_gradient"]
