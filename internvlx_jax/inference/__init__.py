"""Loads checkpoints and asks them: batches, streams and conversations, from Python."""
