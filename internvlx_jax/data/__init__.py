"""Input pipeline: chat files -> samples -> tokens, labels and tiles -> bucketed batches.

Nothing in this package imports jax, so that loader worker processes stay light and never touch a device.
Dims: B rows, S token slots, T tile slots, N image tokens a tile.
"""
