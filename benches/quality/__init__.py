"""Quality and speed beside the peers: the same rows, in the same order, as many of them.

``python -m quality --folder DIR`` (see :mod:`quality.__main__`) trains one BatchTopK SAE with each
library's own trainer on TinyR1's residuals and measures all of them with ``r1sae_fast.evals``.
"""
