"""Run a loaded checkpoint on stored arrays and compare with stored results (design: model.md 15).

Names of inputs and outputs are those of tests/golden/*/{inputs,outputs}.npz.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvlx_jax.checkpoints.hf_folder import TorchCheckpoint
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.checkpoints.tensors import difference
from internvlx_jax.core.files import written_aside
from internvlx_jax.core.inputs import IGNORED, Inputs
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.token_layout import feature_index, short_layout, short_lengths
from internvlx_jax.models.generation import greedy
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.loss import token_losses, weighted_loss
from internvlx_jax.models.params import abstract_model

NEW_TOKENS = 8


class InputsError(ValueError):
    """An inputs.npz that does not fit the model; the message names the array."""


def inputs_from_flat(
    config: ModelConfig,
    image_token_id: int,
    input_ids: np.ndarray,
    tiles: np.ndarray,
    mask: np.ndarray | None = None,
    positions: np.ndarray | None = None,
) -> Inputs:
    """Flat tiles in slot order -> our row-wise layout.

    input_ids, mask: int[B, S]; tiles: float32[I, 3, Y, X], in the order of their slots over the batch
    """
    rows, length = input_ids.shape
    per_tile = config.tokens_per_tile
    counts = (input_ids == image_token_id).sum(axis=1)
    if (counts % per_tile).any() or counts.sum() != len(tiles) * per_tile:
        raise InputsError(
            f"input_ids: rows hold {counts.tolist()} placeholders (id {image_token_id}); {len(tiles)} "
            f"tiles of {per_tile} tokens are given. Check --image_token_id and the tiles"
        )
    tiles_per_row = counts // per_tile
    slots = int(tiles_per_row.max())
    size = config.vision.image_size
    row_tiles = np.zeros((rows, slots, size, size, 3), np.float32)
    tile_start = np.full((rows, slots), length, np.int32)
    first = 0
    for row, count in enumerate(tiles_per_row):
        row_tiles[row, :count] = tiles[first : first + count].transpose(0, 2, 3, 1)
        tile_start[row, :count] = np.flatnonzero(input_ids[row] == image_token_id)[::per_tile]
        first += count
    mask = np.ones_like(input_ids) if mask is None else mask
    if positions is None:
        positions = np.broadcast_to(np.arange(length), input_ids.shape)
    short = None
    if config.lvtc is not None:
        short = short_layout(
            mask, tile_start, int(short_lengths(mask, tile_start, config.lvtc).max()), config.lvtc
        )
    return Inputs(
        *(np.asarray(x, np.int32) for x in (input_ids, positions, mask)),
        row_tiles,
        feature_index(tile_start, length, per_tile),
        short,
    )


def compute_outputs(
    model: InternVLX, arrays: Mapping[str, np.ndarray], image_token_id: int
) -> dict[str, np.ndarray]:
    """Every output whose inputs are present, in float32 at the highest matmul precision."""
    config = model.config
    # The release runs past max_positions without being asked to; here that takes this flag.
    rope = dataclasses.replace(config.decoder.rope, allow_longer=True)
    model.decoder.config = dataclasses.replace(config.decoder, rope=rope)
    pixels = arrays.get("pixel_values")
    if pixels is not None:
        flags = arrays.get("image_flags", np.ones(len(pixels)))
        used = pixels[np.asarray(flags).reshape(-1) == 1]

    def tower():
        vision = variant(model.vision, select_layer=-1)
        return jax.jit(lambda vision, x: vision(x))(vision, pixels.transpose(0, 2, 3, 1))

    def features():
        z = jax.jit(lambda model, x: model.encode_tiles(x))(model, pixels.transpose(0, 2, 3, 1))
        return z.reshape(len(z), config.token_grid, config.token_grid, -1)

    def projector_v2():
        projector = variant(model.projector, pixel_shuffle="v2")
        z = jax.jit(lambda projector, x: projector(x))(projector, arrays["proj_in"])
        return z.reshape(len(z), config.token_grid, config.token_grid, -1)

    def decoder(mask=None, positions=None):
        no_tiles = np.zeros((0, 3, config.vision.image_size, config.vision.image_size), np.float32)
        inputs = inputs_from_flat(config, -1, arrays["llm_input_ids"], no_tiles, mask, positions)
        return whole(inputs)

    def whole(inputs):
        return jax.jit(lambda model, inputs: model.decoder.logits(model(inputs)))(model, inputs)

    def batch():
        return inputs_from_flat(
            config, image_token_id, arrays["input_ids"], used, arrays["attention_mask"]
        )

    def loss():
        labels = np.asarray(arrays["labels"], np.int32)

        def compute(model, inputs, labels):
            ce, _ = token_losses(model.decoder, model(inputs), labels)
            total, weight = weighted_loss(ce, (labels != IGNORED).astype(jnp.float32))
            return total / weight

        return jax.jit(compute)(model, batch(), labels)

    def generate(name, tiles):
        ids = arrays[f"{name}_input_ids"]
        mask = arrays.get(f"{name}_attention_mask", np.ones_like(ids))
        positions = np.where(mask == 1, mask.cumsum(axis=1) - 1, 1)
        inputs = inputs_from_flat(config, image_token_id, ids, tiles, mask, positions)
        prompt = config.prompt
        tokens, steps = jax.jit(greedy, static_argnames=("max_new_tokens", "stop_ids", "pad_id"))(
            model, inputs, max_new_tokens=NEW_TOKENS, stop_ids=prompt.eos_ids, pad_id=prompt.pad_id
        )
        return np.asarray(tokens, np.int64)[:, : int(steps)]

    jobs: dict[str, tuple[tuple[str, ...], Callable[[], jax.Array]]] = {
        "vit_last_hidden_state": (("pixel_values",), tower),
        "extract_feature": (("pixel_values",), features),
        "proj_out_v2": (("proj_in",), projector_v2),
        "llm_logits": (("llm_input_ids",), decoder),
        "llm_logits_mask_left_pos": (
            ("llm_input_ids", "llm_mask_left", "llm_position_ids_left"),
            lambda: decoder(arrays["llm_mask_left"], arrays["llm_position_ids_left"]),
        ),
        "logits": (("pixel_values", "input_ids", "attention_mask"), lambda: whole(batch())),
        "loss": (("pixel_values", "input_ids", "attention_mask", "labels"), loss),
        "gen1_new_tokens": (
            ("pixel_values", "gen1_input_ids"),
            lambda: generate("gen1", pixels[:2]),
        ),
        "gen2_new_tokens": (
            ("pixel_values", "gen2_input_ids"),
            lambda: generate("gen2", pixels[:3]),
        ),
        "gen_text_new_tokens": (
            ("gen_text_input_ids",),
            lambda: generate("gen_text", np.zeros((0, 3, 1, 1))),
        ),
    }
    with jax.default_matmul_precision("highest"):
        return {
            name: np.asarray(compute())
            for name, (needs, compute) in jobs.items()
            if all(need in arrays for need in needs)
        }


def variant(module: nnx.Module, **changes) -> nnx.Module:
    """The same parameters under a changed config."""
    other = nnx.merge(*nnx.split(module))
    other.config = dataclasses.replace(module.config, **changes)
    return other


@dataclasses.dataclass(frozen=True)
class Difference:
    """One row of the comparison; `maximum` is None where shapes differ or the reference is not finite."""

    name: str
    shape: tuple[int, ...]
    maximum: float | None
    note: str = ""

    def passes(self, atol: float) -> bool:
        return self.maximum is not None and self.maximum <= atol


MASKS = {"llm_logits_mask_left_pos": "llm_mask_left", "logits": "attention_mask"}


def compare(
    outputs: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
) -> list[Difference]:
    """Largest absolute difference of every output the reference has; padded rows are compared where the mask is 1."""
    rows = []
    for name, value in outputs.items():
        if name not in reference:
            continue
        expected = reference[name]
        if value.shape != expected.shape:
            rows.append(
                Difference(name, value.shape, None, f"reference has shape {expected.shape}")
            )
            continue
        difference = np.abs(value.astype(np.float64) - expected)
        if name in MASKS:
            difference = difference[np.asarray(arrays[MASKS[name]]) == 1]
        maximum = float(difference.max(initial=0.0))
        rows.append(
            Difference(
                name,
                value.shape,
                maximum if np.isfinite(maximum) else None,
                "" if np.isfinite(maximum) else "not finite",
            )
        )
    return rows


def compare_checkpoints(
    one: RunFolder | TorchCheckpoint, other: RunFolder | TorchCheckpoint
) -> tuple[int, list[str]]:
    """Parameters of two opened checkpoints, of any kinds, bit for bit -> (how many are equal, what differs).

    One parameter is in memory at a time, two where both are run folders.
    """
    problems = [
        f"config: {field}: {getattr(one.config, field)} against {getattr(other.config, field)}"
        for field in ("vision", "projector", "decoder", "lvtc")
        if getattr(one.config, field) != getattr(other.config, field)
    ]
    if problems:
        return 0, problems
    abstract = abstract_model(one.config, dtype="float32")
    one.check(abstract)
    other.check(abstract)
    whole, parts = (one, other) if isinstance(other, TorchCheckpoint) else (other, one)
    equal = 0
    for path, array in whole.read_all(abstract.shapes):
        if array.dtype != parts.dtype(path):
            found = [f"{path}: {one.dtype(path)} against {other.dtype(path)}"]
        elif isinstance(parts, TorchCheckpoint):
            found = parts.differences(path, array)
        else:
            found = difference(path, np.asarray(array), parts.read(path))
        problems += found
        equal += not found
        del array  # before the next one is read
    return equal, problems


def format_table(rows: list[Difference], atol: float) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'array':{width}}  {'max |difference|':>16}  shape"]
    for row in rows:
        maximum = "-" if row.maximum is None else f"{row.maximum:.3g}"
        verdict = "ok" if row.passes(atol) else "FAIL"
        lines.append(
            f"{row.name:{width}}  {maximum:>16}  {list(row.shape)} {verdict} {row.note}".rstrip()
        )
    return "\n".join(lines)


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)
