"""Conversation -> token ids, labels and the slots of the image tokens (design: data.md 3 and 6).

Only tile counts are needed, no pixels, so exact lengths are known before any image is decoded.
Dims: S tokens, T tiles of all images together, N image tokens per tile.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from internvlx_jax.core.errors import SampleError, placeholder_mismatch
from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER, Part, Template, Turn, render
from internvlx_jax.data.tokenizer import SpecialText, Tokenizer


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Holds one sample as ids.

    Attributes:
        tokens: int32[S], bos included where the template asks for it, no eos.
        labels: int32[S], the token itself or IGNORED; not shifted.
        tile_start: int32[T], the first of each tile's N slots, tiles in the order of the images.
    """

    tokens: np.ndarray
    labels: np.ndarray
    tile_start: np.ndarray


def encode_sample(
    turns: Sequence[Turn],
    *,
    system: str | None,
    template: Template,
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int],
    tokens_per_tile: int,
    special_text: SpecialText = "reject",
) -> Encoded:
    """Encodes a training sample: answers and the separator after each are supervised.

    With images, each "<image>" of a human turn becomes the next image of tiles_per_image. Without
    images (a text sample), and in answers, "<image>" is ordinary text.

    Args:
        turns: (role, text) of each message.
        system: system message; None for the template's.
        template: fixed text around the messages.
        tokenizer: of the model.
        tiles_per_image: tiles of each image, in order.
        tokens_per_tile: image tokens per tile.
        special_text: what reserved text inside turns does.

    Raises:
        SampleError: "no_supervision", "placeholder_mismatch" or "reserved_text".
    """
    parts = list(render(template, turns, system=system, strip=template.strip_values))
    encoded = _encode(parts, template, tokenizer, tiles_per_image, tokens_per_tile, special_text)
    if (encoded.labels == IGNORED).all():
        raise SampleError(
            "no_supervision", "no answer to learn from.", "Give at least one gpt turn a text."
        )
    return encoded


def encode_prompt(
    question: str,
    *,
    history: Iterable[tuple[str, str]] = (),
    system: str | None = None,
    template: Template,
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int],
    tokens_per_tile: int,
    special_text: SpecialText = "escape",
    images_per_turn: Sequence[int] | None = None,
) -> Encoded:
    """Encodes a generation prompt: history, question and the header of the answer.

    A first question with images but without "<image>" gets "<image>\\n" in front for each; nothing
    is stripped (design: data.md 4).

    Args:
        question: the message to answer.
        history: (question, answer) pairs before it.
        system: system message; None for the template's.
        template: fixed text around the messages.
        tokenizer: of the model.
        tiles_per_image: tiles of each image, in order.
        tokens_per_tile: image tokens per tile.
        special_text: what reserved text inside turns does.
        images_per_turn: images of each question, oldest first; "<image>" is ordinary text in a
            question without one. None: it is an image wherever there are images at all.

    Returns:
        The prompt; no label is set.

    Raises:
        SampleError: "placeholder_mismatch" or "reserved_text".
    """
    history = list(history)
    if len(tiles_per_image) > 0 and not history and IMAGE_PLACEHOLDER not in question:
        question = f"{IMAGE_PLACEHOLDER}\n" * len(tiles_per_image) + question
    turns = [turn for asked, answer in history for turn in (("human", asked), ("gpt", answer))]
    parts = render(template, [*turns, ("human", question), ("gpt", "")], system=system)
    parts = [part._replace(supervised=False) for part in parts]
    if images_per_turn is not None:
        parts = _as_text(parts, images_per_turn)
    return _encode(parts, template, tokenizer, tiles_per_image, tokens_per_tile, special_text)


def _as_text(parts: list[Part], images_per_turn: Sequence[int]) -> list[Part]:
    """Returns the parts with the questions that have no image marked as plain text."""
    images = iter(images_per_turn)
    return [
        part._replace(source="text") if part.source == "human" and not next(images) else part
        for part in parts
    ]


def _encode(
    parts: list[Part],
    template: Template,
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int],
    tokens_per_tile: int,
    special_text: SpecialText,
) -> Encoded:
    tokenizer.token_id(template.stop)  # a template of another tokenizer would pass as plain text
    images = iter(tiles_per_image)
    expanded = "human" if len(tiles_per_image) > 0 else None
    found = sum(part.text.count(IMAGE_PLACEHOLDER) for part in parts if part.source == expanded)
    if found != len(tiles_per_image):
        raise placeholder_mismatch(len(tiles_per_image), found)
    writer = _Writer(tokenizer)
    wants_bos = tokenizer.add_bos if template.bos is None else template.bos
    if wants_bos and tokenizer.bos_id is not None:
        writer.ids([tokenizer.bos_id])
    writer.ids(tokenizer.start_ids)  # every template begins with an added token
    for part in parts:
        special = "allow" if part.source == "template" else special_text
        texts = part.text.split(IMAGE_PLACEHOLDER) if part.source == expanded else [part.text]
        for i, text in enumerate(texts):
            if i > 0:
                writer.image(next(images), tokens_per_tile)
            writer.text(text, special=special, supervised=part.supervised)
    return writer.encoded()


class _Writer:
    """Collects ids and labels (design: data.md 6).

    Neighboring plain texts become one call of the tokenizer, because a piece may span both.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.tile_start: list[int] = []
        # Plain text not yet encoded, unsupervised and then supervised. An answer ends at its
        # separator's id, so nothing unsupervised ever follows it in the same call.
        self.head, self.tail = "", ""

    def text(self, text: str, *, special: SpecialText, supervised: bool) -> None:
        for i, atom in enumerate(self.tokenizer.split(text, special)):
            if isinstance(atom, int):
                self.ids([atom], supervised=supervised)
                continue
            if i > 0:  # cut by split, so not to be joined with what came before
                self.flush()
            if (
                self.tokens
                and self.tokens[-1] in self.tokenizer.swallowing
                and not self.head
                and not self.tail
            ):
                atom = atom.lstrip()
            if supervised:
                self.tail += atom
            else:
                self.head += atom

    def image(self, tiles: int, tokens_per_tile: int) -> None:
        self.ids([self.tokenizer.img_start])
        self.tile_start += [len(self.tokens) + tile * tokens_per_tile for tile in range(tiles)]
        self.ids([self.tokenizer.image_token_id] * (tiles * tokens_per_tile))
        self.ids([self.tokenizer.img_end])

    def ids(self, ids: list[int], *, supervised: bool = False) -> None:
        self.flush()
        self.tokens += ids
        self.labels += ids if supervised else [IGNORED] * len(ids)

    def flush(self) -> None:
        # A token that holds the end of a header and the start of an answer is not supervised.
        ids, masked = self.tokenizer.encode_plain(self.head, self.tail)
        self.head, self.tail = "", ""
        self.tokens += ids
        self.labels += [IGNORED] * masked + ids[masked:]

    def encoded(self) -> Encoded:
        self.flush()
        return Encoded(
            tokens=np.array(self.tokens, np.int32),
            labels=np.array(self.labels, np.int32),
            tile_start=np.array(self.tile_start, np.int32),
        )
