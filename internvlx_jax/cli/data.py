"""Look at training data before training on it, or generate some.

    internvlx data check META --tokenizer FOLDER
    internvlx data show META --tokenizer FOLDER --sample 0
    internvlx data generate --out FOLDER

A run config (--config) says how its model reads samples; without one, flags do. --set changes
fields of the data settings, e.g. --set max_length=8192 batch_mode=pack.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from internvlx_jax.cli.console import CommandParser, configure_logging, run_command
from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import load_config_file, override
from internvlx_jax.core.ranges import COUNT, NUMBER, Range, whole_number
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.core.tile_config import MOST_TILES, TILE_RULES, TileConfig
from internvlx_jax.data.buckets import SlotCosts
from internvlx_jax.data.check import check, format_check
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.sample_page import show
from internvlx_jax.data.synthetic import add_flags, generate_by_flags
from internvlx_jax.data.templates import TEMPLATES, get_template
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.flops import slot_flops


def main(argv: list[str] | None = None) -> int:
    """Runs `internvlx data` and returns its exit status: 1 for an error, named on stderr."""
    args = _parser().parse_args(argv)
    configure_logging()
    return run_command(lambda: args.run(args), ValueError)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="internvlx data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser(
        "check", help="a table of every dataset: samples, tiles, lengths, padding, bad ones"
    )
    _add_reading_flags(checking)
    checking.add_argument(
        "--decode", action="store_true", help="decode every image too, to count damaged ones"
    )
    checking.set_defaults(run=_check)
    showing = commands.add_parser(
        "show", help="one sample as an HTML page with its tiles and colored tokens"
    )
    _add_reading_flags(showing)
    showing.add_argument(
        "--sample", type=whole_number(NUMBER), default=0, help="number of the usable sample, from 0"
    )
    showing.set_defaults(run=_show)
    generating = commands.add_parser(
        "generate", help="synthetic pages with questions, on which a tiny model learns to read"
    )
    add_flags(generating)
    generating.set_defaults(run=generate_by_flags)
    return parser


def _add_reading_flags(parser: argparse.ArgumentParser) -> None:
    tiles = TileConfig()
    parser.add_argument("meta", metavar="META", help="meta JSON")
    parser.add_argument(
        "--config",
        help="a run config, a file of configs/: its data settings and its model's prompt",
    )
    parser.add_argument("--tokenizer", help="folder or file of the tokenizer")
    parser.add_argument("--template", choices=TEMPLATES, default="internlm2-chat")
    parser.add_argument("--tile_rule", choices=TILE_RULES, default=tiles.rule)
    parser.add_argument(
        "--max_num",
        type=whole_number(Range(1, MOST_TILES)),
        default=tiles.max_num,
        help="largest number of tiles per image, the thumbnail excluded",
    )
    parser.add_argument("--tile_size", type=whole_number(COUNT), default=tiles.tile_size)
    parser.add_argument("--tokens_per_tile", type=whole_number(COUNT), default=256)
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="fields of the data settings, e.g. max_length=8192 images.trust_sizes=false",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/data"), help="folder for what is written"
    )


def _check(args: argparse.Namespace) -> None:
    config, processor, costs = _settings(args)
    report = check(
        args.meta,
        config,
        processor,
        row_quantum=config.row_quantum or 1,
        costs=costs,
        decode=args.decode,
    )
    written = report.save(args.out)
    print(format_check(report))
    print(f"histograms: {written}")


def _show(args: argparse.Namespace) -> None:
    config, processor, costs = _settings(args)
    loader = Loader(
        args.meta,
        config,
        processor,
        row_quantum=config.row_quantum or 1,
        seed=0,
        costs=costs,
        progress=True,
    )
    print(show(loader, args.sample, args.out))


def _settings(args: argparse.Namespace) -> tuple[DataConfig, Processor, SlotCosts]:
    """Returns the data settings, how the model of the run config or the flags reads samples, and
    the work of its slots.
    """
    if args.config is None:
        if args.tokenizer is None:
            raise ConfigError("give --tokenizer, or --config with a run config")
        config = override(DataConfig(meta=args.meta), args.settings)
        tiles = TileConfig(tile_size=args.tile_size, rule=args.tile_rule, max_num=args.max_num)
        processor = Processor(
            Tokenizer.load(args.tokenizer),
            get_template(args.template),
            None,
            tiles,
            args.tokens_per_tile,
            config.special_text,
            images=config.images,
        )
        return config, processor, SlotCosts()
    run = load_config_file(args.config)
    config = override(run.data, args.settings)
    model, tokenizer = _model(args.config, run, args.tokenizer or config.tokenizer)
    processor = Processor.for_model(
        model, tokenizer, special_text=config.special_text, images=config.images
    )
    return config, processor, SlotCosts.of(*slot_flops(model))


def _model(
    config_file: str, run: TrainConfig, tokenizer_path: str | None
) -> tuple[ModelConfig, Tokenizer]:
    """Returns the model of a run and its tokenizer, from its checkpoint where the run names none.

    Raises:
        ConfigError: neither the run nor its checkpoint has them.
    """
    model = run.model
    tokenizer = None if tokenizer_path is None else Tokenizer.load(tokenizer_path)
    if run.init_from is not None and (model is None or tokenizer is None):
        # Only a checkpoint needs jax, which takes seconds to import.
        from internvlx_jax.checkpoints.opening import open_checkpoint

        checkpoint = open_checkpoint(run.init_from)
        model = model or checkpoint.config
        tokenizer = tokenizer or Tokenizer.find(checkpoint.tokenizer_folder)
    if model is None:
        raise ConfigError(f"{config_file} names neither a model nor init_from; set one of them")
    if tokenizer is None:
        raise ConfigError(f"{config_file} names no tokenizer; give --tokenizer")
    return model, tokenizer
