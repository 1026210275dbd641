"""Keeps a conversation with a model, turn by turn (design: data.md 4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from internvlx_jax.inference.arguments import make_request
from internvlx_jax.inference.images import Images
from internvlx_jax.inference.requests import GenerationSpec, Request, Turn
from internvlx_jax.inference.videos import FRAMES, Video

if TYPE_CHECKING:
    from internvlx_jax.inference.vlm import VLM


class Chat:
    """One conversation; `VLM.chat` makes it.

    The keys and values of its turns are kept, so that a turn runs its own tokens and images only.

    Attributes:
        history: turns so far, oldest first, with the images as they were when they were sent.
    """

    def __init__(self, model: VLM, spec: GenerationSpec, *, system: str | None = None):
        self.model, self.spec, self.system = model, spec, system
        self.history: tuple[Turn, ...] = ()
        self._cache = model.conversation()

    @property
    def prefilled(self) -> int:
        """Tokens of the newest prompt that were run; the others were kept from earlier turns."""
        return self._cache.prefilled

    def reset(self) -> None:
        """Forgets all turns and images, and frees the cache."""
        self.history = ()
        self._cache.forget()

    def send(
        self, prompt: str, images: Images = None, *, video: Video = None, frames: int = FRAMES
    ) -> str:
        """Answers the next turn, which then joins the history.

        Args:
            prompt: text of the turn. "<image>" says where an image stands; images stand in front
                of a prompt without it.
            images: an image or a list of images of this turn, of the kinds that `VLM.generate`
                accepts. In a turn without images and video, "<image>" is ordinary text.
            video: a video beside the images, of the kinds that `VLM.generate` accepts.
            frames: frames that are taken from it.

        Raises:
            TypeError, ValueError, SampleError: as `VLM.generate`; the conversation stays as it was.
        """
        return "".join(self.stream(prompt, images, video=video, frames=frames))

    def stream(
        self, prompt: str, images: Images = None, *, video: Video = None, frames: int = FRAMES
    ) -> Iterator[str]:
        """Yields pieces of the answer while it is written; see `send`.

        The turn joins the history after the last piece, so a stream that is left early changes
        nothing.
        """
        request = make_request(
            prompt,
            images,
            history=self.history,
            system=self.system,
            read_files=True,
            literal=True,
            frames=self.model.video_frames(video, frames),
        )
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[str]:
        pieces = []
        for piece in self.model.stream_request(request, self.spec, self._cache):
            pieces.append(piece)
            yield piece
        turn = Turn(request.prompt, "".join(pieces), request.images)
        self.history = (*request.history, turn)
