"""A turn of a chat runs its own part of the prompt, and answers as the whole prompt does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import internvlx_jax as ivx
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.core.model_config import LvtcConfig, RopeConfig
from internvlx_jax.data.batch import Row
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.inference.arguments import make_request
from internvlx_jax.models.continuation import enlarged, extend, keeps_rotation
from internvlx_jax.models.generation import decode_step
from internvlx_jax.models.serving_slots import admit, empty_slots, one_row

LVTC = LvtcConfig(expand_layer=1, low_grid=2, high_grid=4)
TOKENS = 10


@pytest.fixture(scope="module")
def lvtc_model(run_folder):
    return ivx.load(run_folder, dtype="float32", lvtc=LVTC)


@pytest.fixture(scope="module", params=["plain", pytest.param("lvtc", marks=pytest.mark.slow)])
def either(request, model, run_folder):
    return model if request.param == "plain" else request.getfixturevalue("lvtc_model")


def pages(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 255, (40, 60, 3), np.uint8) for _ in range(count)]


TURNS = [("What is it?", 1), ("These two?", 2), ("Why?", 0)]


def test_turns_answer_as_whole_prompts_do(either):
    """With images in later turns, and with as many tokens as they bring."""
    chat = either.chat(max_new_tokens=TOKENS)
    ran, whole = [], []
    for n, (prompt, images) in enumerate(TURNS):
        answer, before = chat.send(prompt, pages(images)), chat.history[:n]
        ran.append(chat.prefilled)
        sent = chat.history[n].images
        assert answer == either.generate(
            prompt, list(sent), history=before, max_new_tokens=TOKENS
        ), n
        request = make_request(prompt, list(sent), history=before)
        row = either._generator.prompts.row(request, Bucket(9, 999), chat.spec)
        whole.append(len(row.tokens))
    assert ran[0] == whole[0] and 2 * either.config.tokens_per_tile < ran[1] < whole[1]
    assert ran[1] <= whole[1] - whole[0] and ran[2] <= whole[2] - whole[1]


def test_logits_are_those_of_the_whole_prompt(either):
    """Within 1e-5 in float32: of the new part, and of the tokens that are decoded behind it."""
    generator = either._generator
    model, prompts = generator.model, generator.prompts
    rng = np.random.default_rng(5)
    per_tile, image = prompts.processor.tokens_per_tile, prompts.processor.tokenizer.image_token_id
    text = rng.integers(20, 400, 60).astype(np.int32)
    tile = np.full(per_tile, image, np.int32)
    tokens = np.concatenate([text[:9], tile, text[9:30], tile, tile, text[30:]])
    starts = np.array([9, 30 + per_tile, 30 + 2 * per_tile], np.int32)
    size = prompts.processor.tiles.tile_size
    tiles = rng.integers(0, 255, (3, size, size, 3), np.uint8)
    split = 9 + per_tile + 7

    def inputs(first, last, bucket):
        inside = (starts >= first) & (starts < last)
        row = Row(
            tokens[first:last],
            np.full(last - first, IGNORED, np.int32),
            starts[inside] - first,
            tiles[inside],
        )
        found = prompts.inputs([row], bucket)
        return found._replace(positions=found.positions + first)

    vocabulary, how = generator.reader.vocabulary, one_row(Sampling(), 0, 0)
    saved = prompts.processor.saved_per_tile
    long, short = Bucket(3, 256, 256 if saved else 0), Bucket(1, 64, 64 if saved else 0)
    begin, go_on = (jax.jit(f, static_argnames="vocabulary") for f in (admit, extend))
    slots = empty_slots(model, 1, 128)
    slots, _ = begin(model, slots, inputs(0, split, short), 0, 50, how, vocabulary=vocabulary)
    slots = enlarged(slots, 256)
    kept = np.array([split - saved, split] if saved else [split], np.int32)
    for end in (len(tokens) - 20, len(tokens)):  # again with less kept than there is
        slots, _ = go_on(
            model,
            slots,
            inputs(split, end, Bucket(2, 128, 128 if saved else 0)),
            kept,
            50,
            how,
            vocabulary=vocabulary,
        )
    whole, _ = begin(
        model, empty_slots(model, 1, 256), inputs(0, len(tokens), long), 0, 50, how,
        vocabulary=vocabulary,
    )  # fmt: skip
    assert int(slots.cache.position[0]) == int(whole.cache.position[0]) == len(tokens)
    assert [int(r.slot[0]) for r in slots.cache.ranges] == [
        int(r.slot[0]) for r in whole.cache.ranges
    ]
    step = jax.jit(decode_step)
    mine, other = slots.cache, whole.cache
    for token in (5, 77, 300):
        mine, found = step(model, mine, jnp.array([token]))
        other, wanted = step(model, other, jnp.array([token]))
        np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_nothing_new_is_compiled_for_another_conversation(model):
    def talk() -> list[str]:
        chat = model.chat(max_new_tokens=TOKENS)
        return [chat.send(prompt, pages(images)) for prompt, images in TURNS]

    first = talk()
    before = model._conversations.programs
    assert talk() == first and model._conversations.programs == before
    chat = model.chat(max_new_tokens=TOKENS)
    chat.send("Now something else?", pages(1))
    chat.send("Is it?")
    chat.send("Is it really?")
    assert model._conversations.programs == before


def test_streams_left_early_resets_and_changed_histories(model):
    chat = model.chat(max_new_tokens=TOKENS)
    first = chat.send("What is it?", pages(1))
    for _ in range(2):
        left = chat.stream("And this, with other words?", pages(2))
        next(left)
        left.close()
    second = chat.send("And now?")
    assert second == model.generate("And now?", history=chat.history[:1], max_new_tokens=TOKENS)
    assert chat.prefilled < 40
    # Two at a time: the second one finds no cache.
    one, other = chat.stream("One?"), chat.stream("Other?")
    second = [next(one), next(other)][1]
    history = chat.history
    second += "".join(other)
    assert second == model.generate("Other?", history=history, max_new_tokens=TOKENS)
    wanted = model.generate("Third?", history=history, max_new_tokens=TOKENS)
    one.close()
    chat.history = history
    assert chat.send("Third?") == wanted
    chat.history = tuple(
        dataclasses.replace(turn, images=()) if i else dataclasses.replace(turn, answer="No.")
        for i, turn in enumerate(history)
    )
    changed = chat.history
    assert chat.send("So?") == model.generate("So?", history=changed, max_new_tokens=TOKENS)
    chat.reset()
    assert chat.send("What is it?", pages(1)) == first


def test_a_failed_step_costs_the_cache_only(model, monkeypatch):
    chat = model.chat(max_new_tokens=TOKENS)
    chat.send("What is it?", pages(1))
    programs = model._conversations

    def broken(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(programs, "decode", broken)
        with pytest.raises(RuntimeError):
            chat.send("And now?")
    assert len(chat.history) == 1
    wanted = model.generate("And now?", history=chat.history, max_new_tokens=TOKENS)
    assert chat.send("And now?") == wanted and chat.prefilled > 40


def test_settings_without_a_kept_cache(model):
    """They run whole prompts, and answer as ever."""
    chat = model.chat(max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    chat.send("What is it?", pages(1))
    answer = chat.send("And now?")
    assert chat.prefilled >= 128, "a whole bucket"
    assert answer == model.generate(
        "And now?", history=chat.history[:1], max_new_tokens=TOKENS, min_new_tokens=TOKENS
    )
    longer = RopeConfig(scaling="dynamic", factor=2.0, max_positions=512, allow_longer=True)
    assert keeps_rotation(longer, 512) and not keeps_rotation(longer, 1024)
    assert keeps_rotation(RopeConfig(max_positions=512), 4096)
