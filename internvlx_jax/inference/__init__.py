"""Loads checkpoints and answers prompts about images: in batches, as streams and in chats."""
