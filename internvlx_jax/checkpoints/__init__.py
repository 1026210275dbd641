"""How any checkpoint is opened, read, transferred and written (design: checkpoints.md)."""
