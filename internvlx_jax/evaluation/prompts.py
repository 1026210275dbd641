"""How questions are put: the texts of both protocols (design: evaluation.md 3, 4)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from internvlx_jax.evaluation.questions import Question

BASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
DIRECTLY = "Answer the question directly."
DIRECTLY_CN = "请直接回答问题。"

Prompt = Callable[[Question], str]

_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def plain(question: Question) -> str:
    return question.text


def ending(text: str) -> Prompt:
    """The question and a fixed text behind it, white space included."""
    return lambda question: question.text + text


def option_lines(options: Mapping[str, str]) -> str:
    return "".join(f"\n{letter}. {text}" for letter, text in options.items())


def choice(instruction: str) -> Prompt:
    """[hint, newline] question, one line an option, the instruction."""

    def prompt(question: Question) -> str:
        hint = f"{question.hint}\n" if question.hint else ""
        return f"{hint}{question.text}{option_lines(question.options)}\n{instruction}"

    return prompt


def vlm_choice(question: Question) -> str:
    """VLMEvalKit: the instruction is in the language of what stands before it, and asks for a letter only if there
    are options."""
    text = choice("")(question).removesuffix("\n")
    chinese = bool(_CHINESE.search(text))
    if question.options:
        return f"{text}\n{LETTER_CN if chinese else LETTER}"
    return f"{text}\n{DIRECTLY_CN if chinese else DIRECTLY}"


def vlm_images(prompt: Prompt) -> Prompt:
    """VLMEvalKit names several images; a single one is put in front by the template."""

    def with_images(question: Question) -> str:
        text = prompt(question)
        count = len(question.images)
        if count < 2:
            return text
        return "".join(f"Image-{i}: <image>\n" for i in range(1, count + 1)) + text

    return with_images
