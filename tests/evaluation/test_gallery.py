"""The picture of answered questions (design: evaluation.md 8)."""

import json

import numpy as np
import pytest
from PIL import Image, ImageColor

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.gallery import CARD, RIGHT, WRONG, write_gallery

PAGE = (10, 200, 30)  # a color that nothing else in the picture has


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.png"
    Image.new("RGB", (40, 30), PAGE).save(path)
    return str(path)


def row(images, **changes):
    return {
        "question_id": 0,
        "prompt": "What is the total?",
        "images": images,
        "prediction": "5",
        "answer": ["5"],
        "score": 1.0,
        "error": None,
    } | changes


def draw(tmp_path, rows, **options):
    predictions, out = tmp_path / "predictions.jsonl", tmp_path / "pictures" / "gallery.png"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_gallery(predictions, out, **options)
    assert [path.name for path in out.parent.iterdir()] == ["gallery.png"]
    return np.asarray(Image.open(out).convert("RGB"))


def count(picture, color):
    rgb = ImageColor.getrgb(color) if isinstance(color, str) else color
    return int((picture == np.array(rgb)).all(axis=-1).sum())


def test_right_and_wrong_are_marked(tmp_path, page):
    right = draw(tmp_path, [row([page])])
    assert count(right, RIGHT) > 0 and count(right, WRONG) == 0
    wrong = draw(tmp_path, [row([page], prediction="6", score=0.0)])
    assert count(wrong, WRONG) > 0 and count(wrong, RIGHT) == 0


def test_question_and_answer_are_drawn(tmp_path, page):
    picture = draw(tmp_path, [row([page])])
    assert (picture != draw(tmp_path, [row([page], prediction="8", answer=["8"])])).any()
    assert (picture != draw(tmp_path, [row([page], prompt="What is the color?")])).any()


def test_unicode_line_separator_inside_a_text(tmp_path, page):
    line = json.dumps(row([page], prediction="a\u2028b"), ensure_ascii=False)
    (tmp_path / "predictions.jsonl").write_text(line, encoding="utf-8")
    write_gallery(tmp_path / "predictions.jsonl", tmp_path / "out.png")
    assert count(np.asarray(Image.open(tmp_path / "out.png")), PAGE) > 0


def test_partial_score_is_written(tmp_path, page):
    half = draw(tmp_path, [row([page], prediction="6", score=0.5), row([page])])
    less = draw(tmp_path, [row([page], prediction="6", score=0.25), row([page], score=1.0)])
    card = np.s_[36 : 36 + CARD[1], 16 : 16 + CARD[0]]
    assert (half[card] != less[card]).any()


def test_pages_stand_side_by_side(tmp_path, page):
    one, two = (draw(tmp_path, [row([page] * pages)]) for pages in (1, 2))
    columns = [(picture == PAGE).all(axis=-1).any(axis=0) for picture in (one, two)]
    runs = [int((np.diff(column.astype(int)) == 1).sum()) for column in columns]
    assert runs == [1, 2]
    assert count(draw(tmp_path, [row([page] * 100)]), PAGE) > 0


def test_choice_is_spread_over_the_file(tmp_path, page):
    """Only rows 0, 3 and 6 of ten have a page, so three of them must be these."""
    rows = [row([page] if index in (0, 3, 6) else []) for index in range(10)]
    assert count(draw(tmp_path, rows, count=3), PAGE) == 3 * count(draw(tmp_path, rows[:1]), PAGE)


def test_few_rows_make_a_small_picture(tmp_path, page):
    assert draw(tmp_path, [row([page])]).shape[1] < draw(tmp_path, [row([page])] * 2).shape[1]
    assert draw(tmp_path, [row([page])] * 5).shape[0] > draw(tmp_path, [row([page])] * 4).shape[0]


def test_failed_question_and_unreadable_page(tmp_path):
    failed = row([str(tmp_path / "absent.png")], prediction="", score=0.0, error="cannot be read")
    assert count(draw(tmp_path, [failed]), WRONG) > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no predictions"),
        ("{\n", "line 1: not "),
        ("[]\n", "line 1: not "),
        (
            '{"prompt": "", "images": [], "prediction": "", "answer": []}\n',
            "line 1: no error, score",
        ),
    ],
)
def test_bad_predictions(tmp_path, text, message):
    (tmp_path / "predictions.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        write_gallery(tmp_path / "predictions.jsonl", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_missing_predictions(tmp_path):
    with pytest.raises(FileNotFoundError, match="eval.py"):
        write_gallery(tmp_path / "predictions.jsonl", tmp_path / "out.png")
