"""Question files as users bring them, and an interrupted job (design: evaluation.md 5, 9)."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from tiny_videos import gray, video

import internvlx_jax as ivx
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.data.images import ImageBytes, load_image
from internvlx_jax.evaluation.records import Parts, Row, Summary, read_objects, write_rows
from internvlx_jax.evaluation.selection import select
from internvlx_jax.evaluation.sources import read_questions
from internvlx_jax.evaluation.tsv import read_cells, read_tsv
from internvlx_jax.inference.batch_generator import BatchGenerator

ROW = {"question": "What?", "answer": "x"}
ODD = ["a\u2028b", "a\u0085b", "nul \u0000", "half \ud83d", "\U0001f600"]


def encoded() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def ask(tmp_path):
    """ask(*rows) -> the file; two pictures lie beside it."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded())

    def write(*rows, name="q.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def chosen(path):
    (spec,) = select(EvaluationConfig(data=str(path), metric="exact"))
    return spec.questions


def test_the_images_of_a_list_are_put_in_front_each(ask, command, checkpoint):
    rows = [
        ROW | {"question_id": "none", "image": ["a.png", "b.png"]},
        ROW | {"question_id": "said", "image": ["a.png", "b.png"],
               "question": "<image>\n<image>\nWhat?"},
        ROW | {"question_id": "one", "images": ["a.png"]},
    ]  # fmt: skip
    status, out, error = command(
        data=ask(*rows), metric="exact", checkpoint=checkpoint, dtype="float32", max_new_tokens=4
    )
    assert status == 0, error
    path = next(word for word in out.split() if word.endswith("out"))
    answers = [row for _, row in read_objects(type(checkpoint)(path) / "predictions.jsonl")]
    assert [row["error"] for row in answers] == [None] * 3
    assert answers[0]["prompt_tokens"] == answers[1]["prompt_tokens"]
    assert answers[0]["raw"] == answers[1]["raw"], "the same prompt"
    assert answers[2]["tiles"] < answers[0]["tiles"]


@pytest.mark.slow
def test_videos(ask, command, checkpoint, tmp_path):
    """Answers are those of `generate`; a damaged file is an error of its question, and counted."""
    (tmp_path / "clip.mp4").write_bytes(video())
    (tmp_path / "bad.mp4").write_bytes(video()[:400])
    (tmp_path / "folder").mkdir()
    for i in range(12):
        Image.fromarray(gray(i)).save(tmp_path / "folder" / f"{i}.png")
    texts = ["What?", "What?", "Is <image> there?", "What?"]
    given = [
        {"video": "clip.mp4"}, {"video": "folder"}, {"video": "clip.mp4", "image": "a.png"},
        {"video": "bad.mp4"},
    ]  # fmt: skip
    rows = [
        ROW | {"question_id": n, "question": text} | fields
        for n, (text, fields) in enumerate(zip(texts, given, strict=True))
    ]
    status, out, error = command(
        data=ask(*rows), metric="exact", checkpoint=checkpoint, dtype="float32", max_new_tokens=4,
        frames=3,
    )  # fmt: skip
    assert status == 3, error
    assert "4 samples, 1 errors" in out
    path = next(word for word in out.split() if word.endswith("out"))
    answers = [row for _, row in read_objects(type(checkpoint)(path) / "predictions.jsonl")]
    assert "the video cannot be decoded" in answers[3]["error"]
    model = ivx.load(checkpoint, dtype="float32")
    wanted = model.generate(
        texts[:3], [None, None, str(tmp_path / "a.png")], frames=3, max_new_tokens=4,
        video=[str(tmp_path / fields["video"]) for fields in given[:3]],
    )  # fmt: skip
    assert [row["raw"] for row in answers[:3]] == wanted
    assert answers[0]["tiles"] == 3 < answers[2]["tiles"]
    assert answers[0]["images"][2].endswith("clip.mp4 frame 3 of 3")


@pytest.mark.parametrize(
    "row, words",
    [
        ({"video": "no.mp4"}, "no.mp4, which does not exist; correct the path, or name the folder"),
        ({"video": ["a.png"]}, 'line 2: "video" must be the path of a video file'),
        ({"video": "empty"}, "holds no frames"),
        ({"video": "a.mp4", "question": "<video><video>"}, "line 2: a prompt about a video has at"),
        ({"video": "a.mp4", "question": "<image>?"}, '0 images but 1 "<image>" in the prompt'),
    ],
)
def test_a_question_is_never_asked_without_its_video(row, words, ask, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        chosen(ask(ROW, ROW | row))
    assert words in str(error.value) and "line 2" in str(error.value)


def test_a_video_that_breaks_off_is_told(ask, tmp_path):
    whole = video(kind="avi")
    (tmp_path / "half.avi").write_bytes(whole[: whole.index(b"idx1") - 300])
    (question,) = chosen(ask(ROW | {"video": "half.avi"}))
    assert question.prompt.count("Frame8: <image>") == 1 and len(question.images) == 8
    with pytest.warns(UserWarning, match="half.avi: the video is damaged; its last frame"):
        load_image(question.images[-1])


def test_frames_without_videos(ask):
    with pytest.raises(ConfigError, match="no question has a video; leave out --frames"):
        select(EvaluationConfig(data=str(ask(ROW)), metric="exact", frames=4))


@pytest.mark.parametrize(
    "row, words",
    [
        ({"question": "<image>\nWhat?"}, 'line 2: 0 images but 1 "<image>" in the question'),
        ({"question": "<image> <image>", "image": "a.png"}, "line 2: 1 image but 2"),
        ({"image": "a.png", "images": ["b.png"]}, 'line 2: "image" and "images" are both set'),
        ({"image": "data:image/png;base64,@"}, "line 2 image 1: the data: URL is not well formed"),
        ({"images": [{"path": "a.png"}]}, '"image" a text or a list of texts'),
    ],
)
def test_a_question_is_never_scored_without_its_picture(row, words, ask):
    with pytest.raises(ConfigError) as error:
        chosen(ask(ROW, ROW | row))
    assert words in str(error.value)


def test_fields_that_are_not_read_are_told_once(ask):
    rows = [ROW | {"question_id": n, "picture": "a.png", "note": 1} for n in range(3)]
    with pytest.warns(
        UserWarning, match=r"q.jsonl: fields that are not read.*'picture' \(3\)"
    ) as w:
        read_questions(ask(*rows))
    assert len(w) == 1
    with pytest.raises(ConfigError, match="needs the fields .* found 'messages', 'images'"):
        read_questions(ask({"messages": [], "images": ["a.png"]}))


def test_images_inside_the_field_are_shown_by_their_place(ask, tmp_path):
    text = base64.b64encode(encoded()).decode()
    path = ask(ROW | {"image": [f"data:image/png;base64,{text}", text, "a.png"]})
    (question,) = read_questions(path)
    assert [str(image) for image in question.images] == [
        f"{path} line 1 image 1", f"{path} line 1 image 2", str(tmp_path / "a.png"),
    ]  # fmt: skip
    assert isinstance(question.images[0], ImageBytes) and question.images[0].data == encoded()


def test_one_json_array_of_questions_is_read(ask, tmp_path):
    path = tmp_path / "array.json"
    path.write_text("\ufeff" + json.dumps([ROW, ROW | {"question": "Which?"}], indent=1))
    first, second = read_questions(path)
    assert (second.text, second.where) == ("Which?", f"{path} record 2")
    path.write_text(json.dumps([ROW])[:-4])
    with pytest.raises(ConfigError, match="array.json line 1: not valid JSON"):
        read_questions(path)


def test_a_cell_of_a_tsv_may_hold_a_data_url_or_line_ends(tmp_path):
    text = base64.b64encode(encoded()).decode()
    broken = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    cells = [f"data:image/png;base64,{text}", f'"{broken}"', text.rstrip("="),
             f"\"['data:image/png;base64,{text}', '{text}']\""]  # fmt: skip
    path = tmp_path / "t.tsv"
    lines = [f"{n}\t{cell}\tWhat?" for n, cell in enumerate(cells)]
    path.write_text("\n".join(["index\timage\tquestion", *lines]) + "\n")
    images = [image for question in read_tsv(path) for image in question.images]
    assert [image.open().read() for image in images] == [encoded()] * 5


def test_answers_survive_every_text(tmp_path):
    rows = [
        Row(index=n, question_id=text, prompt=text, images=[text], tiles=0, prompt_tokens=1,
            new_tokens=1, finish="stop", raw=text, prediction=None, answer=[text], score=None,
            error=None)
        for n, text in enumerate(ODD)
    ]  # fmt: skip
    parts = Parts(tmp_path / "parts", "hash")
    parts.log("0").append(map(parts.line, rows))
    assert [row.raw for row in parts.read().values()] == ODD
    write_rows(tmp_path / "predictions.jsonl", rows)
    assert [row["raw"] for _, row in read_objects(tmp_path / "predictions.jsonl")] == ODD
    (tmp_path / "parts" / "0.jsonl").write_text("[]\n")
    with pytest.raises(ConfigError, match="0.jsonl line 1: not a JSON object"):
        parts.read()


def test_ctrl_c_keeps_the_answers(ask, command, checkpoint, tmp_path, monkeypatch):
    rows = [ROW | {"question_id": n, "question": f"What is {n}?"} for n in range(12)]
    flags = dict(data=ask(*rows), metric="exact", checkpoint=checkpoint, dtype="float32",
                 max_new_tokens=2, batch_size=2)  # fmt: skip
    whole = BatchGenerator.answer

    def interrupted(self, requests, spec):
        for number, answers in enumerate(whole(self, requests, spec)):
            if number == 1:
                raise KeyboardInterrupt
            yield answers

    monkeypatch.setattr(BatchGenerator, "answer", interrupted)
    status, _, error = command(**flags)
    assert status == 130 and "--resume goes on with them" in error and "Traceback" not in error
    (part,) = (tmp_path / "out" / "parts").glob("*.jsonl")
    kept = len(part.read_text().splitlines())
    assert 0 < kept < 12
    monkeypatch.undo()
    status, out, error = command("--resume", **flags)
    assert status == 0, error
    assert len(read_objects(tmp_path / "out" / "predictions.jsonl")) == 12


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_of_questions_is_read(ask, indent):
    path = ask()
    path.write_text(json.dumps([ROW | {"question_id": "a"}, ROW], indent=indent))
    assert [question.id for question in chosen(path)] == ["a", 1]


@pytest.mark.parametrize("field", ["image_path", "img", "images_url", "image_urls"])
def test_a_picture_in_a_field_that_is_not_read_is_refused(ask, field):
    if field == "images_url":  # no spelling that is known
        assert len(chosen(ask(ROW | {field: "a.png"}))) == 1
        return
    with pytest.raises(ConfigError, match=f'line 1: "{field}" is set, but pictures are read from'):
        chosen(ask(ROW | {field: "a.png"}))
    assert len(chosen(ask(ROW | {field: "a.png", "image": "b.png"}))) == 1
    assert len(chosen(ask(ROW | {field: ""}))) == 1


def test_true_is_no_id(ask):
    with pytest.raises(ConfigError, match='"question_id" must be a text or a whole number'):
        chosen(ask(ROW | {"question_id": True}))


def test_a_column_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("index\timage\tquestion\tquestion\n0\tAAAA\ta\tb\n")
    with pytest.raises(ConfigError, match="t.tsv line 1: the column 'question' stands twice"):
        list(read_tsv(path))
    path.write_text("index\tquestion\tindex\n0\ta\t1\n")
    with pytest.raises(ConfigError, match="the column 'index' stands twice"):
        list(read_cells(path, ("question",)))


SUMMARY = {
    "task": "t", "title": "T", "protocol": "generic", "model": "m", "score": 1.0, "parts": {},
    "samples": 1, "errors": 0, "stopped_by_length": 0, "notes": [], "judge": None, "compat": [],
    "files": [], "settings": {}, "settings_hash": "0", "versions": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "field, value",
    [("model", ["m"]), ("score", "1"), ("score", True), ("samples", 1.5), ("notes", [1]),
     ("judge", 3), ("settings", []), ("versions", {"jax": 1})],
)  # fmt: skip
def test_a_damaged_summary_names_its_field(field, value):
    with pytest.raises(ConfigError, match=f"a/summary.json: {field} is "):
        Summary.from_json(SUMMARY | {field: value}, "a/summary.json")
    assert Summary.from_json(SUMMARY, "a/summary.json").score == 1.0
    assert Summary.from_json(SUMMARY | {"score": 1, "judge": {"model": "j"}}, "a").score == 1
    with pytest.raises(ConfigError, match="a/summary.json: 'text' is no JSON object"):
        Summary.from_json("text", "a/summary.json")
