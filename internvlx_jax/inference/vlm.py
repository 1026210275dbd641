"""Loads a checkpoint as a `VLM`, a model that answers from Python."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack, overload

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from internvlx_jax.checkpoints.opening import resolve
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import LvtcConfig, ModelConfig
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.data.video_files import VideoFrame
from internvlx_jax.inference.arguments import MAX_NEW_TOKENS, Options, make_request, make_spec
from internvlx_jax.inference.batch_generator import BatchGenerator
from internvlx_jax.inference.chat import Chat
from internvlx_jax.inference.conversation import Conversation, Conversations
from internvlx_jax.inference.engine import Engine
from internvlx_jax.inference.images import Images
from internvlx_jax.inference.loading import Pretrained, load_pretrained, one_device
from internvlx_jax.inference.requests import Answer, GenerationSpec, Request, Turn
from internvlx_jax.inference.videos import FRAMES, Video, video_frames
from internvlx_jax.models.internvlx import InternVLX

BATCH_SIZE = 16
THREADS = 8


def load(
    path_or_id: str | Path,
    *,
    dtype: DTypeLike = "bfloat16",
    mesh: Mesh | None = None,
    lvtc: LvtcConfig | None = None,
    ema: bool = False,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = BATCH_SIZE,
) -> VLM:
    """Loads a checkpoint, ready to answer.

    Args:
        path_or_id: a run folder or one of its steps, a Hugging Face folder, or a hub id
            "OWNER/NAME".
        dtype: dtype of parameters and activations.
        mesh: devices for the parameters; None takes one device.
        lvtc: replaces the LVTC of the checkpoint; None keeps it. Parameters that the checkpoint
            lacks are initialized with seed 0 and listed in `VLM.report`.
        ema: loads a run's average of its trained parameters instead of them.
        revision: branch, tag or commit of a hub id.
        tokenizer: folder with tokenizer files, for a checkpoint that has none.
        batch_size: most rows that are answered together; memory grows with it.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ConfigError: the checkpoint has no tokenizer, needs something that this package does not
            compute, or has no average of parameters.
        CheckpointError: one report of every unused, missing or mismatched tensor.
    """
    path = path_or_id if revision is None else resolve(path_or_id, revision)
    pretrained = load_pretrained(path, dtype=dtype, mesh=mesh, lvtc=lvtc, ema=ema)
    if tokenizer is not None:
        pretrained = dataclasses.replace(pretrained, tokenizer=Tokenizer.load(tokenizer))
    if pretrained.tokenizer is None:
        raise ConfigError(
            f"{path_or_id} has no tokenizer files; copy tokenizer.model or tokenizer.json and the "
            "files beside it into the folder, or name their folder: load(..., tokenizer=FOLDER)"
        )
    return VLM(pretrained, mesh=mesh, batch_size=batch_size)


class VLM:
    """A vision-language model that answers prompts about images.

    Attributes:
        config: architecture and prompt of the model.
        tokenizer: its tokenizer.
        report: a line for everything that was not simply read from the checkpoint.
        mesh: devices that hold the parameters.
    """

    def __init__(
        self, pretrained: Pretrained, *, mesh: Mesh | None = None, batch_size: int = BATCH_SIZE
    ):
        """Wraps a loaded checkpoint.

        Raises:
            ConfigError: it has no tokenizer, or there are several processes.
        """
        if pretrained.tokenizer is None:
            raise ConfigError(
                "the checkpoint has no tokenizer; load it with load(..., tokenizer=FOLDER)"
            )
        if jax.process_count() > 1:
            raise ConfigError(
                "VLM answers in one process; on several hosts answer a question file with "
                "`internvlx eval --data FILE`"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, it must be at least 1")
        self.config: ModelConfig = pretrained.config
        self.tokenizer: Tokenizer = pretrained.tokenizer
        self.report: tuple[str, ...] = pretrained.report
        self.mesh = one_device() if mesh is None else mesh
        self._generator = BatchGenerator(
            pretrained.model,
            Processor.for_model(self.config, self.tokenizer, special_text="escape"),
            self.mesh,
            batch_size=batch_size,
            fit_rows=True,
        )

    @property
    def model(self) -> InternVLX:
        """The Flax module, in the layout that decodes fastest on this backend."""
        return self._generator.model

    @property
    def speed(self) -> dict[str, float | None]:
        """Counts, seconds and rates of all answers so far, streams left out."""
        return self._generator.speed.report()

    @overload
    def generate(
        self,
        prompt: str,
        images: Images = None,
        *,
        video: Video = None,
        frames: int = FRAMES,
        history: Sequence[Turn] = (),
        system: str | None = None,
        **options: Unpack[Options],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        images: Sequence[Images] | None = None,
        *,
        video: Sequence[Video] | None = None,
        frames: int = FRAMES,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        images: Any = None,
        *,
        video: Any = None,
        frames: int = FRAMES,
        history: Sequence[Turn] = (),
        system: str | None = None,
        **options: Unpack[Options],
    ) -> str | list[str]:
        """Answers one prompt, or a list of prompts in batches.

        The answer of a prompt does not depend on the prompts beside it. With a temperature, its
        place in the list and `seed` decide the randomness.

        Args:
            prompt: a text, or a list of texts. "<image>" says where an image stands; images stand
                in front of a prompt without it.
            images: an image or a list of images; for a list of prompts, one such entry (or None)
                per prompt. An image is a path, a URL, bytes, a PIL image or uint8[H, W, 3].
            video: a video, beside the images; for a list of prompts, a video (or None) per
                prompt. A video is a path or URL of a file or a folder of frames, bytes, a list of
                images or uint8[F, H, W, 3]. "<video>" says where it stands in the prompt;
                without it, behind the images and in front of the text.
            frames: frames that are taken from a video, each of them one tile.
            history: earlier turns, for a single prompt.
            system: replaces the system message of the model.
            **options: see `Options`.

        Returns:
            The answer of a text; a list of answers, in order, of a list.

        Raises:
            TypeError: a prompt, an image or an option is of a kind that is not accepted.
            ValueError: an option is out of its range, or `images` does not fit the prompts.
            SampleError: an image cannot be read, its placeholders are wrong, or the prompt is too
                long. No prompt of the list is answered then.
        """
        spec = self.spec(**options)
        if isinstance(prompt, str):
            taken = self.video_frames(video, frames)
            request = make_request(prompt, images, history=history, system=system, frames=taken)
            (answer,) = self._answer({len(request.history): request}, spec)
            return answer.text
        if history:
            raise ValueError("history belongs to a single prompt; give one text as prompt")
        requests = dict(enumerate(self._requests(prompt, images, video, frames, system)))
        return [answer.text for answer in self._answer(requests, spec)]

    def stream(
        self,
        prompt: str,
        images: Images = None,
        *,
        video: Video = None,
        frames: int = FRAMES,
        history: Sequence[Turn] = (),
        system: str | None = None,
        **options: Unpack[Options],
    ) -> Iterator[str]:
        """Yields pieces of the answer while it is written; joined they are what `generate` returns.

        Arguments and errors are those of `generate`.
        """
        taken = self.video_frames(video, frames)
        request = make_request(prompt, images, history=history, system=system, frames=taken)
        return self.stream_request(request, self.spec(**options))

    def chat(self, *, system: str | None = None, **options: Unpack[Options]) -> Chat:
        """Returns a new conversation, all of whose turns share the options."""
        return Chat(self, self.spec(**options), system=system)

    def conversation(self) -> Conversation:
        """Returns an empty cache for one conversation; `Chat` holds one."""
        return Conversation(self._conversations)

    @functools.cached_property
    def _conversations(self) -> Conversations:
        return Conversations(self._generator)

    def engine(self, **options: Any) -> Engine:
        """Returns an engine for requests that come and go; see `Engine` for the options."""
        return Engine(self.model, self._generator.prompts.processor, self.mesh, **options)

    def answer(self, requests: Sequence[Request], **options: Unpack[Options]) -> list[Answer]:
        """Answers requests in order, with token counts; a failed one carries its error."""
        spec, numbered = self.spec(**options), dict(enumerate(requests))
        found: dict[int, Answer] = {}
        for answers in self._generator.answer(numbered, spec):
            found |= answers
        return [found[number] for number in numbered]

    def spec(self, **options: Unpack[Options]) -> GenerationSpec:
        """Returns the options as a generation spec. Raises TypeError or ValueError.

        Without `max_new_tokens`, answers may fill half of the decoder's positions, but at most
        `MAX_NEW_TOKENS`.
        """
        half = self.config.decoder.rope.max_positions // 2
        defaults: Options = {"max_new_tokens": min(MAX_NEW_TOKENS, half)}
        return make_spec(self.config.prompt.tiles, **(defaults | options))

    def video_frames(self, video: Video, count: int, name: str = "video") -> tuple[VideoFrame, ...]:
        """Returns frames of a video, as `generate` takes them; see videos.video_frames."""
        return video_frames(video, count, self.config.prompt.tiles, name=name)

    def stream_request(
        self, request: Request, spec: GenerationSpec, conversation: Conversation | None = None
    ) -> Iterator[str]:
        """Yields pieces of the answer to a request, on the cache of its conversation if given."""
        if conversation is not None:
            return conversation.stream(request, spec)
        return self._generator.stream(request, spec, number=len(request.history))

    def _answer(self, requests: dict[int, Request], spec: GenerationSpec) -> list[Answer]:
        """Answers requests by number, and raises the error of the first that fails."""
        found: dict[int, Answer] = {}
        for answers in self._generator.answer(requests, spec):
            for answer in answers.values():
                if answer.error is not None:
                    raise answer.error
            found |= answers
        return [found[number] for number in sorted(found)]

    def _requests(
        self, prompts: Sequence[str], images: Any, video: Any, frames: int, system: str | None
    ) -> list[Request]:
        """Returns the request of each prompt."""
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompt is a {type(prompts).__name__}; give a text or a list of texts")
        kinds = ("an image, a list of images, or None", "a video, or None")
        entries = zip(
            prompts,
            _entries("images", images, len(prompts), kinds[0]),
            _entries("video", video, len(prompts), kinds[1]),
            strict=True,
        )

        def request(item: tuple[int, tuple[str, Images, Video]]) -> Request:
            number, (text, pictures, clip) = item
            where = f"prompt[{number}]"
            taken = self.video_frames(clip, frames, f"video[{number}]")
            return make_request(text, pictures, system=system, where=where, frames=taken)

        with ThreadPoolExecutor(THREADS) as pool:  # images behind URLs are fetched here
            return list(pool.map(request, enumerate(entries)))


def _entries(name: str, given: Any, prompts: int, kind: str) -> list[Any]:
    """Returns the entry of each prompt."""
    if given is None:
        return [None] * prompts
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"{name} is a {type(given).__name__}, but prompt is a list; give a list with an entry "
            f"per prompt: {kind}"
        )
    if len(given) != prompts:
        raise ValueError(
            f"{name} has {len(given)} entries for {prompts} prompts; give one entry per "
            f"prompt: {kind}"
        )
    return list(given)
