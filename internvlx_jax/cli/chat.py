"""Chat in the terminal; answers appear as they are written.

A line is a question. `/image FILE` adds an image to the next one, `/reset` forgets the conversation, an empty line or
the end of the input ends it. From Python, `internvlx_jax.load(...).chat` does the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from internvlx_jax.core.errors import CheckpointError, ConfigError, SampleError
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.tile_config import TILE_RULES
from internvlx_jax.inference.chat import Chat
from internvlx_jax.inference.loading import load_pretrained


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="internvlx chat", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, help="Hugging Face folder or run folder of train.py"
    )
    parser.add_argument(
        "--image", action="append", default=[], help="image of the first question; may be repeated"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most likely token"
    )
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop_string",
        action="append",
        default=[],
        help="text that ends an answer; may be repeated",
    )
    parser.add_argument("--tile_rule", choices=TILE_RULES, help="the checkpoint's by default")
    parser.add_argument(
        "--max_num", type=int, help="most tiles an image; the checkpoint's by default"
    )
    args = parser.parse_args(argv)
    try:
        pretrained = load_pretrained(args.checkpoint, dtype=args.dtype)
        changes = {"rule": args.tile_rule, "max_num": args.max_num}
        changes = {name: value for name, value in changes.items() if value is not None}
        tiles = dataclasses.replace(pretrained.config.prompt.tiles, **changes)
        sampling = Sampling(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
        )
        chat = Chat(
            pretrained,
            tiles=tiles,
            sampling=sampling,
            seed=args.seed,
            max_new_tokens=args.max_new_tokens,
            stop_strings=args.stop_string,
        )
    except (ConfigError, CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    converse(chat, list(args.image))
    return 0


def converse(chat: Chat, images: list[str]) -> None:
    """Questions from the standard input, answers to the standard output."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        if line == "/reset":
            chat.reset()
            images = []
        elif line.startswith("/image "):
            images.append(line.removeprefix("/image ").strip())
        else:
            try:
                for piece in chat.ask(line, images):
                    print(piece, end="", flush=True)
                print()
                images = []
            except SampleError as error:
                print(f"error: {error}", file=sys.stderr)
                images = []
