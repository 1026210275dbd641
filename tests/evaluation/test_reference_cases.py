"""Where the references have ways of their own: each of them on data of this test.

(design: evaluation.md 6) VLMEvalKit e8e78f05, InternVL 2410d1d.
"""

import csv
import io

import pytest
from mini_data import Writer
from PIL import Image
from scripted_judge import Scripted

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.model_config import (
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.evaluation.cells import read_column, read_texts
from internvlx_jax.evaluation.job import generation_spec
from internvlx_jax.evaluation.job_config import Decoding
from internvlx_jax.evaluation.judge import NoJudge
from internvlx_jax.evaluation.metrics.options import infer_option
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context
from internvlx_jax.evaluation.selection import compat_of, select
from internvlx_jax.evaluation.tables import fits_xlsx, write_tsv
from internvlx_jax.evaluation.task_run import TaskRun, unscored_row
from internvlx_jax.evaluation.tasks import TASKS, llavabench, mathvista, mmbench, mme, mmmu
from internvlx_jax.evaluation.tasks.mathvista import Key
from internvlx_jax.inference.batches import count_tiles
from internvlx_jax.inference.requests import Answer

PETS = {"A": "ant", "B": "bee", "C": "cow", "D": "dog"}
CHOICES = ("ai2d_test", "scienceqa", "realworldqa", "seed", "mmbench_dev_en", "mmmu_val")


def row(text, *answers, id=0, options=None, **fields):
    fields = {"category": "c", "l2-category": "d", "subject": "Art"} | fields
    question = Question("here", id, (), "Which?", answers, "", options or {}, fields)
    return Answered(question, text)


def score(name, protocol, *rows, judge=None, compat=None):
    """Scores rows with the deviations of the protocol, or those named."""
    spec = TASKS[name].protocols[protocol]
    names = compat_of(EvaluationConfig(tasks=name, compat=compat), spec)
    return spec.score(rows, Context(judge or NoJudge(), names))


def read_tsv(tmp_path, name, protocol, rows, dataset=None, **settings):
    """Selects a task whose TSV file has these rows."""
    out = Writer(tmp_path)
    common = {"image": out.base64(), "question": "Which?"}
    rows = [{"index": i} | common | row for i, row in enumerate(rows)]
    spec = TASKS[name].protocols[protocol]
    out.tsv(dataset or spec.dataset, rows)
    (selected,) = select(
        EvaluationConfig(tasks=name, protocol=protocol, data_root=str(tmp_path), **settings)
    )
    return selected


def finished(selected, tmp_path, *texts):
    """Scores written answers as a job does, files included."""
    rows = {
        i: unscored_row(i, question, Answer(text, 1, 1, 1, "stop"))
        for i, (question, text) in enumerate(zip(selected.questions, texts, strict=True))
    }
    return TaskRun(selected, tmp_path / "task", "m", {}, rows).finish()


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(
    "text, letter",
    [
        ("The answer is\nB\n\nsince bees can fly as you can see here", "B"),
        ("The correct  answer\tis   C I guess, as nothing else could be meant", "C"),
        ("the ANSWER is **D** which is what the picture shows us all here", "D"),
        ("The answer is dog", "D"),
        ("The answer is bee", "B"),
        ("The correct answer is cow.", "C"),
        ("The answer is ant, bee, cow or dog", "A"),
        ("answer is Cuckoo", "C"),
        ("The answer is Elk", None),
        ("Failed to obtain answer via API. B", None),
        ("Failed to obtain: a bee", "B"),
    ],
)
def test_what_follows_answer_is(name, text, letter):
    rows = [row(text, key, id=i + 1, options=PETS) for i, key in enumerate(PETS)]
    result = score(name, "vlmevalkit", *rows)
    assert list(result.scores) == [float(key == letter) for key in PETS]


def test_a_word_after_answer_is_counts_without_compat_as_its_text():
    options = {"A": "no", "B": "do not know", "C": "cat", "D": "dog"}
    assert infer_option("The answer is cat", options) == "C"
    assert infer_option("The answer is dunno", options) == "D"
    assert infer_option("The answer is dunno", options, word_start=False) == "A"
    assert infer_option("İ" * 5 + "cat", {"A": "cat"}, word_start=False) is None, (
        "the length is that of the lower-case text, where this letter has two characters"
    )


def test_scienceqa_reads_parentheses_but_the_release_does_not():
    rows = [row("(B)", "B", options=PETS), row("B.", "B", options={"A": "x"})]
    assert score("scienceqa", "internvl", *rows).scores == [1, 1]
    assert score("scienceqa", "internvl", *rows, compat="release").scores == [0, 0]


def test_options_are_asked_three_times_then_drawn():
    one = row("the striped one", "B", options=PETS, id=7)
    judge = Scripted("hmm", "?", "B")
    assert score("ai2d_test", "vlmevalkit", one, judge=judge).score == 100
    assert [request.attempt for request in judge.requests] == [0, 1, 2]
    drawn = [score("ai2d_test", "vlmevalkit", one, judge=Scripted(*"???")) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0].predictions[0] in {*PETS, "Z"}
    assert "one was drawn for each" in drawn[0].notes[0]
    none = score("ai2d_test", "vlmevalkit", one, judge=Scripted(*"???"), compat="none")
    assert none.predictions == [""] and none.score == 0


def test_the_judge_stops_at_the_first_wrong_rotation():
    def rotation(text, key, number, question=1):
        return row(text, key, id=question + number * mmbench.CIRCLE, options=PETS)

    rows = [
        *(rotation("hm", "A", i) for i in range(4)),
        rotation("A", "B", 0, 2),  # wrong by the rules: nothing of this question is asked
        *(rotation("hm", "B", i, 2) for i in range(1, 4)),
        *(rotation("hm", "C", i, 3) for i in range(2)),
    ]
    judge = Scripted("A", "C", "B", "C")
    result = score("mmbench_dev_en", "vlmevalkit", *rows, judge=judge)
    # Question 1: right, then wrong; question 3: right twice.
    assert len(judge.requests) == 4 and result.score == pytest.approx(100 / 3)


# --- yes or no ------------------------------------------------------------------------------------


def test_yes_or_no_is_asked_five_times_with_rising_temperature():
    one = row("it does", "Yes", id="image_VD_map_0_0_0")
    judge = Scripted("hmm", "well", "", "yes and no", "Yes")
    assert score("hallusionbench", "vlmevalkit", one, judge=judge).score == 100
    assert [request.temperature for request in judge.requests] == [0, 0.5, 1, 1.5, 2]
    silent = score("hallusionbench", "vlmevalkit", one, judge=Scripted(*["?"] * 5))
    assert silent.score == 0 and "neither yes nor no" in silent.notes[0]


@pytest.mark.parametrize("text", ["maybe", "yes and no", "", "nothing"])
def test_pope_takes_an_unknown_answer_for_a_no(text):
    rows = [row("Yes", "Yes"), row(text, "No"), row(text, "No")]
    result = score("pope", "vlmevalkit", *rows)
    assert result.score == 1 and result.parts["all"]["accuracy"] == pytest.approx(1 / 3)
    assert result.parts["all"]["precision"] == 1
    assert score("pope", "vlmevalkit", *rows, compat="none").score == 0.5


def test_keys_of_yes_and_no_have_capitals():
    rows = [row("Yes", "yes", image_path="1", category="color")]
    assert score("mme", "vlmevalkit", *rows).score == 0
    assert score("mme", "vlmevalkit", *rows, compat="none").score == 100


def test_mme_pairs_by_image_under_vlmevalkit_and_by_line_under_internvl():
    rows = [
        row(text, "Yes", category="color", image_path=image)
        for text, image in (("Yes", "a"), ("No", "b"), ("Yes", "a"), ("No", "b"))
    ]
    assert score("mme", "vlmevalkit", *rows).score == 50 + 50
    assert score("mme", "internvl", *rows).score == 50 + 0


def test_mme_leaves_out_answers_with_a_tab():
    rows = [row("no\tyes", "Yes", category="color"), row("yes", "Yes", category="color")]
    assert score("mme", "internvl", *rows).score == 100 + 0
    assert score("mme", "internvl", *rows, compat="none").score == 50 + 0


def test_mme_removes_characters_up_to_9fa5():
    text = "\u9fa6\u9fa7\u9fff\u9fff yes"
    assert score("mme", "internvl", row(text, "Yes", category="color")).predictions == ["other"]
    assert mme.label("\u4e00\u9fa5" + text[4:].strip()) == mme.label(text) == "yes"


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, internvl, vlmevalkit",
    [
        ("red", 1, 1),
        ("Red", 1, 1),
        ("red.", 1, 0),
        ("Red..", 1, 0),
        ("red .", 0, 0),
    ],
)
def test_full_stops_in_gqa(text, internvl, vlmevalkit):
    assert score("gqa_testdev", "internvl", row(text, "red")).scores == [internvl]
    assert score("gqa_testdev", "vlmevalkit", row(text, "red")).scores == [vlmevalkit]
    assert score("gqa_testdev", "internvl", row(text, "red"), compat="none").scores == [1]


@pytest.mark.parametrize(
    "name, answer, text, expected",
    [
        ("textvqa_val", str(["n/a"] * 10), "n/a", 0),
        ("textvqa_val", str([""] * 10), "", 0),
        ("textvqa_val", str(["nan"] * 10), "None", 1),
        ("textvqa_val", str(["none"] * 10), "NULL", 0),
        ("docvqa_val", "['n/a']", "N/A", 0),  # its distance is 2 of 3
        ("docvqa_val", "['none']", "None", 0.5),
        ("docvqa_val", "['none']", "none", 1),
        ("docvqa_val", "['na']", "NaN", 2 / 3),
        ("docvqa_val", "['n/a']", "<NA>", 0),
        ("docvqa_val", "['#n/a']", "#N/A", 0),
        ("docvqa_val", "['nan', 'n/a']", "n/a", 1),
        ("docvqa_val", "n/a", "NULL", 1),  # the answer is missing as well
        ("infovqa_val", "['n/a']", "NA", 0),
        ("infovqa_val", "['not']", "", 0),
        ("infovqa_val", "['man']", "null", 2 / 3),
        ("infovqa_val", "['null']", "null", 0),
        ("gqa_testdev", "none", "None", 0),
        ("gqa_testdev", "None", "None", 1),
        ("gqa_testdev", "N/A", "", 1),
        ("gqa_testdev", "nothing", "<NA>", 0),
        ("chartqa_human", "N/A", "N/A", 0),
        ("chartqa_human", "['N/A', 'x']", "N/A", 0),
    ],
)
def test_texts_that_pandas_reads_as_missing(tmp_path, name, answer, text, expected):
    """The second row keeps the columns texts."""
    rows = [{"answer": answer}, {"answer": "stone"}]
    rows = [r | {"split": "test_human"} for r in rows] if name == "chartqa_human" else rows
    selected = read_tsv(tmp_path, name, "vlmevalkit", rows)
    summary = finished(selected, tmp_path, text, "stone")
    other = 0 if name == "textvqa_val" else 1  # one answer is no ten
    assert summary.score == pytest.approx(50 * (expected + other))
    plain = read_tsv(tmp_path, name, "vlmevalkit", rows, compat="none")
    assert plain.questions[0].answers != ("nan",)


def test_missing_options_and_hints_vanish(tmp_path):
    rows = [
        {"A": "red", "B": "blue", "C": "None", "D": "N/A", "answer": "C", "hint": "null"},
        {"A": "one", "B": "two", "C": "three", "D": "", "answer": "C", "hint": "Count."},
    ]
    selected = read_tsv(tmp_path, "ai2d_test", "vlmevalkit", rows)
    ending = "Answer with the option's letter from the given choices directly."
    assert selected.questions[0].prompt == f"Which?\nA. red\nB. blue\n{ending}"
    assert selected.questions[1].prompt.startswith("Count.\nWhich?\nA. one")
    assert finished(selected, tmp_path, "C", "C").score == 50
    kept = read_tsv(tmp_path, "ai2d_test", "vlmevalkit", rows, compat="none")
    assert kept.questions[0].prompt.startswith("null\nWhich?\nA. red\nB. blue\nC. None\nD. N/A\n")


def test_a_single_answer_may_be_missing(tmp_path):
    """Scores as VLMEvalKit does: relaxed accuracy compares the float NaN with itself."""
    one = {"answer": "N/A", "split": "test_human"}
    for answer, right in (("N/A", 0), ("nan", 0), ("x", 0)):
        selected = read_tsv(tmp_path, "chartqa_human", "vlmevalkit", [one])
        assert finished(selected, tmp_path, answer).score == right
    key = {"question_type": "free_form", "choices": "", "answer_option": "", "task": "t"}
    rows = [
        key | {"answer": "None", "answer_type": "text", "skills": "[]"},
        key | {"answer": "3", "answer_type": "integer", "skills": "[]"},
        key | {"answer": "1.5", "answer_type": "float", "skills": "[]"},
    ]
    selected = read_tsv(tmp_path, "mathvista", "vlmevalkit", rows)
    assert [question.fields["key"].answer for question in selected.questions] == ["nan", "3", "1.5"]


def test_columns_of_numbers_become_numbers(tmp_path):
    rows = [
        {"A": "7", "B": "true", "C": "1.50", "E": "7", "answer": "A"},
        {"A": "8", "B": "FALSE", "C": "2", "E": "", "answer": "A"},
    ]
    (first, _) = read_tsv(tmp_path, "ai2d_test", "vlmevalkit", rows).questions
    assert list(first.options.values()) == ["7", "True", "1.5", "7.0"]
    rows[1]["E"] = "none"
    (first, _) = read_tsv(tmp_path, "ai2d_test", "vlmevalkit", rows).questions
    assert first.options["E"] == "7"


@pytest.mark.parametrize(
    "cells, read",
    [
        (["1", "", "x"], ["1", None, "x"]),
        (["01", "+2"], ["1", "2"]),
        (["1", "NaN"], ["1.0", None]),
        (["1", "1e3"], ["1.0", "1000.0"]),
        ([" 5", "-.5"], ["5.0", "-0.5"]),
        (["inf", "2."], ["inf", "2.0"]),
        (["1,000", "2"], ["1,000", "2"]),
        (["none", "NAN", "Null"], ["none", "NAN", "Null"]),
        (["#N/A", "-nan"], [None, None]),
        (["True", "false", "NA"], ["True", "False", None]),
        ([str(2**63), "1"], [str(2**63), "1"]),
        ([str(2**64)], [str(2**64)]),
    ],
)
def test_cells(cells, read):
    """As pandas 3.1.1 reads these columns with read_csv."""
    assert read_column(cells) == read
    assert read_texts(cells) == ["nan" if text is None else text for text in read]


def test_internvl_reads_mmbench_with_pandas_as_well(tmp_path):
    row = {"A": "x", "B": "N/A", "C": "y", "F": "z", "hint": "None", "answer": "A"}
    file = "../mmbench/mmbench_dev_20230712"
    (question,) = read_tsv(tmp_path, "mmbench_dev_en", "internvl", [row], file).questions
    assert question.prompt.startswith("Which?\nA. x\nC. y\nAnswer") and "F" not in question.options


# --- MMMU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, tiles", [(400, 5), (600, 10)])
def test_vlmevalkit_doubles_the_first_image_of_mmmu(tmp_path, side, tiles):
    selected = read_tsv(
        tmp_path,
        "mmmu_val",
        "vlmevalkit",
        [{"answer": "A", "A": "x", "B": "y", "category": "Art", "split": "validation"}],
    )
    sizes = dict(width=16, layers=1, heads=2)
    model = ModelConfig(
        vision=VisionConfig(**sizes, mlp_width=16, image_size=448),
        decoder=DecoderConfig(**sizes, vocab_size=8, kv_heads=2, head_dim=8, mlp_width=16),
        projector=ProjectorConfig(kind="mlp1"),
    )
    cut = TileConfig(rule="off", dynamic=True, use_thumbnail=True, max_num=6)
    generation, _ = generation_spec(
        selected, EvaluationConfig(tasks="mmmu_val"), model, cut, None, Decoding()
    )
    assert generation.tiler.tiles.max_num == 12
    file = tmp_path / "square.png"
    Image.new("RGB", (side, side)).save(file)
    assert count_tiles(generation.tiler, [str(file)]) == (tiles,)
    assert count_tiles(generation.tiler, [str(file)] * 2)[1] == 1, "further images are not doubled"


def test_internvl_strips_question_and_options_of_mmmu():
    fields = {"question_type": "multiple-choice"}
    options = {"A": " x ", "B": "y\n"}
    question = Question("here", 0, (), "What is it? ", (), "", options, fields)
    ending = "Answer with the option's letter from the given choices directly."
    assert mmmu.prompt(question) == f"What is it?\nA. x\nB. y\n{ending}"


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("so x is \n5", "5", 1),
        ("so , is \n-2", "-2", 1),
        ("thus the final \nblue", "blue", 1),
        ("so it is 5", "5", 1),
    ],
)
def test_empty_tails_of_open_answers(text, answer, right):
    one = row(text, answer, question_type="open")
    assert score("mmmu_val", "internvl", one).scores == [right]
    changed = score("mmmu_val", "internvl", one, compat="none").scores == [right]
    assert changed == (not text.partition("\n")[1])


def test_open_questions_of_mmmu_under_vlmevalkit():
    assert score("mmmu_val", "vlmevalkit", row("C", "C")).scores == [0], "the key stays C"
    assert score("mmmu_val", "vlmevalkit", row("C", "C"), compat="none").scores == [1]
    assert score("mmmu_val", "vlmevalkit", row("nan", "a")).scores == [1], "a is in nan"
    missing = row("A", "nan", answer="None")
    assert mmmu._closed(missing, True, True).question.options == {"B": "Other Answers"}


# --- judges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply, grades",
    [
        ("8 9", (8, 9)),
        ("8 9\nbecause", (8, 9)),
        ("8,9", (8, 9)),
        ("8.5 9", (8.5, 9)),
        ("8  9", (-1, -1)),
        ("6 7 ", (-1, -1)),
        ("10, 5", (-1, -1)),
        ("7", (-1, -1)),
        ("a b", (-1, -1)),
    ],
)
def test_grades_have_one_blank_between_them(reply, grades):
    assert llavabench.read_published(reply) == grades


@pytest.mark.parametrize("protocol", ["internvl", "vlmevalkit"])
def test_unreadable_grades_stay_in_the_means(protocol):
    rows = [row("x", "r", category="conv", caption="c") for _ in range(2)]
    judge = Scripted("8 6", "junk")
    result = score("llavabench", protocol, *rows, judge=judge)
    assert len(judge.requests) == 2 and result.scores == [6, -1]
    assert result.score == pytest.approx(100 * 5 / 7)
    judge = Scripted("8,  6", "junk", "?", "no")
    tolerant = score("llavabench", protocol, *rows, judge=judge, compat="none")
    assert tolerant.score == pytest.approx(75)


def test_mathvista_has_a_prompt_of_its_own_under_internvl():
    one = row("about", "3", key=Key("free_form", "integer", "3"))
    judge = Scripted("", " 3 ")
    assert score("mathvista", "internvl", one, judge=judge).score == 100
    request = judge.requests[0]
    assert request.prompt.endswith("\n\nWhich?\n\nabout\n\nExtracted answer: ")
    assert (
        request.prompt.startswith("Please read the following example. Then")
        and request.max_tokens == 256
    )
    empty = row("", "no", key=Key("multi_choice", "text", "no", ("maybe", "no"), "B"))
    assert score("mathvista", "internvl", empty).score == 100, "the nearest choice, without a judge"


def test_mathvista_prefetches_only_right_numbers_under_vlmevalkit():
    rows = [row(text, "3", key=Key("free_form", "integer", "3")) for text in ("3", "4")]
    assert score("mathvista", "vlmevalkit", *rows).parts["prefetch_rate"] == 0.5
    assert score("mathvista", "vlmevalkit", *rows, compat="none").parts["prefetch_rate"] == 1
    alone = row("3", "None", key=Key("free_form", "text", "None"))
    assert score("mathvista", "vlmevalkit", alone).score == 100, "the text of nothing"
    choice = Key("multi_choice", "text", "red", ("blue", "red"), "B")
    assert mathvista.parse("The answer is blue.", choice, text_bug=True) == "B"


# --- files ----------------------------------------------------------------------------------------


def test_a_bare_carriage_return_stays_in_its_cell(tmp_path):
    rows = [{"index": i, "prediction": text} for i, text in enumerate(["a\rb", "\x01", 'c"\n', ""])]
    write_tsv(tmp_path / "t.tsv", rows)
    text = (tmp_path / "t.tsv").read_bytes().decode()
    assert '"a\rb"' in text
    read = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    assert [r["prediction"] for r in read] == [r["prediction"] for r in rows]


@pytest.mark.parametrize("text", ["a\rb", "\ufffe", "\uffff", "\x0b"])
def test_what_xlsx_does_not_hold(text):
    assert not fits_xlsx([{"prediction": text}])


def test_a_text_in_brackets_is_an_answer_but_a_damaged_list_is_an_error(tmp_path):
    selected = read_tsv(tmp_path, "docvqa_val", "vlmevalkit", [{"answer": "[unclear]"}])
    (question,) = selected.questions
    assert question.answers == ("[unclear]",)
    with pytest.raises(ConfigError, match="DocVQA_VAL.tsv line 2: .* is not a Python list"):
        read_tsv(tmp_path, "docvqa_val", "vlmevalkit", [{"answer": "['12 May', 'May"}])
