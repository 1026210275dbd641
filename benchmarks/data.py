"""Measures the input pipeline on real receipts and a real mix of image sizes.

    python benchmarks/data.py [padding] [speed] [index]

Needs the sample data beside the checkout.

* `padding` prints what docs/data.md shows: padding in both modes, and what RVTC saves against plain
  tiling, from 1,626 image sizes with texts drawn from the receipts.
* `speed` compares the pipeline with a bare Pillow loop (decode, resize, crop, normalize) over the
  same receipts in the same run, on one core, and measures two worker processes on two cores.
* `index` times the size index.

The exit status is 1 if the pipeline reaches less than 90 % of the bare loop.
"""

import argparse
import csv
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from internvlx_jax.core.data_config import DataConfig, ImageConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.check import CheckReport, check
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tiles import choose_grid, normalize
from internvlx_jax.data.tokenizer import Tokenizer

DATA = Path("../shared/data")
TOKENS_PER_TILE, RECEIPTS = 256, 128
WARM_UP_STEPS = 8  # until the workers have started
LIMIT = 0.9  # of the bare loop, which the pipeline has to reach
PARTS = ("padding", "speed", "index")
RULES = ("edge", "area", "off")
HEAD = (
    "| rule | max | tiles | tokens | tiles saved | tokens saved | bucket: padded tokens | tiles | "
    "executables | pack: padded tokens | tiles |"
)


def processor(rule: str = "edge", max_num: int = 6) -> Processor:
    """Makes the processor of InternVL-X for a tiling rule and its maximum of tiles."""
    return Processor(
        Tokenizer.load(DATA / "internlm2_tokenizer"),
        get_template("internlm2-chat"),
        None,
        TileConfig(rule=rule, max_num=max_num),
        TOKENS_PER_TILE,
    )


def size_mix(folder: Path, copies: int = 1) -> Path:
    """Writes a meta file over image_sizes.csv.

    Its samples state their sizes and have no image files; conversations are drawn from the
    receipts.
    """
    texts = [
        json.loads(line)["conversations"]
        for line in (DATA / "receipts/train.jsonl").read_text().splitlines()
    ]
    with open(DATA / "image_sizes.csv", newline="") as file:
        sizes = [(int(row["width"]), int(row["height"])) for row in csv.DictReader(file)] * copies
    drawn = np.random.default_rng(0).integers(0, len(texts), len(sizes))
    lines = [
        json.dumps(
            {"image": "none.jpg", "width": width, "height": height, "conversations": texts[text]}
        )
        for (width, height), text in zip(sizes, drawn)
    ]
    (folder / "sizes.jsonl").write_text("\n".join(lines))
    (folder / "meta.json").write_text(
        json.dumps({"sizes": {"annotation": str(folder / "sizes.jsonl")}})
    )
    return folder / "meta.json"


def padding() -> None:
    """Prints the table of docs/data.md."""
    print(f"{HEAD}\n" + "|---" * 11 + "|")
    with tempfile.TemporaryDirectory() as folder:
        meta = size_mix(Path(folder))
        for max_num in (6, 12):
            for rule in RULES:
                config = DataConfig(meta="", max_length=8192)
                report = check(str(meta), config, processor(rule, max_num))
                print(padding_row(rule, max_num, report))


def padding_row(rule: str, max_num: int, report: CheckReport) -> str:
    """Returns one line of the table from a report of `data check`."""
    found = report.datasets["sizes"]
    bucket, pack = report.padding["bucket"], report.padding["pack"]
    tiles = sum(int(tiles) * count for tiles, count in found.tiles.items())
    cells = (
        f"`{rule}`",
        max_num,
        f"{tiles / found.samples:.2f}",
        f"{found.tokens.mean:.0f}",
        f"{found.off.tile_share_saved:.1%}",
        f"{found.off.token_share_saved:.1%}",
        f"{bucket.padded_tokens:.1%}",
        f"{bucket.padded_tiles:.1%}",
        bucket.executables,
        f"{pack.padded_tokens:.1%}",
        f"{pack.padded_tiles:.1%}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def bare_loop(paths: list[Path], tiles: TileConfig) -> float:
    """Decodes, resizes, crops and normalizes images one after the other.

    Returns:
        Images per second.
    """
    side, started = tiles.tile_size, time.perf_counter()
    for path in paths:
        with Image.open(path) as file:
            image = file.convert("RGB")
        columns, rows = choose_grid(tiles, *image.size)
        canvas = np.asarray(image.resize((columns * side, rows * side), Image.Resampling.BICUBIC))
        cut = [
            canvas[r * side : (r + 1) * side, c * side : (c + 1) * side]
            for r in range(rows)
            for c in range(columns)
        ]
        if len(cut) > 1:
            cut.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)))
        normalize(np.stack(cut))
    return len(paths) / (time.perf_counter() - started)


def pipeline(folder: str, workers: int) -> dict[str, float]:
    """Runs the whole pipeline: read, decode, cut, tokenize, collate, and bring to this process.

    Args:
        folder: Where the size index is kept.
        workers: Worker processes; 0 is threads in this process.

    Returns:
        Rates over one pass of the receipts.
    """
    config = DataConfig(meta="", tokens_per_step=8192, index_dir=folder, num_workers=workers)
    loader = Loader(str(DATA / "receipts_meta.json"), config, processor(), row_quantum=1, seed=0)
    stop, samples = WARM_UP_STEPS, 0
    while samples < RECEIPTS:
        samples += loader.counts(loader.plan.step(stop)).samples
        stop += 1
    images = tiles = tokens = size = 0
    started = time.perf_counter()
    for number, step in enumerate(loader.steps(0, stop)):
        if number == WARM_UP_STEPS - 1:
            started = time.perf_counter()
        elif number >= WARM_UP_STEPS:
            images += step.counts.images
            tiles += step.counts.tiles
            tokens += step.counts.tokens
            size += step.batch.inputs.tiles.nbytes
    seconds = time.perf_counter() - started
    return {
        "images_per_s": images / seconds,
        "tiles_per_s": tiles / seconds,
        "tokens_per_s": tokens / seconds,
        "MB_per_s": size / seconds / 1e6,
    }


def speed() -> float:
    """Prints the rates of the pipeline and of the bare loop.

    Returns:
        The rate of the pipeline with threads relative to that of the bare loop, on one core.
    """
    lines = (DATA / "receipts/train.jsonl").read_text().splitlines()
    paths = [DATA / "receipts" / json.loads(line)["image"] for line in lines]
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        os.sched_setaffinity(0, cores[:1])
        bare_loop(paths[:16], TileConfig())  # files and code are warm for both
        bare, result = [bare_loop(paths, TileConfig())], {}
        for name, workers in (("threads", 0), ("1 worker", 1)):
            result[f"{name}, one core"] = pipeline(folder, workers)
            bare.append(bare_loop(paths, TileConfig()))
        os.sched_setaffinity(0, cores)
        if len(cores) > 1:
            result["2 workers, two cores"] = pipeline(folder, 2)
            os.sched_setaffinity(0, cores[:1])
            bare.append(bare_loop(paths, TileConfig()))
    # The speed of a shared machine changes within a minute, so each rate is compared with the mean
    # of the bare loop before and after it.
    ratios = {
        name: 2 * rates["images_per_s"] / (before + after)
        for (name, rates), before, after in zip(result.items(), bare, bare[1:], strict=False)
    }
    report = {"bare_images_per_s": bare, "pipeline": result, "against_bare_on_one_core": ratios}
    print(json.dumps(report, indent=2))
    return ratios["threads, one core"]


def index() -> None:
    """Prints how long the size index takes to build, to open again, and per image header."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        meta = size_mix(Path(folder), copies=10)
        started = time.perf_counter()
        loader = Loader(
            str(meta), DataConfig(meta="", index_dir=folder), processor(), row_quantum=1, seed=0
        )
        result["samples"] = len(loader.table.length)
        result["build_s"] = time.perf_counter() - started
        started = time.perf_counter()
        Loader(str(meta), DataConfig(meta="", index_dir=folder), processor(), row_quantum=1, seed=0)
        result["cached_s"] = time.perf_counter() - started
        careful = ImageConfig(trust_sizes=False)
        started = time.perf_counter()
        Loader(
            str(DATA / "receipts_meta.json"),
            DataConfig(meta="", index_dir=folder, images=careful),
            dataclasses.replace(processor(), images=careful),
            row_quantum=1,
            seed=0,
        )
        result["headers_per_s"] = RECEIPTS / (time.perf_counter() - started)
    print(json.dumps(result, indent=2))


def main() -> int:
    """Runs the command.

    Returns:
        Exit status, 1 if data is missing or the pipeline is too slow.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parts = parser.parse_args().parts or PARTS
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    if not DATA.is_dir():
        print(f"error: {DATA} is missing; put the sample data beside the checkout", file=sys.stderr)
        return 1
    if "padding" in parts:
        padding()
    slow = "speed" in parts and speed() < LIMIT
    if "index" in parts:
        index()
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
