"""Goodfire's released feature databases, as they are on the disk.

- DuckDB: ``math.ddb``, ``logic.ddb`` and their samples (``math-10.ddb``, ``math-1.ddb``,
  ``math-0-1.ddb``), labels beside them in ``autointerp.db`` (SQLite) or ``autointerp.csv``;
- the first release: the SQLite files ``autointerp.db``, ``tokens.db`` and
  ``feature_activations.db``.

:mod:`.recognise` says what a path is, :mod:`.connect` makes it readable in SQL, :mod:`.labels`
and :mod:`.sqlite` read what DuckDB can't without an extension.
Source: github.com/goodfire-ai/r1-interpretability, README.md and db_example.ipynb.
"""

from r1sae_fast.features.released.connect import largest_feature, open_source
from r1sae_fast.features.released.recognise import DuckdbSource, Source, SqliteSource, recognise

__all__ = [
    "DuckdbSource",
    "Source",
    "SqliteSource",
    "largest_feature",
    "open_source",
    "recognise",
]
