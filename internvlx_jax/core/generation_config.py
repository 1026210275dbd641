"""How tokens are chosen (design: evaluation.md 3)."""

from __future__ import annotations

import dataclasses

from internvlx_jax.core.ranges import NUMBER, POSITIVE, Range, check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Says how a token is chosen from its logits, in this order, as transformers does it.

    Attributes:
        repetition_penalty: r > 1 divides positive scores and multiplies negative ones of ids
            already written in this answer; a leading bos counts as written, the prompt does not.
        temperature: 0 takes the most likely token (ties: lowest id), and the rest has no effect.
        top_k: Keeps the k best; 0 keeps all.
        top_p: Drops the least likely ones as long as their probabilities add up to at most 1 - p.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check_ranges(
            self,
            repetition_penalty=POSITIVE,
            temperature=NUMBER,
            top_k=NUMBER,
            top_p=Range(0, 1, low_open=True),
        )
