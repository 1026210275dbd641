"""The prompts of both protocols (design: evaluation.md 3, 4)."""

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
    """Returns the question alone."""
    return question.text


def ending(text: str) -> Prompt:
    """Returns a prompt: the question and then `text`, white space included."""
    return lambda question: question.text + text


def option_lines(options: Mapping[str, str]) -> str:
    """Returns a line per option, each with a line break in front."""
    return "".join(f"\n{letter}. {text}" for letter, text in options.items())


def choice(instruction: str) -> Prompt:
    """Returns a prompt: hint, question, a line per option, and the instruction."""

    def prompt(question: Question) -> str:
        hint = f"{question.hint}\n" if question.hint else ""
        return f"{hint}{question.text}{option_lines(question.options)}\n{instruction}"

    return prompt


def vlm_choice(question: Question) -> str:
    """Returns the prompt of VLMEvalKit for a question with or without options.

    The instruction is in the language of the text before it.
    """
    text = choice("")(question).removesuffix("\n")
    chinese = bool(_CHINESE.search(text))
    if question.options:
        return f"{text}\n{LETTER_CN if chinese else LETTER}"
    return f"{text}\n{DIRECTLY_CN if chinese else DIRECTLY}"


def vlm_images(prompt: Prompt) -> Prompt:
    """Returns the prompt of VLMEvalKit, which numbers several images.

    A single image is put in front by the template.
    """

    def with_images(question: Question) -> str:
        text = prompt(question)
        count = len(question.images)
        if count < 2:
            return text
        return "".join(f"Image-{i}: <image>\n" for i in range(1, count + 1)) + text

    return with_images
