"""How tokens are chosen (design: evaluation.md 3)."""

from __future__ import annotations

import dataclasses

from internvlx_jax.core.errors import ConfigError


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
        for name, valid, allowed in (
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be {allowed}")
