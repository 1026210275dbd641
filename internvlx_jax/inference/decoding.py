"""Runs the compiled steps that every kind of answer shares, and reads text from token ids."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from internvlx_jax.core.inputs import Inputs
from internvlx_jax.data.templates import Template
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.inference.requests import GenerationSpec
from internvlx_jax.models.generation import Decoding, Vocabulary, advance, row_keys, start
from internvlx_jax.models.internvlx import InternVLX

# What the tokenizer writes for a character whose last bytes are still to come.
UNFINISHED = "\ufffd"


class TokenDecoder:
    """Runs prompts and writes tokens; each combination of shapes and sampling compiles once."""

    def __init__(self, tokenizer: Tokenizer, template: Template):
        self.tokenizer, self.stop_id = tokenizer, tokenizer.token_id(template.stop)
        pad, bos = tokenizer.pad_id, tokenizer.bos_id
        self.vocabulary = Vocabulary(
            stop_ids=(self.stop_id,), pad_id=pad, bos_id=pad if bos is None else bos
        )
        static = ("sampling", "vocabulary")
        self._start = jax.jit(start, static_argnames=("max_new_tokens", *static))
        self._advance = jax.jit(advance, static_argnames=static, donate_argnames="state")

    @property
    def executables(self) -> int:
        """Number of programs compiled so far."""
        # jax has no public count of the programs of a jitted function.
        programs = (self._start, self._advance)
        return sum(p._cache_size() for p in programs)  # pyright: ignore[reportAttributeAccessIssue]

    def start(
        self,
        model: InternVLX,
        inputs: Inputs,
        numbers: jax.Array,
        spec: GenerationSpec,
        *,
        capacity: int,
    ) -> Decoding:
        """Runs the prompts and chooses the first token of each row.

        Args:
            model: model in its decoding layout.
            inputs: batch of prompts.
            numbers: uint32[B], with the seed the randomness of each row.
            spec: how tokens are chosen.
            capacity: cache slots for new tokens.
        """
        return self._start(
            model,
            inputs,
            row_keys(spec.seed, numbers),
            spec.min_new_tokens,
            max_new_tokens=capacity,
            sampling=spec.sampling,
            vocabulary=self.vocabulary,
        )

    def advance(
        self, model: InternVLX, state: Decoding, until: int, spec: GenerationSpec
    ) -> Decoding:
        """Goes on until `until` tokens are written or every row has stopped; consumes `state`."""
        return self._advance(
            model,
            state,
            until,
            spec.min_new_tokens,
            sampling=spec.sampling,
            vocabulary=self.vocabulary,
        )

    def read(self, ids: Sequence[int], stop_strings: Sequence[str] = ()) -> tuple[str, bool]:
        """Returns the text before the stop token and all stop strings, and whether one occurs."""
        stopped = self.stop_id in ids
        ids = ids[: ids.index(self.stop_id)] if stopped else ids
        # The model may have more rows than the tokenizer has ids; those have no text.
        text = self.tokenizer.decode(id for id in ids if id < self.tokenizer.vocab_size)
        end = min([text.find(stop) for stop in stop_strings if stop in text], default=len(text))
        return text[:end], stopped or end < len(text)


def settled(text: str, stop_strings: Sequence[str] = ()) -> str:
    """Returns the part of an unfinished answer that further tokens leave as it is.

    Half a character, the beginning of a stop string and trailing white space may still change.
    """
    text = text.rstrip(UNFINISHED)
    partial = max(
        (
            length
            for stop in stop_strings
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ),
        default=0,
    )
    return text[: len(text) - partial].rstrip()
