"""Meta files and chat files: good, odd and bad input (design: data.md 1 to 3)."""

import json
import os
from pathlib import Path

import pytest

from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.conversations import parse_sample
from internvlx_jax.data.meta import DatasetEntry, read_meta
from internvlx_jax.data.sources import JsonLines, read_sample

Q, A = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def only(folder: Path, line: object):
    return parse_sample(
        line if isinstance(line, bytes) else json.dumps(line).encode(),
        dataset="d",
        line=1,
        where="a.jsonl line 1",
        root=str(folder),
    )


def write_meta(folder: Path, **fields: object) -> Path:
    (folder / "a.jsonl").write_text("")
    (folder / "images").mkdir(exist_ok=True)
    path = folder / "meta.json"
    fields = {"root": "images", "annotation": "a.jsonl"} | fields
    path.write_text(
        json.dumps({"d": {key: value for key, value in fields.items() if value is not ...}})
    )
    return path


def test_receipts_from_any_directory(shared_data, tmp_path, monkeypatch):
    samples = []
    for folder in (tmp_path, shared_data):
        monkeypatch.chdir(folder)
        (dataset,) = read_meta(shared_data / "receipts_meta.json")
        source = JsonLines(dataset.annotation, dataset.annotation)
        samples.append([read_sample(source, dataset, position) for position in range(len(source))])
        assert len(samples[-1]) == dataset.length == 128
        assert all(os.path.isfile(sample.images[0]) for sample in samples[-1])
    first = samples[0][0]
    assert first.turns == samples[1][0].turns and len(first.turns) % 2 == 0
    assert (first.id, first.sizes, first.line) == ("414", ((932, 1812),), 1)
    assert first.where == f"{shared_data}/receipts/train.jsonl line 1"


def test_sample_types(tmp_path):
    said = {"from": "gpt", "value": "What is <image>?"}
    text = only(tmp_path, {"conversations": [Q, said]})
    assert (text.images, text.sizes, text.id, text.system) == ((), (), None, None)
    assert text.turns == (("human", "Q"), ("gpt", "What is <image>?"))

    single = only(
        tmp_path, {"id": 7, "image": "x/1.jpg", "width": 30, "height": 20, "conversations": [Q, A]}
    )
    assert (
        single.images == (str(tmp_path / "x/1.jpg"),)
        and single.sizes == ((30, 20),)
        and single.id == "7"
    )
    assert single.turns[0] == ("human", "<image>\nQ")

    later = only(tmp_path, {"image": "/abs.jpg", "conversations": [Q, A, human("and <image>?"), A]})
    assert later.images == ("/abs.jpg",) and later.sizes == (None,)
    assert [text for _, text in later.turns] == ["Q", "A", "and <image>?", "A"]

    multi = only(
        tmp_path,
        {
            "image": ["1.jpg", "2.jpg"],
            "width_list": [3, 4],
            "height_list": [5, 6],
            "conversations": [
                human("<image>\nvs"),
                A,
                human("<image>"),
                {"from": "gpt", "value": "<image>"},
            ],
        },
    )
    assert multi.sizes == ((3, 5), (4, 6)) and len(multi.images) == 2


def test_system_and_leading_gpt_turns(tmp_path):
    system = {"from": "system", "value": "Be brief."}
    sample = only(tmp_path, {"conversations": [system, A, Q, A, Q]})
    assert sample.system == "Be brief."
    assert sample.turns == (("human", "Q"), ("gpt", "A"), ("human", "Q"))


@pytest.mark.parametrize(
    "line, reason, message",
    [
        (b'{"conversations": [', "json", "not valid JSON"),
        (b'{"id": "\xff"}', "json", "not UTF-8: byte 8 is 0xff; save the file as UTF-8"),
        ([1], "json", "not a JSON object"),
        ({}, "json", '"conversations" must be a list'),
        ({"conversations": [{"from": "human"}]}, "json", '"conversations" must be a list'),
        (
            b'{"conversations": [{"from": "human", "value": "\\ud800"}]}',
            "json",
            "not valid Unicode",
        ),
        (
            {"conversations": [human("What is <image>?"), A]},
            "placeholder_mismatch",
            '0 images but 1 "<image>" in the human turns',
        ),
        (
            {"image": 5, "conversations": [Q, A]},
            "json",
            '"image" must be a path or a list of paths, got 5',
        ),
        ({"image": ["a", ""], "conversations": [Q, A]}, "json", "list of paths"),
        ({"conversations": []}, "role_order", "from nobody"),
        ({"conversations": [A]}, "role_order", "from nobody"),
        ({"conversations": [Q, Q, A]}, "role_order", "from human, human, gpt"),
        ({"conversations": [A, A, Q, A]}, "role_order", "from gpt, human, gpt"),
        (
            {"conversations": [Q, A, {"from": "system", "value": ""}]},
            "role_order",
            "human, gpt, system",
        ),
        (
            {"image": "a", "conversations": [human("<image><image>"), A]},
            "placeholder_mismatch",
            "1 image but 2",
        ),
        (
            {"image": ["a"], "conversations": [Q, A]},
            "placeholder_mismatch",
            '1 image but 0 "<image>"',
        ),
        (
            {"image": ["a", "b"], "conversations": [human("<image>"), A]},
            "placeholder_mismatch",
            "2 images but 1",
        ),
        (
            {"image": "a", "width": 0, "height": 5, "conversations": [Q, A]},
            "size_mismatch",
            "positive width",
        ),
        ({"image": "a", "width": 5, "conversations": [Q, A]}, "size_mismatch", "positive width"),
        (
            {"image": "a", "width": 5.5, "height": 5, "conversations": [Q, A]},
            "size_mismatch",
            "positive width",
        ),
        (
            {
                "image": ["a"],
                "width_list": [1, 2],
                "height_list": [1],
                "conversations": [human("<image>"), A],
            },
            "size_mismatch",
            "or remove them",
        ),
        (
            {"image": "s3://a/b.jpg", "conversations": [Q, A]},
            "unreadable",
            "s3://a/b.jpg is not a local file",
        ),
        (
            {"video": ["a.mp4"], "conversations": [Q, A]},
            "json",
            "a list holds images, and a sample one video",
        ),
        (
            {"video": "a.mp4", "clip": [3, 1], "conversations": [Q, A]},
            "json",
            '"clip" must be [begin, end] in seconds, got [3, 1]',
        ),
        (
            {"video": "a", "clip": [0, 1], "conversations": [Q, A]},
            "missing_decoder",
            '"clip" gives seconds',
        ),
        (
            {"video": "a", "image": "b", "conversations": [Q, A]},
            "json",
            '"image" or "video", not both',
        ),
        (
            {"video": 5, "conversations": [Q, A]},
            "json",
            '"video" must be a video file, a folder or a list of frames, got 5',
        ),
        (
            {"video": "a", "conversations": [human("<video> <video>"), A]},
            "placeholder_mismatch",
            'one "<video>" in the first human turn',
        ),
        (
            {"video": "a", "conversations": [human("<video> <image>"), A]},
            "placeholder_mismatch",
            'no "<image>"',
        ),
        (b"[" * 100_000, "json", "not valid JSON"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, reason, message):
    with pytest.raises(SampleError) as error:
        only(tmp_path, line)
    assert error.value.reason == reason
    head, remedy = str(error.value).split("\n")
    assert head.startswith("a.jsonl line 1: ") and message in str(error.value) and remedy


def test_empty_lines_do_not_count(tmp_path):
    good = json.dumps({"conversations": [Q, A]})
    (tmp_path / "a.jsonl").write_text(f"{good}\n\n  \n{good}\nbroken\n{good}")
    source = JsonLines("a.jsonl", str(tmp_path / "a.jsonl"))
    assert len(source) == 4 and source.lines.tolist() == [1, 4, 5, 6]
    dataset = DatasetEntry("d", annotation="a.jsonl")
    assert [read_sample(source, dataset, position).line for position in (3, 0)] == [6, 1]
    with pytest.raises(SampleError, match="a.jsonl line 5: not valid JSON"):
        read_sample(source, dataset, 2)


def test_meta_fields(tmp_path, monkeypatch):
    fields = {
        "repeat_time": 3,
        "length": 0,
        "max_dynamic_patch": 2,
        "conv_style": "internvl2_5",
        "tile_rule": "off",
    }
    (dataset,) = read_meta(write_meta(tmp_path, data_augment=False, **fields))
    assert dataset == DatasetEntry(
        "d", str(tmp_path / "images"), str(tmp_path / "a.jsonl"), **fields
    )
    monkeypatch.chdir(tmp_path)  # the working directory comes first
    (dataset,) = read_meta("meta.json")
    assert (dataset.root, dataset.annotation) == ("images", "a.jsonl")


def test_unknown_field_is_a_warning(tmp_path):
    with pytest.warns(
        UserWarning, match='"d": unknown field "repeat_tine" is ignored. Did you mean "repeat_t'
    ):
        read_meta(write_meta(tmp_path, repeat_tine=2))


@pytest.mark.parametrize(
    "fields, kind, message",
    [
        ({"annotation": ...}, ValueError, '"annotation" must name a .jsonl file, got None'),
        ({"annotation": "a.txt"}, ValueError, "must name a .jsonl file, got 'a.txt'"),
        (
            {"annotation": "b.jsonl"},
            FileNotFoundError,
            '"annotation" does not exist; tried b.jsonl and .*/b',
        ),
        ({"root": "nowhere"}, FileNotFoundError, '"root" does not exist; tried nowhere and'),
        ({"root": 3}, ValueError, '"root" must be a text, got 3'),
        ({"repeat_time": 1.5}, ValueError, "below 1 or a whole number, got 1.5"),
        ({"repeat_time": -1}, ValueError, '"repeat_time" must be'),
        ({"repeat_time": "2"}, ValueError, "got '2'"),
        (
            {"max_dynamic_patch": 0},
            ValueError,
            '"max_dynamic_patch" must be a whole number above 0, got 0',
        ),
        ({"tile_rule": "egde"}, ValueError, '"tile_rule" must be one of edge, area, off'),
        (
            {"conv_style": "internvl2.5"},
            ValueError,
            '"conv_style": template .* Did you mean "internvl2_5"',
        ),
        ({"data_augment": 1}, ValueError, '"data_augment" must be true or false, got 1'),
        ({"weight": 0}, ValueError, '"weight" must be a number above 0, got 0'),
        ({"array_record": "x"}, ValueError, "has annotation and array_record; keep one of them"),
        (
            {"annotation": ..., "array_record": "x-*"},
            FileNotFoundError,
            '"array_record" does not exist; tried x-',
        ),
        (
            {"annotation": ..., "tfds": "a:1.0.0"},
            ValueError,
            '"tfds" needs "builder": "module:function"',
        ),
    ],
)
def test_bad_meta_fields(tmp_path, fields, kind, message):
    path = write_meta(tmp_path, **fields)
    with pytest.raises(kind, match=message) as error:
        read_meta(path)
    assert str(error.value).startswith(f'{path} dataset "d": ')


def test_bad_meta_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"meta file .*no\.json does not exist"):
        read_meta(tmp_path / "no.json")
    path = tmp_path / "meta.json"
    path.write_text('{\n"d": {]}')
    with pytest.raises(ValueError, match=r"meta.json is not valid JSON: .* line 2 column 7"):
        read_meta(path)
    path.write_text('{"d": []}')
    with pytest.raises(ValueError, match="meta.json: must map dataset names to objects"):
        read_meta(path)
