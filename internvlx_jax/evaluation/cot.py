r"""Chain of thought: prompts that ask for reasoning, and the final answer in what comes back.

(design: evaluation.md 13) `vlmevalkit` uses the prompts that VLMEvalKit gives to InternVL2.5 and
InternVL3 with USE_COT=1 and reads the last \boxed{...}; `internvl` uses the instruction of the
InternVL scripts with --cot and reads what follows "Final answer:".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from internvlx_jax.evaluation.prompts import LETTER, Prompt
from internvlx_jax.evaluation.scoring import Scorer

NEW_TOKENS = 4096
_BOX = r"\boxed{"
_FINAL = re.compile(r"(?:Final answer:|Answer:)\s*(.*)", re.IGNORECASE)

REASON_THEN_ANSWER = (
    "Your task is to answer the question below. Give step by step reasoning before you answer, and "
    'when you\'re ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\n'
)
_GUESS = (
    "If you are uncertain or the problem is too complex, make a reasoned guess based on the "
    "information provided. Avoid repeating steps indefinitely—provide your best guess even if "
    "unsure. Think step by step logically, considering all relevant information before answering."
)
BOXED_LETTER = (
    "Answer the preceding multiple choice question. The last line of your response should follow "
    "this format: 'Answer: \\boxed{$LETTER}' (without quotes), where LETTER is one of the options. "
    f"{_GUESS}"
)
BOXED_ANSWER = (
    "Answer the preceding question. The last line of your response should follow this format: "
    "'Answer: \\boxed{$FINAL_ANSWER}' (without quotes), where 'FINAL_ANSWER' is your conclusion "
    f"based on the reasoning provided. {_GUESS}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cot:
    """How a benchmark is asked for its reasoning.

    Attributes:
        prompt: how a question is put to the model.
        read: finds the final answer in what the model wrote; this is what is scored.
        score: how answers are scored; None keeps the scorer of the protocol.
        dataset: name of the table of predictions; None keeps that of the protocol.
        max_new_tokens: most tokens of reasoning and answer.
    """

    prompt: Prompt
    read: Callable[[str], str]
    score: Scorer | None = None
    dataset: str | None = None
    max_new_tokens: int = NEW_TOKENS


def boxed(text: str) -> str:
    r"""Returns the content of the last \boxed{...}, whose braces may be nested.

    Without a box, or if its braces are not closed, the whole text is returned.
    """
    start = text.rfind(_BOX)
    if start < 0:
        return text
    start += len(_BOX)
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return text


def final_answer(text: str) -> str:
    """Returns the rest of the line behind the first "Final answer:" or "Answer:", in any case.

    White space behind the colon may include line breaks. Without either, the text is returned.
    """
    match = _FINAL.search(text)
    return match[1].strip() if match else text


def boxed_choice(prompt: Prompt) -> Cot:
    """Returns the chain of thought of VLMEvalKit for multiple choice."""
    return Cot(
        prompt=lambda question: f"{prompt(question).replace(LETTER, '').strip()}\n{BOXED_LETTER}",
        read=boxed,
    )


def boxed_answer(prompt: Prompt) -> Cot:
    """Returns the chain of thought of VLMEvalKit for other questions."""
    return Cot(prompt=lambda question: f"{prompt(question)}\n{BOXED_ANSWER}", read=boxed)


def reasoned(prompt: Prompt, *, score: Scorer | None = None) -> Cot:
    """Returns the chain of thought of the InternVL scripts; `prompt` has no other instruction."""
    return Cot(
        prompt=lambda question: REASON_THEN_ANSWER + prompt(question),
        read=final_answer,
        score=score,
    )
