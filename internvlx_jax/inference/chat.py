"""A conversation with a model, turn by turn (design: evaluation.md 3, data.md 4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from internvlx_jax.inference.arguments import make_request
from internvlx_jax.inference.images import Images
from internvlx_jax.inference.requests import GenerationSpec, Request, Turn

if TYPE_CHECKING:
    from internvlx_jax.inference.vlm import VLM


class Chat:
    """One conversation; `VLM.chat` makes it.

    Attributes:
        history: turns so far, oldest first, with the images as they were when they were sent.
    """

<<<<<<< HEAD
    def __init__(self, model: VLM, spec: GenerationSpec, *, system: str | None = None):
        self.model, self.spec, self.system = model, spec, system
        self.history: tuple[Turn, ...] = ()
=======
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
>>>>>>> h-models

    def reset(self) -> None:
        """Forgets all turns and images."""
        self.history = ()

    def send(self, prompt: str, images: Images = None) -> str:
        """Answers the next turn, which then joins the history.

        Args:
            prompt: text of the turn. "<image>" says where an image stands; images stand in front
                of a prompt without it.
            images: an image or a list of images of this turn, of the kinds that `VLM.generate`
                accepts.

        Raises:
            TypeError, ValueError, SampleError: as `VLM.generate`; the conversation stays as it was.
        """
        return "".join(self.stream(prompt, images))

    def stream(self, prompt: str, images: Images = None) -> Iterator[str]:
        """Yields pieces of the answer while it is written; see `send`.

        The turn joins the history after the last piece, so a stream that is left early changes
        nothing.
        """
        request = make_request(
            prompt, images, history=self.history, system=self.system, read_files=True
        )
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[str]:
        pieces = []
        for piece in self.model.stream_request(request, self.spec):
            pieces.append(piece)
            yield piece
        turn = Turn(request.prompt, "".join(pieces), request.images)
        self.history = (*request.history, turn)
