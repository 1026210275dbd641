"""Open questions of MMMU: what a text may state as its answer (design: evaluation.md 6)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = set(":,.!?;'")
_NUMBERS = (re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"), re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
            re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"))  # fmt: skip

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": ("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
                            "Pharmacy", "Public_Health"),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": ("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
                             "Energy_and_Power", "Materials", "Mechanical_Engineering"),
}  # fmt: skip


def open_answers(text: str) -> set[str | float]:
    """The texts and numbers that an answer states."""
    text = text.strip().strip(".").lower()
    parts = text.split("\n")
    stated = []
    for i, part in enumerate(parts):
        # An equation may end the answer: only the last part is cut at "=".
        indicators = _INDICATORS if i < len(parts) - 1 else (*_INDICATORS, "=")
        tails = [
            part.rpartition(indicator)[2].strip() for indicator in indicators if indicator in part
        ]
        shortest = min(filter(None, tails), key=len, default="")
        if shortest and shortest not in _TRIVIAL:
            stated.append(shortest)
    stated = stated or [text]
    numbers = [
        number for tail in stated for pattern in _NUMBERS for number in pattern.findall(tail)
    ]
    return {form for item in (*stated, *numbers) for form in _normalise(item)}


def open_matches(text: str, keys: Sequence[str]) -> bool:
    """A key's text is contained in a stated text, or a key's number is among the stated numbers."""
    wanted = {form for key in keys for form in _normalise(key)}
    given = open_answers(text)
    return any(
        form in wanted
        if isinstance(form, float)
        else any(isinstance(key, str) and key in form for key in wanted)
        for form in given
    )


def _normalise(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        # One letter alone would be found inside any word.
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
