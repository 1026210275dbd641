"""Measures index, plan, first batch and restart of a dataset of millions of samples.

    python benchmarks/data_scale.py [--samples 5000000] [--batch_mode tokens] [--folder FOLDER]

The samples are synthetic: texts from a fixed vocabulary, sizes of images from a list, no pixels.
The annotation lies in FOLDER, which may be a gs:// URL (of the emulator, for example); each start
is a process of its own, whose seconds and peak memory are printed. `first` finds nothing, `restart`
finds what `first` has kept, and `new host` finds the index in FOLDER but has an empty local cache.
The table of docs/data.md is the output of this program.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tokenizer import Tokenizer

TOKENS_PER_TILE, ROW_QUANTUM, BLOCK = 256, 8, 10_000
SIZES = ((640, 480), (480, 640), (1024, 768), (500, 375), (800, 1200), (300, 300))
WORDS = ("total", "sum", "date", "shop", "paid", "cash", "card", "tax", "item", "price", "how", "a")


def lines(samples: int) -> Iterator[bytes]:
    """Yields the annotation by blocks of lines; half of the samples have an image."""
    draw = np.random.default_rng(0)
    for first in range(0, samples, BLOCK):
        block = []
        for number in range(first, min(first + BLOCK, samples)):
            width, height = SIZES[draw.integers(len(SIZES))]
            asked, said = text(draw, 12), text(draw, draw.integers(4, 40))
            image = (
                {"image": f"{number}.jpg", "width": width, "height": height} if number % 2 else {}
            )
            block.append(json.dumps({"id": number, **image, "conversations": turns(asked, said)}))
        yield ("\n".join(block) + "\n").encode()


def text(draw: np.random.Generator, words: int | np.integer) -> str:
    """Draws some words."""
    return " ".join(WORDS[each] for each in draw.integers(len(WORDS), size=words))


def turns(asked: str, said: str) -> list[dict[str, str]]:
    """Returns a conversation of one question."""
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


def write_meta(folder: str, samples: int) -> str:
    """Writes annotation and meta file; returns the path of the meta file."""
    annotation = as_path(folder) / f"chat-{samples}.jsonl"
    meta = as_path(folder) / f"meta-{samples}.json"
    if not annotation.is_file():
        annotation.parent.mkdir(parents=True, exist_ok=True)
        with annotation.open("wb") as file:
            for block in lines(samples):
                file.write(block)
    meta.write_text(json.dumps({"chat": {"annotation": str(annotation), "root": ""}}))
    return str(meta)


def start(meta: str, batch_mode: str) -> None:
    """Opens the loader and takes the first step; prints what it took."""
    started = time.perf_counter()
    processor = Processor(
        Tokenizer.load(TOKENIZER_FOLDER),
        get_template("internlm2-chat"),
        None,
        TileConfig(max_num=6),
        TOKENS_PER_TILE,
    )
    config: Any = DataConfig(meta=meta, batch_mode=batch_mode)  # type: ignore[arg-type]
    loader = Loader(meta, config, processor, row_quantum=ROW_QUANTUM, seed=0)
    opened = time.perf_counter()
    planned = loader.plan.step(0)
    first = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "open": round(opened - started, 1),
                "step": round(first - opened, 1),
                "peak_mb": round(memory),
                "samples": len(loader.table.length),
                "rows": len(planned.rows),
                "hash": loader.plan_hash,
            }
        )
    )


def main() -> None:
    """Writes the data, then starts several times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5_000_000)
    parser.add_argument("--batch_mode", default="tokens", choices=("tokens", "samples", "pack"))
    parser.add_argument("--folder", default="")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        start(args.start, args.batch_mode)
        return
    with tempfile.TemporaryDirectory() as scratch:
        meta = write_meta(args.folder or scratch, args.samples)
        for name in ("first", "restart", "new host"):
            cache = Path(scratch) / ("other" if name == "new host" else "cache")
            command = [sys.executable, __file__, "--start", meta, "--batch_mode", args.batch_mode]
            done = subprocess.run(
                command,
                env=os.environ | {"INTERNVLX_CACHE": str(cache)},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(done.stderr)
            print(f"{name}: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
