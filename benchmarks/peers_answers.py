"""The end-to-end comparison of benchmarks/peers.py: questions about images, answered in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import peers_rows
import torch

from internvlx_jax.data.processor import Processor
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.inference.arguments import make_spec
from internvlx_jax.inference.batch_generator import BatchGenerator
from internvlx_jax.inference.loading import one_device
from internvlx_jax.inference.requests import Request

BATCH = 8
NEW_TOKENS = 16


def sides(
    pair: peers_rows.Models, image: bytes, questions: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns what answers all questions here, and in transformers.

    Both decode and cut every image, encode every prompt and write as many tokens. The prompt's
    tokens in transformers are those of this package, since its tokenizer is not that of a release.
    """
    tokenizer = Tokenizer.load(TOKENIZER_FOLDER)
    processor = Processor.for_model(pair.config, tokenizer, special_text="escape")
    generator = BatchGenerator(pair.ours, processor, one_device(), batch_size=BATCH)
    tiles = pair.config.prompt.tiles
    spec = make_spec(tiles, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    requests = {
        number: Request(prompt=f"<image>\nWhat is the total of page {number}?", images=(image,))
        for number in range(questions)
    }

    def mine() -> list[str]:
        found: dict[int, Any] = {}
        for answers in generator.answer(requests, spec):
            found |= answers
        errors = [answer.error for answer in found.values() if answer.error is not None]
        if errors:
            raise errors[0]
        return [found[number].text for number in requests]

    def encoded(request: Request) -> np.ndarray:
        bucket = generator.prompts.bucket(request, spec)
        row = generator.prompts.row(request, bucket, spec)
        ids = np.maximum(row.tokens, 2).astype(np.int64)
        slots = row.tile_start[:, None] + np.arange(pair.config.tokens_per_tile)
        ids[slots.ravel()] = 1  # IMAGE_TOKEN of gpu_torch
        return ids

    prompts = {number: encoded(request) for number, request in requests.items()}

    def theirs() -> list[str]:
        written: list[str] = []
        for first in range(0, questions, BATCH):
            numbers = range(first, min(first + BATCH, questions))
            written += _transformers(pair, image, [prompts[n] for n in numbers], tiles, tokenizer)
        return written

    return mine, theirs


def _transformers(
    pair: peers_rows.Models, image: bytes, prompts: list[np.ndarray], tiles: Any, tokenizer: Any
) -> list[str]:
    """Answers one batch by `generate`, prompts padded on the left."""
    length = max(map(len, prompts))
    ids = np.full((len(prompts), length), 2)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    cut = np.concatenate([peers_rows.pillow_tiles(image, tiles) for _ in prompts])
    place = peers_rows.device()
    pixels = torch.as_tensor(cut, device=place).permute(0, 3, 1, 2).float().div(255)
    new = pair.theirs.generate(
        input_ids=torch.as_tensor(ids, device=place),
        attention_mask=torch.as_tensor(mask, device=place),
        pixel_values=((pixels - 0.45) / 0.225).to(pair.theirs.dtype),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=2,
    )[:, length:]
    return [tokenizer.decode(row) for row in new.tolist()]
