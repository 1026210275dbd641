"""Look at training data before training on it.

    internvlx data check META --tokenizer FOLDER
    internvlx data show META --tokenizer FOLDER --sample 0

A run config (--config) says how its model reads samples; without one, flags do. --set changes fields of the data
settings, e.g. --set max_length=8192 batch_mode=pack.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import CheckpointError, ConfigError, SampleError
from internvlx_jax.core.overrides import load_config_file, override
from internvlx_jax.core.tile_config import TILE_RULES, TileConfig
from internvlx_jax.data.check import check, format_check, show, write_check
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.templates import TEMPLATES, get_template
from internvlx_jax.data.tokenizer import Tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="internvlx data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser(
        "check", help="a table of every dataset: samples, tiles, lengths, padding, bad ones"
    )
    checking.add_argument(
        "--decode", action="store_true", help="decode every image too, to count damaged ones"
    )
    showing = commands.add_parser(
        "show", help="one sample as an HTML page with its tiles and coloured tokens"
    )
    showing.add_argument(
        "--sample", type=int, default=0, help="number of the usable sample, from 0"
    )
    for each in (checking, showing):
        _add_common(each)
    args = parser.parse_args(argv)
    try:
        config, processor = _settings(args)
        if args.command == "check":
            report = check(
                args.meta,
                config,
                processor,
                row_quantum=config.row_quantum or 1,
                decode=args.decode,
            )
            write_check(report, args.out)
            print(format_check(report))
            print(f"histograms: {args.out / 'check.json'}")
        else:
            loader = Loader(
                args.meta,
                config,
                processor,
                row_quantum=config.row_quantum or 1,
                seed=0,
                progress=True,
            )
            print(show(loader, args.sample, args.out))
    except (ConfigError, CheckpointError, SampleError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _add_common(parser: argparse.ArgumentParser) -> None:
    tiles = TileConfig()
    parser.add_argument("meta", metavar="META", help="meta JSON")
    parser.add_argument(
        "--config", help="a run config, a file of configs/: its datasettings and its model's prompt"
    )
    parser.add_argument("--tokenizer", help="folder or file of the tokenizer")
    parser.add_argument("--template", choices=TEMPLATES, default="internlm2-chat")
    parser.add_argument("--tile_rule", choices=TILE_RULES, default=tiles.rule)
    parser.add_argument(
        "--max_num",
        type=int,
        default=tiles.max_num,
        help="largest number of tiles, thumbnail not counted",
    )
    parser.add_argument("--tile_size", type=int, default=tiles.tile_size)
    parser.add_argument("--tokens_per_tile", type=int, default=256)
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="fields of the datasettings, e.g. max_length=8192 images.trust_sizes=false",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/data"), help="folder for what is written"
    )


def _settings(args: argparse.Namespace) -> tuple[DataConfig, Processor]:
    if args.config is None:
        if args.tokenizer is None:
            raise ConfigError("give --tokenizer, or --config with a run config")
        config = override(DataConfig(meta=args.meta), args.settings)
        tiles = TileConfig(tile_size=args.tile_size, rule=args.tile_rule, max_num=args.max_num)
        return config, Processor(
            Tokenizer.load(args.tokenizer),
            get_template(args.template),
            None,
            tiles,
            args.tokens_per_tile,
            config.special_text,
            images=config.images,
        )
    run = load_config_file(args.config)
    config, model = override(run.data, args.settings), run.model
    path = args.tokenizer or config.tokenizer
    tokenizer = None if path is None else Tokenizer.load(path)
    if model is None or (tokenizer is None and run.init_from is not None):
        from internvlx_jax.checkpoints.opening import (
            open_checkpoint,
        )  # the only part that needs jax

        checkpoint = open_checkpoint(run.init_from)
        model, tokenizer = model or checkpoint.config, tokenizer or checkpoint.tokenizer()
    if tokenizer is None:
        raise ConfigError(f"{args.config} names no tokenizer; give --tokenizer")
    return config, Processor.for_model(
        model, tokenizer, special_text=config.special_text, images=config.images
    )
