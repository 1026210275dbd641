"""MathVista: an extracted answer against the key, in the two published variants (design: evaluation.md 6)."""

from __future__ import annotations

import dataclasses
import re

from internvlx_jax.evaluation.metrics.options import infer_option
from internvlx_jax.evaluation.metrics.text import levenshtein

_LETTER = re.compile(r"\(([a-zA-Z])\)")


@dataclasses.dataclass(frozen=True)
class Key:
    """What a question of MathVista asks for.

    Attributes:
        question_type: multi_choice or free_form. answer_type: text, integer, float or list.
        answer: as written in the file; the text of the right choice, too.
        choices: texts of the choices, in order. letter: the right one of them, empty for a free question.
        precision: decimals of a float answer.
    """

    question_type: str
    answer_type: str
    answer: str
    choices: tuple[str, ...] = ()
    letter: str = ""
    precision: int = 0

    @property
    def options(self) -> dict[str, str]:
        return {chr(ord("A") + i): text for i, text in enumerate(self.choices)}


def parse(text: str, key: Key, *, text_bug: bool) -> str | int | float | None:
    """What VLMEvalKit compares with the key; None if the text states nothing of the wanted type.

    text_bug: text and list answers are never recognised (`--compat mathvista_text_bug`).
    """
    if key.question_type == "multi_choice":
        return infer_option(text, key.options)
    try:
        if key.answer_type == "integer":
            return int(text)
        if key.answer_type == "float":
            return float(text)
    except ValueError:
        return None
    return None if text_bug else text.strip()


def matches(parsed: str | int | float | None, key: Key) -> bool:
    """Python equality with the key, of the type that the key states."""
    if parsed is None:
        return False
    if key.question_type == "multi_choice":
        return parsed == key.letter
    if key.answer_type == "integer":
        return parsed == int(key.answer)
    if key.answer_type == "float":
        return parsed == float(key.answer)
    return parsed == key.answer


def internvl_prefetch(text: str, key: Key) -> str | None:
    """An answer that needs no extraction: a choice, or a number of the wanted type."""
    if key.question_type == "multi_choice":
        return text if text in key.choices else None
    try:
        if key.answer_type == "integer":
            return str(int(text))
        if key.answer_type == "float":
            return str(float(text))
    except ValueError:
        pass
    return None


def internvl_matches(extraction: str, key: Key) -> bool:
    """A letter in parentheses or the nearest choice; `int(float(x))`; `round(x, precision)`; else equal texts."""
    text = extraction.strip()
    if key.question_type == "multi_choice":
        letter = _LETTER.search(text)
        text = letter[1].upper() if letter else text
        if text not in key.options:
            return min(key.choices, key=lambda choice: levenshtein(text, choice)) == key.answer
        return key.options[text] == key.answer
    try:
        if key.answer_type == "integer":
            return str(int(float(text))) == key.answer
        if key.answer_type == "float":
            return str(round(float(text), key.precision)) == key.answer
    except (ValueError, OverflowError):
        return False
    return text == key.answer
