"""The max-activating examples of every feature, in one pass and in bounded memory.

>>> examples = collect_examples(CodeShards("codes"), n=20)
>>> examples.strengths[feature], examples.rows[feature]  # the strongest first

One pass over the codes keeps of each feature the n strongest rows, a histogram and the sum of its
strengths, whatever the number of tokens: ``d_sae * (12 n + 800)`` bytes and as much again for each
thread (28,672 features, n = 20: 30 MB). The result depends on the rows and their codes alone, not
on the order of shards, the size of batches or the number of threads: ties go to the lower row, the
histogram's edges are fixed, sums are added in integers. So :meth:`Examples.merge` is exact too.
"""

from r1sae_fast.examples.collect import collect_examples
from r1sae_fast.examples.result import Examples, histogram_edges

__all__ = ["Examples", "collect_examples", "histogram_edges"]
