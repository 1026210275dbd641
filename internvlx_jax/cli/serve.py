"""Answers OpenAI's chat completions over HTTP (design: serving.md 2)."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from internvlx_jax.cli.console import CommandParser, configure_logging, run_command
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.extras import require
from internvlx_jax.core.ranges import COUNT, NUMBER, Range, whole_number
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.core.tile_config import MOST_TILES
from internvlx_jax.inference.engine import Engine
from internvlx_jax.inference.remote_images import ImageRules
from internvlx_jax.inference.vlm import load
from internvlx_jax.models.sharding import make_mesh

SUMMARY = "Answer OpenAI's chat completions over HTTP, many clients at a time."
MIB = 2**20


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = CommandParser(prog="internvlx serve", description=SUMMARY)
    add = parser.add_argument
    add("--checkpoint", required=True, help="run folder, Hugging Face folder or hub id")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--ema", action="store_true", help="load a run's average of its parameters")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    add("--port", type=whole_number(Range(0, 65535)), default=8000, help="(%(default)s)")
    add("--model_name", help="name of the model in requests and replies; the checkpoint if unset")
    add("--tensor", type=whole_number(COUNT), default=1, help="devices that share heads and widths")
    group = parser.add_argument_group("size")
    add = group.add_argument
    add("--slots", type=whole_number(COUNT), default=8, help="requests answered at a time (8)")
    add("--max_length", type=whole_number(COUNT), help="tokens of prompt and answer of a request")
    most = whole_number(Range(1, 10 * MOST_TILES))
    add("--max_tiles", type=most, help="tiles of all images of a request")
    add("--queue", type=whole_number(NUMBER), default=64, help="requests that may wait (64)")
    group = parser.add_argument_group("access")
    add = group.add_argument
    text = "clients have to send it; INTERNVLX_API_KEY, or everybody is let in, if unset"
    add("--api_key", default=os.environ.get("INTERNVLX_API_KEY"), help=text)
    add("--allow_http", action="store_true", help="fetch images of http(s) URLs, public hosts only")
    add("--media_root", type=Path, help="folder below which file:// URLs may be read")
    add("--max_image_mib", type=whole_number(COUNT), default=32, help="size of an image file (32)")
    add("--max_video_mib", type=whole_number(COUNT), default=64, help="size of a video file (64)")
    add("--max_body_mib", type=whole_number(COUNT), default=64, help="size of a request (64)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT, which let running requests finish; returns the status."""
    flags = parser().parse_args(argv)
    configure_logging()
    return run_command(lambda: serve(flags))


def serve(flags: argparse.Namespace) -> None:
    """Serves until a signal.

    Raises:
        ConfigError: an extra is missing, or a flag does not fit the checkpoint.
    """
    uvicorn = require("uvicorn", extra="serve", purpose="the server")
    require("starlette", extra="serve", purpose="the server")
    from internvlx_jax.inference.server import Server, ServerConfig

    if flags.media_root is not None and not flags.media_root.is_dir():
        raise ConfigError(f"--media_root {flags.media_root} is not a folder")
    config = ServerConfig(
        model=flags.model_name or flags.checkpoint.rstrip("/"),
        images=ImageRules(
            flags.allow_http,
            flags.media_root,
            flags.max_image_mib * MIB,
            max_video_bytes=flags.max_video_mib * MIB,
        ),
        api_key=flags.api_key,
        max_body=flags.max_body_mib * MIB,
    )
    server = Server(lambda: make_engine(flags), config, lambda: setattr(http, "should_exit", True))
    http = uvicorn.Server(
        uvicorn.Config(
            server.app(),
            host=flags.host,
            port=flags.port,
            log_config=None,
            access_log=False,
            lifespan="on",
        )
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    print(f"listening at http://{flags.host}:{flags.port}, loading {flags.checkpoint}", flush=True)
    http.run()
    if server.failure is not None:
        raise server.failure


def make_engine(flags: argparse.Namespace) -> Engine:
    """Loads the checkpoint and returns its engine, with everything compiled."""
    if flags.tensor > len(jax.devices()):
        raise ConfigError(f"--tensor is {flags.tensor}, but there are {len(jax.devices())} devices")
    mesh = make_mesh(MeshConfig(tensor=flags.tensor), jax.devices()[: flags.tensor])
    model = load(
        flags.checkpoint, dtype=flags.dtype, ema=flags.ema, revision=flags.revision, mesh=mesh
    )
    engine = model.engine(
        slots=flags.slots,
        capacity=flags.max_length,
        max_tiles=flags.max_tiles,
        waiting=flags.queue,
    )
    engine.start()
    return engine
