"""The max-activating examples of every feature, in one pass and in bounded memory.

>>> examples = collect_examples(CodeShards("codes"), n=20)
>>> examples.strengths[feature], examples.rows[feature]  # the strongest first

>>> examples.intervals(feature, count=5, per_interval=5)  # from weak to strong

One pass over the codes keeps of each feature the n strongest rows, a few rows of each bin of its
histogram, the histogram and the sum of its strengths, whatever the number of tokens: for 28,672
features, n = 20 and 4 samples about 90 MB, and 60 MB more for each thread. The result depends on
the rows and their codes alone, not on the order of shards, the size of batches or the number of
threads: ties go to the lower row, the histogram's edges are fixed, sums are added in integers, rows
are sampled by a keyed hash. So :meth:`Examples.merge` is exact too.
"""

from r1sae_fast.examples.collect import collect_examples
from r1sae_fast.examples.intervals import Interval
from r1sae_fast.examples.result import Examples, histogram_edges

__all__ = ["Examples", "Interval", "collect_examples", "histogram_edges"]
