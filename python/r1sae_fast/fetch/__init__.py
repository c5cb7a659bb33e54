"""Fetching what Goodfire released: feature databases from S3, SAE weights from the hub.

>>> fetch_features("logic", "0.1%", "features")  # features/logic/logic-0-1.ddb, autointerp.db

Downloads go on where they were cut (``<file>.part`` with a journal beside it), are verified, and
renamed into place whole.
"""

from r1sae_fast.fetch.catalogue import BUCKET, SAMPLES, SETS
from r1sae_fast.fetch.features import fetch_features, fetch_object
from r1sae_fast.fetch.weights import fetch_weights

__all__ = ["BUCKET", "SAMPLES", "SETS", "fetch_features", "fetch_object", "fetch_weights"]
