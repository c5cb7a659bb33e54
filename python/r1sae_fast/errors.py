"""The package's exceptions: built-ins where they are apt, else this small tree.

Every message says what was found, what was expected, and what to do.
"""


class R1SaeError(Exception):
    """Base of every exception that is this package's own."""


class NonFiniteError(R1SaeError, ValueError):
    """A NaN or an infinity among activations; the message names the row."""


class ShardError(R1SaeError):
    """A shard or its manifest is truncated, altered, foreign or in use by another writer."""


class CheckpointError(R1SaeError):
    """A model's or an SAE's checkpoint is incomplete, malformed or of another kind."""


class DatabaseError(R1SaeError):
    """A feature database is locked, missing tables, or no database at all."""


class FetchError(R1SaeError):
    """A file can't be fetched, changed meanwhile, or is not what the server said it was."""


class TrainingDivergedError(R1SaeError):
    """The loss became NaN or infinite; the last checkpoint stands."""


class LostRankError(R1SaeError):
    """Another process of a training run is gone; the last checkpoint stands."""


class MissingExtraError(R1SaeError, ImportError):
    """An optional dependency is not installed; the message has the command that installs it."""


class LabelError(R1SaeError):
    """A language model can't be asked, or what it says can't be used."""
