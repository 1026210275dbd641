"""What a meta file holds, without a model: a table, histograms, and one sample to look at (design: data.md 18)."""

from __future__ import annotations

import dataclasses
import html
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.files import write_json, written_aside
from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.data.faults import Fault
from internvlx_jax.data.fit import CHANGES, Room
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.plan import Sample
from internvlx_jax.data.processor import Processor

LENGTH_BIN = 128  # tokens, of the length histogram


def check(
    meta: str,
    config: DataConfig,
    processor: Processor,
    *,
    row_quantum: int = 1,
    decode: bool = False,
) -> dict[str, Any]:
    """Everything that `format_check` prints, as JSON can hold it.

    decode: open and decode every image too, so that damaged ones are counted. Padding is that of one epoch, for rows of
    buckets and for packed rows alike, whatever data.batch_mode is.
    """
    # Bad samples are what is asked for: none of them ends the check.
    config = dataclasses.replace(
        config, faults=dataclasses.replace(config.faults, on_bad="skip", max_share=1.0)
    )
    modes = {
        mode: Loader(
            meta,
            dataclasses.replace(config, batch_mode=batch_mode),
            processor,
            row_quantum=row_quantum,
            seed=0,
            epochs=1,
            progress=True,
        )
        for mode, batch_mode in (
            ("bucket", "tokens" if config.batch_mode == "pack" else config.batch_mode),
            ("pack", "pack"),
        )
    }
    loader = modes["pack" if config.batch_mode == "pack" else "bucket"]
    if decode:
        _decode_all(loader)
    report: dict[str, Any] = {
        "datasets": {},
        "padding": {mode: _padding(each) for mode, each in modes.items()},
        "buckets": [
            dataclasses.asdict(bucket) | {"rows": rows}
            for bucket, rows in zip(loader.plan.buckets, loader.plan.rows)
        ],
    }
    table = loader.table
    for number, (entry, index) in enumerate(zip(loader.entries, loader.indexes)):
        here = table.dataset == number
        tiles, length, off = table.tiles[here], table.length[here], table.off_tiles[here]
        bad = {
            reason: count
            for faults in (loader.index_faults, loader.faults)
            for (name, reason), count in sorted(faults.reasons.items())
            if name == entry.name
        }
        saved = int(off.sum() - tiles.sum())
        report["datasets"][entry.name] = {
            "records": len(index),
            "samples": int(here.sum()),
            "images": int(table.images[here].sum()),
            "tiles": _histogram(tiles),
            "lengths": _histogram(length // LENGTH_BIN * LENGTH_BIN),
            "tokens": {
                "mean": float(length.mean()) if len(length) else 0.0,
                "largest": int(length.max(initial=0)),
            },
            "supervised_tokens": int(table.supervised[here].sum()),
            "made_to_fit": {
                change: int(count)
                for change, count in zip(
                    CHANGES[1:], np.bincount(index.change, minlength=len(CHANGES))[1:]
                )
                if count
            },
            "off": {
                "tiles_saved": saved,
                "tile_share_saved": saved / max(1, int(off.sum())),
                "tokens_saved": saved * processor.tokens_per_tile,
                "token_share_saved": saved
                * processor.tokens_per_tile
                / max(1, int(length.sum()) + saved * processor.tokens_per_tile),
            },
            "bad": bad,
        }
    return report


def _whole(loader: Loader) -> Room:
    """Room for any sample."""
    return Room(loader.config.max_length, loader.config.max_length, loader.config.max_length)


def _histogram(values: np.ndarray) -> dict[str, int]:
    return {str(value): int(count) for value, count in zip(*np.unique(values, return_counts=True))}


def _padding(loader: Loader) -> dict[str, float]:
    """Shares of padded slots over one epoch; the rows that it leaves over count as they are, without masked ones."""
    rows = np.zeros(2, np.int64)
    for stream, bucket in zip(loader.plan.streams, loader.plan.buckets):
        rows += stream.before(1) * np.array([bucket.length, bucket.tiles])
    entries = np.concatenate([stream.rows(0).sample for stream in loader.plan.streams])
    tokens, tiles = int(loader.table.length[entries].sum()), int(loader.table.tiles[entries].sum())
    return {
        "padded_tokens": 1 - tokens / max(1, int(rows[0])),
        "padded_tiles": 1 - tiles / max(1, int(rows[1])),
        "executables": len(loader.plan.buckets),
        "steps": loader.plan.total,
    }


def _decode_all(loader: Loader) -> None:
    """Read every usable sample as training would, so that its faults are counted."""

    def read(sample: int) -> tuple[Counter, list[Fault]]:
        counts, faults = Counter(), []
        loader.read_slot(Sample(sample, 0), _whole(loader), counts, faults)
        return counts, faults

    samples = range(len(loader.table.length))
    with ThreadPoolExecutor() as pool:
        for counts, faults in tqdm(
            pool.map(read, samples), total=len(samples), desc="decoding", unit=" samples"
        ):
            loader.faults.add(counts, faults)


def format_check(report: dict[str, Any]) -> str:
    """The table that `check` prints."""
    lines = []
    for name, found in report["datasets"].items():
        off, tokens = found["off"], found["tokens"]
        lines += [
            f"{name}",
            f"  samples          {found['samples']:,} of {found['records']:,} records, {found['images']:,} images",
            f"  tiles a sample   {_listed(found['tiles'])}",
            f"  token length     mean {tokens['mean']:.0f}, largest {tokens['largest']}; "
            f"from each {LENGTH_BIN}: {_listed(found['lengths'])}",
            f"  supervised       {found['supervised_tokens']:,} tokens",
            f"  against rule off {off['tiles_saved']:,} tiles ({off['tile_share_saved']:.1%}) and "
            f"{off['tokens_saved']:,} tokens ({off['token_share_saved']:.1%}) saved",
            f"  made to fit      {_listed(found['made_to_fit']) or 'none'}",
            f"  bad samples      {_listed(found['bad']) or 'none'}",
        ]
    lines.append(
        "buckets (tiles x tokens x rows)  "
        + "  ".join(
            f"{bucket['tiles']}x{bucket['length']}x{bucket['rows']}" for bucket in report["buckets"]
        )
    )
    for mode, padding in report["padding"].items():
        lines.append(
            f"{mode:<7} padded tokens {padding['padded_tokens']:6.1%}  padded tiles "
            f"{padding['padded_tiles']:6.1%}  executables {padding['executables']}  steps an epoch "
            f"{padding['steps']:,}"
        )
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return "  ".join(f"{name}:{count}" for name, count in counts.items())


def write_check(report: dict[str, Any], folder: Path) -> None:
    """The whole report, with the histograms, as check.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "check.json", report)


# --- one sample ---------------------------------------------------------------------------------------------------

_STYLE = """body{font:14px sans-serif;max-width:70em;margin:2em auto} .tokens{font:13px monospace;line-height:1.9}
.tokens span{padding:2px 1px;border-radius:3px;white-space:pre-wrap} .learn{background:#bfe8c5} .masked{background:#e8e8ee}
.image{background:#cfe0f7} img{margin:2px;border:1px solid #bbb} pre{white-space:pre-wrap;background:#f6f6f6;padding:1em}"""


def show(loader: Loader, number: int, folder: Path) -> Path:
    """Write sample `number` of the meta file, counted from 0, to folder/sample-N.html, its tiles beside it as PNG files.

    The page shows the prompt, every token (supervised, masked, image tokens counted) and the tiles. Returns its path.
    Raises ValueError for a number that is none, SampleError when the sample cannot be read.
    """
    table = loader.table
    if not 0 <= number < len(table.length):
        raise ValueError(f"--sample {number}: there are samples 0 to {len(table.length) - 1}")
    dataset, position = int(table.dataset[number]), int(table.position[number])
    found = loader.reader.read(
        dataset, position, cycle=0, tiles=int(table.tiles[number]), slot=_whole(loader)
    )
    row, tokenizer = found.row, loader.processors[dataset].tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for tile, pixels in enumerate(row.tiles):
        pictures.append(f"sample-{number}-tile-{tile}.png")
        with written_aside(folder / pictures[-1]) as aside:
            Image.fromarray(pixels).save(aside, "PNG")
    spans, run = [], 0
    for token, label in zip([*row.tokens.tolist(), -1], [*row.labels.tolist(), IGNORED]):
        if token == tokenizer.image_token_id:
            run += 1
            continue
        if run:
            spans.append(
                f'<span class="image" title="{tokenizer.image_token_id}">&lt;IMG_CONTEXT&gt; x {run}</span>'
            )
            run = 0
        if token >= 0:
            kind = "masked" if label == IGNORED else "learn"
            spans.append(
                f'<span class="{kind}" title="{token}">{_token_text(tokenizer, token)}</span>'
            )
    prompt = tokenizer.decode(
        (token for token in row.tokens.tolist() if token != tokenizer.image_token_id),
        skip_special=False,
    )
    supervised = int((row.labels != IGNORED).sum())
    page = folder / f"sample-{number}.html"
    with written_aside(page) as aside:
        aside.write_text(
            f'<!doctype html><meta charset="utf-8"><title>{html.escape(found.name)}</title><style>{_STYLE}</style>'
            f"<h1>{html.escape(found.name)}</h1><p>{len(row.tokens)} tokens, {supervised} supervised, "
            f"{len(row.tiles)} tiles{''.join(f', {reason}' for reason in found.counted)}</p>"
            + "".join(f'<img src="{picture}" width="224">' for picture in pictures)
            + f'<h2>Tokens</h2><p><span class="learn">supervised</span> <span class="masked">masked</span> '
            f'<span class="image">image</span></p><div class="tokens">{" ".join(spans)}</div>'
            f"<h2>Prompt without image tokens</h2><pre>{html.escape(prompt)}</pre>\n",
            encoding="utf-8",
        )
    return page


def _token_text(tokenizer, token: int) -> str:
    text = html.escape(tokenizer.decode([token], skip_special=False) or tokenizer.piece(token))
    return text.replace("\n", "\\n<br>")
