"""Training: sharding, optimiser, the jitted step, checkpoints, the loop (spec: training.md)."""
