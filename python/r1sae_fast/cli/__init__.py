"""The command line, ``r1sae``: :mod:`r1sae_fast.cli.main` lists the commands, one module each.

Modules import torch and the like inside their functions, so that ``r1sae --help`` is instant.
"""
