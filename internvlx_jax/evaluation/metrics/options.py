"""Which option an answer means, and circular accuracy (design: evaluation.md 6: MMBench, option inference)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

NONE_OF_THEM = "Z"
CIRCLE = 1_000_000  # rotations of a question have the same index modulo this

_REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
             "I'm sorry, but without the image provided", "Cannot determine the answer")  # fmt: skip
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED = re.compile(r"(?:correct )?answer is \**([A-D])\**(?!\w)", re.IGNORECASE)


def first_option(answer: str, options: Mapping[str, str]) -> str:
    """MMBench and MMMU as InternVL reads them: a leading letter, else the first option whose text is in the answer.

    Neither: the answer itself, which then equals no letter.
    """
    answer = answer.strip()
    if len(answer) == 1 or not answer:
        return answer
    if answer[0] in options:
        return answer[0]
    return next((letter for letter, text in options.items() if text in answer), answer)


def infer_option(answer: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's inference: a letter, "Z" for a refusal, or None where only a judge can tell."""
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE_OF_THEM
    tokens = answer.translate(_TO_SPACES).split()
    letters = [letter for letter in options if letter in tokens]
    if len(letters) == 1 and tokens.index(letters[0]) >= len(tokens) - 4:
        return letters[0]
    if not letters and NONE_OF_THEM in tokens:
        return NONE_OF_THEM
    stated = _STATED.search(answer)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def circular(indices: Sequence[int], right: Sequence[bool]) -> dict[int, bool]:
    """First index of each question -> whether all of its rotations are right."""
    groups: dict[int, list[tuple[int, bool]]] = defaultdict(list)
    for index, hit in zip(indices, right, strict=True):
        groups[index % CIRCLE].append((index, hit))
    return {min(group)[0]: all(hit for _, hit in group) for group in groups.values()}
