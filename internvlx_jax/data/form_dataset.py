"""Writes the dataset of forms that the ablation trains and asks on (design: data.md 20).

    OUT/forms.json                               the configuration and what was written
    OUT/meta_train.json, meta_val.json           InternVL meta files, relative paths
    OUT/forms/train.jsonl, val.jsonl             chats about one form each, all of its fields asked
    OUT/forms/text.jsonl, OUT/meta_text.json     chats about further forms, told in words
    OUT/forms/test.jsonl                         one question per line, of further forms
    OUT/forms/test_blank.jsonl                   the first questions again, on blank pages
    OUT/forms/test_downsized.jsonl               the first questions again, on small copies
    OUT/forms/images/train|val|test|blank|downsized/   PNG files

Form i of a split depends on (seed, split, i) only, so that splits share no form and a longer split
begins with the shorter one. A small copy has a quarter of the width and height.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import new_folder, write_json
from internvlx_jax.core.json_text import read_json_object
from internvlx_jax.core.ranges import COUNT, NUMBER, SEED, check_ranges
from internvlx_jax.data.synthetic import chance
from internvlx_jax.data.synthetic_forms import PAPER, Form, described, make_form, questions

__all__ = ["CONTROLS", "FILES", "FormConfig", "generate_forms"]

VERSION = 6  # raise it with every change that alters a form or a question
FOLDER = "forms"
SUMMARY = "forms.json"
SPLITS = ("train", "val", "test")
TEXT = "text"
CONTROLS = ("blank", "downsized")
FILES = {
    "meta_train": "meta_train.json",
    "meta_val": "meta_val.json",
    "meta_text": "meta_text.json",
    "test": f"{FOLDER}/test.jsonl",
    **{name: f"{FOLDER}/test_{name}.jsonl" for name in CONTROLS},
}


@dataclasses.dataclass(frozen=True)
class FormConfig:
    """Describes the dataset to generate.

    Attributes:
        seed: 0 to 2**32 - 1.
        train, val: Forms of the chats for training and validation.
        test: Forms of the test questions.
        controls: Test forms that are asked about again without their details.
        text: Forms that are told in words, with no image.
    """

    seed: int = 0
    train: int = 8000
    val: int = 100
    test: int = 600
    controls: int = 150
    text: int = 0

    def __post_init__(self):
        check_ranges(self, seed=SEED, train=COUNT, val=COUNT, test=COUNT, controls=COUNT)
        check_ranges(self, text=NUMBER)
        if self.controls > self.test:
            raise ConfigError(f"controls is {self.controls}, it must be at most test, {self.test}")


def generate_forms(folder: str | os.PathLike[str], config: FormConfig) -> dict[str, Any]:
    """Writes the dataset, or reuses it if the folder already holds it.

    Args:
        folder: A new or empty folder, or one that holds the same configuration; it is complete or
            absent.
        config: What to generate.

    Returns:
        The contents of forms.json: `version`, `config`, the number of `questions` of each split,
        and `chance` with the exact match of the best answerer that sees no page, overall and by
        kind of field. FILES names the files.

    Raises:
        ConfigError: The folder holds another dataset.
        FileExistsError: It holds something else.
    """
    folder = Path(folder).absolute()
    wanted = {"version": VERSION, "config": dataclasses.asdict(config)}
    if found := read_json_object(folder / SUMMARY):
        if {name: found.get(name) for name in wanted} != wanted:
            raise ConfigError(
                f"{folder} holds forms of version {found.get('version')} and config "
                f"{found.get('config')}, not {wanted}; choose another folder, or delete it"
            )
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as partial:
        root = partial / FOLDER
        for split in (*SPLITS, *CONTROLS):
            (root / "images" / split).mkdir(parents=True)
        rows = {split: _write_split(root, config, split) for split in SPLITS}
        _write_text(root, config)
        for split in ("train", "val", *([TEXT] if config.text else [])):
            entry = {"root": f"{FOLDER}/", "annotation": f"{FOLDER}/{split}.jsonl"}
            meta = entry | {"data_augment": False, "repeat_time": 1}
            write_json(
                partial / FILES[f"meta_{split}"],
                {"forms": meta | {"length": getattr(config, split)}},
            )
        counts = {split: len(asked) for split, asked in rows.items()}
        summary = wanted | {"questions": counts, "chance": _chance(rows["train"], rows["test"])}
        write_json(partial / SUMMARY, summary)
    return summary


def _chance(known: list[dict[str, Any]], asked: list[dict[str, Any]]) -> dict[str, float]:
    kinds = dict.fromkeys(row["field"] for row in asked)
    return {"all": chance(known, asked)} | {
        kind: chance(known, [row for row in asked if row["field"] == kind]) for kind in kinds
    }


def _write_split(root: Path, config: FormConfig, split: str) -> list[dict[str, Any]]:
    """Writes the files of a split, and returns one row per question."""
    chats, rows = [], []
    number = SPLITS.index(split)
    for index in range(getattr(config, split)):
        rng = _rng(config, number, index)
        form = make_form(rng)
        asked = questions(form, rng)
        name = f"images/{split}/{index:06d}.png"
        form.image.save(root / name, compress_level=1)
        chats.append(_chat(f"{split}-{index:06d}", name, form, asked))
        rows += [
            {"image": name, "question": question, "answer": answer, "field": kind}
            for kind, question, answer in asked
        ]
        if split == "test" and index < config.controls:
            _write_controls(root, name, form.image)
    if split != "test":
        _write_jsonl(root / f"{split}.jsonl", chats)
        return rows
    rows = [{"question_id": number, **row} for number, row in enumerate(rows)]
    _write_jsonl(root / "test.jsonl", rows)
    for control in CONTROLS:
        names = {path.name for path in (root / "images" / control).iterdir()}
        _write_jsonl(
            root / f"test_{control}.jsonl",
            [
                row | {"image": row["image"].replace("/test/", f"/{control}/")}
                for row in rows
                if Path(row["image"]).name in names
            ],
        )
    return rows


def _write_text(root: Path, config: FormConfig) -> None:
    """Writes the chats that have the form's fields in their first turn, in reading order."""
    chats = []
    for index in range(config.text):
        rng = _rng(config, len(SPLITS), index)
        form = make_form(rng)
        turns = _turns(questions(form, rng), described(form) + "\n")
        chats.append({"id": f"{TEXT}-{index:06d}", "conversations": turns})
    if chats:
        _write_jsonl(root / f"{TEXT}.jsonl", chats)


def _rng(config: FormConfig, split: int, index: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((config.seed, 7, split, index)))


def _turns(asked: list[tuple[str, str, str]], before: str) -> list[dict[str, str]]:
    turns = []
    for _, question, answer in asked:
        head = "" if turns else before
        turns += [{"from": "human", "value": head + question}, {"from": "gpt", "value": answer}]
    return turns


def _chat(id: str, image: str, form: Form, asked: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Returns a sample in InternVL's format that asks everything in one conversation."""
    turns = _turns(asked, "<image>\n")
    width, height = form.image.size
    sample = {"id": id, "image": image, "width": width, "height": height}
    return sample | {"conversations": turns}


def _write_controls(root: Path, name: str, image: Image.Image) -> None:
    """Writes an empty page of the same size on gray paper, and a copy of a quarter of the sides."""
    blank = Image.new("RGB", image.size, (sum(PAPER) // 2,) * 3)
    blank.save(root / name.replace("/test/", "/blank/"), compress_level=1)
    small = image.resize((image.width // 4, image.height // 4), Image.Resampling.BICUBIC)
    small.save(root / name.replace("/test/", "/downsized/"), compress_level=1)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
