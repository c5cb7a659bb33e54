"""Features for other tools: JSON lines, and the files that Neuronpedia and SAEDashboard write."""

from r1sae_fast.features.exporting.write import FORMATS, export_pages

__all__ = ["FORMATS", "export_pages"]
