"""Activations and sparse codes on disk: folders of plain safetensors files with a manifest.

A folder holds ``manifest.jsonl`` (a header line, then one line a finished shard) and the shard
files it lists. Writers finish a shard by writing a temporary file, syncing and renaming it, and
only then listing it, so that a crash at any moment leaves whole shards and nothing else. Readers
map the files into memory.
"""

from r1sae_fast.shards.activations import ActivationBatch, ActivationShards, ActivationWriter
from r1sae_fast.shards.codes import CodeBatch, CodeShards, CodeWriter
from r1sae_fast.shards.columns import PROMPT, RESPONSE, THINKING, UNKNOWN
from r1sae_fast.shards.loader import ShardLoader
from r1sae_fast.shards.manifest import ManifestWarning
from r1sae_fast.shards.pairs import PairedBatch, PairedShards

__all__ = [
    "PROMPT",
    "RESPONSE",
    "THINKING",
    "UNKNOWN",
    "ActivationBatch",
    "ActivationShards",
    "ActivationWriter",
    "CodeBatch",
    "CodeShards",
    "CodeWriter",
    "ManifestWarning",
    "PairedBatch",
    "PairedShards",
    "ShardLoader",
]
