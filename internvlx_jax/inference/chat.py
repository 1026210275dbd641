"""Chat in the terminal; answers appear as they are written.

    python -m internvlx_jax.chat --checkpoint DIR --image FILE

A line is a question. `/image FILE` adds an image to the next one, `/reset` forgets the conversation, an empty line or
the end of the input ends it. From Python, `Chat` does the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.batch import Row, collate
from internvlx_jax.data.encode import encode_prompt
from internvlx_jax.data.plan import smallest_bucket
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER, get_template
from internvlx_jax.inference.batch_generator import read_answer
from internvlx_jax.inference.loading import Pretrained
from internvlx_jax.models.generation import (
    Sampling,
    Vocabulary,
    advance,
    for_decoding,
    row_keys,
    start,
)

UNFINISHED = (
    "\ufffd"  # what the tokenizer writes for a character whose last bytes are still to come
)


class Chat:
    """One conversation with a model.

    Attributes:
        history: (question, answer) of each turn; questions with their image placeholders.
        tiles: uint8[n, s, s, 3] of each image so far.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        tiles: TileConfig | None = None,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        max_new_tokens: int = 1024,
        stop_strings: Sequence[str] = (),
    ):
        if pretrained.tokenizer is None:
            raise ConfigError(
                "the checkpoint holds no tokenizer.model; copy the tokenizer files into it"
            )
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}, it must be at least 1")
        config, prompt = pretrained.config, pretrained.config.prompt
        self.model, self.stop_strings = for_decoding(pretrained.model), tuple(stop_strings)
        tokenizer = pretrained.tokenizer
        self.processor = Processor(
            tokenizer,
            get_template(prompt.template),
            prompt.system_message,
            tiles or prompt.tiles,
            config.tokens_per_tile,
            special_text="escape",
            lvtc=config.lvtc,
        )
        self.stop_id = tokenizer.token_id(self.processor.template.stop)
        self.max_new_tokens, self.seed = max_new_tokens, seed
        options = dict(
            sampling=sampling,
            vocabulary=Vocabulary(
                stop_ids=(self.stop_id,), pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id
            ),
        )
        self._start = jax.jit(
            lambda model, inputs, keys: start(
                model, inputs, keys, 0, max_new_tokens=max_new_tokens, **options
            )
        )
        self._advance = jax.jit(
            lambda model, state, until: advance(model, state, until, 0, **options),
            donate_argnames="state",
        )
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.history: list[tuple[str, str]] = []
        self.tiles: list[np.ndarray] = []

    def ask(self, question: str, images: Sequence[str] = ()) -> Iterator[str]:
        """Pieces of the answer as they are written; together they are the answer, which then joins the history.

        images: files, one for each "<image>" of the question, which are put in front if there are none. Raises
        SampleError, which leaves the conversation as it was.
        """
        if IMAGE_PLACEHOLDER not in question:
            question = f"{IMAGE_PLACEHOLDER}\n" * len(images) + question
        tiles = [*self.tiles, *self.processor.cut(images, "question")]
        inputs = self._inputs(question, tiles)
        key = row_keys(self.seed, jnp.asarray([len(self.history)]))
        state = self._start(self.model, inputs, key)
        shown = ""
        while True:
            step = int(state.step)
            text, done = self._read(np.asarray(state.tokens)[0, :step].tolist())
            done = done or step == self.max_new_tokens
            text = text.rstrip() if done else self._settled(text)
            if text[len(shown) :]:
                yield text[len(shown) :]
            shown = text
            if done:
                break
            state = self._advance(self.model, state, step + 1)
        self.history.append((question, text))
        self.tiles = tiles

    def _inputs(self, question: str, tiles: list[np.ndarray]):
        processor = self.processor
        prompt = encode_prompt(
            question,
            history=self.history,
            system=processor.system_message,
            template=processor.template,
            tokenizer=processor.tokenizer,
            tiles_per_image=[len(image) for image in tiles],
            tokens_per_tile=processor.tokens_per_tile,
            special_text=processor.special_text,
        )
        bucket = smallest_bucket(
            sum(map(len, tiles)), len(prompt.tokens), saved_per_tile=processor.saved_per_tile
        )
        rope = self.model.config.decoder.rope
        if bucket.length + self.max_new_tokens > rope.max_positions and not rope.allow_longer:
            raise SampleError(
                "too_long",
                f"the conversation has {len(prompt.tokens)} tokens, which with "
                f"{self.max_new_tokens} new ones are more than the decoder's {rope.max_positions} "
                "positions.",
                "Reset the conversation, or lower max_num or max_new_tokens.",
            )
        row = Row(prompt.tokens, prompt.labels, prompt.tile_start, processor.concatenate(tiles))
        return collate(
            [row],
            bucket,
            tile_size=processor.tiles.tile_size,
            tokens_per_tile=processor.tokens_per_tile,
            pad_id=processor.tokenizer.pad_id,
            lvtc=processor.lvtc,
        ).inputs

    def _read(self, ids: list[int]) -> tuple[str, bool]:
        """(text so far, whether it has ended)."""
        text, stopped = read_answer(self.processor.tokenizer, ids, self.stop_id, self.stop_strings)
        return text.lstrip(), stopped

    def _settled(self, text: str) -> str:
        """Without an end that more tokens may change: half a character, half a stop string, trailing spaces."""
        text = text.rstrip(UNFINISHED)
        partial = max(
            (
                length
                for stop in self.stop_strings
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
        return text[: len(text) - partial].rstrip()
