"""From a checkpoint and a question file to scores (spec: evaluation.md)."""
