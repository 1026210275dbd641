"""Input pipeline: chat files -> samples -> tokens, labels and tiles -> bucketed batches.

Nothing in this package uses jax (grain, in pipeline.py, imports it without touching a device), so that loader worker
processes stay light.
Dims: B rows, S token slots, T tile slots, N image tokens a tile.
"""
