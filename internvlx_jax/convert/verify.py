"""Runs a loaded checkpoint on stored arrays and compares with stored results (design: model.md 15).

Inputs and outputs are named as in tests/golden/*/{inputs,outputs}.npz.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvlx_jax.checkpoints.checkpoint import Checkpoint
from internvlx_jax.checkpoints.torch_checkpoint import TorchCheckpoint
from internvlx_jax.core.files import written_aside
from internvlx_jax.core.inputs import IGNORED, Inputs
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.data.batch import feature_index, short_layout, short_lengths
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
    """Puts flat tiles into the rows that their placeholders stand in.

    Args:
        config: the model.
        image_token_id: id of the placeholder.
        input_ids: int[B, S].
        tiles: float32[I, 3, Y, X], in the order of their placeholders over the batch.
        mask: int[B, S], 1 for tokens; None is all ones.
        positions: int[B, S]; None counts from 0.

    Raises:
        InputsError: placeholders and tiles do not match.
    """
    rows, length = input_ids.shape
    per_tile = config.tokens_per_tile
    counts = (input_ids == image_token_id).sum(axis=1)
    if (counts % per_tile).any() or counts.sum() != len(tiles) * per_tile:
        raise InputsError(
            f"input_ids: rows hold {counts.tolist()} placeholders (id {image_token_id}); "
            f"{len(tiles)} tiles of {per_tile} tokens are given. Check --image_token_id and the "
            "tiles"
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
        np.asarray(input_ids, np.int32),
        np.asarray(positions, np.int32),
        np.asarray(mask, np.int32),
        row_tiles,
        feature_index(tile_start, length, per_tile),
        short,
    )


def compute_outputs(
    model: InternVLX, arrays: Mapping[str, np.ndarray], image_token_id: int
) -> dict[str, np.ndarray]:
    """Computes every output whose inputs are present, in float32 at the highest matmul precision.

    Args:
        model: float32 parameters.
        arrays: inputs by name.
        image_token_id: id of the image placeholder.

    Raises:
        InputsError: an input does not fit the model.
    """
    # The release runs past max_positions without being asked to; here that takes a flag.
    decoder = model.decoder.config
    rope = dataclasses.replace(decoder.rope, allow_longer=True)
    model = nnx.merge(*nnx.split(model))
    model.decoder.config = dataclasses.replace(decoder, rope=rope)
    run = _Outputs(model, arrays, image_token_id)
    with jax.default_matmul_precision("highest"):
        return {
            name: np.asarray(compute(run))
            for name, (needs, compute) in OUTPUTS.items()
            if all(need in arrays for need in needs)
        }


class _Outputs:
    """The outputs of one model on one set of arrays; each method computes one on demand."""

    def __init__(self, model: InternVLX, arrays: Mapping[str, np.ndarray], image_token_id: int):
        self._model, self._arrays, self._image_token_id = model, arrays, image_token_id
        self._config: ModelConfig = model.config

    def tower(self) -> jax.Array:
        vision = variant(self._model.vision, select_layer=-1)
        return jax.jit(lambda vision, x: vision(x))(vision, self._pixels_last())

    def features(self) -> jax.Array:
        z = jax.jit(lambda model, x: model.encode_tiles(x))(self._model, self._pixels_last())
        return self._as_grid(z)

    def projector_v2(self) -> jax.Array:
        projector = variant(self._model.projector, pixel_shuffle="v2")
        z = jax.jit(lambda projector, x: projector(x))(projector, self._arrays["proj_in"])
        return self._as_grid(z)

    def decoder(self, mask: str | None = None, positions: str | None = None) -> jax.Array:
        size = self._config.vision.image_size
        inputs = inputs_from_flat(
            self._config,
            -1,
            self._arrays["llm_input_ids"],
            np.zeros((0, 3, size, size), np.float32),
            None if mask is None else self._arrays[mask],
            None if positions is None else self._arrays[positions],
        )
        return self._logits(inputs)

    def logits(self) -> jax.Array:
        return self._logits(self._batch())

    def loss(self) -> jax.Array:
        labels = np.asarray(self._arrays["labels"], np.int32)

        def compute(model, inputs, labels):
            ce, _ = token_losses(model.decoder, model(inputs), labels)
            total, weight = weighted_loss(ce, (labels != IGNORED).astype(jnp.float32))
            return total / weight

        return jax.jit(compute)(self._model, self._batch(), labels)

    def generate(self, name: str, tiles: int) -> np.ndarray:
        """Decodes greedily after the prompt `name`, whose images are the first `tiles` tiles."""
        ids = self._arrays[f"{name}_input_ids"]
        mask = self._arrays.get(f"{name}_attention_mask", np.ones_like(ids))
        positions = np.where(mask == 1, mask.cumsum(axis=1) - 1, 1)
        pixels = self._arrays["pixel_values"][:tiles] if tiles else np.zeros((0, 3, 1, 1))
        inputs = inputs_from_flat(self._config, self._image_token_id, ids, pixels, mask, positions)
        prompt = self._config.prompt
        tokens, steps = jax.jit(greedy, static_argnames=("max_new_tokens", "stop_ids", "pad_id"))(
            self._model,
            inputs,
            max_new_tokens=NEW_TOKENS,
            stop_ids=prompt.eos_ids,
            pad_id=prompt.pad_id,
        )
        return np.asarray(tokens, np.int64)[:, : int(steps)]

    def _batch(self) -> Inputs:
        """The rows of `input_ids` with the tiles whose image flag is 1."""
        pixels = self._arrays["pixel_values"]
        flags = self._arrays.get("image_flags", np.ones(len(pixels)))
        used = pixels[np.asarray(flags).reshape(-1) == 1]
        ids, mask = self._arrays["input_ids"], self._arrays["attention_mask"]
        return inputs_from_flat(self._config, self._image_token_id, ids, used, mask)

    def _logits(self, inputs: Inputs) -> jax.Array:
        return jax.jit(lambda model, inputs: model.decoder.logits(model(inputs)))(
            self._model, inputs
        )

    def _pixels_last(self) -> np.ndarray:
        return self._arrays["pixel_values"].transpose(0, 2, 3, 1)

    def _as_grid(self, z: jax.Array) -> jax.Array:
        grid = self._config.token_grid
        return z.reshape(len(z), grid, grid, -1)


# Output -> the inputs it needs, how it is computed.
OUTPUTS: Mapping[str, tuple[tuple[str, ...], Callable[[_Outputs], jax.Array | np.ndarray]]] = {
    "vit_last_hidden_state": (("pixel_values",), _Outputs.tower),
    "extract_feature": (("pixel_values",), _Outputs.features),
    "proj_out_v2": (("proj_in",), _Outputs.projector_v2),
    "llm_logits": (("llm_input_ids",), _Outputs.decoder),
    "llm_logits_mask_left_pos": (
        ("llm_input_ids", "llm_mask_left", "llm_position_ids_left"),
        lambda run: run.decoder("llm_mask_left", "llm_position_ids_left"),
    ),
    "logits": (("pixel_values", "input_ids", "attention_mask"), _Outputs.logits),
    "loss": (("pixel_values", "input_ids", "attention_mask", "labels"), _Outputs.loss),
    "gen1_new_tokens": (
        ("pixel_values", "gen1_input_ids"),
        lambda run: run.generate("gen1", tiles=2),
    ),
    "gen2_new_tokens": (
        ("pixel_values", "gen2_input_ids"),
        lambda run: run.generate("gen2", tiles=3),
    ),
    "gen_text_new_tokens": (
        ("gen_text_input_ids",),
        lambda run: run.generate("gen_text", tiles=0),
    ),
}


def variant(module: Any, **changes: Any) -> Any:
    """Returns a module with the same parameters and some fields of its config changed."""
    other = nnx.merge(*nnx.split(module))
    other.config = dataclasses.replace(module.config, **changes)
    return other


@dataclasses.dataclass(frozen=True)
class Difference:
    """One row of the comparison.

    Attributes:
        name: the output.
        shape: its shape.
        maximum: largest absolute difference; None where shapes differ or a value is not finite.
        note: why `maximum` is None.
    """

    name: str
    shape: tuple[int, ...]
    maximum: float | None
    note: str = ""

    def passes(self, atol: float) -> bool:
        """Whether the largest difference is within `atol`."""
        return self.maximum is not None and self.maximum <= atol


MASKS = {"llm_logits_mask_left_pos": "llm_mask_left", "logits": "attention_mask"}


def compare(
    outputs: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
) -> list[Difference]:
    """Finds the largest absolute difference of every output that the reference has.

    Args:
        outputs: computed arrays by name.
        reference: expected arrays by name.
        arrays: the inputs, whose masks say which tokens are compared.
    """
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


def compare_checkpoints(one: Checkpoint, other: Checkpoint) -> tuple[int, list[str]]:
    """Compares the parameters of two opened checkpoints, of any kinds, bit for bit.

    One parameter is in memory at a time, two where both are run folders.

    Returns:
        How many parameters are equal, and what differs.

    Raises:
        CheckpointError: a checkpoint does not fit its config.
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
    # PyTorch checkpoints compare layer by layer, so the other one is read whole.
    whole, parts = (one, other) if isinstance(other, TorchCheckpoint) else (other, one)
    equal = 0
    for path, array in whole.read_all(abstract.shapes):
        if array.dtype != parts.dtype(path):
            found = [f"{path}: {one.dtype(path)} against {other.dtype(path)}"]
        else:
            found = parts.differences(path, array)
        problems += found
        equal += not found
        del array  # before the next one is read
    return equal, problems


def format_table(rows: list[Difference], atol: float) -> str:
    """Returns the comparison as text, one line per output, with a verdict."""
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
    """Writes arrays to an npz file, aside and then renamed, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(arrays))
