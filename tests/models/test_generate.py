"""Greedy generation against the original, whatever the padding and the neighbors (model.md 11)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvlx_jax.convert.verify import inputs_from_flat
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.models.generation import (
    Sampling,
    Vocabulary,
    advance,
    choose,
    decode_step,
    greedy,
    prefill,
    row_keys,
    start,
)

IMAGE_TOKEN = 7


@functools.partial(jax.jit, static_argnames=("new", "stop_ids"))
def run(model, inputs, *, new=8, stop_ids=()):
    return greedy(model, inputs, max_new_tokens=new, stop_ids=stop_ids, pad_id=2)


def prompts(parity, name, tiles):
    ids = parity.inputs[f"{name}_input_ids"]
    mask = parity.inputs.get(f"{name}_attention_mask", np.ones_like(ids))
    positions = np.where(mask == 1, mask.cumsum(axis=1) - 1, 1)
    return inputs_from_flat(parity.model.config, IMAGE_TOKEN, ids, tiles, mask, positions)


def test_golden_tokens(parity):
    eos = parity.model.config.prompt.eos_ids
    pixels = parity.inputs["pixel_values"]
    for name, tiles in (("gen1", pixels[:2]), ("gen2", pixels[:3]), ("gen_text", pixels[:0])):
        tokens, steps = run(parity.model, prompts(parity, name, tiles), stop_ids=eos)
        np.testing.assert_array_equal(
            tokens[:, : int(steps)], parity.outputs[f"{name}_new_tokens"], err_msg=name
        )


def test_a_row_stops_at_eos_and_is_padded(parity):
    eos = int(parity.outputs["gen2_eos_id"])
    tokens, steps = run(
        parity.model, prompts(parity, "gen2", parity.inputs["pixel_values"][:3]), stop_ids=(eos,)
    )
    np.testing.assert_array_equal(tokens[:, : int(steps)], parity.outputs["gen2_eos_new_tokens"])
    assert (np.asarray(tokens)[:, int(steps) :] == 2).all()


def test_scores_of_every_step(parity):
    """Prefill and cached steps give the logits of the original at each step."""
    inputs = prompts(parity, "gen2", parity.inputs["pixel_values"][:3])
    scores = parity.outputs["gen2_scores"]
    cache, logits = jax.jit(prefill, static_argnums=2)(parity.model, inputs, len(scores))
    step = jax.jit(decode_step)
    for expected in scores:
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
        cache, logits = step(parity.model, cache, jnp.argmax(logits, axis=-1))


def test_padding_side_and_neighbors_do_not_matter(load_golden):
    parity = load_golden("internlm2")
    inputs = prompts(parity, "gen2", parity.inputs["pixel_values"][:3])
    expected = parity.outputs["gen2_new_tokens"]
    length, text = (
        inputs.tokens.shape[1],
        inputs.tiles.shape[1] * parity.model.config.tokens_per_tile,
    )

    def right_padded(row):
        real = np.flatnonzero(inputs.segment_ids[row])
        shifted = [np.zeros(length + 5, np.int32) for _ in range(3)] + [
            np.full(length + 5, text, np.int32)
        ]
        for out, field in zip(shifted, ("tokens", "positions", "segment_ids", "feature_index")):
            out[: len(real)] = getattr(inputs, field)[row, real]
        return shifted

    rows = [right_padded(0), right_padded(1)]
    for order in ([0, 1], [1, 0], [1]):
        tokens, positions, segments, index = (
            np.stack([rows[row][field] for row in order]) for field in range(4)
        )
        batch = inputs._replace(
            tokens=tokens,
            positions=positions,
            segment_ids=segments,
            feature_index=index,
            tiles=inputs.tiles[order],
        )
        ours, _ = run(parity.model, batch)
        np.testing.assert_array_equal(ours, expected[order])


def test_an_empty_row_pads_the_batch(load_golden):
    parity = load_golden("internlm2")
    inputs = prompts(parity, "gen1", parity.inputs["pixel_values"][:2])
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), inputs)
    tokens, _ = run(parity.model, padded)
    np.testing.assert_array_equal(tokens[:1], parity.outputs["gen1_new_tokens"])
    assert (np.asarray(tokens)[1] == 2).all()


def test_golden_tokens_with_a_repetition_penalty(parity):
    """Ids of this answer and the bos in front of it count as written, the prompt's do not."""
    inputs = prompts(parity, "gen1", parity.inputs["pixel_values"][:2])
    options = dict(
        sampling=Sampling(repetition_penalty=1.3),
        vocabulary=Vocabulary(stop_ids=parity.model.config.prompt.eos_ids, pad_id=2, bos_id=1),
    )

    @jax.jit
    def run(model, inputs):
        return advance(
            model,
            start(model, inputs, row_keys(0, [0]), 0, max_new_tokens=8, **options),
            8,
            0,
            **options,
        ).tokens

    np.testing.assert_array_equal(run(parity.model, inputs), parity.outputs["gen1_rep_new_tokens"])


def test_cached_steps_equal_one_forward_pass(load_golden):
    """Without a cache: the answer behind its prompt, each token the most likely one after what
    stands before it.
    """
    parity = load_golden("qwen2")
    answer = parity.outputs["gen1_new_tokens"][0]
    prompt = parity.inputs["gen1_input_ids"]
    ids = np.concatenate([prompt, answer[None]], axis=1)
    inputs = inputs_from_flat(
        parity.model.config, IMAGE_TOKEN, ids, parity.inputs["pixel_values"][:2]
    )
    logits = jax.jit(lambda model, inputs: model.decoder.logits(model(inputs)))(
        parity.model, inputs
    )
    np.testing.assert_array_equal(np.argmax(logits[0], axis=-1)[prompt.shape[1] - 1 : -1], answer)


def test_pieces_and_the_minimum_of_new_tokens(load_golden):
    """Three steps and then the rest give what one call gives.

    A stop id has to wait for the minimum.
    """
    parity = load_golden("internlm2")
    inputs = prompts(parity, "gen1", parity.inputs["pixel_values"][:2])
    expected = parity.outputs["gen1_new_tokens"]
    first, second = expected[0, :2].tolist()
    options = dict(
        sampling=Sampling(), vocabulary=Vocabulary(stop_ids=(second,), pad_id=2, bos_id=1)
    )
    begin = jax.jit(
        lambda model, inputs, minimum: start(
            model, inputs, row_keys(0, [0]), minimum, max_new_tokens=8, **options
        )
    )
    go = jax.jit(
        lambda model, state, until, minimum: advance(model, state, until, minimum, **options)
    )

    state = go(parity.model, begin(parity.model, inputs, 0), 8, 0)
    assert (
        np.asarray(state.tokens)[0].tolist() == [first, second] + [2] * 6 and int(state.step) == 2
    )
    state = go(parity.model, begin(parity.model, inputs, 8), 3, 8)
    assert int(state.step) == 3 and not bool(state.done[0])
    whole = go(parity.model, begin(parity.model, inputs, 8), 8, 8)
    np.testing.assert_array_equal(go(parity.model, state, 8, 8).tokens, whole.tokens)
    assert second not in np.asarray(whole.tokens)


LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(temperature=1), {0, 1, 2, 3}),
        (Sampling(temperature=1, top_k=2), {0, 1}),
        (Sampling(temperature=1, top_p=0.7), {0, 1}),
        (Sampling(temperature=1, top_p=0.81), {0, 1, 2}),
        (Sampling(temperature=1, top_p=0.01), {0}),
        (Sampling(temperature=1, top_k=3, top_p=0.9), {0, 1, 2}),
        (Sampling(temperature=0.01), {0}),
        (Sampling(), {0}),
    ],
)
def test_what_may_be_sampled(sampling, kept):
    """top_p drops the least likely tokens while together they have at most 1 - p."""
    rows = 2000
    tokens = choose(
        jnp.repeat(LOGITS, rows, axis=0), row_keys(0, jnp.arange(rows)), jnp.int32(3), sampling
    )
    counts = np.bincount(np.asarray(tokens), minlength=4)
    assert set(np.flatnonzero(counts).tolist()) == kept
    if kept == {0, 1, 2, 3}:
        np.testing.assert_allclose(counts / rows, np.exp(LOGITS[0]), atol=0.04)


def test_rows_have_their_own_randomness():
    logits = jnp.zeros((3, 1000))
    draw = functools.partial(choose, logits, sampling=Sampling(temperature=1))
    first = np.asarray(draw(row_keys(0, jnp.array([5, 6, 7])), jnp.int32(0)))
    again = np.asarray(draw(row_keys(0, jnp.array([7, 5, 6])), jnp.int32(0)))
    assert first.tolist() == [again[1], again[2], again[0]] and len(set(first)) == 3
    assert set(np.asarray(draw(row_keys(0, jnp.array([5, 6, 7])), jnp.int32(1)))) != set(first)


@pytest.mark.parametrize(
    "setting", [dict(top_p=0), dict(top_k=-1), dict(temperature=-1), dict(repetition_penalty=0)]
)
def test_settings_outside_their_range(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Sampling(**setting)
