"""Meta file -> batches.

One mixed stream, resumable, the same for every process and worker (design: data.md 10-17).
"""

import dataclasses
import json
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from internvlx_jax.core.data_config import DataConfig, FaultConfig, PackConfig
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.model_config import LvtcConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data import index
from internvlx_jax.data.buckets import Capacity, SlotCosts
from internvlx_jax.data.images import load_image
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.synthetic import FILES, TOKENIZER_FOLDER, SyntheticConfig, generate
from internvlx_jax.data.templates import get_template, prompt_text
from internvlx_jax.data.tiles import cut_tiles
from internvlx_jax.data.tokenizer import Tokenizer

PER_TILE = 4
TILES = TileConfig(tile_size=56, max_num=4)
CONFIG = DataConfig(
    meta="", max_length=256, tokens_per_step=1024, max_executables=4, length_step=128
)
STRICT = FaultConfig(on_bad="fail")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "data"
    generate(
        folder,
        SyntheticConfig(train_samples=40, val_samples=4, two_page_share=0.25, text_share=0.25),
    )
    return folder


@pytest.fixture(scope="module")
def processor():
    """With LVTC, so that batches have both frames."""
    return Processor(
        Tokenizer.load(TOKENIZER_FOLDER),
        get_template("internlm2-chat"),
        "",
        TILES,
        PER_TILE,
        lvtc=LvtcConfig(expand_layer=0, low_grid=1, high_grid=2),
    )


@pytest.fixture(scope="module")
def make_loader(dataset, processor):
    def make(
        meta=None,
        *,
        row_quantum=2,
        seed=0,
        epochs=None,
        state=None,
        process_index=0,
        process_count=1,
        **settings,
    ) -> Loader:
        meta = meta or dataset / FILES["meta_train"]
        return Loader(
            str(meta),
            dataclasses.replace(CONFIG, **settings),
            processor,
            row_quantum=row_quantum,
            seed=seed,
            epochs=epochs,
            state=state,
            process_index=process_index,
            process_count=process_count,
        )

    return make


@pytest.fixture(scope="module")
def epoch(make_loader):
    """A loader of one epoch and all its steps."""
    loader = make_loader(epochs=1)
    return loader, list(loader.steps(0, loader.plan.total))


def arrays(step):
    inputs = step.batch.inputs
    return [*inputs[:-1], *inputs.short, step.batch.labels, step.batch.loss_weight]


def assert_same(steps, others):
    assert len(steps) == len(others) > 0
    for step, other in zip(steps, others):
        assert (step.sample_ids, step.counts, step.read) == (
            other.sample_ids,
            other.counts,
            other.read,
        )
        for a, b in zip(arrays(step), arrays(other)):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def lines_of(dataset):
    return [
        json.loads(line)
        for line in (dataset / "synthetic_pages" / "train.jsonl").read_text().splitlines()
    ]


def rendered(record, tiles_per_image) -> str:
    """The conversation as the model reads it, with the empty system message of the processor."""
    turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    head, *parts = prompt_text(get_template("internlm2-chat"), turns, system="").split("<image>")
    images = [f"<img>{'<IMG_CONTEXT>' * (tiles * PER_TILE)}</img>" for tiles in tiles_per_image]
    return head + "".join(image + part for image, part in zip(images, parts, strict=True))


def n_images(record) -> int:
    return len(record["image"]) if isinstance(record.get("image"), list) else "image" in record


# --- one stream -----------------------------------------------------------------------------------


def test_text_single_and_multi_image_samples_come_in_one_stream(epoch, dataset):
    loader, steps = epoch
    records = lines_of(dataset)
    assert {n_images(record) for record in records} == {0, 1, 2}
    ids = [name for step in steps for name in step.sample_ids]
    assert sorted(ids) == sorted(f"synthetic:{line}" for line in range(1, 41))
    assert sum(step.counts.images for step in steps) == sum(map(n_images, records))
    assert len(loader.plan.buckets) <= 4


def test_rows_hold_their_sample(epoch, dataset, processor):
    """Tokens of each row, read back, are the conversation; its tiles are those of its files."""
    loader, steps = epoch
    records, image_id = lines_of(dataset), processor.tokenizer.image_token_id
    for number, step in enumerate(steps):
        inputs, planned = step.batch.inputs, loader.plan.step(number)
        assert inputs.tokens.shape == (len(planned.rows), planned.bucket.length)
        assert inputs.tiles.shape[:2] == (len(planned.rows), planned.bucket.tiles)
        for row, entries in enumerate(planned.rows):
            n = int(inputs.segment_ids[row].sum())
            if not entries:
                assert n == 0 and step.batch.loss_weight[row].sum() == 0
                continue
            record = records[int(loader.table.position[entries[0].sample])]
            assert n == loader.table.length[entries[0].sample]
            paths = record.get("image", [])
            paths = [paths] if isinstance(paths, str) else paths
            expected = [
                cut_tiles(
                    load_image(dataset / "synthetic_pages" / path),
                    TILES,
                    TILES.max_num // len(paths),
                )
                for path in paths
            ]
            text = processor.tokenizer.decode(inputs.tokens[row, :n], skip_special=False)
            assert text == "<s>" + rendered(record, map(len, expected))
            answer = [int(i) for i in step.batch.labels[row] if i >= 0]
            stop = processor.tokenizer.token_id("<|im_end|>")
            gpt = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
            assert answer == [i for text in gpt for i in [*processor.tokenizer.encode(text), stop]]
            tiles = sum(map(len, expected))
            assert tiles == loader.table.tiles[entries[0].sample]
            visual = inputs.tokens[row, :n] == image_id
            assert visual.sum() == tiles * PER_TILE
            assert inputs.feature_index[row, :n][visual].tolist() == [*range(tiles * PER_TILE)]
            if expected:
                np.testing.assert_array_equal(inputs.tiles[row, :tiles], np.concatenate(expected))
        assert step.counts.samples == sum(map(len, planned.rows))
        assert step.counts.masked_rows == sum(not row for row in planned.rows)
        assert (
            step.counts.tokens == (inputs.segment_ids > 0).sum()
            and step.counts.slots == inputs.tokens.size
        )
        assert step.counts.tiles * PER_TILE == (inputs.tokens == image_id).sum()


# --- order ----------------------------------------------------------------------------------------

MODES = pytest.mark.parametrize("mode", ["tokens", "pack"])


@MODES
def test_a_restart_goes_on_exactly_where_the_run_ended(mode, make_loader):
    loader = make_loader(batch_mode=mode)
    stop = loader.plan.first_step(2) + 3
    straight = list(loader.steps(0, stop))
    for cut in (1, loader.plan.first_step(1), stop - 1):
        state = json.loads(json.dumps(loader.state(cut)))
        assert len(json.dumps(state)) < 1024 and state["step"] == cut
        restarted = make_loader(batch_mode=mode, state=state)
        assert restarted.plan_hash == loader.plan_hash
        assert_same(straight[cut:], list(restarted.steps(cut, stop)))
    assert list(restarted.steps(stop, stop)) == []


def test_the_seed_decides_the_order(make_loader):
    loader, other = make_loader(), make_loader(seed=1)
    assert [loader.plan.step(step).rows for step in range(5)] != [
        other.plan.step(step).rows for step in range(5)
    ]
    assert other.plan_hash != loader.plan_hash


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"seed": 1}, "seed or mixture"),
        ({"row_quantum": 16}, "batching"),
        ({"max_executables": 2}, "batching"),
        ({"tokens_per_step": 2048}, "batching"),
        ({"batch_mode": "pack"}, "batching"),
    ],
)
def test_the_hash_names_what_decides_the_order(changes, part, make_loader, epoch):
    parts, others = epoch[0].parts, make_loader(**changes).parts
    assert part in {name for name in parts if parts[name] != others[name]}


def test_the_hash_changes_with_samples_and_processor(make_loader, dataset, processor, epoch):
    meta = dataset / FILES["meta_train"]
    shorter = json.loads(meta.read_text())
    shorter["synthetic"] |= {"repeat_time": 0.9, "length": None}
    (dataset / "shorter.json").write_text(json.dumps(shorter))
    changed = {
        name
        for name, part in make_loader(dataset / "shorter.json").parts.items()
        if part != epoch[0].parts[name]
    }
    assert "samples" in changed and "seed or mixture" not in changed
    other = dataclasses.replace(processor, tiles=dataclasses.replace(TILES, max_num=1))
    parts = Loader(str(meta), CONFIG, other, row_quantum=2, seed=0).parts
    assert parts["tokenizer, template or tiling"] != epoch[0].parts["tokenizer, template or tiling"]


@MODES
def test_processes_hold_parts_of_the_same_steps_whatever_their_number(mode, make_loader):
    """A run that begins on one process goes on with two, then with four."""
    loader = make_loader(batch_mode=mode, row_quantum=4, tokens_per_step=2048)
    whole = list(loader.steps(0, 6))
    for count in (2, 4):
        state = loader.state(2)
        parts = [
            list(
                make_loader(
                    batch_mode=mode,
                    row_quantum=4,
                    tokens_per_step=2048,
                    state=state,
                    process_index=index,
                    process_count=count,
                ).steps(2, 6)
            )
            for index in range(count)
        ]
        for step, *shares in zip(whole[2:], *parts, strict=True):
            assert step.sample_ids == tuple(name for share in shares for name in share.sample_ids)
            assert {share.counts for share in shares} == {step.counts}
            for both, *pieces in zip(arrays(step), *map(arrays, shares)):
                assert len({len(piece) for piece in pieces}) == 1
                np.testing.assert_array_equal(np.concatenate(pieces), both)


def test_processes_that_cannot_share_a_step_evenly_are_refused(make_loader):
    with pytest.raises(ConfigError, match="3 processes cannot share steps of a multiple of 2 rows"):
        make_loader(process_count=3)


def test_worker_processes_give_the_same_batches_and_end_with_the_iterator(make_loader, epoch):
    _, steps = epoch
    iterator = make_loader(num_workers=2, epochs=1).steps(0, len(steps))
    assert_same(steps[:3], [next(iterator) for _ in range(3)])
    assert len(multiprocessing.active_children()) == 2
    iterator.close()
    assert multiprocessing.active_children() == []


# --- packed rows ----------------------------------------------------------------------------------


def test_packed_rows_hold_whole_samples(make_loader, epoch):
    """Each segment of a packed row is the row that the sample has on its own in bucket mode."""
    alone = {}
    for step in epoch[1]:
        names = iter(step.sample_ids)
        for row in range(len(step.batch.labels)):
            n = int(step.batch.inputs.segment_ids[row].sum())
            if n:
                inputs = step.batch.inputs
                visual = inputs.feature_index[row, :n]
                alone[next(names)] = (
                    inputs.tokens[row, :n],
                    step.batch.labels[row, :n],
                    inputs.tiles[row],
                    np.where(visual < inputs.tiles.shape[1] * PER_TILE, visual, -1),
                )
    loader = make_loader(batch_mode="pack", max_length=512, epochs=1, loss_reduction="square")
    steps = list(loader.steps(0, loader.plan.total))
    assert sorted(name for step in steps for name in step.sample_ids) == sorted(alone)
    assert max(step.batch.inputs.segment_ids.max() for step in steps) > 2
    for step in steps:
        inputs, names = step.batch.inputs, iter(step.sample_ids)
        none = inputs.tiles.shape[1] * PER_TILE
        for row in range(len(inputs.tokens)):
            first_tile = 0
            for segment in range(1, inputs.segment_ids[row].max() + 1):
                slots = np.flatnonzero(inputs.segment_ids[row] == segment)
                tokens, labels, tiles, visual = alone[name := next(names)]
                number = [entry.name for entry in loader.entries].index(name.rpartition(":")[0])
                assert (step.batch.dataset[row, slots] == number).all()
                np.testing.assert_array_equal(inputs.tokens[row, slots], tokens)
                np.testing.assert_array_equal(step.batch.labels[row, slots], labels)
                assert labels[0] == -100 and inputs.positions[row, slots].tolist() == [
                    *range(len(slots))
                ]
                shown = np.where(visual < 0, none, visual + first_tile * PER_TILE)
                np.testing.assert_array_equal(inputs.feature_index[row, slots], shown)
                count = visual.max() // PER_TILE + 1 if (visual >= 0).any() else 0
                np.testing.assert_array_equal(
                    inputs.tiles[row, first_tile : first_tile + count], tiles[:count]
                )
                supervised = labels >= 0
                np.testing.assert_allclose(
                    step.batch.loss_weight[row, slots],
                    supervised * supervised.sum() ** -0.5,
                    rtol=1e-6,
                )
                first_tile += count
            assert not step.batch.loss_weight[row][inputs.segment_ids[row] == 0].any()


def test_packed_rows_fit_the_short_frame_of_lvtc(make_loader, dataset, processor):
    """Its length follows from the bucket, is below the long layout, and bounds every row."""
    loader = make_loader(batch_mode="pack", max_length=512, length_step=16, epochs=1)
    (bucket,) = loader.plan.buckets
    saved = processor.saved_per_tile
    assert saved == 3 and 0 < bucket.short_length < bucket.length
    for number in range(loader.plan.total):
        for row in loader.plan.step(number).rows:
            samples = [sample for sample, _ in row]
            tiles, length = loader.table.tiles[samples].sum(), loader.table.length[samples].sum()
            assert (
                length - saved * tiles <= bucket.short_length
                and length <= 512
                and tiles <= bucket.tiles
            )
    plain = dataclasses.replace(processor, lvtc=None)
    meta = str(dataset / FILES["meta_train"])
    without = Loader(meta, loader.config, plain, row_quantum=2, seed=0, epochs=1)
    assert without.plan.buckets[0].short_length == 0 and without.plan_hash != loader.plan_hash


@pytest.mark.parametrize("reduction, power", [("token", 0), ("sample", -1), ("square", -0.5)])
def test_loss_weights(reduction, power, make_loader):
    loader = make_loader(loss_reduction=reduction)
    (step,) = loader.steps(0, 1)
    for labels, weight in zip(step.batch.labels, step.batch.loss_weight):
        supervised = labels >= 0
        np.testing.assert_allclose(
            weight, supervised * float(max(1, supervised.sum())) ** power, rtol=1e-6
        )


def test_a_row_budget_of_its_own(make_loader):
    loader = make_loader(batch_mode="pack", pack=PackConfig(tiles=9, open_rows=4), max_length=512)
    (bucket,) = loader.plan.buckets
    assert (bucket.tiles, bucket.length) == (9, 512)
    (step,) = loader.steps(0, 1)
    assert step.batch.inputs.tiles.shape[1] == 9


# --- real receipts --------------------------------------------------------------------------------


def test_real_receipts_from_any_working_directory(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.load(shared_data / "internlm2_tokenizer")
    tiles = TileConfig(max_num=6)
    processor = Processor(tokenizer, get_template("internlm2-chat"), None, tiles, 256)
    meta = shared_data / "receipts_meta.json"
    config = DataConfig(
        meta=str(meta), max_length=4096, tokens_per_step=4096, index_dir=str(tmp_path)
    )
    loader = Loader(str(meta), config, processor, row_quantum=2, seed=0)
    assert len(loader.table.length) == 128 and not loader.index_faults.reasons
    records = [
        json.loads(line)
        for line in (shared_data / "receipts" / "train.jsonl").read_text().splitlines()
    ]
    for number, step in enumerate(loader.steps(0, 3)):
        lines = [
            int(loader.table.position[sample]) + 1
            for row in loader.plan.step(number).rows
            for sample, _ in row
        ]
        assert step.sample_ids == tuple(f"receipts:{line}" for line in lines)
        for row, line in enumerate(lines):
            record = records[line - 1]
            with Image.open(shared_data / "receipts" / record["image"]) as image:
                expected = cut_tiles(image.convert("RGB"), tiles)
            np.testing.assert_array_equal(step.batch.inputs.tiles[row, : len(expected)], expected)
            assert not step.batch.inputs.tiles[row, len(expected) :].any()
            assert (step.batch.inputs.tokens[row] == tokenizer.image_token_id).sum() == len(
                expected
            ) * 256


# --- bad input ------------------------------------------------------------------------------------

GOOD = {
    "image": "page.png",
    "width": 50,
    "height": 50,
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "This."},
    ],
}


@pytest.fixture
def write_meta(tmp_path):
    Image.new("RGB", (50, 50), "red").save(tmp_path / "page.png")

    def write(second: dict | str, **fields):
        """A meta file over two good lines with `second` between them."""
        good = json.dumps(GOOD)
        line = second if isinstance(second, str) else json.dumps(GOOD | second)
        (tmp_path / "chat.jsonl").write_text(f"{good}\n{line}\n{good}\n")
        meta = tmp_path / "meta.json"
        meta.write_text(
            json.dumps(
                {
                    "bad": {"root": str(tmp_path), "annotation": str(tmp_path / "chat.jsonl")}
                    | fields
                }
            )
        )
        return meta

    return write


def turns(question, answer="This."):
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    }


@pytest.mark.parametrize(
    "second, reason, problem, remedy",
    [
        (
            {"image": "gone.png"},
            "unreadable",
            "gone.png: the image cannot be read",
            "Check the file and its path",
        ),
        (
            {"image": "gone.png", "width": None, "height": None},
            "unreadable",
            "gone.png: the image cannot be read",
            "Check the file and its path",
        ),
        (json.dumps(GOOD)[:60], "json", "not valid JSON", "Correct the line"),
        (
            turns("<image> or <image>?"),
            "placeholder_mismatch",
            '1 image but 2 "<image>"',
            "Write one placeholder",
        ),
        (
            {"image": ["page.png"] * 2, "width": None, "height": None},
            "placeholder_mismatch",
            '2 images but 1 "<image>"',
            "Write one placeholder",
        ),
        (
            turns("long " * 300 + "<image>"),
            "too_long",
            "4 of them image tokens of 1 tiles, do not fit into "
            "data.max_length = 256; image tokens are never cut",
            "Raise data.max_length",
        ),
        (
            {"image": "large.png"},
            "size_mismatch",
            "the images give 5 tiles",
            "Correct width and height",
        ),
        (turns("<image>\n<|im_end|>"), "reserved_text", '"<|im_end|>"', "Remove it"),
        (
            turns("<image>\nWhat?", ""),
            "no_supervision",
            "no answer to learn from",
            "Give at least one gpt turn",
        ),
    ],
)
def test_a_bad_sample_is_one_error_with_file_line_and_remedy(
    second, reason, problem, remedy, write_meta, make_loader, tmp_path
):
    meta = write_meta(second)
    Image.new("RGB", (500, 500)).save(tmp_path / "large.png")
    with pytest.raises(SampleError) as error:
        loader = make_loader(meta, faults=STRICT, epochs=1)
        list(loader.steps(0, loader.plan.total))
    head, *rest = str(error.value).split("\n")
    assert error.value.reason == reason
    assert head.startswith(f"{tmp_path / 'chat.jsonl'} line 2: ")
    assert problem in head and "\n".join(rest).startswith(remedy)


def test_a_sample_error_of_a_worker_process_arrives_whole_and_ends_the_others(
    write_meta, make_loader
):
    loader = make_loader(write_meta({"image": "gone.png"}), num_workers=2, faults=STRICT, epochs=1)
    with pytest.raises(
        SampleError, match="chat.jsonl line 2: .*gone.png: the image cannot be read"
    ):
        list(loader.steps(0, loader.plan.total))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("size", [(40, 55), (500, 500)], ids=["same tiles", "fewer tiles in fact"])
def test_a_wrong_size_that_leaves_room_is_good_enough(size, write_meta, make_loader):
    loader = make_loader(write_meta({"width": size[0], "height": size[1]}), epochs=1)
    steps = list(loader.steps(0, loader.plan.total))
    assert (
        sum(step.counts.samples for step in steps)
        == sum(len(step.sample_ids) for step in steps)
        == 3
    )
    assert not loader.faults.reasons


def test_an_unknown_template_names_meta_file_and_dataset(write_meta, make_loader):
    with pytest.raises(
        ConfigError,
        match=r'meta.json dataset "bad": "conv_style": template "internlm2chat" is unknown. '
        r'Did you mean "internlm2-chat"\?',
    ):
        make_loader(write_meta({}, conv_style="internlm2chat"))


def test_a_meta_file_without_samples_is_an_error(write_meta, make_loader):
    with pytest.raises(ConfigError, match="meta.json: the meta file names no samples"):
        make_loader(write_meta({}, repeat_time=0.1))


@pytest.mark.parametrize("name, reason", [("cut.png", "truncated"), ("deep.png", "16bit")])
def test_an_image_used_with_reservations_is_counted(
    name, reason, write_meta, make_loader, tmp_path
):
    noise = np.random.default_rng(0).integers(0, 2**16, (50, 50), np.uint16)
    Image.fromarray(noise).save(tmp_path / "deep.png")
    Image.fromarray((noise >> 8).astype(np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    loader = make_loader(write_meta({"image": name}), epochs=1)
    steps = list(loader.steps(0, loader.plan.total))
    assert loader.faults.summary() == f"bad: {reason} 1" and loader.faults.totals().tolist() == [
        [3, 0]
    ]
    assert sum(len(step.sample_ids) for step in steps) == 3


def test_data_modules_import_no_jax():
    """All but read_ahead.py and what imports it: grain imports jax by itself."""
    modules = (
        "batch, buckets, conversations, encode, faults, fit, images, index, meta, order, packing, "
        "plan, processor, reader, sources, storage, streams, synthetic, table, templates, tiles, "
        "tokenizer, video"
    )
    code = (
        f"import sys; from internvlx_jax.data import {modules}; "
        "print([m for m in ('jax', 'tensorflow') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


# Digests of the order that earlier versions gave to `fixed_meta`. A run whose plan hash changes
# cannot go on, so they change only with the order itself.
PLAN_HASHES = {
    "tokens": "8b24ae105ded20ef",
    "samples": "69014e10e2be44c7",
    "pack": "64fb97fd5213aca0",
}
# And those of runs that begin now.
NEW_PLAN_HASHES = {
    "tokens": "81ae237b16b7ea0d",
    "samples": "0f701c7f53ee418d",
    "pack": "238d95f3184911fb",
}


@pytest.fixture
def fixed_meta(tmp_path):
    """Thirty texts and images of stated sizes, written here so that no generator changes them."""
    lines = []
    for n in range(30):
        turns = [
            {"from": "human", "value": f"What is {n}?"},
            {"from": "gpt", "value": "one " * (n % 7 + 1)},
        ]
        image = {"image": "none.png", "width": 40 + 9 * n, "height": 60} if n % 3 else {}
        lines.append(json.dumps(image | {"conversations": turns}) + "\n")
    (tmp_path / "pages.jsonl").write_text("".join(lines))
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"pages": {"annotation": "pages.jsonl"}}))
    return meta


@pytest.fixture
def open_fixed(fixed_meta, processor, standin):
    def make(batch_mode, **options):
        config = dataclasses.replace(CONFIG, batch_mode=batch_mode, samples_per_step=4)
        reader = dataclasses.replace(processor, tokenizer=standin)
        return Loader(str(fixed_meta), config, reader, row_quantum=2, seed=0, **options)

    return make


@pytest.mark.parametrize("batch_mode", PLAN_HASHES)
def test_a_run_of_an_earlier_version_keeps_its_plan(batch_mode, open_fixed):
    """Its checkpoints say nothing about costs; those of its later steps still do not."""
    earlier = {"version": 2, "plan_hash": PLAN_HASHES[batch_mode], "epoch": 0, "step": 3}
    loader = open_fixed(batch_mode, state=earlier)
    assert loader.plan_hash == loader.state(3)["plan_hash"] == PLAN_HASHES[batch_mode]
    assert "costs" not in loader.state(3)
    again = open_fixed(batch_mode, state=json.loads(json.dumps(loader.state(5))))
    assert again.plan_hash == PLAN_HASHES[batch_mode]


@pytest.mark.parametrize("batch_mode", NEW_PLAN_HASHES)
def test_the_plan_hash_stays(batch_mode, open_fixed):
    """A run goes on with the costs that it began with, whatever they are by now."""
    loader = open_fixed(batch_mode)
    assert loader.plan_hash == loader.state(3)["plan_hash"] == NEW_PLAN_HASHES[batch_mode]
    state = json.loads(json.dumps(loader.state(3)))
    assert state["costs"] == {"tile": 243.2, "short": 0.0}
    later = open_fixed(batch_mode, costs=SlotCosts(tile=9.0, short=0.5), state=state)
    assert later.plan_hash == loader.plan_hash and later.costs == loader.costs
    assert [later.plan.step(n).rows for n in range(4)] == [
        loader.plan.step(n).rows for n in range(4)
    ]


def test_the_state_of_a_checkpoint_keeps_its_fields(make_loader):
    fields = ["version", "plan_hash", "parts", "epoch", "step", "row_quantum"]
    assert list(make_loader().state(3)) == [*fields, "costs"]
    assert list(make_loader(batch_mode="pack").state(3)) == [*fields, "rows_before", "costs"]


def test_the_name_of_an_index_is_that_of_earlier_versions(processor, make_loader):
    """Its hash takes the capacity in the words of the first version."""
    key = index._index_key("sizes", 40, processor, CONFIG, Capacity(256, 12))
    assert key == "ed1d0472c91739fe"
