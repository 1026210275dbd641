"""Training: sharding, optimiser, the jitted step, checkpoints, the loop (design: training.md)."""
