"""The generated dataset: deterministic, balanced, readable from the image and from nothing else."""

import collections
import dataclasses
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data import synthetic
from internvlx_jax.data.synthetic import (
    FILES,
    PAGES,
    TOKENIZER_FOLDER,
    SyntheticConfig,
    chance,
    generate,
)
from internvlx_jax.data.synthetic_pages import BAND, GRIDS, KINDS, TILE, make_page
from internvlx_jax.data.synthetic_tokenizer import (
    ADDED_TOKENS,
    PIECES,
    SYSTEM_TEXTS,
    train_tokenizer,
)
from internvlx_jax.data.templates import get_template, prompt_text
from internvlx_jax.data.tiles import choose_grid, tile_count
from internvlx_jax.data.tokenizer import Tokenizer

CONFIG = SyntheticConfig(seed=3, train_samples=900, val_samples=150)
FIELD_OF = {question: name for name, kind in KINDS.items() for question in kind.questions}
SMALL = SyntheticConfig(train_samples=12, val_samples=6, two_page_share=0.3, text_share=0.2)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def image_hashes(folder, split):
    files = (folder / PAGES / "images" / split).iterdir()
    return {hashlib.sha256(path.read_bytes()).digest() for path in files}


def questions(sample):
    """(question, answer) of each turn, without the image placeholder."""
    texts = [turn["value"].removeprefix("<image>\n") for turn in sample["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def single_page(samples):
    return [sample for sample in samples if isinstance(sample.get("image"), str)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    return folder, generate(folder, CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(TOKENIZER_FOLDER)


# Files and determinism


def test_same_config_gives_the_same_bytes(tmp_path):
    generate(tmp_path / "a", SMALL)
    generate(tmp_path / "b", SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_longer_data_set_begins_with_the_shorter(tmp_path):
    generate(tmp_path / "a", SMALL)
    generate(tmp_path / "b", dataclasses.replace(SMALL, train_samples=15))
    long, short = (contents(tmp_path / name / PAGES / "images") for name in "ba")
    assert short.items() <= long.items()
    assert len(short) < len(long)


def test_splits_and_seeds_share_no_page(dataset, tmp_path):
    folder, summary = dataset
    train, val = image_hashes(folder, "train"), image_hashes(folder, "val")
    assert (
        len(train) == summary["train"]["images"] and len(val) == summary["val"]["images"]
    )  # no page twice
    assert not train & val
    generate(tmp_path / "other", SyntheticConfig(seed=4, train_samples=30, val_samples=10))
    assert not train & image_hashes(tmp_path / "other", "train")


def test_finished_folder_is_reused(tmp_path):
    first = generate(tmp_path / "a", SMALL)
    marker = next((tmp_path / "a" / PAGES / "images" / "val").iterdir())
    marker.write_bytes(b"untouched")
    assert generate(tmp_path / "a", SMALL) == first
    assert marker.read_bytes() == b"untouched"


def test_folder_with_something_else_is_refused(tmp_path):
    generate(tmp_path / "a", SMALL)
    with pytest.raises(FileExistsError, match="seed: 0 in synthetic.json, 9 wanted"):
        generate(tmp_path / "a", dataclasses.replace(SMALL, seed=9))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no synthetic.json"):
        generate(tmp_path / "b", SMALL)
    assert contents(tmp_path / "b").keys() == {
        (tmp_path / "b" / "notes.txt").relative_to(tmp_path / "b")
    }


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(path, rows):
        raise OSError("no space left")

    monkeypatch.setattr(synthetic, "_write_jsonl", full_disk)
    with pytest.raises(OSError, match="no space left"):
        generate(tmp_path / "a", SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", -1),
        ("train_samples", 0),
        ("val_samples", 0),
        ("text_share", -0.1),
        ("two_page_share", 0.99),
    ],
)
def test_bad_config(name, value):
    with pytest.raises(ValueError, match=rf"{name}(=| is ){value}"):
        SyntheticConfig(**{name: value})


def test_command_line_without_jax(tmp_path):
    code = (
        "import sys; from internvlx_jax.data.synthetic import main; main(); "
        "assert not {'jax', 'sentencepiece'} & set(sys.modules)"
    )
    options = {"out": tmp_path / "a", "train_samples": 2, "val_samples": 4, "text_share": 0}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = SyntheticConfig(train_samples=2, val_samples=4, text_share=0.0)
    assert json.loads(done.stdout)["config"] == dataclasses.asdict(config)


def test_validation_needs_a_single_page(tmp_path):
    config = SyntheticConfig(train_samples=1, val_samples=2, two_page_share=0, text_share=1)
    with pytest.raises(ValueError, match="none of the 2 validation samples"):
        generate(tmp_path / "a", config)


# Samples


def test_samples_are_valid_chats_about_existing_images(dataset):
    folder, summary = dataset
    types = collections.Counter()
    for split in ("train", "val"):
        name, entry = next(iter(json.loads((folder / FILES[f"meta_{split}"]).read_text()).items()))
        samples = read(folder / entry["annotation"])
        assert name == "synthetic" and entry["length"] == len(samples) == summary[split]["samples"]
        for sample in samples:
            turns = sample["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            image = sample.get("image", [])
            paths, widths, heights = (
                image,
                sample.get("width_list", []),
                sample.get("height_list", []),
            )
            if isinstance(image, str):
                paths, widths, heights = [image], [sample["width"]], [sample["height"]]
                assert 1 <= len(turns) // 2 <= 2
            types[len(paths)] += 1
            assert "".join(turn["value"] for turn in turns).count("<image>") == len(paths)
            assert turns[0]["value"].count("<image>\n") == len(paths)
            for path, width, height in zip(paths, widths, heights, strict=True):
                with Image.open(folder / entry["root"] / path) as opened:
                    assert (opened.format, opened.mode, opened.size) == (
                        "PNG",
                        "RGB",
                        (width, height),
                    )
    assert types[0] / types.total() == pytest.approx(CONFIG.text_share, abs=0.02)
    assert types[2] / types.total() == pytest.approx(CONFIG.two_page_share, abs=0.03)


def test_vqa_rows_are_the_single_page_questions(dataset):
    folder, summary = dataset
    rows = read(folder / FILES["val_vqa"])
    assert {row["question"]: row["field"] for row in rows} == FIELD_OF
    assert [row["question_id"] for row in rows] == list(range(summary["vqa_questions"]))
    by_image = collections.defaultdict(list)
    for row in rows:
        by_image[row["image"]].append((row["question"], row["answer"]))
    for sample in single_page(read(folder / PAGES / "val.jsonl")):
        assert by_image.pop(sample["image"]) == questions(sample)
    assert not by_image


def test_values_are_uniform(dataset):
    folder, _ = dataset
    counts = collections.defaultdict(collections.Counter)
    for sample in single_page(read(folder / PAGES / "train.jsonl")):
        for question, answer in questions(sample):
            counts[FIELD_OF[question]][answer] += 1
    assert set(counts) == set(KINDS)
    for name, answers in counts.items():
        assert set(answers) == set(KINDS[name].values) and len(answers) == 9
        expected = answers.total() / 9
        chi_square = sum((n - expected) ** 2 / expected for n in answers.values())
        assert expected > 40 and chi_square < 26.1, (
            name,
            answers,
        )  # 8 degrees of freedom: p > 0.001


def test_pages_cover_the_grids_they_were_laid_out_for():
    tiles, rng = TileConfig(tile_size=TILE), np.random.default_rng(0)
    counts = collections.Counter()
    for _ in range(400):
        page = make_page(rng)
        assert choose_grid(tiles, *page.image.size) == page.grid
        counts[tile_count(tiles, *page.image.size)] += 1
        width, height = (side / n for side, n in zip(page.image.size, page.grid, strict=True))
        for left, top, right, bottom in (
            field.box for field in page.fields
        ):  # no box on a tile's border
            assert left // width == (right - 1) // width and top // height == (bottom - 1) // height
    assert sum(GRIDS.values()) == pytest.approx(1)
    shares = {1: 0.82, 3: 0.09, 4: 0.04, 5: 0.03, 7: 0.02}
    assert counts.keys() == shares.keys()
    for tile, share in shares.items():
        assert counts[tile] / 400 == pytest.approx(share, abs=0.05)


# The image is needed, and it is enough


def test_chance_is_that_of_the_most_frequent_answer_in_training():
    def rows(**answers):
        return [
            {"field": field, "answer": answer}
            for field, given in answers.items()
            for answer in given
        ]

    known = rows(total="1121", stamp=("moon", "ring", "ring"))
    assert chance(known, rows(total="122", stamp=("ring", "moon"))) == 2 / 5


def test_chance_is_about_one_in_nine(dataset):
    folder, summary = dataset
    noise = (1 / 9 * 8 / 9 / summary["vqa_questions"]) ** 0.5
    assert abs(summary["chance"] - 1 / 9) < 3.5 * noise


def _blind_questions(path):
    """For each question about a single page.

    What is known without the image, by name, and the answer.
    """
    for sample in single_page(read(path)):
        pairs = questions(sample)
        for turn, (question, answer) in enumerate(pairs):
            field = FIELD_OF[question]
            yield (
                {
                    "question": question,
                    "width": (field, sample["width"]),
                    "height": (field, sample["height"]),
                    "turn": (field, turn, len(pairs)),
                    "previous": (field, *pairs[turn - 1 : turn]),
                    "line": (field, int(sample["id"][-6:]) % 9),
                }.items(),
                answer,
            )


def test_nothing_but_the_image_predicts_the_answers(dataset):
    folder, _ = dataset
    seen = collections.defaultdict(collections.Counter)
    for features, answer in _blind_questions(folder / PAGES / "train.jsonl"):
        for feature in features:
            seen[feature][answer] += 1
    right = collections.defaultdict(list)
    for features, answer in _blind_questions(folder / PAGES / "val.jsonl"):
        for feature in features:
            guess = seen[feature].most_common(1)
            right[feature[0]].append(bool(guess) and guess[0][0] == answer)
    for name, hits in right.items():
        noise = (1 / 9 * 8 / 9 / len(hits)) ** 0.5
        assert abs(np.mean(hits) - 1 / 9) < 3.5 * noise, name


def test_blank_pages_carry_nothing(dataset):
    folder, _ = dataset
    rows, blanks = read(folder / FILES["val_vqa"]), read(folder / FILES["val_blank_vqa"])
    assert [row | {"image": ""} for row in rows] == [row | {"image": ""} for row in blanks]
    for row, blank in zip(rows, blanks, strict=True):
        page, empty = (Image.open(folder / PAGES / name["image"]) for name in (row, blank))
        assert page.size == empty.size
        assert empty.getcolors() == [(page.width * page.height, (255, 255, 255))]
        assert any(low < high for low, high in page.getextrema())


def _value_crops(rng, pages):
    crops, answers = collections.defaultdict(list), collections.defaultdict(list)
    for _ in range(pages):
        page = make_page(rng, (1, 1))
        for field in page.fields:
            left, top, right, bottom = field.box
            crop = page.image.crop((left, top + BAND, right, bottom))
            crop = crop.resize((16, 14), Image.Resampling.BILINEAR)
            crops[field.kind].append(np.asarray(crop, np.float32).ravel())
            answers[field.kind].append(field.value)
    return {kind: np.stack(crops[kind]) for kind in KINDS}, {
        kind: np.array(answers[kind]) for kind in KINDS
    }


def test_values_can_be_read_from_their_boxes():
    """The nearest of a few hundred known crops has the right value.

    What is printed is what is answered.
    """
    known, known_answers = _value_crops(np.random.default_rng(1), 400)
    new, new_answers = _value_crops(np.random.default_rng(2), 60)
    for kind in KINDS:
        distances = ((new[kind][:, None] - known[kind][None]) ** 2).sum(-1)
        read_values = known_answers[kind][distances.argmin(1)]
        assert np.mean(read_values == new_answers[kind]) > 0.85, kind


# Tokenizer


def test_every_answer_is_one_piece_after_the_header(tokenizer):
    template = get_template("internlm2-chat")
    ids = {}
    for value in {value for kind in KINDS.values() for value in kind.values}:
        asked = [("human", "What is the total?")]
        prompt = tokenizer.encode(prompt_text(template, [*asked, ("gpt", "")]))
        answered = tokenizer.encode(prompt_text(template, [*asked, ("gpt", value)]))
        assert answered[: len(prompt)] == prompt and answered[-1] == tokenizer.token_id(
            "<|im_end|>"
        )
        (ids[value],) = answered[len(prompt) : -1]
        assert tokenizer.decode([ids[value]]) == value
    assert len(set(ids.values())) == 18


def test_prompts_are_short(tokenizer):
    for text in SYSTEM_TEXTS:
        assert len(tokenizer.encode("system\n" + text)) <= 14
    for question in FIELD_OF:
        assert len(tokenizer.encode("\n" + question)) <= 9


def test_tokenizer_has_the_traits_of_internlm2(tokenizer):
    for text in (" two  spaces ", "\ttab\n\n", "ﬁ ½ Å", "日本語 🙂", SYSTEM_TEXTS[0]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("red") != tokenizer.encode(" red")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2) and tokenizer.add_bos
    assert [tokenizer.token_id(token) for token in ADDED_TOKENS] == list(
        range(PIECES, tokenizer.vocab_size)
    )


def test_shipped_tokenizer_is_what_the_trainer_writes(tmp_path):
    train_tokenizer(tmp_path)
    models = [
        sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for folder in (tmp_path, TOKENIZER_FOLDER)
    ]
    new, shipped = ([model.id_to_piece(i) for i in range(len(model))] for model in models)
    assert new == shipped
    for name in ("added_tokens.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (TOKENIZER_FOLDER / name).read_text()
