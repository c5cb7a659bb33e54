"""The feature database: one DuckDB file that says where each feature fires, and on what.

>>> db = FeatureDB.build("features.ddb", codes="codes", decode=tokenizer)
>>> db.top(feature, n=10, window=5)    # strongest examples with their context
>>> db.search("Wait")                  # features by label and by token
>>> db.sql("SELECT * FROM features ORDER BY density DESC LIMIT 10")

The tables ``tokens``, ``activations`` and ``autointerp`` have the names and columns of Goodfire's
released databases, which :meth:`FeatureDB.open` opens too, and :func:`import_database` sorts by
feature; :mod:`.schema` lists all tables.
"""

from r1sae_fast.features.database import FeatureDB
from r1sae_fast.features.importing import Imported, import_database
from r1sae_fast.features.results import ContextToken, SearchHit, SearchHits, TopExample, TopExamples

__all__ = [
    "ContextToken",
    "FeatureDB",
    "Imported",
    "SearchHit",
    "SearchHits",
    "TopExample",
    "TopExamples",
    "import_database",
]
