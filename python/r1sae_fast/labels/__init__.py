"""Labels by a language model: explained, scored, and kept beside the counted ones.

>>> endpoint = Endpoint.from_environment()
>>> label_features("features.ddb", endpoint, features=range(100))
>>> FeatureDB("features.ddb").labels(7)      # with scores, the best labeller's first

The protocol is delphi's: windows of 32 tokens, 40 to explain by from ten quantiles of strength, 50
others and 50 silent ones to score by. :mod:`.run` is where to begin reading.
"""

from r1sae_fast.labels.client import EndpointError
from r1sae_fast.labels.cost import Prices, Usage
from r1sae_fast.labels.endpoint import Endpoint
from r1sae_fast.labels.merge import merge_labels
from r1sae_fast.labels.run import LabelRun, label_features
from r1sae_fast.labels.settings import LabelSettings

__all__ = [
    "Endpoint",
    "EndpointError",
    "LabelRun",
    "LabelSettings",
    "Prices",
    "Usage",
    "label_features",
    "merge_labels",
]
