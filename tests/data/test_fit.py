"""What gives way when a sample is too long, in order (design: data.md 10)."""

import numpy as np
import pytest

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.buckets import Capacity
from internvlx_jax.data.conversations import parse_sample
from internvlx_jax.data.fit import fit_sample
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tiles import tile_counts
from internvlx_jax.data.tokenizer import Tokenizer

PER_TILE = 16


@pytest.fixture(scope="module")
def processor():
    tiles = TileConfig(tile_size=56, max_num=6)
    return Processor(
        Tokenizer.load(TOKENIZER_FOLDER), get_template("internlm2-chat"), "", tiles, PER_TILE
    )


def sample(*turns, images=1):
    names = [f"{number}.png" for number in range(images)]
    conversations = [
        {"from": role, "value": text} for role, text in zip(["human", "gpt"] * len(turns), turns)
    ]
    record = (
        {"image": names, "conversations": conversations}
        if images
        else {"conversations": conversations}
    )
    return parse_sample(record, dataset="d", line=7, where="a.jsonl line 7", root="")


def whole(processor, sample, sizes):
    return fit_sample(processor, sample, sizes, Capacity(10**6))


def text_of(processor, fitted):
    return processor.tokenizer.decode(
        fitted.encoded.tokens[fitted.encoded.tokens != processor.tokenizer.image_token_id]
    )


def test_a_sample_that_fits_is_left_alone(processor):
    chat = sample("<image>What?", "This.")
    fitted = whole(processor, chat, [(112, 168)])
    assert (fitted.change, fitted.tiles, fitted.limit) == ("", (7,), 6)
    exact = fit_sample(processor, chat, [(112, 168)], Capacity(len(fitted.encoded.tokens), 7))
    np.testing.assert_array_equal(exact.encoded.tokens, fitted.encoded.tokens)


@pytest.mark.parametrize(
    "capacity", [Capacity(10**6, 6), Capacity(7 * PER_TILE - 1)], ids=["tile slots", "tokens"]
)
def test_first_tiles_are_fewer(processor, capacity):
    chat = sample("<image>What?", "This.")
    fitted = fit_sample(processor, chat, [(112, 168)], capacity)
    assert fitted.change == "fewer_tiles" and sum(fitted.tiles) < 7 and fitted.limit < 6
    assert len(fitted.encoded.tokens) <= capacity.length
    larger = tile_counts(processor.tiles, [(112, 168)], fitted.limit + 1)
    text = len(fitted.encoded.tokens) - sum(fitted.tiles) * PER_TILE
    assert (
        sum(larger) > (capacity.tiles or 99) or text + sum(larger) * PER_TILE > capacity.length
    ), "as many as fit"


def test_then_trailing_turns_go_with_their_images(processor):
    chat = sample("<image>What?", "This.", "And <image>?", "That " * 5, "So?", images=2)
    sizes = [(50, 50), (50, 50)]
    full = whole(processor, chat, sizes)
    # The unanswered question alone, then the pair with the second image.
    fitted = fit_sample(processor, chat, sizes, Capacity(len(full.encoded.tokens) - 1))
    assert (
        fitted.change == "dropped_turns"
        and fitted.tiles == (1, 1)
        and "So?" not in text_of(processor, fitted)
    )
    fitted = fit_sample(processor, chat, sizes, Capacity(len(fitted.encoded.tokens) - 1))
    assert (
        fitted.change == "dropped_turns"
        and fitted.tiles == (1,)
        and "And" not in text_of(processor, fitted)
    )
    assert len(fitted.encoded.tile_start) == 1


def test_an_image_in_the_first_turns_stays(processor):
    """Without its image the rest would be another sample."""
    chat = sample("Hello.", "Hi.", "<image>What?", "This " * 20)
    fitted = fit_sample(
        processor,
        chat,
        [(50, 50)],
        Capacity(len(whole(processor, chat, [(50, 50)]).encoded.tokens) - 10),
    )
    assert fitted.change == "cut_answer" and fitted.tiles == (1,)


def test_last_the_answer_is_cut(processor):
    chat = sample("<image>What?", "This " * 50)
    full = whole(processor, chat, [(50, 50)]).encoded
    fitted = fit_sample(processor, chat, [(50, 50)], Capacity(len(full.tokens) - 30))
    assert fitted.change == "cut_answer"
    np.testing.assert_array_equal(fitted.encoded.tokens, full.tokens[:-30])
    np.testing.assert_array_equal(fitted.encoded.labels, full.labels[:-30])


@pytest.mark.parametrize(
    "turns, images, capacity",
    [
        (("<image>What?", "This."), 1, Capacity(PER_TILE)),
        (("long " * 100 + "<image>", "This."), 1, Capacity(60)),
        (("long " * 100, "This."), 0, Capacity(60)),
        (("<image><image>", "This."), 2, Capacity(500, 1)),
    ],
    ids=["image", "question", "text", "tile slots"],
)
def test_what_cannot_fit_is_too_long(processor, turns, images, capacity):
    with pytest.raises(SampleError, match="a.jsonl line 7: .* image tokens are never cut") as error:
        fit_sample(processor, sample(*turns, images=images), [(50, 50)] * images, capacity)
    assert error.value.reason == "too_long"


def test_no_capacity_ever_breaks_an_image(processor):
    """over all capacities: image tokens are those of the tiles, in unbroken runs."""
    chat = sample("<image>What?", "This " * 9, "And <image> now?", "That " * 9, images=2)
    changes = set()
    for length in range(20, 260):
        try:
            fitted = fit_sample(processor, chat, [(112, 168), (50, 120)], Capacity(length))
        except SampleError:
            changes.add("too_long")
            continue
        changes.add(fitted.change)
        tokens = fitted.encoded.tokens
        assert len(tokens) <= length and (fitted.encoded.labels >= 0).any()
        visual = np.flatnonzero(tokens == processor.tokenizer.image_token_id)
        slots = [start + i for start in fitted.encoded.tile_start for i in range(PER_TILE)]
        assert visual.tolist() == slots and len(slots) == sum(fitted.tiles) * PER_TILE
        assert (tokens == processor.tokenizer.img_end).sum() == len(fitted.tiles)
    assert changes == {"", "fewer_tiles", "dropped_turns", "cut_answer", "too_long"}
