"""Writes a dataset from which a tiny model learns to read pages (design: data.md 1, 2).

    python -m internvlx_jax.data.synthetic --out runs/synthetic

    OUT/synthetic.json                                     the configuration and what was written
    OUT/meta_train.json, meta_val.json                     InternVL meta files, relative paths
    OUT/synthetic_pages/train.jsonl, val.jsonl             chats about one page or two, or text only
    OUT/synthetic_pages/val_vqa.jsonl, val_blank_vqa.jsonl one question per line, about one page
    OUT/synthetic_pages/images/train|val|blank/            PNG files

A conversation asks once about every field of its page, or about three fields of its two pages.
Every value is uniform and independent of everything else on the page, so an answerer that does not
see the image is right about one time in nine. The blank questions are the validation questions on
empty pages of the same sizes. Sample i of a split depends on (seed, split, i) only: a longer
dataset begins with the shorter one.
"""

import argparse
import collections
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.ranges import COUNT, SEED, SHARE, check_ranges
from internvlx_jax.data.synthetic_pages import KINDS, Page, make_page

__all__ = [
    "FILES",
    "TOKENIZER_FOLDER",
    "SyntheticConfig",
    "chance",
    "generate",
    "make_page",
    "text_samples",
]

# Written by synthetic_tokenizer.py.
TOKENIZER_FOLDER = Path(__file__).parent / "assets" / "synthetic_tokenizer"

# Raise it with every change that alters a page or a sample, so that old folders are not reused.
VERSION = 4
PAGES = "synthetic_pages"
FILES = {
    "meta_train": "meta_train.json",
    "meta_val": "meta_val.json",
    "val_vqa": f"{PAGES}/val_vqa.jsonl",
    "val_blank_vqa": f"{PAGES}/val_blank_vqa.jsonl",
}
SPLITS = ("train", "val")
SUMMARY = "synthetic.json"


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Describes the dataset to generate.

    Attributes:
        seed: 0 to 2**32 - 1.
        train_samples: Lines of train.jsonl.
        val_samples: Lines of val.jsonl.
        two_page_share: Share of samples with two images and questions about the first or the second
            page.
        text_share: Share of samples without an image.
    """

    seed: int = 0
    train_samples: int = 7000
    val_samples: int = 300
    two_page_share: float = 0.1
    text_share: float = 0.05

    def __post_init__(self):
        check_ranges(
            self,
            seed=SEED,
            train_samples=COUNT,
            val_samples=COUNT,
            two_page_share=SHARE,
            text_share=SHARE,
        )
        if self.two_page_share + self.text_share > 1:
            raise ConfigError(
                f"two_page_share={self.two_page_share} and text_share={self.text_share} must be at "
                "least 0 and at most 1 together."
            )


def text_samples() -> list[tuple[str, str]]:
    """Returns all (question, answer) pairs of the text-only samples.

    They ask to copy a value, or to count on by one.
    """
    values = sorted({value for kind in KINDS.values() for value in kind.values})
    repeat = [(f"Repeat the word: {value}.", value) for value in values]
    return repeat + [(f"Which number comes after {n}?", str(n + 1)) for n in range(1, 9)]


def _turns(questions: Iterable[tuple[str, str]], head: str) -> list[dict[str, str]]:
    """Returns human and gpt turns; `head` holds the image placeholders of the first turn."""
    turns = []
    for question, answer in questions:
        turns += [{"from": "human", "value": head + question}, {"from": "gpt", "value": answer}]
        head = ""
    return turns


def _ask(page: Page, rng: np.random.Generator, prefix: str = "") -> list[tuple[str, str]]:
    """Returns one question about each field, in random order and wording."""
    fields = [page.fields[i] for i in rng.permutation(len(page.fields))]
    return [
        (prefix + str(rng.choice(KINDS[field.kind].questions)), field.value) for field in fields
    ]


def _sample(config: SyntheticConfig, split: str, index: int) -> tuple[dict[str, Any], list[Page]]:
    """Returns sample `index` of a split: its JSONL object without image paths, and its pages.

    The sample has no page, one or two.
    """
    rng = np.random.default_rng(np.random.SeedSequence((config.seed, SPLITS.index(split), index)))
    sample: dict[str, Any] = {"id": f"{split}-{index:06d}"}
    kind = rng.random()
    if kind < config.text_share:
        pairs = text_samples()
        sample["conversations"] = _turns([pairs[rng.integers(len(pairs))]], "")
        return sample, []
    if kind < config.text_share + config.two_page_share:
        # One tile per page and three questions keep these samples as short as the others.
        pages = [make_page(rng, (1, 1)), make_page(rng, (1, 1))]
        questions = [
            pair
            for page, where in zip(pages, ("First", "Second"), strict=True)
            for pair in _ask(page, rng, f"{where} page: ")
        ]
        questions = [questions[i] for i in rng.permutation(len(questions))[:3]]
        sample["width_list"] = [page.image.width for page in pages]
        sample["height_list"] = [page.image.height for page in pages]
        sample["conversations"] = _turns(questions, "Image-1: <image>\nImage-2: <image>\n")
        return sample, pages
    page = make_page(rng)
    sample["width"], sample["height"] = page.image.size
    sample["conversations"] = _turns(_ask(page, rng), "<image>\n")
    return sample, [page]


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _save(image: Image.Image, root: Path, name: str) -> str:
    image.save(root / name, compress_level=1)
    return name


def _write_split(root: Path, config: SyntheticConfig, split: str) -> list[dict[str, Any]]:
    """Writes the JSONL file and the images of a split below `root`, and returns its samples."""
    (root / "images" / split).mkdir(parents=True)
    samples = []
    for index in range(getattr(config, f"{split}_samples")):
        sample, pages = _sample(config, split, index)
        suffixes = ("a", "b") if len(pages) == 2 else ("",) * len(pages)
        paths = [
            _save(page.image, root, f"images/{split}/{index:06d}{suffix}.png")
            for page, suffix in zip(pages, suffixes, strict=True)
        ]
        if paths:
            sample["image"] = paths[0] if len(paths) == 1 else paths
        samples.append(sample)
    _write_jsonl(root / f"{split}.jsonl", samples)
    return samples


def _vqa_rows(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row per question of the single-page samples, as in generic VQA files."""
    kinds = {question: name for name, kind in KINDS.items() for question in kind.questions}
    rows = []
    for sample in samples:
        if not isinstance(sample.get("image"), str):
            continue
        texts = [turn["value"].removeprefix("<image>\n") for turn in sample["conversations"]]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            row = {
                "question_id": len(rows),
                "image": sample["image"],
                "question": question,
                "answer": answer,
            }
            rows.append(row | {"field": kinds[question]})
    return rows


def _write_vqa(root: Path, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes the validation questions, and the same on blank pages.

    Returns the rows of the former.
    """
    rows = _vqa_rows(samples)
    if not rows:
        raise ValueError(
            f"none of the {len(samples)} validation samples has exactly one page. "
            "Raise val_samples, or lower text_share and two_page_share."
        )
    (root / "images" / "blank").mkdir()
    blank = {}
    for sample in samples:
        if isinstance(sample.get("image"), str):
            page = Image.new("RGB", (sample["width"], sample["height"]), "white")
            blank[sample["image"]] = _save(page, root, sample["image"].replace("/val/", "/blank/"))
    _write_jsonl(root / "val_vqa.jsonl", rows)
    _write_jsonl(
        root / "val_blank_vqa.jsonl", [row | {"image": blank[row["image"]]} for row in rows]
    )
    return rows


def chance(known: Iterable[Mapping[str, str]], rows: Iterable[Mapping[str, str]]) -> float:
    """Returns the exact match on `rows` of the best answerer that does not see the image.

    It knows the kind of field that is asked for, and always gives the answer that was most frequent
    for that kind in the training questions.

    Args:
        known: Training questions: objects with `field` and `answer`.
        rows: Questions to answer, such as the lines of val_vqa.jsonl.
    """
    counts = collections.defaultdict(collections.Counter)
    for row in known:
        counts[row["field"]][row["answer"]] += 1
    guesses = {field: answers.most_common(1)[0][0] for field, answers in counts.items()}
    hits = [row["answer"] == guesses.get(row["field"]) for row in rows]
    return sum(hits) / len(hits)


def _read_summary(folder: Path, config: SyntheticConfig) -> dict[str, Any] | None:
    """Returns the summary of a finished dataset in `folder`, None if the folder is empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    path = folder / SUMMARY
    if not path.is_file():
        raise FileExistsError(
            f"{folder} is not empty and holds no {SUMMARY}. Choose another folder."
        )
    summary = json.loads(path.read_text(encoding="utf-8"))
    want = {"version": VERSION, **dataclasses.asdict(config)}
    have = {"version": summary.get("version"), **summary.get("config", {})}
    keys = [key for key in want if have.get(key) != want[key]]
    changes = [f"{key}: {have.get(key)} in {SUMMARY}, {want[key]} wanted" for key in keys]
    if changes:
        raise FileExistsError(
            f"{folder} holds another dataset ({'; '.join(changes)}). "
            "Choose another folder, or delete it."
        )
    return summary


def generate(folder: str | os.PathLike[str], config: SyntheticConfig) -> dict[str, Any]:
    """Writes the dataset, or reuses it if the folder already holds it.

    The files are written into a sibling folder, which is renamed at the end: `folder` is complete
    or absent.

    Args:
        folder: A new or empty folder, or one that holds the same configuration.
        config: What to generate.

    Returns:
        The contents of synthetic.json: `version`, `config`, counts of `train` and `val` (`samples`,
        `images`, `questions`), `vqa_questions`, and `chance` (see chance()) of val_vqa.jsonl. FILES
        names the files.

    Raises:
        FileExistsError: `folder` holds something else.
        ValueError: No validation sample has exactly one page.
    """
    folder = Path(folder).absolute()
    if (summary := _read_summary(folder, config)) is not None:
        return summary
    folder.parent.mkdir(parents=True, exist_ok=True)
    summary = {"version": VERSION, "config": dataclasses.asdict(config)}
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        written = {}
        for split in SPLITS:
            samples = written[split] = _write_split(partial / PAGES, config, split)
            summary[split] = {
                "samples": len(samples),
                "images": sum(1 for _ in (partial / PAGES / "images" / split).iterdir()),
                "questions": sum(len(sample["conversations"]) // 2 for sample in samples),
            }
            entry = {
                "root": f"{PAGES}/",
                "annotation": f"{PAGES}/{split}.jsonl",
                "data_augment": False,
            }
            _write_json(
                partial / FILES[f"meta_{split}"],
                {"synthetic": entry | {"repeat_time": 1, "length": len(samples)}},
            )
        rows = _write_vqa(partial / PAGES, written["val"])
        summary |= {"vqa_questions": len(rows), "chance": chance(_vqa_rows(written["train"]), rows)}
        _write_json(partial / SUMMARY, summary)
        partial.replace(folder)
    return summary


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--out` and a flag for each field of the config."""
    parser.add_argument(
        "--out", required=True, help="folder to write; reused if it holds the same dataset"
    )
    for field in dataclasses.fields(SyntheticConfig):
        assert field.default is not dataclasses.MISSING
        parser.add_argument(
            f"--{field.name}", type=type(field.default), default=field.default, help="%(default)s"
        )


def generate_by_flags(args: argparse.Namespace) -> None:
    """Writes the dataset and prints its summary."""
    names = [field.name for field in dataclasses.fields(SyntheticConfig)]
    config = SyntheticConfig(**{name: getattr(args, name) for name in names})
    print(json.dumps(generate(args.out, config), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the generated dataset.")
    add_flags(parser)
    generate_by_flags(parser.parse_args())


if __name__ == "__main__":
    main()
