"""One sample as an HTML page: tiles, prompt and supervised tokens (design: data.md 18)."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from PIL import Image

from internvlx_jax.core.files import write_text, written_aside
from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.data.batch import Row
from internvlx_jax.data.check import whole_row
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.reader import ReadSample
from internvlx_jax.data.tokenizer import Tokenizer

_STYLE = """body{font:14px sans-serif;max-width:70em;margin:2em auto}
.tokens{font:13px monospace;line-height:1.9}
.tokens span{padding:2px 1px;border-radius:3px;white-space:pre-wrap}
.learn{background:#bfe8c5} .masked{background:#e8e8ee} .image{background:#cfe0f7}
img{margin:2px;border:1px solid #bbb} pre{white-space:pre-wrap;background:#f6f6f6;padding:1em}"""


def show(loader: Loader, number: int, folder: Path) -> Path:
    """Writes one sample as folder/sample-N.html, with its tiles beside it as PNG files.

    The page shows the prompt, every token (supervised, masked, image tokens counted) and the tiles.

    Args:
        loader: the usable samples of a meta file.
        number: of the sample among them, from 0.
        folder: where the files go.

    Returns:
        The path of the page.

    Raises:
        ValueError: no sample has this number.
        SampleError: the sample cannot be read.
    """
    table = loader.table
    if not 0 <= number < len(table.length):
        raise ValueError(f"--sample {number}: there are samples 0 to {len(table.length) - 1}")
    dataset = int(table.dataset[number])
    found = loader.reader.read(
        dataset,
        int(table.position[number]),
        cycle=0,
        tiles=int(table.tiles[number]),
        capacity=whole_row(loader.config),
    )
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _write_tiles(found.row.tiles, number, folder)
    page = folder / f"sample-{number}.html"
    write_text(page, _page(found, loader.processors[dataset].tokenizer, pictures))
    return page


def _write_tiles(tiles: np.ndarray, number: int, folder: Path) -> list[str]:
    """Writes uint8[t, s, s, 3] as PNG files and returns their names."""
    names = [f"sample-{number}-tile-{tile}.png" for tile in range(len(tiles))]
    for name, pixels in zip(names, tiles, strict=True):
        with written_aside(folder / name) as aside:
            Image.fromarray(pixels).save(aside, "PNG")
    return names


def _page(found: ReadSample, tokenizer: Tokenizer, pictures: list[str]) -> str:
    row, name = found.row, html.escape(found.name)
    text = [token for token in row.tokens.tolist() if token != tokenizer.image_token_id]
    prompt = html.escape(tokenizer.decode(text, skip_special=False))
    supervised = int((row.labels != IGNORED).sum())
    counted = "".join(f", {reason}" for reason in found.counted)
    images = "".join(f'<img src="{picture}" width="224">' for picture in pictures)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
        f"<h1>{name}</h1><p>{len(row.tokens)} tokens, {supervised} supervised, "
        f"{len(row.tiles)} tiles{counted}</p>{images}"
        '<h2>Tokens</h2><p><span class="learn">supervised</span> '
        '<span class="masked">masked</span> <span class="image">image</span></p>'
        f'<div class="tokens">{" ".join(_spans(row, tokenizer))}</div>'
        f"<h2>Prompt without image tokens</h2><pre>{prompt}</pre>\n"
    )


def _spans(row: Row, tokenizer: Tokenizer) -> list[str]:
    """Returns an HTML element per token, and one per run of image tokens."""
    image = tokenizer.image_token_id
    spans, run = [], 0
    # A token after the last one ends a run of image tokens there.
    pairs = zip([*row.tokens.tolist(), -1], [*row.labels.tolist(), IGNORED], strict=True)
    for token, label in pairs:
        if token == image:
            run += 1
            continue
        if run:
            spans.append(f'<span class="image" title="{image}">&lt;IMG_CONTEXT&gt; x {run}</span>')
            run = 0
        if token >= 0:
            kind = "masked" if label == IGNORED else "learn"
            text = _token_text(tokenizer, token)
            spans.append(f'<span class="{kind}" title="{token}">{text}</span>')
    return spans


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    text = html.escape(tokenizer.decode([token], skip_special=False) or tokenizer.piece(token))
    return text.replace("\n", "\\n<br>")
