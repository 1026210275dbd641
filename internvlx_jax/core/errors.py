"""Errors that a user can act on, and the hint that misspelt names share (design: data.md 15)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class ConfigError(ValueError):
    """A setting, or a file that the user wrote, cannot be used.

    The message names the field or the file, and the remedy.
    """


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message lists everything that is wrong with it.

    Attributes:
        problems: One line per problem.
    """

    def __init__(self, path: str | Path, problems: list[str]):
        self.problems = problems
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(
            f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n{listed}"
        )


REASONS = (
    "json",
    "role_order",
    "placeholder_mismatch",
    "reserved_text",
    "no_supervision",
    "too_long",
    "unreadable",
    "truncated",
    "too_many_pixels",
    "unsupported_mode",
    "size_mismatch",
    "missing_decoder",
)


class SampleError(ValueError):
    """One sample cannot be used; the loader counts it under `reason` and replaces or masks it.

    Attributes:
        reason: One of REASONS.
        problem: What is wrong.
        remedy: What the user can do about it.
        where: The source, such as "receipts/train.jsonl line 41"; empty where the raiser does not
            know it.
    """

    def __init__(self, reason: str, problem: str, remedy: str, where: str = ""):
        if reason not in REASONS:
            raise ValueError(
                f'"{reason}" is not a reason for a bad sample. Use one of {", ".join(REASONS)}.'
            )
        # Exceptions are pickled by their arguments; loader processes send this one.
        super().__init__(reason, problem, remedy, where)
        self.reason, self.problem, self.remedy, self.where = reason, problem, remedy, where

    def at(self, where: str) -> SampleError:
        """Returns the same error with `where` in front of the place that it already names."""
        where = f"{where}: {self.where}" if self.where else where
        return SampleError(self.reason, self.problem, self.remedy, where)

    def __str__(self) -> str:
        head = f"{self.where}: " if self.where else ""
        return f"{head}{self.problem}\n{self.remedy}"


def placeholder_mismatch(images: int, found: int) -> SampleError:
    """Returns the error of `images` images but `found` placeholders in the human turns."""
    return SampleError(
        "placeholder_mismatch",
        f'{images} image{"s" * (images != 1)} but {found} "<image>" in the human turns.',
        'Write one placeholder for each image, and name the images under "image".',
    )


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?' for the choice nearest to a misspelt name, or nothing."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""
