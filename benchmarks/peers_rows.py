"""The rows of benchmarks/peers.py: what is run on both sides, at which shapes."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from gpu_shared import packed, random_params, toy_model
from gpu_torch import arrays_of, model_of
from PIL import Image

from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.model_config import ModelConfig, ProjectorConfig
from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.images import load_image
from internvlx_jax.data.tiles import choose_grid, cut_tiles
from internvlx_jax.models.generation import (
    Vocabulary,
    advance,
    for_decoding,
    prefill,
    row_keys,
    start,
)
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.params import abstract_model, unflatten
from internvlx_jax.training.step import loss_and_grads

PARTS = ("tower", "prefill", "decode", "weights", "train", "images", "answers")
TARGETS = {"bfloat16": 0.9, "float32": 0.7}
VOCABULARY = Vocabulary(stop_ids=(), pad_id=2, bos_id=1)
Side = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        part, name, dtype: What is compared.
        target: The largest ratio that it should have; None without one.
        ours, theirs: Run one side to its end.
        calls: What one run is divided by, such as the tokens of a decoding run.
    """

    part: str
    name: str
    dtype: str
    target: float | None
    ours: Side
    theirs: Side
    calls: int = 1


@dataclasses.dataclass(frozen=True)
class Size:
    """Holds the shapes of a measurement.

    Attributes:
        model: Of all parts but the training and the answers.
        trained: Of the training: gradients need the memory of the weights once more.
        answering: Of the answers.
        tiles: Numbers of tiles for the tower.
        prompts: Text tokens of the prefill.
        behind: Text tokens before the decoded ones.
        batches: Rows that decode together.
        new_tokens: Decoded per row.
        training: Tiles and text tokens of a training row.
        image: Width and height of the images.
        questions: Number of questions.
        rounds: Of each row.
    """

    model: ModelConfig
    trained: ModelConfig
    answering: ModelConfig
    tiles: tuple[int, ...]
    prompts: tuple[int, ...]
    behind: int
    batches: tuple[int, ...]
    new_tokens: int
    training: tuple[int, int]
    image: tuple[int, int]
    questions: int
    rounds: int


def _shaped(base: ModelConfig, *, layers: int, words: int, **widths: Any) -> ModelConfig:
    """Returns a model with the two-layer projector and fewer layers and words."""
    vision = dict(layers=layers, **widths.get("vision", {}))
    decoder = dict(layers=layers, vocab_size=words, **widths.get("decoder", {}))
    return dataclasses.replace(
        base,
        projector=ProjectorConfig(kind="mlp1"),
        vision=dataclasses.replace(base.vision, **vision),
        decoder=dataclasses.replace(base.decoder, **decoder),
        prompt=dataclasses.replace(base.prompt, **widths.get("prompt", {})),
    )


SIZES = {
    "full": Size(
        _shaped(internvlx_2b(), layers=4, words=32768),
        _shaped(internvlx_2b(), layers=2, words=8192),
        _shaped(
            internvlx_2b(),
            layers=4,
            words=655,
            vision=dict(width=256, heads=4, mlp_width=1024, image_size=224),
            decoder=dict(width=512, heads=8, kv_heads=4, head_dim=64, mlp_width=1536),
            prompt=dict(tiles=TileConfig(tile_size=224, rule="off")),
        ),
        tiles=(1, 7),
        prompts=(300, 1800),
        behind=256,
        batches=(1, 8),
        new_tokens=16,
        training=(1, 256),
        image=(1280, 960),
        questions=48,
        rounds=3,
    ),
    "quick": Size(
        *[_shaped(toy_model(), layers=1, words=655)] * 3,
        tiles=(1,),
        prompts=(24,),
        behind=12,
        batches=(1,),
        new_tokens=4,
        training=(1, 12),
        image=(200, 120),
        questions=2,
        rounds=1,
    ),
}


def device() -> str:
    """Returns PyTorch's name of the device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def waits(run: Side) -> Side:
    """Makes PyTorch's side wait for its device, without gradients."""

    @torch.inference_mode()
    def side():
        result = run()
        if device() == "cuda":
            torch.cuda.synchronize()
        return result

    return side


class Models:
    """One model of ours and one of transformers, of the same shape, with random weights."""

    def __init__(self, config: ModelConfig, dtype: str, *, decoding: bool = True):
        self.config, self.dtype = config, dtype
        abstract = abstract_model(config, dtype=dtype, param_dtype=dtype)
        model = nnx.merge(
            abstract.graphdef, unflatten(random_params(abstract.shapes, abstract.inits))
        )
        self.ours: InternVLX = for_decoding(model) if decoding else model
        with torch.device(device()):
            self.theirs = model_of(config).to(getattr(torch, dtype)).eval()

    def ids(self, rows: int, length: int) -> np.ndarray:
        """Returns random tokens, int64[rows, length]."""
        words = self.config.decoder.vocab_size
        return np.random.default_rng(0).integers(3, words, (rows, length))


@functools.lru_cache(maxsize=1)
def models(config: ModelConfig, dtype: str) -> Models:
    """Keeps the newest pair of models only."""
    return Models(config, dtype)


def ours(function: Callable[..., Any], *args: Any) -> Side:
    """Compiles a function of arrays, and returns what runs it to its end."""
    program = jax.jit(function).lower(*args).compile()
    placed = jax.device_put(args)
    return lambda: jax.block_until_ready(program(*placed))


def rows_of(part: str, dtype: str, size: Size) -> Iterator[Callable[[], Row]]:
    """Yields what makes each row of a part; models are made when a row is."""
    cases: dict[str, tuple[Callable[..., Row], tuple[Any, ...]]] = {
        "tower": (tower, size.tiles),
        "prefill": (prefilled, size.prompts),
        "decode": (decoded, size.batches),
        "weights": (weights, (1,)),
        "train": (trained, ("none", "full")),
        # These do not depend on the dtype, or are told in the default one.
        "images": (images, (None,) if dtype == "bfloat16" else ()),
        "answers": (answers, (size.questions,)),
    }
    make, values = cases[part]
    for value in values:
        yield functools.partial(make, dtype, size, value)


def tower(dtype: str, size: Size, tiles: int) -> Row:
    """Compares the vision tower on normalized tiles."""
    pair, edge = models(size.model, dtype), size.model.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((tiles, edge, edge, 3)).astype(np.float32)
    theirs = torch.as_tensor(pixels.transpose(0, 3, 1, 2).copy(), device=device())
    theirs = theirs.to(getattr(torch, dtype))
    run = ours(lambda model, x: model.features(x), pair.ours, jnp.asarray(pixels, dtype))
    tower_of = pair.theirs.model.vision_tower
    name = f"{tiles} tiles of {edge}, {size.model.vision.layers} layers"
    return Row("tower", name, dtype, TARGETS[dtype], run, waits(lambda: tower_of(theirs)))


def prefilled(dtype: str, size: Size, length: int) -> Row:
    """Compares the forward pass of a text that leaves its keys and values."""
    pair = models(size.model, dtype)
    inputs = packed(size.model, [(0, length)], 1).batch.inputs
    ids = torch.as_tensor(pair.ids(1, length), device=device())

    def theirs():
        made = pair.theirs.model.language_model(ids, use_cache=True)
        return pair.theirs.lm_head(made.last_hidden_state[:, -1])

    run = ours(lambda model, inputs: prefill(model, inputs, 1), pair.ours, inputs)
    name = f"{length} tokens, {size.model.decoder.layers} layers"
    return Row("prefill", name, dtype, TARGETS[dtype], run, waits(theirs))


def _decoding(pair: Models, size: Size, rows: int) -> Side:
    """Returns what decodes `new_tokens` - 1 tokens, each time from the same state."""
    inputs = packed(size.model, [(0, size.behind)], rows).batch.inputs
    options: dict[str, Any] = dict(sampling=Sampling(), vocabulary=VOCABULARY)

    def begin(model, inputs):
        keys = row_keys(0, jnp.arange(rows))
        return start(model, inputs, keys, 0, max_new_tokens=size.new_tokens, **options)

    state = jax.jit(begin)(pair.ours, inputs)
    return ours(
        lambda model, state: advance(model, state, size.new_tokens, 0, **options),
        pair.ours,
        state,
    )


def decoded(dtype: str, size: Size, rows: int) -> Row:
    """Compares greedy decoding behind a prompt, per token."""
    pair = models(size.model, dtype)
    ids = torch.as_tensor(pair.ids(rows, size.behind), device=device())
    with torch.inference_mode():
        made = pair.theirs.model.language_model(ids, use_cache=True)
    cache, first = made.past_key_values, ids[:, :1]

    def theirs():
        token = first
        for _ in range(size.new_tokens - 1):
            step = pair.theirs.model.language_model(token, past_key_values=cache, use_cache=True)
            token = pair.theirs.lm_head(step.last_hidden_state).argmax(-1)
        cache.crop(1 - size.new_tokens)
        return token.cpu()

    name = f"batch {rows} behind {size.behind}, {size.model.decoder.layers} layers"
    run, calls = _decoding(pair, size, rows), size.new_tokens - 1
    return Row("decode", name, dtype, TARGETS[dtype], run, waits(theirs), calls)


def weights(dtype: str, size: Size, rows: int) -> Row:
    """Compares a decoding step at batch 1 with reading its weights."""
    pair = models(size.model, dtype)
    decoder = pair.ours.decoder
    assert decoder.head is not None
    read = [*jax.tree.leaves(nnx.state(decoder.layers)), decoder.head[...]]
    name = f"{sum(leaf.nbytes for leaf in read) / 2**20:.0f} MiB, batch {rows}"
    calls = size.new_tokens - 1
    once = _reading(read)

    def theirs():
        for _ in range(calls):
            once()

    return Row("weights", name, dtype, 1.2, _decoding(pair, size, rows), theirs, calls)


def _reading(arrays: list[jax.Array]) -> Side:
    """Returns what reads arrays once, as fast as the device lets it."""
    if jax.default_backend() != "cpu":
        return ours(lambda arrays: [jnp.sum(array) for array in arrays], arrays)
    # XLA's sum is slow on a CPU; NumPy's exclusive or is not, and each thread has its part.
    words = [np.asarray(array).reshape(-1).view(np.uint8) for array in arrays]
    words = [each[: each.size // 8 * 8].view(np.uint64) for each in words]
    count = torch.get_num_threads()
    threads = ThreadPoolExecutor(count)
    parts = [part for each in words for part in np.array_split(each, count)]
    return lambda: list(threads.map(np.bitwise_xor.reduce, parts))


def trained(dtype: str, size: Size, remat: str) -> Row:
    """Compares loss and gradients of all parameters."""
    models.cache_clear()
    config = size.trained
    rows = packed(config, [size.training], 1)
    abstract = abstract_model(config, dtype=dtype, remat=remat)
    params = random_params(abstract.shapes, abstract.inits)
    run = ours(
        lambda params, batch: loss_and_grads(abstract.graphdef, params, {}, batch, None),
        params,
        rows.batch,
    )
    with torch.device(device()):
        model = model_of(config).train()
    if remat == "full":
        checkpointing = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    arrays = arrays_of(config, rows, device())

    def theirs():
        model.zero_grad(set_to_none=True)
        with torch.autocast(device(), torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**arrays, use_cache=False).loss
        loss.backward()
        return loss.item()

    tiles, text = size.training
    name = f"{tiles} tiles, {text} text tokens, remat {remat}, {config.decoder.layers} layers"
    target = 1.0 if dtype == "bfloat16" else TARGETS[dtype]
    return Row("train", name, dtype, target, run, theirs)


def photo(size: Size) -> bytes:
    """Returns a JPEG with something in it."""
    width, height = size.image
    small = np.random.default_rng(0).integers(0, 256, (height // 20, width // 20, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def pillow_tiles(data: bytes, config: TileConfig) -> np.ndarray:
    """Cuts tiles as InternVL's loop does: one resize, a crop per tile, a thumbnail."""
    image, s = Image.open(io.BytesIO(data)).convert("RGB"), config.tile_size
    columns, rows = choose_grid(config, *image.size)
    canvas = image.resize((columns * s, rows * s), Image.Resampling.BICUBIC)
    boxes = [(c * s, r * s, (c + 1) * s, (r + 1) * s) for r in range(rows) for c in range(columns)]
    tiles = [np.asarray(canvas.crop(box)) for box in boxes]
    if config.use_thumbnail and columns * rows > 1:
        tiles.append(np.asarray(image.resize((s, s), Image.Resampling.BICUBIC)))
    return np.stack(tiles)


def images(dtype: str, size: Size, _: None) -> Row:
    """Compares the way from a JPEG to uint8 tiles."""
    data, config = photo(size), TileConfig(tile_size=size.model.vision.image_size, rule="off")

    def mine():
        return cut_tiles(load_image(data), config)

    assert mine().shape == pillow_tiles(data, config).shape
    name = f"{size.image[0]} x {size.image[1]} to {len(mine())} tiles"
    return Row("images", name, "uint8", 0.9, mine, lambda: pillow_tiles(data, config))


def answers(dtype: str, size: Size, questions: int) -> Row:
    """Compares the way from questions and JPEGs to text."""
    from peers_answers import sides

    models.cache_clear()
    config = size.answering
    mine, theirs = sides(Models(config, dtype, decoding=False), photo(size), questions)
    name = f"{questions} questions, {config.decoder.layers} layers of {config.decoder.width}"
    return Row("answers", name, dtype, TARGETS[dtype], mine, waits(theirs), questions)
