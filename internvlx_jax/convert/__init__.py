"""PyTorch checkpoints in and out of JAX, and the proof that they agree (design: checkpoints.md)."""
