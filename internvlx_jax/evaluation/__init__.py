"""From a checkpoint and a question file to scores (design: evaluation.md)."""
