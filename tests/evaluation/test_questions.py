"""Question files (design: evaluation.md 5)."""

import json
import re

import pytest

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.sources import read_questions

ROW = {"question_id": 3, "image": "images/a.png", "question": "What?", "answer": "This"}


@pytest.fixture
def write(tmp_path):
    def write(*lines: dict | str | bytes):
        path = tmp_path / "questions.jsonl"
        texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        path.write_bytes(
            b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts) + b"\n"
        )
        return path

    return write


def test_a_line_is_a_question(write, tmp_path):
    path = write(ROW)
    assert read_questions(path) == [
        Question(f"{path} line 1", 3, (str(tmp_path / "images/a.png"),), "What?", ("This",))
    ]


def test_images_answers_and_ids_of_every_form(write, tmp_path):
    path = write(
        ROW | {"image": ["a.png", "/b.png"], "answer": ["x", "y"]},
        "",
        ROW | {"image": None, "question_id": "q"},
        {"question": "Text only?", "answer": ""},
    )
    first, second, third = read_questions(path)
    assert first.images == (str(tmp_path / "a.png"), "/b.png") and first.answers == ("x", "y")
    assert (second.images, second.id, second.where) == ((), "q", f"{path} line 3")
    assert (third.id, third.images, third.answers) == (2, (), ("",))


def test_image_root_replaces_the_folder_of_the_file(write, tmp_path):
    (question,) = read_questions(write(ROW), tmp_path / "elsewhere")
    assert question.images == (str(tmp_path / "elsewhere" / "images/a.png"),)


def test_limit_takes_the_first_questions(write):
    path = write("", *(ROW | {"question_id": i} for i in range(5)), "not read any more")
    assert [question.id for question in read_questions(path, limit=5)] == [0, 1, 2, 3, 4]
    assert [question.id for question in read_questions(path, limit=2)] == [0, 1]


def test_line_separators_inside_a_text_do_not_end_the_line(write):
    texts = ["a\u2028b", "c\u0085d", "e\x0bf"]
    path = write(
        *(json.dumps({"question": text, "answer": "x"}, ensure_ascii=False) for text in texts[:2]),
        {"question": texts[2], "answer": "x"},
    )
    assert [question.text for question in read_questions(path)] == texts


@pytest.mark.parametrize(
    "line, problem",
    [
        (json.dumps(ROW)[:30], "not valid JSON"),
        (b'{"question": "\xff", "answer": "x"}', "not UTF-8: byte 14 is 0xff"),
        ({"question": "What?"}, 'needs the fields "question" and "answer"'),
        ({"answer": "This"}, 'needs the fields "question" and "answer"'),
        ("[1]", 'needs the fields "question" and "answer"'),
        ("5", 'needs the fields "question" and "answer"'),
        (ROW | {"question": ["What?"]}, '"question" must be a text'),
        (ROW | {"answer": 5}, '"answer" and "image" a text or a list of texts'),
        (ROW | {"answer": []}, '"answer" and "image" a text or a list of texts'),
        (ROW | {"answer": ["x", None]}, '"answer" and "image" a text or a list of texts'),
        (ROW | {"image": 5}, '"answer" and "image" a text or a list of texts'),
        (ROW | {"question_id": [1]}, '"question_id" must be a text or a whole number, got [1]'),
        (ROW | {"question_id": None}, '"question_id" must be a text or a whole number, got None'),
        ('{"question": "\\ud800", "answer": "x"}', "a text is not valid Unicode"),
        (ROW | {"question_id": 0}, "question_id 0 is also in "),
    ],
)
def test_a_bad_line_is_one_error_with_file_and_line(line, problem, write):
    path = write(ROW | {"question_id": 0}, "", line)
    with pytest.raises(
        ConfigError, match=f"^{re.escape(str(path))} line 3: .*{re.escape(problem)}"
    ):
        read_questions(path)


def test_a_missing_and_an_empty_file_are_errors(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl does not exist"):
        read_questions(tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="questions.jsonl: no questions in it"):
        read_questions(write("", " "))
