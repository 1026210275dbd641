"""Chat in the terminal; answers appear as they are written.

A line is a prompt. `/image FILE` adds an image to the next one, `/reset` forgets the conversation,
an empty line or the end of the input ends it. From Python, `internvlx_jax.load(...).chat()` does
the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from internvlx_jax.cli.console import CommandParser
from internvlx_jax.core.errors import CheckpointError, ConfigError, SampleError
from internvlx_jax.core.tile_config import TILE_RULES
from internvlx_jax.inference.arguments import MAX_NEW_TOKENS
from internvlx_jax.inference.chat import Chat
from internvlx_jax.inference.vlm import load

SUMMARY = "Chat in the terminal; answers appear as they are written."


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags; those that are options of `VLM.chat` have its names."""
    parser = CommandParser(prog="internvlx chat", description=SUMMARY)
    add = parser.add_argument
    add("--checkpoint", required=True, help="run folder, Hugging Face folder or hub id")
    add("--image", action="append", default=[], help="image of the first prompt; may be repeated")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--ema", action="store_true", help="load a run's average of its parameters")
    add(
        "--max_new_tokens",
        type=int,
        default=argparse.SUPPRESS,
        help=f"most tokens of an answer; {MAX_NEW_TOKENS} if unset, fewer for a small model",
    )
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    add("--top_k", type=int, default=0)
    add("--top_p", type=float, default=1.0)
    add("--repetition_penalty", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add(
        "--stop_string",
        action="append",
        default=[],
        dest="stop",
        help="text that ends an answer; may be repeated",
    )
    add("--tile_rule", choices=TILE_RULES, help="bound of the tile grid; the checkpoint's if unset")
    add("--max_num", type=int, help="most tiles per turn; the checkpoint's if unset")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a conversation and returns the exit status."""
    options = vars(parser().parse_args(argv))
    images, checkpoint = options.pop("image"), options.pop("checkpoint")
    try:
        model = load(checkpoint, dtype=options.pop("dtype"), ema=options.pop("ema"), batch_size=1)
        chat = model.chat(**options)
    except (ConfigError, CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    converse(chat, images)
    return 0


def converse(chat: Chat, images: list[str]) -> None:
    """Reads prompts from the standard input and writes answers to the standard output."""
    while line := read_line():
        if line == "/reset":
            chat.reset()
            images = []
        elif line.startswith("/image "):
            images = [*images, line.removeprefix("/image ").strip()]
        else:
            try:
                for piece in chat.stream(line, images):
                    print(piece, end="", flush=True)
                print()
            except (SampleError, ConfigError) as error:
                print(f"error: {error}", file=sys.stderr)
            images = []


def read_line() -> str:
    """Returns the next line of the standard input, empty at its end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
