"""Chat in the terminal; answers appear as they are written.

A line is a prompt. `/image FILE` adds an image to the next one, `/video FILE` a video, `/reset`
forgets the conversation, `//text` sends "/text", an empty line or the end of the input ends it.
Ctrl-C ends an answer, and at the prompt the conversation. From Python,
`internvlx_jax.load(...).chat()` does the same.
"""

from __future__ import annotations

import argparse
import difflib
import io
import re
import sys
from collections.abc import Sequence

from internvlx_jax.cli.console import CommandParser, run_command
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.ranges import COUNT, NUMBER, SEED, Range, whole_number
from internvlx_jax.core.tile_config import MOST_TILES, TILE_RULES
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER
from internvlx_jax.inference.arguments import MAX_NEW_TOKENS
from internvlx_jax.inference.chat import Chat

COMMANDS = ("/image", "/video", "/reset")
HELP = (
    "the commands are /image FILE, /video FILE and /reset; // sends a text that begins with /, and "
    "an empty line ends the conversation"
)
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
        type=whole_number(COUNT),
        default=argparse.SUPPRESS,
        help=f"most tokens of an answer; {MAX_NEW_TOKENS} if unset, fewer for a small model",
    )
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    add("--top_k", type=whole_number(NUMBER), default=0)
    add("--top_p", type=float, default=1.0)
    add("--repetition_penalty", type=float, default=1.0)
    add("--seed", type=whole_number(SEED), default=0)
    add(
        "--stop_string",
        action="append",
        default=[],
        dest="stop",
        help="text that ends an answer; may be repeated",
    )
    add("--tile_rule", choices=TILE_RULES, help="bound of the tile grid; the checkpoint's if unset")
    most = whole_number(Range(1, MOST_TILES))
    add("--max_num", type=most, help="most tiles per turn; the checkpoint's if unset")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a conversation and returns the exit status."""
    options = vars(parser().parse_args(argv))
    images, checkpoint = options.pop("image"), options.pop("checkpoint")

    def talk() -> None:
        from internvlx_jax.inference.vlm import load  # with jax, which --help does without

        model = load(checkpoint, dtype=options.pop("dtype"), ema=options.pop("ema"), batch_size=1)
        converse(model.chat(**options), images)

    return run_command(talk, ValueError, interrupted="")


def converse(chat: Chat, images: list[str]) -> None:
    """Reads prompts from the standard input and writes answers to the standard output.

    Raises:
        KeyboardInterrupt: Ctrl-C at the prompt; in an answer it ends that answer only.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes of another encoding are told below
    video: str | None = None
    while (line := read_line()) != "":
        word = (line or "").partition(" ")[0]
        if line is None:
            complain("this line is not UTF-8; set the terminal to UTF-8 and type it again")
        elif line == "/reset":
            chat.reset()
            images, video = [], None
        elif word == "/image":
            images = add_image(images, line.removeprefix("/image").strip())
        elif word == "/video":
            video = line.removeprefix("/video").strip() or None
            if video is None:
                complain("/video needs a file: /video FILE")
        elif re.fullmatch(r"/\w+", word):
            near = difflib.get_close_matches(word, COMMANDS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            complain(f"unknown command {word}; {hint}{HELP}")
        else:
            answer(chat, line.removeprefix("/") if line.startswith("//") else line, images, video)
            images, video = [], None


def read_line() -> str | None:
    """Returns the next line of the standard input; empty at its end, None if it is not UTF-8."""
    try:
        line = input("> ").strip()
        line.encode()
    except EOFError:
        return ""
    except UnicodeError:
        return None
    return line


def add_image(images: list[str], path: str) -> list[str]:
    """Returns the images of the next prompt with one more."""
    if not path:
        complain("/image needs a file: /image FILE")
        return images
    return [*images, path]


def answer(chat: Chat, prompt: str, images: list[str], video: str | None) -> None:
    """Answers one prompt; an error, or Ctrl-C, leaves the conversation as it was."""
    if IMAGE_PLACEHOLDER in prompt and not images and not video:
        complain(f'no /image was given, so "{IMAGE_PLACEHOLDER}" is ordinary text', kind="note")
    try:
        for piece in chat.stream(prompt, images, video=video):
            print(piece, end="", flush=True)
        print()
    except SampleError as error:
        told = str(error).partition("\n")[0]
        given = ["/image"] * bool(images) + ["/video"] * (video is not None)
        hint = f"; give another {' and '.join(given)}" if given else ""
        complain(f"{told.removeprefix('prompt: ').rstrip('.')}{hint}")
    except ConfigError as error:
        complain(str(error))
    except KeyboardInterrupt:
        print()
        complain("the answer was ended, and is not part of the conversation", kind="note")


def complain(message: str, kind: str = "error") -> None:
    """Says in one line what is wrong; the conversation goes on."""
    print(f"{kind}: {message}", file=sys.stderr)
