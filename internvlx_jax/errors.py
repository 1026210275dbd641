"""Errors that a user can act on; SampleError of the data pipeline is in data/errors.py."""

from __future__ import annotations

from pathlib import Path


class ConfigError(ValueError):
    """A setting, or a file that the user wrote, that cannot be used; the message names field or file and remedy."""


class CheckpointError(ValueError):
    """Everything that is wrong with a checkpoint, in one report."""

    def __init__(self, path: str | Path, problems: list[str]):
        self.problems = problems
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n{listed}")
