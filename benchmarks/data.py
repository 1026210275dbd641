"""The input pipeline on real receipts and a real mix of image sizes.

    python benchmarks/data.py [padding] [speed] [index]

Needs the sample data beside the checkout. `padding` prints what docs/data.md shows: padding in both
modes and what RVTC saves against plain tiling, from 1,626 image sizes with texts drawn from the
receipts. `speed` compares the pipeline with a bare Pillow loop (decode, resize, crop, normalize)
over the same receipts in the same run, on one core, and counts what two worker processes on two
cores give. `index` times the size index. Exit status 1 if the pipeline reaches less than 90 % of
the bare loop.
"""

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
from internvlx_jax.data.check import check
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tiles import choose_grid, normalize
from internvlx_jax.data.tokenizer import Tokenizer

DATA = Path("../shared/data")
TOKENS_PER_TILE = 256
PASSES = 1


def processor(rule: str = "edge", max_num: int = 6) -> Processor:
    return Processor(
        Tokenizer.load(DATA / "internlm2_tokenizer"),
        get_template("internlm2-chat"),
        None,
        TileConfig(rule=rule, max_num=max_num),
        TOKENS_PER_TILE,
    )


def size_mix(folder: Path, copies: int = 1) -> Path:
    """A meta file over image_sizes.csv.

    Stated sizes, no files, conversations drawn from the receipts.
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


def padding() -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        meta = size_mix(Path(folder))
        for max_num in (6, 12):
            for rule in ("edge", "area", "off"):
                report = check(
                    str(meta), DataConfig(meta="", max_length=8192), processor(rule, max_num)
                )
                found, bucket, pack = (
                    report.datasets["sizes"],
                    report.padding["bucket"],
                    report.padding["pack"],
                )
                rows.append(
                    {
                        "rule": rule,
                        "max": max_num,
                        "tiles": sum(int(tiles) * count for tiles, count in found.tiles.items())
                        / found.samples,
                        "tokens": found.tokens.mean,
                        "tiles_saved": found.off.tile_share_saved,
                        "tokens_saved": found.off.token_share_saved,
                        "bucket_tokens": bucket.padded_tokens,
                        "bucket_tiles": bucket.padded_tiles,
                        "executables": bucket.executables,
                        "pack_tokens": pack.padded_tokens,
                        "pack_tiles": pack.padded_tiles,
                    }
                )
    print(
        "| rule | max | tiles | tokens | tiles saved | tokens saved | "
        "bucket: padded tokens | tiles | executables | pack: padded tokens | tiles |"
    )
    print("|---" * 11 + "|")
    for row in rows:
        print(
            f"| `{row['rule']}` | {row['max']} | {row['tiles']:.2f} | {row['tokens']:.0f} | "
            f"{row['tiles_saved']:.1%} | {row['tokens_saved']:.1%} | {row['bucket_tokens']:.1%} | "
            f"{row['bucket_tiles']:.1%} | {row['executables']} | "
            f"{row['pack_tokens']:.1%} | {row['pack_tiles']:.1%} |"
        )
    return rows


def bare_loop(paths: list[Path], tiles: TileConfig) -> float:
    """Receipts a second of decode, resize, crop and normalise, one after the other."""
    side, started = tiles.tile_size, time.perf_counter()
    for path in paths * PASSES:
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
    return len(paths) * PASSES / (time.perf_counter() - started)


def pipeline(folder: str, workers: int) -> dict[str, float]:
    """Rates of the whole pipeline.

    Read, decode, cut, tokenize, collate, and bring to this process.
    """
    config = DataConfig(meta="", tokens_per_step=8192, index_dir=folder, num_workers=workers)
    loader = Loader(str(DATA / "receipts_meta.json"), config, processor(), row_quantum=1, seed=0)
    warm = 8  # steps until the workers have started
    stop = next(
        step
        for step in range(warm, 10**6)
        if sum(loader.counts(loader.plan.step(s)).samples for s in range(warm, step))
        >= 128 * PASSES
    )
    images = tiles = tokens = size = 0
    for number, step in enumerate(loader.steps(0, stop)):
        if number == warm - 1:
            started = time.perf_counter()
        elif number >= warm:
            images, tiles, tokens = (
                images + step.counts.images,
                tiles + step.counts.tiles,
                tokens + step.counts.tokens,
            )
            size += step.batch.inputs.tiles.nbytes
    seconds = time.perf_counter() - started
    return {
        "images_per_s": images / seconds,
        "tiles_per_s": tiles / seconds,
        "tokens_per_s": tokens / seconds,
        "MB_per_s": size / seconds / 1e6,
    }


def speed() -> dict:
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
    # The machine may be faster or slower after a minute: each rate stands between two of the bare
    # loop.
    ratios = {
        name: 2 * rates["images_per_s"] / (before + after)
        for (name, rates), before, after in zip(result.items(), bare, bare[1:])
    }
    report = {"bare_images_per_s": bare, "pipeline": result, "against_bare_on_one_core": ratios}
    print(json.dumps(report, indent=2))
    return report


def index() -> None:
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
        result["headers_per_s"] = 128 / (time.perf_counter() - started)
    print(json.dumps(result, indent=2))


def main() -> int:
    if not DATA.is_dir():
        print(
            f"error: {DATA} not found; this benchmark needs the sample data beside the checkout",
            file=sys.stderr,
        )
        return 1
    wanted = sys.argv[1:] or ["padding", "speed", "index"]
    failed = False
    if "padding" in wanted:
        padding()
    if "speed" in wanted:
        failed = speed()["against_bare_on_one_core"]["threads, one core"] < 0.9
    if "index" in wanted:
        index()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
