"""Records what generation cost on this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from internvlx_jax.inference.requests import Answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Counts and seconds of some batches; the sum of two records is the record of both.

    Attributes:
        answers, images, tiles, prompt_tokens, new_tokens: counts of all batches.
        compile_seconds: seconds of the batches that compiled, which the rates leave out.
        prefill_seconds, decode_seconds: device seconds of the other batches.
        timed_batches, timed_images, timed_new_tokens, timed_steps, timed_bytes: counts of the other
            batches, bytes as read by decoding steps.
    """

    answers: int = 0
    images: int = 0
    tiles: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    timed_batches: int = 0
    timed_images: int = 0
    timed_new_tokens: int = 0
    timed_steps: int = 0
    timed_bytes: int = 0

    def __add__(self, other: Speed) -> Speed:
        names = [field.name for field in dataclasses.fields(self)]
        return Speed(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @classmethod
    def of(cls, answers: Collection[Answer], *, images: int, **costs: float) -> Speed:
        """Returns the record of one batch; `costs` holds its seconds, steps and bytes."""
        return cls(
            answers=len(answers),
            images=images,
            tiles=sum(answer.tiles for answer in answers),
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            new_tokens=sum(answer.new_tokens for answer in answers),
            **costs,  # pyright: ignore[reportArgumentType]  (floats and ints by field)
        )

    def report(self) -> dict[str, float | None]:
        """Returns counts, seconds, and rates per second of device time.

        `decode_gbytes_per_s` counts the decoder and the cache once per step. A rate without a
        measurement is None.
        """
        busy = self.prefill_seconds + self.decode_seconds
        counted = ("answers", "images", "tiles", "prompt_tokens", "new_tokens")
        seconds = ("compile_seconds", "prefill_seconds", "decode_seconds")

        def ratio(part: float, whole: float) -> float | None:
            return part / whole if whole else None

        return {name: getattr(self, name) for name in (*counted, *seconds)} | {
            "new_tokens_per_s": ratio(self.timed_new_tokens, busy),
            "images_per_s": ratio(self.timed_images, self.prefill_seconds),
            "time_to_first_token_s": ratio(self.prefill_seconds, self.timed_batches),
            "decode_steps_per_s": ratio(self.timed_steps, self.decode_seconds),
            "decode_gbytes_per_s": ratio(self.timed_bytes / 1e9, self.decode_seconds),
        }
