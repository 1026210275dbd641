"""Which option an answer means (design: evaluation.md 6: MMBench, option inference, yes or no)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from internvlx_jax.evaluation.metrics.vqa import strip_punctuation

NONE_OF_THEM = "Z"

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# VLMEvalKit writes this in place of an answer or a reply; no letter in it counts.
_FAILED = "Failed to obtain answer via API"
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# A letter that begins a word counts in VLMEvalKit ("The answer is dog" is D).
_STATED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_STATED_ALONE = re.compile(_STATED.pattern + r"(?!\w)", re.IGNORECASE)


def first_option(answer: str, options: Mapping[str, str]) -> str:
    """Reads an answer as InternVL does for MMBench and MMMU.

    Returns:
        The leading letter, else the letter of the first option whose text is in the answer, else
        the answer itself, which then equals no letter.
    """
    answer = answer.strip()
    if len(answer) == 1 or not answer:
        return answer
    if answer[0] in options:
        return answer[0]
    return next((letter for letter, text in options.items() if text in answer), answer)


def first_option_or_parentheses(answer: str, options: Mapping[str, str]) -> str:
    """Reads an answer as InternVL does for ScienceQA: `first_option`, else X of "(X)" or "X."."""
    found = first_option(answer, options)
    if len(found) > 1 and found[1] == ".":
        return found[0]
    if len(found) > 2 and found[0] == "(" and found[2] == ")":
        return found[1]
    return found


def infer_option(answer: str, options: Mapping[str, str], *, word_start: bool = True) -> str | None:
    """Reads an answer by the rules of VLMEvalKit.

    Args:
        answer: what the model wrote.
        options: texts of the options by letter.
        word_start: whether "answer is" may be followed by a word that begins with the letter, as
            in VLMEvalKit (`--compat option_word_start`).

    Returns:
        A letter, "Z" for a refusal, or None where only a judge can tell.
    """
    if _FAILED not in answer and (letter := _letter(answer, options, word_start)):
        return letter
    lower = answer.lower()
    if len(lower) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in lower]
    return named[0] if len(named) == 1 else None


def _letter(answer: str, options: Mapping[str, str], word_start: bool) -> str | None:
    """Returns the letter that an answer states, "Z" for a refusal, None without any."""
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE_OF_THEM
    tokens = answer.translate(_TO_SPACES).split()
    letters = [letter for letter in options if letter in tokens]
    if len(letters) == 1 and tokens.index(letters[0]) >= len(tokens) - 4:
        return letters[0]
    if not letters and NONE_OF_THEM in tokens:
        return NONE_OF_THEM
    stated = (_STATED if word_start else _STATED_ALONE).search(answer)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    return None


def yes_or_no(text: str) -> str | None:
    """Returns "Yes" or "No" if only one of the two words occurs, else None."""
    words = strip_punctuation(text.lower(), vlmevalkit=True).split()
    yes, no = "yes" in words, "no" in words
    if yes == no:
        return None
    return "Yes" if yes else "No"
