"""Turns a checkpoint and questions into scores (design: evaluation.md)."""
