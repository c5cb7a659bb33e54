"""The streaming engine's parts: R1's residuals on a machine that can't hold R1.

Layer-major prefill: all sequences of a pass go through block i, then block i's weights make room
for block i+1's. The weights are read once a pass, however many sequences it has.
"""
