"""One question of a benchmark or of a question file (design: evaluation.md 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from internvlx_jax.data.images import ImageSource
from internvlx_jax.inference.requests import Request
from internvlx_jax.inference.videos import place_video


@dataclasses.dataclass(frozen=True)
class Question:
    """One sample of a benchmark.

    Attributes:
        where: file and line, for messages.
        images: paths, or files inside other files; none for a text question.
        id: its id in the data.
        text: the question itself.
        answers: all accepted answers.
        hint: text that a multiple-choice question puts first.
        options: texts of the options by letter, in order.
        fields: everything else that metrics and output files need; for a TSV file all columns but
            the image.
        prompt: what the model is asked, set by the protocol.
        frames: those of its video, in a question file; `asked` puts them among the images.
    """

    where: str
    id: str | int
    images: tuple[ImageSource, ...]
    text: str
    answers: tuple[str, ...]
    hint: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: str = ""
    frames: tuple[ImageSource, ...] = ()

    def asked(self, prompt: str) -> Question:
        """Returns the question with its prompt, and the frames of its video in their place.

        Raises:
            SampleError: placeholders of the prompt do not fit images and video.
        """
        images = self.images
        if self.frames:
            prompt, before = place_video(prompt, len(images), len(self.frames), self.where)
            images = (*images[:before], *self.frames, *images[before:])
        return dataclasses.replace(self, prompt=prompt, images=images, frames=())

    @property
    def request(self) -> Request:
        """What the model is asked."""
        return Request(prompt=self.prompt, images=self.images, where=self.where)
