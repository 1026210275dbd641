"""Generated forms: deterministic, disjoint, cheaper with RVTC, with controls that lack the form."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.overrides import load_config_file
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.form_dataset import CONTROLS, FILES, FormConfig, generate_forms
from internvlx_jax.data.synthetic_forms import (
    FORM_KINDS,
    GRIDS,
    PAPER,
    TABLE,
    TILE,
    make_form,
    questions,
)
from internvlx_jax.data.tiles import tile_count

SMALL = FormConfig(seed=5, train=12, val=3, test=8, controls=3)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms") / "data"
    return folder, generate_forms(folder, SMALL)


def test_same_config_gives_the_same_bytes_and_is_reused(dataset, tmp_path):
    folder, summary = dataset
    generate_forms(tmp_path / "again", SMALL)
    assert contents(folder) == contents(tmp_path / "again")
    assert generate_forms(folder, SMALL) == summary


def test_splits_share_no_form(dataset):
    folder, _ = dataset
    images = [
        path.read_bytes()
        for split in ("train", "val", "test")
        for path in (folder / "forms" / "images" / split).iterdir()
    ]
    assert len(set(images)) == len(images) == SMALL.train + SMALL.val + SMALL.test


def test_another_dataset_is_refused(dataset):
    with pytest.raises(ConfigError, match="choose another folder"):
        generate_forms(dataset[0], FormConfig(seed=6))
    with pytest.raises(ConfigError, match="controls is 9, it must be at most test, 8"):
        FormConfig(test=8, controls=9)


def test_controls_ask_the_same_without_the_form(dataset):
    folder, summary = dataset
    asked = rows(folder / FILES["test"])
    assert len(asked) == summary["questions"]["test"]
    for control in CONTROLS:
        again = rows(folder / FILES[control])
        assert len({row["image"] for row in again}) == SMALL.controls
        for row in again:
            original = asked[row["question_id"]]
            assert (row["question"], row["answer"]) == (original["question"], original["answer"])
            image = Image.open(folder / "forms" / row["image"])
            form = Image.open(folder / "forms" / original["image"])
            if control == "blank":
                assert image.getextrema() == ((sum(PAPER) // 2,) * 2,) * 3
                assert image.size == form.size
            else:
                assert image.size == tuple(side // 4 for side in form.size)


def test_table_answers_are_the_cells():
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        form = make_form(rng)
        asked = questions(form, rng)
        assert {kind for kind, _, _ in asked} == {field.kind for field in form.fields}
        values = {field.kind: field.value for field in form.fields}
        for kind, question, answer in asked:
            if kind == TABLE:
                column, row = question.rstrip("?").split()
                assert answer == values[TABLE][(int(row) - 1) * 2 + "AB".index(column)]
                found += 1
            else:
                assert answer == values[kind] and answer in FORM_KINDS[kind].values
    assert found > 10


def test_rvtc_saves_a_third_of_the_tiles():
    rng = np.random.default_rng(0)
    sizes = [make_form(rng).image.size for _ in range(200)]
    edge, off = (
        sum(tile_count(TileConfig(tile_size=TILE, rule=rule, max_num=6), *size) for size in sizes)
        for rule in ("edge", "off")
    )
    assert edge <= 2 / 3 * off
    ratios = {columns / rows for columns, rows in GRIDS}
    assert (min(ratios), max(ratios)) == (1 / 3, 3)


def test_every_row_of_the_ablation_is_a_model():
    config = load_config_file("configs/ablation_pages.py:variant=x,preset=cpu")
    assert (config.model.lvtc.low_grid, config.model.lvtc.high_grid) == (2, 4)
    assert config.model.lvtc.expand_layer == 5 and config.model.decoder.layers == 6
    off = load_config_file("configs/ablation_pages.py:variant=internvl,seed=2")
    assert off.model.projector.kind == "mlp1" and off.model.prompt.tiles.rule == "off"
    assert off.optimizer == config.optimizer and off.steps == config.steps and off.seed == 2
    with pytest.raises(ConfigError, match="variant 'y' is unknown"):
        load_config_file("configs/ablation_pages.py:variant=y")
    with pytest.raises(ConfigError, match="stage 'rows' is unknown"):
        load_config_file("configs/ablation_pages.py:stage=rows")


def test_rows_of_a_seed_begin_with_one_decoder_that_has_seen_no_image():
    first, other, next_seed = (
        load_config_file(f"configs/ablation_pages.py:stage=decoder,variant={variant},seed={seed}")
        for variant, seed in (("x", 1), ("mlp1-4", 1), ("x", 2))
    )
    assert first == other and first.freeze.vit and first.freeze.projector
    assert first.output_dir != next_seed.output_dir
    assert dataclasses.replace(next_seed, seed=1, output_dir=first.output_dir) == first
    row = load_config_file("configs/ablation_pages.py:variant=mlp1-4")
    assert row.model.decoder == first.model.decoder and row.data.meta != first.data.meta


def test_forms_told_in_words_hold_their_answers(tmp_path):
    generate_forms(tmp_path / "f", FormConfig(train=1, val=1, test=1, controls=1, text=40))
    tables = 0
    for chat in rows(tmp_path / "f" / "forms" / "text.jsonl"):
        assert "image" not in chat
        turns = [turn["value"] for turn in chat["conversations"]]
        *told, turns[0] = turns[0].split("\n")
        words = {line.split()[0]: line.split()[1:] for line in told}
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            name = question.rstrip("?").split()[-1]
            if name in words:
                assert words[name] == [answer]
                continue
            cells = " ".join(words[TABLE])
            assert f"{question.rstrip('?')} {answer}" in cells
            tables += 1
    assert tables
    assert rows(tmp_path / "f" / "forms" / "train.jsonl")[0]["image"]
