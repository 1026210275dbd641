"""Greedy generation against the original, whatever the padding and the neighbours (model.md 11)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from internvlx_jax.convert.verify import inputs_from_flat
from internvlx_jax.models.generate import decode_step, greedy, prefill

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
        np.testing.assert_array_equal(tokens[:, : int(steps)], parity.outputs[f"{name}_new_tokens"], err_msg=name)


def test_a_row_stops_at_eos_and_is_padded(parity):
    eos = int(parity.outputs["gen2_eos_id"])
    tokens, steps = run(parity.model, prompts(parity, "gen2", parity.inputs["pixel_values"][:3]), stop_ids=(eos,))
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


def test_padding_side_and_neighbours_do_not_matter(load_golden):
    parity = load_golden("internlm2")
    inputs = prompts(parity, "gen2", parity.inputs["pixel_values"][:3])
    expected = parity.outputs["gen2_new_tokens"]
    length, text = inputs.tokens.shape[1], inputs.tiles.shape[1] * parity.model.config.tokens_per_tile

    def right_padded(row):
        real = np.flatnonzero(inputs.segment_ids[row])
        shifted = [np.zeros(length + 5, np.int32) for _ in range(3)] + [np.full(length + 5, text, np.int32)]
        for out, field in zip(shifted, ("tokens", "positions", "segment_ids", "feature_index")):
            out[: len(real)] = getattr(inputs, field)[row, real]
        return shifted

    rows = [right_padded(0), right_padded(1)]
    for order in ([0, 1], [1, 0], [1]):
        tokens, positions, segments, index = (np.stack([rows[row][field] for row in order]) for field in range(4))
        batch = inputs._replace(tokens=tokens, positions=positions, segment_ids=segments, feature_index=index,
                                tiles=inputs.tiles[order])
        ours, _ = run(parity.model, batch)
        np.testing.assert_array_equal(ours, expected[order])


def test_an_empty_row_pads_the_batch(load_golden):
    parity = load_golden("internlm2")
    inputs = prompts(parity, "gen1", parity.inputs["pixel_values"][:2])
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), inputs)
    tokens, _ = run(parity.model, padded)
    np.testing.assert_array_equal(tokens[:1], parity.outputs["gen1_new_tokens"])
    assert (np.asarray(tokens)[1] == 2).all()
