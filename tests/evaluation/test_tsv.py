"""TSV files in and out (design: evaluation.md 5, 8, tests 4 and 9)."""

import base64
import csv
import re

import mini_data
import openpyxl
import pytest

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.data.images import image_size
from internvlx_jax.evaluation.tables import write_table, write_tsv
from internvlx_jax.evaluation.tsv import list_cell, read_tsv

CELLS = [base64.b64encode(mini_data.picture(number)).decode() for number in (1, 2)]


@pytest.fixture
def write(tmp_path):
    def write(*rows, names=("index", "image", "question", "answer", "A", "B")):
        path = tmp_path / "table.tsv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerows([names, *rows])
        return path

    return write


def test_images_of_all_kinds(write):
    """Base64, the index of another row, a list; rows without an image are left out."""
    path = write(
        ["7", CELLS[0], 'one\n"two"\tthree', "x", "a", "b"],
        ["8", "7", "q", "", "", ""],
        ["9", "", "q", "y", "", ""],
        ["10", f"[{CELLS[0]}, {CELLS[1]}]", "q\r\nr", "y", "a", ""],
    )
    first, second, third = read_tsv(path)
    assert (first.text, first.answers, first.options) == (
        'one\n"two"\tthree',
        ("x",),
        {"A": "a", "B": "b"},
    )
    assert (second.id, second.answers, second.images) == ("8", (), first.images)
    assert third.text == "q\r\nr" and third.options == {"A": "a"}
    assert [image_size(image) for image in (*first.images, *third.images)] == [
        (61, 60),
        (61, 60),
        (62, 60),
    ]
    assert first.images[0].open().read() == mini_data.picture(1)
    assert [str(image).rpartition("/")[2] for image in third.images] == [
        "table.tsv row 10",
        "table.tsv row 10 image 2",
    ]
    assert first.where == f"{path} line 2" and second.where == f"{path} line 4"
    assert "image" not in first.fields and first.fields["question"] == first.text


def test_paths_in_place_of_images(write, tmp_path):
    path = write(
        ["1", "a.png", "q"],
        ["2", "['a.png', 'b.png']", "q"],
        names=("index", "image_path", "question"),
    )
    one, two = read_tsv(path)
    assert one.images == (str(tmp_path / "a.png"),) and two.images == (
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
    )


@pytest.mark.parametrize(
    "rows, names, problem",
    [
        ([["1", "x"]], ("index", "image"), "line 1: no column question"),
        ([["1", "x"]], ("index", "question"), "line 1: no column image"),
        (
            [["1", CELLS[0], "q"], ["1", CELLS[0], "q"]],
            ("index", "image", "question"),
            "line 3: index 1 is used twice",
        ),
        ([["1", CELLS[0]]], ("index", "image", "question"), "line 2: 2 cells, but 3 columns"),
        (
            [["1", "5", "q"]],
            ("index", "image", "question"),
            "row 1: its image is that of row 5, which has none",
        ),
    ],
)
def test_a_bad_table_names_its_line(rows, names, problem, write):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        list(read_tsv(write(*rows, names=names)))


def test_a_bad_image_is_a_bad_sample(write):
    (question,) = read_tsv(write(["1", "%" * 100, "q", "", "", ""]))
    with pytest.raises(SampleError, match="table.tsv row 1"):
        image_size(question.images[0])


def test_list_cells():
    assert list_cell("['a', 'b\\'c', 1]", "w") == ("a", "b'c", "1")
    assert list_cell("plain", "w") == ("plain",)
    with pytest.raises(ConfigError, match="w: '.a, b.' is not a Python list"):
        list_cell("[a, b]", "w")


ROWS = [
    {"index": "007", "text": "=1+1", "long": 'two\nlines\tand "quotes"', "n": 3},
    {"index": "1e5", "text": "None", "long": " spaces ", "n": 4},
]


def test_xlsx_gives_the_same_cells_back(tmp_path):
    path = write_table(tmp_path / "t", ROWS)
    assert path.name == "t.xlsx"
    header, *rows = openpyxl.load_workbook(path).active.iter_rows(values_only=True)
    assert [dict(zip(header, row)) for row in rows] == ROWS


def test_tsv_gives_the_same_cells_back(tmp_path):
    write_tsv(tmp_path / "t.tsv", ROWS)
    with (tmp_path / "t.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert rows == [{name: str(value) for name, value in row.items()} for row in ROWS]


@pytest.mark.parametrize("text", ["\x01", "x" * 32_768], ids=["control character", "too long"])
def test_what_xlsx_cannot_hold_becomes_a_tsv(text, tmp_path):
    write_table(tmp_path / "t", ROWS)
    path = write_table(tmp_path / "t", [*ROWS, ROWS[0] | {"text": text}])
    assert path.name == "t.tsv" and not (tmp_path / "t.xlsx").exists()
    assert text in path.read_text()
    assert write_table(tmp_path / "t", ROWS).name == "t.xlsx" and not path.exists()
