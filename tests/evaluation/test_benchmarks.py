"""Prompts and metrics of the benchmarks of today, by vectors of their references.

(design: evaluation.md 4, 6, 13, 14)
"""

import math

import numpy as np
import pytest
from scripted_judge import Scripted

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.data.images import image_size, load_image
from internvlx_jax.evaluation.cot import boxed, final_answer
from internvlx_jax.evaluation.judge import NoJudge
from internvlx_jax.evaluation.metrics import boxes
from internvlx_jax.evaluation.metrics.expressions import arithmetic, same_value
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import COMPAT, Answered, Context
from internvlx_jax.evaluation.selection import select
from internvlx_jax.evaluation.tasks import GROUPS, SUITES, TASKS, chartqapro, mmmu_pro, mvbench
from internvlx_jax.evaluation.tasks.muirbench import named_images
from internvlx_jax.evaluation.tasks.ocrbench import contains
from internvlx_jax.evaluation.tasks.videomme import first_letter
from internvlx_jax.evaluation.video_frames import Segments, Steps, video_frames


@pytest.fixture
def chosen(data_root):
    """Returns a function: task, protocol and further settings -> its TaskSpec."""

    def choose(task, protocol=None, **settings):
        config = EvaluationConfig(
            tasks=task, protocol=protocol, data_root=str(data_root), **settings
        )
        return select(config)[0]

    return choose


def score(spec, texts, judge=None, compat=None):
    rows = [
        Answered(question, spec.protocol_spec.read(text))
        for question, text in zip(spec.questions, texts, strict=True)
    ]
    compat = spec.compat if compat is None else compat
    return spec.protocol_spec.score(rows, Context(judge or NoJudge(), frozenset(compat)))


# --- chain of thought -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{A} or rather \boxed{B}.", "B"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{2}", r"\boxed{\frac{1}{2}"),
        ("no box", "no box"),
        (r"\boxed{}", ""),
    ],
)
def test_boxed(text, answer):
    assert boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Since 2 + 2 = 4,\nfinal ANSWER:  4 \nDone.", "4"),
        ("Answer:\n B", "B"),
        ("The answer is B", "The answer is B"),
        ("Answer: A. Final answer: B", "A. Final answer: B"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_cot_changes_prompt_length_and_reading(chosen):
    spec = chosen("mmmu_val", "vlmevalkit", cot=True, limit=2)
    prompt = spec.questions[0].prompt
    assert "Answer with the option's letter" not in prompt
    assert prompt.endswith("considering all relevant information before answering.")
    assert r"'Answer: \boxed{$LETTER}'" in prompt and spec.protocol_spec.max_new_tokens == 4096
    reasoned = r"A red car? No, a tree. Answer: \boxed{A}"
    assert score(spec, [reasoned, reasoned.replace("{A}", "{B}")]).scores == [1, 0]
    internvl = chosen("mathvista", "internvl", cot=True)
    assert internvl.questions[0].prompt.endswith("Question:\n\nQuestion: how many?")
    result = score(internvl, ["One, two. Final answer: 3", "Answer: 1/2"])
    assert (result.score, result.pending) == (100, False), "no judge reads a stated answer"


def test_cot_without_such_a_prompt(chosen, data_root):
    with pytest.raises(
        ConfigError, match="none of textvqa_val has a prompt for a chain of thought"
    ):
        chosen("textvqa_val", cot=True)
    config = EvaluationConfig(tasks="textvqa_val,mmstar", data_root=str(data_root), cot=True)
    direct, reasoned = select(config)
    assert any("asked directly" in note for note in direct.notes)
    assert not any("asked directly" in note for note in reasoned.notes)


# --- choices --------------------------------------------------------------------------------------


def test_images_of_muirbench_are_named_where_they_belong(chosen):
    together, apart, single = (question.prompt for question in chosen("muirbench").questions)
    assert together.startswith("Image-1: <image>\nImage-2: <image>\n Which differs?\nA. a red car")
    assert "\nIn <Image-1>, where is <Image-2>?\n" in apart
    assert single.startswith("Image-1: <image>\nWhat is it?\n")
    question = Question("w", 1, ("a", "b"), "<image>!", ())
    assert named_images(lambda question: question.text)(question).endswith("\n<Image-1>!")


def test_blink_has_its_own_judge(chosen):
    spec = chosen("blink")
    judge = Scripted("(B)")
    assert score(spec, ["A", "the nearer one of the two that can be seen"], judge).score == 100
    (request,) = judge.requests
    assert "(Z) Failed\nAnswer: the nearer one" in request.prompt


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Answer: B", "B"),
        ("Answer: (A). But A or B? Answer: C", "C"),
        ("(A) is wrong, (B) is right", "B"),
        ("It is A or C ", "C"),
        ("The two animals here are a cat and a dog", "B"),
        ("a dog", ""),
        ("", ""),
    ],
)
def test_stated_letter_of_mmmu_pro(answer, letter):
    options = {"A": "cat", "B": "dog", "C": "red bird"}
    assert mmmu_pro.stated_letter(answer, options) == letter


def test_images_of_mmmu_pro_are_in_the_order_of_the_text(chosen):
    for protocol, texts in (
        ("internvl", ("<image> How many?\nA. ", "<image> or <image>?\nA. ")),
        (
            "vlmevalkit",
            ("Question: See \n. How many?", "Image-2: <image>\nQuestion: <Image-1> or <Image-2>?"),
        ),
    ):
        spec = chosen("mmmu_pro_standard", protocol)
        for question, text in zip(spec.questions, texts, strict=True):
            assert text in question.prompt, protocol
        second = [str(image) for image in spec.questions[1].images]
        ends = ("image_2", "image_1") if protocol == "internvl" else (" image 2", " row 1")
        assert all(image.endswith(end) for image, end in zip(second, ends, strict=True))
    policy = chosen("mmmu_pro_vision", "vlmevalkit").protocol_spec.images(True)
    assert (policy.enlarge_first, policy.limits(6, 2)) == (2, [6, 6])
    assert mmmu_pro.last_line("So:\nAnswer: $B") == "B"
    assert mmmu_pro.last_line("Answer: B or C") == " B or C"


# --- mathematics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("12", "12.0", True),
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{3}", "0.3333333", True),
        (r"\frac{1}{3}", "0.3333", False),
        (r"\sqrt{2}", "1.41421356", False),  # only numbers are evaluated
        ("X", "x", True),
        ("2^3", "8", True),
        ("abs(-3)", "7 % 4", True),
        ("1 if 2 > 1 else 2", "max(0, 1)", True),
        ("round(2.6)", "int(3.9)", True),
        ("sum((1, 2))", "3", False),
        ("5 cm", "5", False),
        ("[1,2]", "[1, 2]", False),
    ],
)
def test_same_value(a, b, same):
    assert same_value(a, b) == same_value(b, a) == same


def test_a_name_of_the_reference_is_right_for_any_number():
    assert same_value("A", "12", names=True) and not same_value("A", "12")
    assert same_value("a or b", "12", names=True) and not same_value("b or a", "12", names=True)
    assert same_value("1/2", "B", names=True) and not same_value("1/2", "B")
    assert not same_value("a", "x", names=True)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "abs(print(1))",
        "abs.__class__",
        "max(*[1])",
        "max(1, default=2)",
        "(abs or abs)(1)",
        "pow(9, 99999999)",
        "9**int(9**9)",
        "9**9**9",
        "(9**999)**999",
        "[1]*9",
        "x",
        "1/0",
        "2**99999",
        "1 +",
        "'a'",
    ],
)
def test_answers_are_no_programs(text):
    assert arithmetic(text) is None


def test_mathvision_asks_for_what_rules_do_not_find(chosen):
    spec = chosen("mathvision")
    waiting = score(spec, ["13", "It is C"])
    assert waiting.pending and waiting.parts["prefetch_rate"] == 0.5
    judge = Scripted("12")
    result = score(spec, ["The sum is twelve", "It is C"], judge)
    assert (result.score, result.parts["subjects"]) == (100, {"counting": 100})
    assert judge.requests[0].max_tokens == 128
    assert judge.requests[0].prompt.endswith(
        "How many?\n<image1>\nModel respone: The sum is twelveExtracted answer:"
    )


def test_mathverse_extracts_and_compares(chosen):
    spec = chosen("mathverse")
    assert spec.questions[0].prompt == "please provide the final value. AB?"
    judge = Scripted("12", "D", "perhaps", "0")
    result = score(spec, ["twelve", "D it is"], judge)
    assert result.score == 50 and result.parts["problem_version"] == {"Text Lite": 50}
    assert result.parts["subfield"] == {"Circle": 50}
    comparisons = judge.requests[2:]
    assert [request.temperature for request in comparisons] == [0, 0.5], "asked again"
    assert "[Standard Answer]: C\n    [Model_answer] : D\n" in comparisons[0].prompt
    assert score(spec, ["twelve", "C"]).pending


# --- documents ------------------------------------------------------------------------------------


def test_ocrbench_counts_to_1000(chosen):
    assert contains("the STOP\nsign", ["stop sign"], expression=False)
    assert contains(r"it is \frac{1}{2}", [r"\frac { 1 } { 2 }"], expression=True)
    assert not contains(r"\FRAC{1}{2}", [r"\frac{1}{2}"], expression=True)
    result = score(chosen("ocrbench"), ["A stop sign", "21", r"\frac{1}{2}"])
    assert result.score == pytest.approx(2000 / 3)
    assert result.parts["Text Recognition"] == 1 and result.parts["Doc-oriented VQA"] == 0


@pytest.mark.parametrize(
    ("target", "prediction", "years", "value"),
    [
        ("10", "10.4", ["NO"], 1),
        ("2020", "2021", ["NO"], 1),
        ("2020", "2021", ["YES"], 0),
        ("0", "0.0", ["NO"], 1),
        ("5%", "5", ["NO"], 1),
        ("abcd", "abce", ["NO"], 0.75),
        ("abcd", "abxy", ["NO"], 0),
        ("[a, b]", "['a', 'b']", ["NO"], 1),
        ("['a', 'b']", "a", ["NO"], 0.5),
        ("a", "['a', 'b']", ["NO"], 0.5),
    ],
)
def test_correctness_of_chartqapro(target, prediction, years, value):
    assert chartqapro.correctness(target, prediction, years) == value


def test_chartqapro_asks_by_type(chosen):
    spec = chosen("chartqapro")
    factoid, conversation, check = (question.prompt for question in spec.questions)
    assert factoid.startswith("\n\n            You are given a factoid question")
    assert "Conversation: ['Total?', '7'] Question: And in 2020?\n" in conversation
    assert "either true or false" in check
    result = score(spec, ["3.6", "2021", "True."])
    assert result.scores == [1, 0, 1], "the last year of a conversation is exact"
    assert result.parts["Conversational"] == 0


# --- boxes ----------------------------------------------------------------------------------------


def test_boxes_of_internvl():
    box = boxes.internvl_box("<ref>cup</ref><box>[[0, 0, 500, 500]]</box>")
    assert box == (0, 0, 500, 500)
    assert boxes.internvl_overlap(box, (0, 0, 40, 30), 80, 60) == 1
    assert boxes.internvl_overlap((0, 0, 0.5, 0.25), (0, 0, 40, 30), 80, 60) == 0.5
    assert boxes.internvl_box("no box") == boxes.internvl_box("[a, b, c, d]") == (0, 0, 0, 0)
    assert math.isnan(boxes.internvl_overlap((0, 0, 0, 0), (5, 5, 5, 5), 80, 60))


def test_boxes_of_vlmevalkit():
    assert boxes.vlmevalkit_box("[1, 2 3,4.5]") == (1, 2, 3, 4.5)
    assert boxes.vlmevalkit_box("from 1 2 to 3 4 and 5") == (1, 2, 3, 4)
    assert boxes.vlmevalkit_box("[1, 2, 3]") is None
    assert boxes.in_pixels((500, 0, 0, 1000), 80, 60) == (0, 0, 40, 60)
    assert boxes.in_pixels((0.5, 0, 1.2, 1), 80, 60) == (40, 0, 80, 60)
    assert boxes.in_pixels((0, 0, 1001, 50), 80, 60) == (0, 0, 80, 50)
    assert boxes.vlmevalkit_overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert boxes.vlmevalkit_overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0


def test_refcoco_is_the_mean_over_splits(chosen):
    spec = chosen("refcoco_val")
    assert spec.questions[0].prompt.endswith("this sentence describes: <ref>left cup</ref>")
    assert score(spec, ["[[0, 0, 500, 500]]", "[0, 0, 0.2, 0.5]"]).score == 50
    full = chosen("refcoco_all")
    assert [question.id for question in full.questions][:2] == ["RefCOCO_val_0", "RefCOCO_testA_1"]
    result = score(full, ["[0,0,0.5,0.5]", "?", "[0, 0, 500, 500]", "0 0 40 3"])
    assert result.score == 50 and result.parts["RefCOCO+_val"] == 100


# --- videos ---------------------------------------------------------------------------------------


def test_frames_are_chosen_as_in_the_references():
    assert Segments()(8, 24, 12.0, 0) == [1, 4, 7, 10, 13, 15, 18, 21]
    assert Segments(0.0, 1.0)(4, 24, 12.0, 0) == [1, 4, 7, 10]
    assert Segments()(4, 6, 3.0, 1) == [1, 2, 3, 5]
    assert Steps()(8, 24, 12.0, 0) == [2, 5, 8, 10, 13, 16, 18, 21]
    assert Segments()(4, 1, 25.0, 0) == [0, 0, 0, 0], "frames of short videos are repeated"


def dominant(image) -> str:
    red, _, blue = np.asarray(load_image(image), np.float32).mean(axis=(0, 1))
    return "red" if red > blue else "blue"


def test_frames_of_files_and_folders(chosen, data_root):
    spec = chosen("mvbench", "vlmevalkit")
    by_kind = {question.fields["task_type"]: question.images for question in spec.questions}
    whole, part = by_kind["Action Antonym"], by_kind["Action Sequence"]
    assert [dominant(image) for image in whole] == ["red"] * 4 + ["blue"] * 4
    assert {dominant(image) for image in part} == {"red"}, "the first second of two"
    assert [dominant(image) for image in by_kind["Episodic Reasoning"]] == ["red"] * 8
    assert image_size(whole[0]) == (48, 32) and whole[0].open().read(2) == b"\xff\xd8"
    lossless = chosen("mvbench", "internvl").questions[2].images
    assert len(lossless) == 16 and lossless[0].open().read(4) == b"\x89PNG"
    short = chosen("videomme", frames=4)
    assert [len(question.images) for question in short.questions] == [4, 4]
    assert [dominant(image) for image in short.questions[1].images] == ["red"] * 2 + ["blue"] * 2
    assert short.protocol_spec.dataset == "Video-MME_4frame"


def test_far_frames_are_found_by_seeking(tmp_path):
    import av

    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", 12
        for i in range(1200):
            gray = np.full((32, 32, 3), i // 5, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(stream.encode())
    frames = video_frames(path, Steps(), 3, jpeg=False, where="w")
    values = [np.asarray(load_image(frame)).mean() for frame in frames]
    assert np.allclose(values, [60, 120, 180], atol=3)


def test_missing_and_damaged_videos(chosen, data_root, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    (frame,) = video_frames(broken, Steps(), 1, jpeg=True, where="w")
    with pytest.raises(SampleError, match="the video cannot be decoded"):
        load_image(frame)
    table = tmp_path / "data" / "tsv"
    table.mkdir(parents=True)
    name = "Video-MME.tsv"
    (table / name).write_bytes((data_root / "tsv" / name).read_bytes())
    config = EvaluationConfig(tasks="videomme", data_root=str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match="2 videos of Video-MME are missing"):
        select(config)
    with pytest.raises(ConfigError, match="none of mmstar has videos"):
        chosen("mmstar", frames=4)


def test_answers_about_videos(chosen):
    assert first_letter("Best option: C", as_written=True) == "B", "a bug of the reference"
    assert first_letter("Best option: C", as_written=False) == "C"
    assert first_letter("The answer is (D).", as_written=True) == "D"
    assert score(chosen("videomme"), ["B", "A"]).parts["duration"] == {"long": 0, "short": 100}
    assert mvbench.names_option("(b) blue", "B", empty=True)
    assert mvbench.names_option("", "B", empty=True) and not mvbench.names_option(
        "", "B", empty=False
    )
    spec = chosen("mvbench", "vlmevalkit")
    nothing = score(spec, ["nan"] * 20), score(spec, ["nan"] * 20, compat=())
    assert [result.score for result in nothing] == [100, 0], "a bug of the reference"
    texts = ["(A) red", "It is blue", *["B"] * 18]
    assert score(spec, texts).score == 95, "the option of the second answer is inferred"
    internvl = chosen("mvbench", "internvl")
    assert score(internvl, texts).score == 90


# --- all of them ----------------------------------------------------------------------------------


def test_suites_and_groups_name_tasks():
    for names in (*SUITES.values(), *GROUPS.values()):
        assert len(set(names)) == len(names) and set(names) <= set(TASKS)
    assert len(SUITES["x20"]) == 21 and len(SUITES["internvl3"]) > 30


def test_deviations_are_known():
    for task in TASKS.values():
        for spec in task.protocols.values():
            assert set(spec.compat) <= set(COMPAT)


@pytest.mark.parametrize(
    ("task", "column"),
    [
        ("ocrbench", "category"),
        ("chartqapro", "year"),
        ("mathvision", "choices"),
        ("mathverse", "metadata"),
        ("mvbench", "candidates"),
        ("videomme", "duration"),
    ],
)
def test_missing_columns_are_named(task, column, data_root, tmp_path):
    spec = TASKS[task].protocols["vlmevalkit"]
    name = next(iter(spec.source.files(select_roots(data_root)))).name
    text = (data_root / "tsv" / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(text.replace(column, "other", 1), encoding="utf-8")
    config = EvaluationConfig(
        tasks=task, protocol="vlmevalkit", data_root=str(data_root), tsv_root=str(tmp_path)
    )
    with pytest.raises(ConfigError, match=f"no column .?{column}"):
        select(config)


def select_roots(data_root):
    from internvlx_jax.evaluation.sources import Roots

    return Roots(data_root, data_root / "tsv")
