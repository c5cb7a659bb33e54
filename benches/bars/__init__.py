"""The project's bars at R1's shape, each beside the peer that it names, in one run."""
