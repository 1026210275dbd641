"""The engine beside batches of one shape, where all questions are there at the start.

`python benchmarks/serve_load.py offline` answers the same questions in one process by
`load(...).generate(list)` and by `model.engine(slots=N)`, in turns, A B A B. Prompts have mixed
lengths and numbers of images, and a stop string ends the answers of random weights at different
lengths. Both have compiled all their programs before the clock starts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

from mutated_requests import png

Asked = list[tuple[str, list[bytes]]]  # text and encoded images of each question


def offline(flags: argparse.Namespace, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Returns questions per second of both ways in each round, and their ratio."""
    import jax

    import internvlx_jax as ivx

    jax.config.update("jax_compilation_cache_dir", environment["JAX_COMPILATION_CACHE_DIR"])
    model = ivx.load(flags.checkpoint, dtype=flags.dtype, batch_size=flags.batch_size)
    asked = mixed(flags.questions, flags.seed, model.config.prompt.tiles.tile_size, flags.max_tiles)
    options = {"max_new_tokens": flags.max_tokens, "stop": flags.stop or ()}
    engine = model.engine(
        slots=flags.slots,
        capacity=flags.max_length,
        max_tiles=flags.max_tiles,
        waiting=len(asked),
    )
    engine.start()
    ways = {
        "generate": lambda: in_batches(model, asked, options),
        "engine": lambda: in_slots(model, engine, asked, options),
    }
    answers = {name: way() for name, way in ways.items()}  # compiles what is not compiled
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(flags.rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            repeated = way()
            seconds[name].append(time.perf_counter() - begun)
            assert repeated == answers[name], f"{name} answers otherwise the second time"
    engine.close()
    return report(flags, asked, seconds, answers) | {
        "compiles_after_start": engine.state().compiles
    }


def mixed(count: int, seed: int, tile: int, max_tiles: int) -> Asked:
    """Returns questions of mixed lengths with none, one or two images."""
    draw, made = random.Random(seed), []
    for i in range(count):
        number = min(draw.choice([0, 0, 1, 1, 1, 2]), max_tiles)
        # One image of up to 6 tiles and a thumbnail, or images of one tile.
        most = 2 * tile if number == 1 and max_tiles >= 7 else tile
        sides = [(draw.randrange(tile // 2, most), draw.randrange(tile // 2, most))] * number
        text = f"Question {i}? " + "word " * draw.choice([0, 5, 40, 90])
        made.append((text, [png(*side, 10 * i + page) for page, side in enumerate(sides)]))
    return made


def in_batches(model: Any, asked: Asked, options: dict[str, Any]) -> list[str]:
    """Answers all questions in batches of one shape."""
    texts, images = map(list, zip(*asked, strict=True))
    return model.generate(texts, images, **options)


def in_slots(model: Any, engine: Any, asked: Asked, options: dict[str, Any]) -> list[str]:
    """Answers all questions by the engine, all of them waiting from the start."""
    import queue

    from internvlx_jax.inference.arguments import make_request

    spec, ended = model.spec(**options), queue.SimpleQueue()
    for number, (text, images) in enumerate(asked):

        def deliver(piece: Any, number: int = number) -> None:
            if piece.is_last:
                ended.put((number, piece.answer))

        engine.submit(make_request(text, images), spec, deliver)
    found = dict(ended.get() for _ in asked)
    failed = [answer and answer.error for answer in found.values() if not answer or answer.error]
    assert not failed, failed[0]
    return [found[number].text for number in range(len(asked))]


def report(
    flags: argparse.Namespace,
    asked: Asked,
    seconds: dict[str, list[float]],
    answers: dict[str, list[str]],
) -> dict[str, Any]:
    """Returns the numbers; the ratio is above 1 where the engine is faster."""
    pairs = list(zip(seconds["generate"], seconds["engine"], strict=True))
    ratios = [generate / engine for generate, engine in pairs]
    return {
        "questions": len(asked),
        "slots": flags.slots,
        "batch_size": flags.batch_size,
        "generate_per_second": [round(len(asked) / each, 2) for each in seconds["generate"]],
        "engine_per_second": [round(len(asked) / each, 2) for each in seconds["engine"]],
        "engine_to_generate": round(statistics.median(ratios), 3),
        "engine_to_generate_by_round": [round(ratio, 3) for ratio in ratios],
        "distinct_answers": len(set(answers["generate"])),
        "equal_answers": sum(
            a == b for a, b in zip(answers["generate"], answers["engine"], strict=True)
        ),
    }
