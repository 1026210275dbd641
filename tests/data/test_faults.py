"""Bad samples: used, replaced, masked or counted, never lost.

Two thousand damaged inputs (design: data.md 7, 15).
"""

import dataclasses
import io
import json
import resource
import time

import numpy as np
import pytest
from PIL import Image

from internvlx_jax.core.data_config import DataConfig, FaultConfig, ImageConfig
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.data.faults import Fault, FaultCounts, read_quarantine
from internvlx_jax.data.pipeline import Loader

CONFIG = DataConfig(
    meta="",
    max_length=256,
    tokens_per_step=1024,
    max_executables=4,
    faults=FaultConfig(max_share=1.0),
)
MODES = pytest.mark.parametrize("mode", ["tokens", "pack"])


def chat(question: str, answer: str = "It is.") -> dict:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    }


def encoded(number: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)).save(
        file, kind
    )
    return file.getvalue()


def write(folder, lines, name="d", **fields):
    """A meta file over lines of JSON text, objects or bytes."""
    (folder / f"{name}.jsonl").write_bytes(
        b"".join(
            (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
            for line in lines
        )
    )
    meta = folder / "meta.json"
    found = json.loads(meta.read_text()) if meta.exists() else {}
    meta.write_text(
        json.dumps(
            found
            | {name: {"root": str(folder), "annotation": str(folder / f"{name}.jsonl")} | fields}
        )
    )
    return meta


@pytest.fixture
def make(processor):
    def make(meta, *, row_quantum=2, seed=0, epochs=1, images=ImageConfig(), **settings):
        return Loader(
            str(meta),
            dataclasses.replace(CONFIG, images=images, **settings),
            dataclasses.replace(processor, images=images),
            row_quantum=row_quantum,
            seed=seed,
            epochs=epochs,
        )

    return make


@pytest.fixture
def mixed(tmp_path):
    """Forty samples in two datasets.

    Lines 4, 8, ... of the first show a file that cannot be decoded.
    """
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(number, "PNG"))
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("a", "b"):
        lines = [
            {
                "image": "empty.png" if name == "a" and number % 4 == 3 else f"{number % 4}.png",
                "width": 40,
                "height": 30,
                **chat("What?", f"{name} {number}."),
            }
            for number in range(20)
        ]
        meta = write(tmp_path, lines, name)
    return meta


def rows_by_slot(steps):
    """(step, row, segment) -> tokens."""
    return {
        (number, row, segment): tuple(
            step.batch.inputs.tokens[row][step.batch.inputs.segment_ids[row] == segment]
        )
        for number, step in enumerate(steps)
        for row in range(len(step.batch.labels))
        for segment in range(1, step.batch.inputs.segment_ids[row].max() + 1)
    }


@MODES
def test_bad_samples_are_replaced_and_all_other_rows_stay(mode, mixed, make, tmp_path):
    # With this seed one of the first two draws is a good sample of the dataset, for each bad one.
    loader = make(mixed, batch_mode=mode, seed=2)
    steps = list(loader.steps(0, loader.plan.total))
    assert (
        loader.faults.summary().startswith("a: unreadable ") and loader.faults.totals()[0, 1] >= 5
    )
    assert loader.faults.totals()[1, 1] == 0
    with_faults = rows_by_slot(steps)
    (tmp_path / "empty.png").write_bytes(encoded(9, "PNG"))
    whole = make(mixed, batch_mode=mode, seed=2)
    assert whole.plan_hash == loader.plan_hash
    healthy_steps = list(whole.steps(0, whole.plan.total))
    healthy = rows_by_slot(healthy_steps)
    assert with_faults.keys() == healthy.keys(), "every slot of the plan is filled"
    changed = {slot for slot in healthy if healthy[slot] != with_faults[slot]}
    assert len(changed) == 5 and not whole.faults.reasons
    names = [name for step in steps for name in step.sample_ids]
    assert len(names) == 40 and not {f"a:{line}" for line in range(4, 21, 4)} & set(names)
    assert all(
        name.startswith("a:")
        for step, other in zip(steps, healthy_steps)
        for name, before in zip(step.sample_ids, other.sample_ids)
        if name != before
    ), "first of the same dataset"


def test_the_replacement_depends_on_the_slot_alone(mixed, make):
    loader = make(mixed, epochs=None)
    straight = [step.sample_ids for step in loader.steps(0, 20)]
    assert straight[7:] == [step.sample_ids for step in make(mixed, epochs=None).steps(7, 20)]


@MODES
def test_skipped_samples_leave_their_slots_empty(mode, mixed, make):
    loader = make(mixed, batch_mode=mode, faults=FaultConfig(on_bad="skip", max_share=1.0))
    steps = list(loader.steps(0, loader.plan.total))
    assert sum(len(step.sample_ids) for step in steps) == 35
    for step in steps:
        empty = ~step.batch.inputs.segment_ids.any(axis=1)
        assert not step.batch.loss_weight[empty].any() and not step.batch.inputs.tiles[empty].any()
        found = sum(int(row.max()) for row in step.batch.inputs.segment_ids)
        assert found == len(step.sample_ids), "segments of a packed row close up"


def test_a_bucket_without_a_good_sample_is_masked(make, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    image = {"image": "empty.png", "width": 40, "height": 30}
    loader = make(write(tmp_path, [image | chat("What?")] * 3 + [chat("Hello.")]))
    steps = list(loader.steps(0, loader.plan.total))
    assert [name for step in steps for name in step.sample_ids] == ["d:4"]
    assert loader.faults.totals()[0, 1] == 3 * 3 + 3, (
        "each of three slots tried itself and three others"
    )


def test_strict_stops_at_the_first_one(mixed, make):
    loader = make(mixed, faults=FaultConfig(on_bad="fail"))
    with pytest.raises(SampleError, match="a.jsonl line .*the image cannot be read"):
        list(loader.steps(0, loader.plan.total))


# --- counting -------------------------------------------------------------------------------------


def test_a_share_of_bad_lines_stops_the_run_before_it_begins(make, tmp_path):
    meta = write(tmp_path, [chat("Hello.")] * 190 + [b"{broken"] * 10)
    assert make(meta, faults=FaultConfig(max_share=0.05)).index_faults.totals().tolist() == [
        [200, 10]
    ]
    with pytest.raises(
        ConfigError,
        match='dataset "d": 10 of 200 samples are bad, more than data.faults.max_share = 0.04 '
        r"\(json 10\)",
    ):
        make(meta, faults=FaultConfig(max_share=0.04))


def test_a_small_data_set_is_judged_as_if_it_had_a_hundred(make, tmp_path):
    meta = write(tmp_path, [chat("Hello."), b"{broken"])
    assert make(meta, faults=FaultConfig(max_share=0.01)).index_faults.summary() == "d: json 1"
    with pytest.raises(ConfigError, match="1 of 2 samples are bad"):
        make(meta, faults=FaultConfig(max_share=0.0))


def test_counts_of_several_processes_are_judged_together():
    config = FaultConfig(max_share=0.1)
    counts = [FaultCounts(["a", "b"], config) for _ in range(2)]
    error = SampleError("unreadable", "gone", "find it")
    for each in counts:
        each.add(
            {"a": 150, "b": 150}, [Fault("b", line, "unreadable", error) for line in range(14)]
        )
        each.judge(each.totals())
        each.judge(counts[0].totals() + counts[1].totals())
    counts[0].add({"b": 3}, [Fault("b", line, "unreadable", error) for line in range(3)])
    counts[0].judge(counts[0].totals() * 0)
    with pytest.raises(ConfigError, match='dataset "b": 31 of 303 samples are bad'):
        counts[1].judge(counts[0].totals() + counts[1].totals())


def test_the_quarantine_lists_each_sample_once_and_later_runs_leave_them_out(mixed, make, tmp_path):
    with open(tmp_path / "b.jsonl", "ab") as file:
        file.write(b"{broken\n")
    quarantine = tmp_path / "quarantine.jsonl"
    loader = make(mixed, epochs=2)
    loader.list_bad_samples(quarantine)
    list(loader.steps(0, loader.plan.total))
    again = make(mixed, epochs=2)
    again.list_bad_samples(quarantine)
    list(again.steps(0, again.plan.total))
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted((row["dataset"], row["line"], row["reason"]) for row in rows) == [
        *(("a", line, "unreadable") for line in (4, 8, 12, 16, 20)),
        ("b", 21, "json"),
    ]
    assert all(f"{row['dataset']}.jsonl line {row['line']}" in row["error"] for row in rows)

    clean = make(mixed, faults=FaultConfig(max_share=1.0, exclude=(str(quarantine),)))
    steps = list(clean.steps(0, clean.plan.total))
    assert sum(len(step.sample_ids) for step in steps) == 35 and not clean.faults.reasons
    with pytest.raises(ConfigError, match="data.faults.exclude: nowhere does not exist"):
        make(mixed, faults=FaultConfig(exclude=("nowhere",)))
    quarantine.write_text('{"dataset": "a"}\n')
    with pytest.raises(ConfigError, match="quarantine.jsonl line 1: no quarantined sample"):
        read_quarantine([quarantine])


# --- what an image can be -------------------------------------------------------------------------


def test_every_kind_of_odd_image_is_used_or_counted(make, tmp_path):
    """Corrupt, cut, empty, animated, CMYK, 16-bit, alpha, turned and over-large files, one line
    each.
    """
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "good.png": encoded(0, "PNG"),
        "corrupt.png": encoded(0, "PNG")[:20] + b"\0" * 50,
        "empty.png": b"",
        "cut.jpg": encoded(0, "JPEG")[:-300],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pixels.save(tmp_path / "moving.gif", save_all=True, append_images=[pixels.rotate(180)])
    pixels.convert("CMYK").save(tmp_path / "cmyk.jpg")
    pixels.convert("RGBA").save(tmp_path / "alpha.png")
    pixels.save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(
        tmp_path / "deep.png"
    )
    Image.new("RGB", (100, 100)).save(tmp_path / "large.png")
    Image.new("F", (40, 30)).save(tmp_path / "float.tif")
    names = [
        *files,
        "moving.gif",
        "cmyk.jpg",
        "alpha.png",
        "turned.jpg",
        "deep.png",
        "large.png",
        "float.tif",
    ]
    meta = write(tmp_path, [{"image": name, **chat("What?")} for name in names])
    loader = make(meta, images=ImageConfig(max_pixels=5000))
    steps = list(loader.steps(0, loader.plan.total))
    assert loader.index_faults.summary() == "d: too_many_pixels 1, unreadable 2"
    reasons = {(fault.line, fault.reason) for step in steps for fault in step.faults}
    assert {
        (names.index("cut.jpg") + 1, "truncated"),
        (names.index("deep.png") + 1, "16bit"),
        (names.index("float.tif") + 1, "unsupported_mode"),
    } == reasons
    used = {int(name.split(":")[1]) - 1 for step in steps for name in step.sample_ids}
    assert {names[i] for i in used} >= {
        "good.png",
        "cut.jpg",
        "moving.gif",
        "cmyk.jpg",
        "alpha.png",
        "turned.jpg",
        "deep.png",
    }

    turned = make(meta, images=ImageConfig(exif="apply", truncated="reject"))
    sizes = {
        name: tuple(turned.processors[0].sizes([str(tmp_path / name)], "")[0])
        for name in ("turned.jpg", "good.png")
    }
    assert sizes == {"turned.jpg": (30, 40), "good.png": (40, 30)}
    list(turned.steps(0, turned.plan.total))
    assert turned.faults.reasons["d", "truncated"] >= 1 and turned.faults.totals()[0, 1] >= 1


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Up to 20 bytes flipped, sometimes the end lost."""
    data = np.frombuffer(content, np.uint8).copy()
    places = rng.integers(0, len(data), rng.integers(1, 21))
    data[places] ^= rng.integers(1, 256, len(places), np.uint8)
    return data[: rng.integers(1, len(data)) if rng.random() < 0.1 else None].tobytes()


@MODES
def test_two_thousand_damaged_inputs_are_used_or_counted(mode, make, tmp_path):
    """1,000 in each mode: 350 JPEG, 350 PNG and 300 JSON lines."""
    rng = np.random.default_rng(["tokens", "pack"].index(mode))
    (tmp_path / "good.png").write_bytes(encoded(0, "PNG"))
    lines = []
    for number in range(700):
        kind = ("JPEG", "PNG")[number % 2]
        (tmp_path / f"{number}.{kind}").write_bytes(mutated(encoded(number, kind), rng))
        lines.append(
            {"image": f"{number}.{kind}", "width": 40, "height": 30, **chat("What?", f"{number}.")}
        )
    for number in range(300):
        line = json.dumps(
            {
                "image": "good.png",
                "width": 40,
                "height": 30,
                **chat("<image> What is in it?", f"{number}."),
            }
        )
        lines.append(mutated(line.encode(), rng).replace(b"\n", b" "))
    meta = write(tmp_path, lines)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    loader = make(meta, batch_mode=mode, images=ImageConfig(max_pixels=10**6))
    steps = list(loader.steps(0, loader.plan.total))
    assert time.monotonic() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kB"

    listed = {int(loader.sources[0].lines[position]) for position, _ in loader.indexes[0].bad}
    while_reading = {
        fault.line for step in steps for fault in step.faults if fault.error is not None
    }
    used = {int(name.split(":")[1]) for step in steps for name in step.sample_ids}
    assert listed | while_reading | used == set(range(1, len(loader.indexes[0]) + 1)), (
        "used or counted, none lost"
    )
    assert not used & (listed | while_reading)
    assert (
        len(loader.indexes[0]) >= 995
        and len(used) > 300
        and len(listed) > 100
        and len(while_reading) > 50
    )
    for step in steps:
        image_tokens = (
            step.batch.inputs.tokens == loader.processors[0].tokenizer.image_token_id
        ).sum()
        assert (
            image_tokens
            == (step.batch.inputs.feature_index < step.batch.inputs.tiles.shape[1] * 4).sum()
        )
