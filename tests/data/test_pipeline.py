"""Meta file -> batches: one mixed stream, resumable, the same for every process and worker (spec: data.md 10-17)."""

import dataclasses
import json
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from internvlx_jax.data.config import DataConfig
from internvlx_jax.data.errors import SampleError
from internvlx_jax.data.images import load_image
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.plan import MASKED
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.synthetic import FILES, TOKENIZER_FOLDER, SyntheticConfig, generate
from internvlx_jax.data.templates import get_template, prompt_text
from internvlx_jax.data.tiles import TileConfig, cut_tiles
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.errors import ConfigError
from internvlx_jax.models.config import LvtcConfig

PER_TILE = 4
TILES = TileConfig(tile_size=56, max_num=4)
CONFIG = DataConfig(meta="", max_length=256, tokens_per_step=1024, max_executables=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "data"
    generate(folder, SyntheticConfig(train_samples=40, val_samples=4, two_page_share=0.25, text_share=0.25))
    return folder


@pytest.fixture(scope="module")
def processor():
    """With LVTC, so that batches have both frames."""
    return Processor(Tokenizer.load(TOKENIZER_FOLDER), get_template("internlm2-chat"), "", TILES, PER_TILE,
                     lvtc=LvtcConfig(expand_layer=0, low_grid=1, high_grid=2))


@pytest.fixture(scope="module")
def make_loader(dataset, processor):
    def make(meta=None, *, row_quantum=2, seed=0, process_index=0, process_count=1, **settings) -> Loader:
        meta = meta or dataset / FILES["meta_train"]
        return Loader(str(meta), dataclasses.replace(CONFIG, **settings), processor, row_quantum=row_quantum, seed=seed,
                      process_index=process_index, process_count=process_count)

    return make


@pytest.fixture(scope="module")
def epoch(make_loader):
    """The loader and all steps of its first epoch."""
    loader = make_loader()
    return loader, list(loader.steps(0, loader.steps_per_epoch))


def arrays(step):
    inputs = step.batch.inputs
    return [*inputs[:-1], *inputs.short, step.batch.labels, step.batch.loss_weight]


def assert_same(steps, others):
    assert len(steps) == len(others) > 0
    for step, other in zip(steps, others):
        assert (step.sample_ids, step.counts) == (other.sample_ids, other.counts)
        for a, b in zip(arrays(step), arrays(other)):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def lines_of(dataset):
    return [json.loads(line) for line in (dataset / "synthetic_pages" / "train.jsonl").read_text().splitlines()]


def rendered(record, tiles_per_image) -> str:
    """The conversation as the model reads it, with the empty system message of the processor."""
    turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    head, *parts = prompt_text(get_template("internlm2-chat"), turns, system="").split("<image>")
    images = [f"<img>{'<IMG_CONTEXT>' * (tiles * PER_TILE)}</img>" for tiles in tiles_per_image]
    return head + "".join(image + part for image, part in zip(images, parts, strict=True))


def n_images(record) -> int:
    return len(record["image"]) if isinstance(record.get("image"), list) else "image" in record


# --- one stream ---------------------------------------------------------------------------------------------------


def test_text_single_and_multi_image_samples_come_in_one_stream(epoch, dataset):
    loader, steps = epoch
    records = lines_of(dataset)
    assert {n_images(record) for record in records} == {0, 1, 2}
    ids = [name for step in steps for name in step.sample_ids]
    assert sorted(ids) == sorted(f"synthetic:{line}" for line in range(1, 41))
    assert sum(step.counts.images for step in steps) == sum(map(n_images, records))
    assert len(loader.buckets) <= 4


def test_rows_hold_their_sample(epoch, dataset, processor):
    """Tokens of each row, read back, are the conversation; its tiles are those of its files."""
    loader, steps = epoch
    records, image_id = lines_of(dataset), processor.tokenizer.image_token_id
    for number, step in enumerate(steps):
        inputs, planned = step.batch.inputs, loader.planned(number)
        assert inputs.tokens.shape == (len(planned.entries), planned.bucket.length)
        assert inputs.tiles.shape[:2] == (len(planned.entries), planned.bucket.tiles)
        for row, entry in enumerate(planned.entries):
            n = int(inputs.segment_ids[row].sum())
            if entry == MASKED:
                assert n == 0 and step.batch.loss_weight[row].sum() == 0
                continue
            sample = loader.samples[entry]
            record = records[sample.sample.line - 1]
            assert n == sample.length
            text = processor.tokenizer.decode(inputs.tokens[row, :n], skip_special=False)
            assert text == "<s>" + rendered(record, sample.tiles_per_image)
            answer = [int(i) for i in step.batch.labels[row] if i >= 0]
            stop = processor.tokenizer.token_id("<|im_end|>")
            gpt = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
            assert answer == [i for text in gpt for i in [*processor.tokenizer.encode(text), stop]]
            tiles = sum(sample.tiles_per_image)
            visual = inputs.tokens[row, :n] == image_id
            assert visual.sum() == tiles * PER_TILE
            assert inputs.feature_index[row, :n][visual].tolist() == [*range(tiles * PER_TILE)]
            paths = record.get("image", [])
            paths = [paths] if isinstance(paths, str) else paths
            expected = [cut_tiles(load_image(dataset / "synthetic_pages" / path), TILES, TILES.max_num // len(paths))
                        for path in paths]
            if expected:
                np.testing.assert_array_equal(inputs.tiles[row, :tiles], np.concatenate(expected))
        assert step.counts.samples == sum(entry != MASKED for entry in planned.entries)
        assert step.counts.tokens == (inputs.segment_ids > 0).sum()
        assert step.counts.tiles * PER_TILE == (inputs.tokens == image_id).sum()


# --- order --------------------------------------------------------------------------------------------------------


def test_a_restart_goes_on_exactly_where_the_run_ended(make_loader, epoch):
    loader, _ = epoch
    stop = loader.steps_per_epoch + 3
    straight = list(loader.steps(0, stop))
    restarted = make_loader()
    assert restarted.plan_hash == loader.plan_hash
    for cut in (1, loader.steps_per_epoch, stop - 1):
        assert_same(straight[cut:], list(restarted.steps(cut, stop)))
    assert list(restarted.steps(stop, stop)) == []


def test_epochs_differ_and_the_seed_decides(make_loader, epoch):
    loader, steps = epoch

    def order(loader, epoch):
        first = epoch * loader.steps_per_epoch
        return [loader.planned(step).entries for step in range(first, first + loader.steps_per_epoch)]

    assert order(loader, 0) != order(loader, 1)
    assert order(make_loader(seed=1), 0) != order(loader, 0)
    assert make_loader(seed=1).plan_hash != loader.plan_hash


def test_two_processes_hold_the_halves_of_the_same_steps(make_loader, epoch):
    _, whole = epoch
    halves = []
    for index in (0, 1):
        loader = make_loader(process_index=index, process_count=2)
        halves.append(list(loader.steps(0, loader.steps_per_epoch)))
    for step, first, second in zip(whole, *halves, strict=True):
        assert first.sample_ids == second.sample_ids == step.sample_ids
        assert first.counts == second.counts == step.counts
        for a, b, both in zip(arrays(first), arrays(second), arrays(step)):
            assert len(a) == len(b)
            np.testing.assert_array_equal(np.concatenate([a, b]), both)


def test_processes_that_cannot_share_a_step_evenly_are_refused(make_loader):
    with pytest.raises(ConfigError, match="3 processes cannot share steps of a multiple of 2 rows"):
        make_loader(process_count=3)


def test_worker_processes_give_the_same_batches_and_end_with_the_iterator(make_loader, epoch):
    _, steps = epoch
    iterator = make_loader(num_workers=2).steps(0, 100)
    assert_same(steps[:3], [next(iterator) for _ in range(3)])
    assert len(multiprocessing.active_children()) == 2
    iterator.close()
    assert multiprocessing.active_children() == []


# --- real receipts ------------------------------------------------------------------------------------------------


def test_real_receipts_from_any_working_directory(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.load(shared_data / "internlm2_tokenizer")
    tiles = TileConfig(max_num=6)
    processor = Processor(tokenizer, get_template("internlm2-chat"), None, tiles, 256)
    meta = shared_data / "receipts_meta.json"
    config = DataConfig(meta=str(meta), max_length=4096, tokens_per_step=4096)
    loader = Loader(str(meta), config, processor, row_quantum=2, seed=0)
    assert len(loader.samples) == 128
    for sample in loader.samples:
        tokens = processor.encode(sample.sample, sample.tiles_per_image).tokens
        assert (tokens == tokenizer.image_token_id).sum() == sum(sample.tiles_per_image) * 256
    records = [json.loads(line) for line in (shared_data / "receipts" / "train.jsonl").read_text().splitlines()]
    for number, step in enumerate(loader.steps(0, 3)):
        entries = [entry for entry in loader.planned(number).entries if entry != MASKED]
        assert step.sample_ids == tuple(f"receipts:{loader.samples[entry].sample.line}" for entry in entries)
        for row, entry in enumerate(entries):
            record = records[loader.samples[entry].sample.line - 1]
            with Image.open(shared_data / "receipts" / record["image"]) as image:
                expected = cut_tiles(image.convert("RGB"), tiles)
            np.testing.assert_array_equal(step.batch.inputs.tiles[row, : len(expected)], expected)
            assert not step.batch.inputs.tiles[row, len(expected) :].any()
            assert (step.batch.inputs.tokens[row] == tokenizer.image_token_id).sum() == len(expected) * 256


# --- bad input ----------------------------------------------------------------------------------------------------

GOOD = {"image": "page.png", "width": 50, "height": 50,
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]}  # fmt: skip


@pytest.fixture
def write_meta(tmp_path):
    Image.new("RGB", (50, 50), "red").save(tmp_path / "page.png")

    def write(second: dict | str, **fields):
        """A meta file over two good lines with `second` between them."""
        good = json.dumps(GOOD)
        line = second if isinstance(second, str) else json.dumps(GOOD | second)
        (tmp_path / "chat.jsonl").write_text(f"{good}\n{line}\n{good}\n")
        meta = tmp_path / "meta.json"
        meta.write_text(json.dumps({"bad": {"root": str(tmp_path), "annotation": str(tmp_path / "chat.jsonl")} | fields}))
        return meta

    return write


def turns(question, answer="This."):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.mark.parametrize("second, reason, problem, remedy", [
    ({"image": "gone.png"}, "unreadable", "gone.png: the image cannot be read", "Check the file and its path"),
    ({"image": "gone.png", "width": None, "height": None}, "unreadable", "gone.png: the image cannot be read",
     "Check the file and its path"),
    (json.dumps(GOOD)[:60], "json", "not valid JSON", "Correct the line"),
    (turns("<image> or <image>?"), "placeholder_mismatch", '1 image but 2 "<image>"', "Write one placeholder"),
    ({"image": ["page.png"] * 2, "width": None, "height": None}, "placeholder_mismatch", '2 images but 1 "<image>"',
     "Write one placeholder"),
    (turns("<image>\nWhat?", "long " * 300), "too_long", "4 of them image tokens of 1 tiles, do not fit into "
     "data.max_length = 256; image tokens are never cut", "Raise data.max_length"),
    ({"width": 500, "height": 500}, "size_mismatch", "the stated sizes give [5] tiles, the files give [1]",
     "Correct width and height"),
    (turns("<image>\n<|im_end|>"), "reserved_text", '"<|im_end|>"', "Remove it"),
    (turns("<image>\nWhat?", ""), "no_supervision", "no answer to learn from", "Give at least one gpt turn"),
])  # fmt: skip
def test_a_bad_sample_is_one_error_with_file_line_and_remedy(second, reason, problem, remedy, write_meta, make_loader,
                                                             tmp_path):
    meta = write_meta(second)
    with pytest.raises(SampleError) as error:
        loader = make_loader(meta)
        list(loader.steps(0, loader.steps_per_epoch))
    head, *rest = str(error.value).split("\n")
    assert error.value.reason == reason
    assert head.startswith(f"{tmp_path / 'chat.jsonl'} line 2: ")
    assert problem in head and "\n".join(rest).startswith(remedy)


def test_a_sample_error_of_a_worker_process_arrives_whole_and_ends_the_others(write_meta, make_loader):
    loader = make_loader(write_meta({"image": "gone.png"}), num_workers=2)
    with pytest.raises(SampleError, match="chat.jsonl line 2: .*gone.png: the image cannot be read"):
        list(loader.steps(0, loader.steps_per_epoch))
    assert multiprocessing.active_children() == []


def test_a_stated_size_that_gives_the_same_tiles_is_good_enough(write_meta, make_loader):
    loader = make_loader(write_meta({"width": 40, "height": 55}))
    assert sum(step.counts.samples for step in loader.steps(0, loader.steps_per_epoch)) == 3


def test_an_unknown_template_names_meta_file_and_dataset(write_meta, make_loader):
    with pytest.raises(ConfigError, match=r'meta.json dataset "bad": "conv_style": template "internlm2chat" is unknown. '
                                          r'Did you mean "internlm2-chat"\?'):
        make_loader(write_meta({}, conv_style="internlm2chat"))


def test_a_meta_file_without_samples_is_an_error(write_meta, make_loader):
    with pytest.raises(ConfigError, match="meta.json: the meta file names no samples"):
        make_loader(write_meta({}, repeat_time=0.1))


@pytest.mark.parametrize("name, problem", [("cut.png", "the file is damaged"), ("deep.png", "16-bit values")])
def test_an_image_used_with_reservations_is_a_warning(name, problem, write_meta, make_loader, tmp_path):
    noise = np.random.default_rng(0).integers(0, 2**16, (50, 50), np.uint16)
    Image.fromarray(noise).save(tmp_path / "deep.png")
    Image.fromarray((noise >> 8).astype(np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    loader = make_loader(write_meta({"image": name}))
    with pytest.warns(UserWarning, match=f"chat.jsonl line 2: .*{name}: {problem}") as caught:
        steps = list(loader.steps(0, loader.steps_per_epoch))
    assert len(caught) == 1
    assert sum(step.counts.samples for step in steps) == 3


def test_data_modules_import_no_jax():
    """All but pipeline.py: grain, which it needs, imports jax by itself."""
    modules = "batch, chat, config, encode, images, meta, plan, processor, synthetic, templates, tiles, tokenizer"
    code = f"import sys; from internvlx_jax.data import {modules}; print([m for m in ('jax', 'tensorflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
