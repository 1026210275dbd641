"""LVTC against a loop written from its definition.

Also upsampling, caches, gradients, config errors (design: lvtc.md 6).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lvtc_oracle import Oracle, Piece

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import (
    DecoderConfig,
    LvtcConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.projector_sites import released_site
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.batch import feature_index, short_layout, short_lengths
from internvlx_jax.models.generation import decode_step, for_decoding, greedy, prefill
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.lvtc import interpolation_matrix, upsample
from internvlx_jax.models.params import AbstractModel, abstract_model, flatten, unflatten

PLACEHOLDER, VOCABULARY, LAYERS = 7, 50, 4
TEXT, ROWS, BATCHES, POOL = (
    24,
    4,
    36,
    8,
)  # text slots a row, rows a batch, batches a case, different tiles
KINDS = ("text", "tile", "grid", "images", "packed", "empty")
run = jax.jit(lambda model, inputs: model(inputs))


def model_config(lvtc: LvtcConfig | None, patch_grid: int = 4) -> ModelConfig:
    """PVTC, the released projector, makes a token of 2 x 2 patches."""
    side = 14 * patch_grid
    return ModelConfig(
        vision=VisionConfig(width=16, layers=1, heads=2, mlp_width=32, image_size=side),
        decoder=DecoderConfig(
            vocab_size=VOCABULARY,
            width=32,
            layers=LAYERS,
            heads=4,
            kv_heads=2,
            head_dim=8,
            mlp_width=48,
        ),
        prompt=PromptConfig(tiles=TileConfig(tile_size=side)),
        lvtc=lvtc,
    )


class Case(NamedTuple):
    """One compiled shape: configuration and tile slots of a row."""

    config: ModelConfig
    tiles: int = 4

    @property
    def lvtc(self) -> LvtcConfig:
        return self.config.lvtc

    @property
    def lengths(self) -> tuple[int, int]:
        """Long and short layout, filled by a row of all its tiles and all its text."""
        return TEXT + self.tiles * self.lvtc.high_grid**2, TEXT + self.tiles * self.lvtc.low_grid**2


PAPER = LvtcConfig(expand_layer=2, low_grid=2, high_grid=4)
FAST = LvtcConfig(expand_layer=1, low_grid=1, high_grid=2, high_projector="pvtc", gate=None)
CASES = {
    "paper": Case(model_config(PAPER)),
    "paper_inject": Case(
        model_config(dataclasses.replace(PAPER, expand_layer=1, inject_layers=(2, 3)))
    ),
    "fast": Case(model_config(FAST)),
    "nearest_all_new": Case(
        model_config(
            LvtcConfig(
                expand_layer=1,
                low_grid=2,
                high_grid=4,
                low_projector="mlp",
                high_projector="pvtc",
                inject_projector="pvtc",
                inject_layers=(3,),
                upsample="nearest",
            )
        )
    ),
    "four_times": Case(
        model_config(LvtcConfig(expand_layer=3, low_grid=2, high_grid=8), patch_grid=8), tiles=2
    ),
    "no_shallow_part": Case(
        model_config(
            LvtcConfig(
                expand_layer=0, low_grid=1, high_grid=4, low_projector="mlp", inject_layers=(1, 2)
            )
        )
    ),
}


# Small projectors only, which compile quickly: for what does not depend on the kind of projector.
LEAN = Case(
    model_config(
        LvtcConfig(
            expand_layer=1, low_grid=2, high_grid=4, low_projector="mlp", inject_layers=(2, 3)
        )
    )
)


@functools.cache
def abstract(config: ModelConfig) -> AbstractModel:
    return abstract_model(config, dtype="float32")


def random_params(config: ModelConfig) -> dict[str, np.ndarray]:
    """Dotted path -> float32.

    No norm is neutral and no gate is closed; equal paths have equal values.
    """

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(list(path.encode()))
        near_one = path.endswith(("norm.weight", "gate", "norm1.weight", "norm2.weight"))
        return (rng.normal(1.0, 0.3, shape) if near_one else rng.normal(0.0, 0.15, shape)).astype(
            np.float32
        )

    return {path: draw(path, spec.shape) for path, spec in abstract(config).shapes.items()}


def build(config: ModelConfig, params: dict[str, np.ndarray]) -> InternVLX:
    return nnx.merge(abstract(config).graphdef, unflatten(jax.tree.map(jnp.asarray, params)))


def tile_pool(config: ModelConfig) -> np.ndarray:
    side = config.vision.image_size
    return np.random.default_rng(0).normal(size=(POOL, side, side, 3)).astype(np.float32)


class Segment(NamedTuple):
    """One sample: integers in `pieces` are tiles of the pool.

    `start` is its first slot in the row.
    """

    pieces: list[Piece]
    positions: np.ndarray
    start: int


def draw_pieces(rng: np.random.Generator, kind: str, tiles: int, text: int) -> list[Piece]:
    """At most `tiles` tiles and `text` text slots."""
    if kind == "text" or tiles == 0:
        images = []
    elif kind == "tile" or tiles < 2:
        images = [1]
    elif kind == "grid":
        images = [int(rng.integers(2, tiles + 1))]
    else:
        images = [1, int(rng.integers(1, tiles))]
    full = rng.random() < 0.3
    words = text if full else int(rng.integers(len(images) + 1, text + 1))
    # The first and the last text may be empty, so that a tile begins or ends the sample.
    cuts = sorted(rng.integers(0, words + 1, len(images)))
    pieces = []
    for first, last, image in zip([0, *cuts], [*cuts, words], [*images, 0]):
        pieces.append(rng.integers(8, VOCABULARY, last - first))
        pieces += [int(tile) for tile in rng.integers(0, POOL, image)]
    return pieces


def draw_row(rng: np.random.Generator, kind: str, case: Case) -> list[Segment]:
    """Samples somewhere in a row: at its left, its right or between padding."""
    if kind == "empty":
        return []
    parts = int(rng.integers(2, 4)) if kind == "packed" else 1
    samples = [
        draw_pieces(
            rng,
            str(rng.choice(KINDS[:4])) if kind == "packed" else kind,
            case.tiles // parts,
            TEXT // parts,
        )
        for _ in range(parts)
    ]
    widths = [width(pieces, case.lvtc.high_grid) for pieces in samples]
    slack = case.lengths[0] - sum(widths)
    start = int(rng.choice([0, slack, rng.integers(0, slack + 1)]))
    row = []
    for pieces, slots in zip(samples, widths):
        steps = rng.integers(1, 3, slots) if rng.random() < 0.3 else np.ones(slots, int)
        row.append(Segment(pieces, np.cumsum(steps) - steps[:1], start))
        start += slots
    return row


def width(pieces: list[Piece], grid: int) -> int:
    return sum(grid**2 if isinstance(piece, int) else len(piece) for piece in pieces)


def tiles_of(row: list[Segment]) -> list[int]:
    return [piece for segment in row for piece in segment.pieces if isinstance(piece, int)]


class Layout(NamedTuple):
    inputs: Inputs
    tile_start: np.ndarray


def lay_out(
    rng: np.random.Generator,
    rows: list[list[Segment]],
    case: Case,
    pool: np.ndarray,
    lengths: tuple[int, int] | None = None,
) -> Layout:
    """Rows in the form that the model reads.

    Tiles stand in any slots, in order; the other slots hold noise.
    """
    long, short = lengths or case.lengths
    lvtc = case.lvtc
    tokens, positions, segments = (np.zeros((len(rows), long), np.int32) for _ in range(3))
    tiles = rng.normal(0, 100, (len(rows), case.tiles, *pool.shape[1:])).astype(np.float32)
    tile_start = np.full((len(rows), case.tiles), long, np.int32)
    for b, row in enumerate(rows):
        free = iter(sorted(rng.permutation(case.tiles)[: len(tiles_of(row))]))
        for number, segment in enumerate(row, start=1):
            slot = segment.start
            for piece in segment.pieces:
                if isinstance(piece, int):
                    t = next(free)
                    tiles[b, t], tile_start[b, t] = pool[piece], slot
                    piece = np.full(lvtc.high_grid**2, PLACEHOLDER)
                tokens[b, slot : slot + len(piece)] = piece
                slot += len(piece)
            positions[b, segment.start : slot] = segment.positions
            segments[b, segment.start : slot] = number
    inputs = Inputs(
        tokens,
        positions,
        segments,
        tiles,
        feature_index(tile_start, long, lvtc.high_grid**2),
        short_layout(segments, tile_start, short, lvtc),
    )
    return Layout(inputs, tile_start)


def draw_batches(case: Case, batches: int, seed: int = 0):
    """Mixed rows; every kind comes equally often."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.resize(KINDS, batches * ROWS)).reshape(batches, ROWS)
    pool = tile_pool(case.config)
    for names in kinds:
        rows = [draw_row(rng, str(kind), case) for kind in names]
        yield rows, lay_out(rng, rows, case, pool)


# The definition


@pytest.mark.parametrize("name", CASES)
def test_mixed_batches_equal_the_loop_over_samples(name):
    """Hidden states of every real slot, on BATCHES batches a case through one executable."""
    case = CASES[name]
    params = random_params(case.config)
    model = build(case.config, params)
    features = jax.jit(lambda model, tiles: model.features(tiles))(model, tile_pool(case.config))
    oracle = Oracle(case.config, params, np.asarray(features))
    for rows, layout in draw_batches(case, BATCHES):
        ours = np.asarray(run(model, layout.inputs))
        assert np.isfinite(ours).all()
        for b, row in enumerate(rows):
            for segment in row:
                expected = oracle.hidden(segment.pieces, segment.positions)
                np.testing.assert_allclose(
                    ours[b, segment.start : segment.start + len(expected)],
                    expected,
                    rtol=0,
                    atol=1e-5 * np.abs(expected).max(),
                )


def loop_plan(
    row: list[Segment], tile_start: np.ndarray, case: Case
) -> tuple[list[np.ndarray], int]:
    """The four arrays of one row's short layout, slot by slot, and the slots it fills."""
    lvtc, (long, short) = case.lvtc, case.lengths
    to_long, to_short = np.full(short, long), np.full(long, short)
    start, feature = np.full(case.tiles, short), np.full(short, case.tiles * lvtc.low_grid**2)
    s = 0
    for segment in row:
        slot = segment.start
        for piece in segment.pieces:
            if isinstance(piece, int):
                tile = list(tile_start).index(slot)
                start[tile] = s
                for y in range(lvtc.high_grid):
                    for x in range(lvtc.high_grid):
                        a, b = y // lvtc.scale, x // lvtc.scale
                        parent = s + a * lvtc.low_grid + b
                        to_short[slot] = parent
                        if (y, x) == (a * lvtc.scale, b * lvtc.scale):
                            to_long[parent] = slot
                            feature[parent] = tile * lvtc.low_grid**2 + a * lvtc.low_grid + b
                        slot += 1
                s += lvtc.low_grid**2
                continue
            for _ in piece:
                to_long[s], to_short[slot] = slot, s
                s, slot = s + 1, slot + 1
    return [to_long, to_short, start, feature], s


@pytest.mark.parametrize("name", CASES)
def test_index_plan_equals_the_loop_over_slots(name):
    case = CASES[name]
    for rows, layout in draw_batches(case, BATCHES):
        lengths = short_lengths(layout.inputs.segment_ids, layout.tile_start, case.lvtc)
        for b, row in enumerate(rows):
            plan, filled = loop_plan(row, layout.tile_start[b], case)
            assert lengths[b] == filled
            for ours, expected, field in zip(
                layout.inputs.short, plan, layout.inputs.short._fields
            ):
                assert ours.dtype == np.int32
                np.testing.assert_array_equal(ours[b], expected, err_msg=field)


def test_a_short_frame_that_is_too_short_is_named():
    segments, tile_start = np.ones((2, 20), np.int32), np.array([[20], [3]], np.int32)
    assert list(short_lengths(segments, tile_start, PAPER)) == [20, 8]
    with pytest.raises(ValueError, match="row 0 needs 20 slots in the short layout, which has 19"):
        short_layout(segments, tile_start, 19, PAPER)


def test_a_bucket_without_tiles_equals_the_model_without_lvtc():
    case = Case(CASES["paper_inject"].config, tiles=0)
    rng = np.random.default_rng(0)
    layout = lay_out(
        rng, [draw_row(rng, "text", case) for _ in range(ROWS)], case, tile_pool(case.config)
    )
    lvtc, plain = both_models(case.config)
    real = layout.inputs.segment_ids > 0
    np.testing.assert_allclose(
        np.asarray(run(lvtc, layout.inputs))[real],
        np.asarray(run(plain, layout.inputs._replace(short=None)))[real],
        atol=1e-5,
        rtol=0,
    )


def both_models(config: ModelConfig, **replaced: np.ndarray) -> tuple[InternVLX, InternVLX]:
    """The model with and without LVTC, of the same weights."""
    plain = dataclasses.replace(config, lvtc=None)
    return build(config, random_params(config) | replaced), build(plain, random_params(plain))


@pytest.mark.parametrize("expand_layer", range(LAYERS))
def test_without_compression_and_residual_it_is_the_plain_model(expand_layer):
    """Equal grids and a closed gate: bit for bit, wherever the layers are cut."""
    case = Case(model_config(LvtcConfig(expand_layer=expand_layer, low_grid=2, high_grid=2)))
    rng = np.random.default_rng(0)
    # Right-padded: the short layout has no gaps, so both frames hold everything in the same slots.
    rows = [
        [segment._replace(start=0) for segment in draw_row(rng, kind, case)]
        for kind in ("images", "grid", "text")
    ]
    inputs = lay_out(rng, rows, case, tile_pool(case.config)).inputs
    lvtc, plain = both_models(case.config, **{"lvtc.high.gate": np.float32(0)})
    real = inputs.segment_ids > 0
    np.testing.assert_array_equal(
        np.asarray(run(lvtc, inputs))[real],
        np.asarray(run(plain, inputs._replace(short=None)))[real],
    )


# Upsampling


@pytest.mark.parametrize("low, high", [(1, 4), (2, 2), (2, 4), (2, 16), (16, 32)])
def test_bilinear_is_resize_of_jax(low, high):
    x = np.random.default_rng(0).normal(size=(2, low, low, 3)).astype(np.float32)
    ours = upsample(
        jnp.asarray(x.reshape(2, low * low, 3)),
        LvtcConfig(expand_layer=1, low_grid=low, high_grid=high),
    )
    expected = jax.image.resize(x, (2, high, high, 3), "linear")
    np.testing.assert_allclose(ours.reshape(expected.shape), expected, atol=1e-6)


def test_nearest_copies_the_parent_bit_for_bit():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    ours = upsample(
        jnp.asarray(x.reshape(2, 16, 3)),
        LvtcConfig(expand_layer=1, low_grid=4, high_grid=16, upsample="nearest"),
    )
    np.testing.assert_array_equal(ours.reshape(2, 16, 16, 3), x.repeat(4, axis=1).repeat(4, axis=2))


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_interpolation_keeps_a_constant(method):
    matrix = interpolation_matrix(4, 16, method)
    assert matrix.shape == (16, 4) and (matrix >= 0).all()
    np.testing.assert_array_equal(matrix.sum(axis=1), 1)


# Generation


def prompts(case: Case) -> list[list[Piece]]:
    rng = np.random.default_rng(1)
    return [draw_pieces(rng, kind, case.tiles, TEXT) for kind in ("images", "text", "grid", "tile")]


def padded_prompts(case: Case) -> Layout:
    """One prompt a row, of different lengths and padded on either side."""
    rows = []
    for b, pieces in enumerate(prompts(case)):
        slots = width(pieces, case.lvtc.high_grid)
        rows.append([Segment(pieces, np.arange(slots), case.lengths[0] - slots if b % 2 else 0)])
    return lay_out(np.random.default_rng(2), rows, case, tile_pool(case.config))


def full_logits(model: InternVLX, case: Case, answers: np.ndarray) -> np.ndarray:
    """One forward of prompts and answers -> [B, new + 1, W]: behind the prompt and behind each new
    token. By causality that is what a forward after every step would give.
    """
    new, rows, last = answers.shape[1], [], []
    for pieces, answer in zip(prompts(case), answers):
        slots = width(pieces, case.lvtc.high_grid)
        rows.append([Segment([*pieces, answer], np.arange(slots + new), 0)])
        last.append(slots - 1)
    lengths = (case.lengths[0] + new, case.lengths[1] + new)
    inputs = lay_out(np.random.default_rng(3), rows, case, tile_pool(case.config), lengths).inputs
    logits = np.asarray(
        jax.jit(lambda model, inputs: model.decoder.logits(model(inputs)))(model, inputs)
    )
    return np.stack([row[first : first + new + 1] for row, first in zip(logits, last)])


def test_prefill_and_cached_steps_equal_the_full_forward():
    case, new = LEAN, 5
    model, layout = build(case.config, random_params(case.config)), padded_prompts(case)
    rows = len(layout.tile_start)
    assert len({width(pieces, case.lvtc.high_grid) for pieces in prompts(case)}) == rows
    answers = np.random.default_rng(0).integers(8, VOCABULARY, (rows, new))
    expected = full_logits(model, case, answers)
    cache, logits = jax.jit(prefill, static_argnums=2)(model, layout.inputs, new)

    (long, short), decoder = case.lengths, case.config.decoder
    shallow = case.lvtc.expand_layer
    for frame, layers, slots in zip(
        cache.ranges, (shallow, LAYERS - shallow), (short, long), strict=True
    ):
        shape = (layers, rows, slots + new, decoder.kv_heads, decoder.head_dim)
        assert frame.kv.keys.shape == frame.kv.values.shape == shape
        assert frame.segments.shape == shape[1:3] and int(frame.slot) == slots
    filled = short_lengths(layout.inputs.segment_ids, layout.tile_start, case.lvtc)
    np.testing.assert_array_equal(cache.ranges[0].segments.sum(axis=1), filled)

    step, tolerance = jax.jit(decode_step), 1e-5 * np.abs(expected).max()
    for t in range(new):
        np.testing.assert_allclose(
            logits, expected[:, t], atol=tolerance, rtol=0, err_msg=f"before token {t}"
        )
        cache, logits = step(model, cache, jnp.asarray(answers[:, t], jnp.int32))
    np.testing.assert_allclose(logits, expected[:, new], atol=tolerance, rtol=0)


def test_greedy_writes_what_the_full_forward_prefers():
    """Without a shallow part, whose cache then holds no layer; stacked layers and separate ones."""
    case, new = CASES["no_shallow_part"], 5
    model = build(case.config, random_params(case.config))
    decode = jax.jit(
        lambda model, inputs: greedy(model, inputs, max_new_tokens=new, stop_ids=(), pad_id=0)
    )
    prompts = padded_prompts(case).inputs
    tokens, steps = decode(model, prompts)
    assert int(steps) == new
    preferred = full_logits(model, case, np.asarray(tokens)).argmax(axis=-1)
    np.testing.assert_array_equal(tokens, preferred[:, :new])
    separate = for_decoding(model)
    assert separate.decoder.layers is not model.decoder.layers
    np.testing.assert_array_equal(decode(separate, prompts)[0], tokens)


# Gradients and masked tiles


def test_gradients_and_masked_tiles():
    """Every added parameter learns.

    A masked tile slot contributes exactly nothing, whatever it holds.
    """
    graphdef, params = abstract(LEAN.config).graphdef, unflatten(random_params(LEAN.config))
    ((_, layout),) = draw_batches(LEAN, 1)
    unused = layout.tile_start == LEAN.lengths[0]
    assert unused.any() and not unused.all()
    real = layout.inputs.segment_ids[..., None] > 0
    weight = (
        np.random.default_rng(0).normal(size=(*real.shape[:2], LEAN.config.decoder.width)) * real
    )

    @jax.jit
    def gradients(lvtc, tiles):
        def total(lvtc, tiles):
            model = nnx.merge(graphdef, params | {"lvtc": lvtc})
            return jnp.sum(model(layout.inputs._replace(tiles=tiles)) * weight)

        value, (of_lvtc, of_tiles) = jax.value_and_grad(total, argnums=(0, 1))(lvtc, tiles)
        return value, flatten(of_lvtc), of_tiles

    value, of_lvtc, of_tiles = gradients(params["lvtc"], layout.inputs.tiles)
    gates = {"high.gate", "inject_2.gate", "inject_3.gate"}
    assert gates < of_lvtc.keys() and all(gradient.any() for gradient in of_lvtc.values())

    np.testing.assert_array_equal(of_tiles.any(axis=(2, 3, 4)), ~unused)
    other_noise = np.where(
        unused[..., None, None, None], 3 - layout.inputs.tiles, layout.inputs.tiles
    )
    other_value, of_lvtc_again, _ = gradients(params["lvtc"], other_noise)
    assert other_value == value
    jax.tree.map(np.testing.assert_array_equal, of_lvtc_again, of_lvtc)

    # The start of training: closed gates hide their projectors, which learn nothing until the gates
    # have opened.
    closed = unflatten(flatten(params["lvtc"]) | dict.fromkeys(gates, np.float32(0)))
    _, at_start, _ = gradients(closed, layout.inputs.tiles)
    assert all(
        at_start[path].any() == (path in gates) for path in at_start if not path.startswith("low.")
    )


# Configs


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"expand_layer": 4}, r"lvtc\.expand_layer 4 is outside 0\.\.3 of a decoder with 4 layers"),
        ({"expand_layer": -1}, r"lvtc\.expand_layer is -1, it must be at least 0"),
        ({"low_grid": 3}, r"lvtc\.low_grid 3 is not a power of two"),
        ({"high_grid": 6}, r"lvtc\.high_grid 6 is not a power of two"),
        ({"low_grid": 0}, r"lvtc\.low_grid is 0, it must be at least 1"),
        ({"low_grid": 4, "high_grid": 2}, r"lvtc\.low_grid 4 does not divide lvtc\.high_grid 2"),
        ({"high_grid": 8}, r"lvtc\.high_grid 8 does not divide the patch grid of side 4"),
        (
            {"inject_layers": (4,)},
            r"lvtc\.inject_layers \[4\] go beyond layer 3, .* decoder with 4 layers",
        ),
        (
            {"inject_layers": (2,)},
            r"lvtc\.inject_layers \[2\] are not increasing layers behind lvtc\.expand_layer 2",
        ),
        (
            {"inject_layers": (3, 3)},
            r"lvtc\.inject_layers \[3, 3\] are not increasing layers behind",
        ),
    ],
)
def test_config_errors_state_both_sides(changes, message):
    with pytest.raises(ConfigError, match=message):
        model_config(dataclasses.replace(PAPER, **changes))


def test_the_baseline_projector_has_no_lvtc():
    with pytest.raises(ConfigError, match="lvtc needs projector.kind pvtc, it is mlp1"):
        dataclasses.replace(model_config(PAPER), projector=ProjectorConfig(kind="mlp1"))


@pytest.mark.parametrize(
    "lvtc, role",
    [
        (PAPER, "low"),
        (FAST, "high"),
        (CASES["nearest_all_new"].lvtc, None),
        (LvtcConfig(expand_layer=1, low_grid=2, high_grid=2, high_projector="pvtc"), "low"),
    ],
)
def test_the_released_projector_has_one_place(lvtc, role):
    """A checkpoint has one PVTC of the model's own token grid: layer 0 takes it first."""
    config = model_config(lvtc)
    paths = abstract(config).shapes
    site = released_site(config)
    assert (site and site.name) == role
    assert any(path.startswith("projector.") for path in paths) == (role is not None)
    assert any(path.startswith("lvtc.low.") for path in paths) == (role != "low")
    assert any(path.startswith("lvtc.high.projector.") for path in paths) == (role != "high")
