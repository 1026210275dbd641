"""`load` and `VLM`: one answer by call, batch, stream or conversation."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import internvlx_jax as ivx
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.model_config import LvtcConfig
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER
from internvlx_jax.evaluation import job
from internvlx_jax.evaluation.job import EvalConfig
from internvlx_jax.inference.batches import BatchSizes
from internvlx_jax.inference.images import image_sources
from internvlx_jax.inference.requests import Request, Turn
from internvlx_jax.inference.vlm import VLM
from internvlx_jax.models.sharding import make_mesh

SHORT = {"max_new_tokens": 12}
PROMPTS = [f"What stands in line {i}?" * (1 + 3 * (i % 3)) for i in range(7)]


@pytest.fixture(scope="module")
def pages(pixels):
    """Entries of images for PROMPTS: none, one, and two, so that a call has several buckets."""
    second = Image.fromarray(pixels[::-1])
    return [None, pixels, [pixels, second], second, [], [second], pixels]


@pytest.fixture(scope="module")
def alone(model, pages) -> list[str]:
    """The answer of each prompt by itself."""
    return [model.generate(p, i, **SHORT) for p, i in zip(PROMPTS, pages, strict=True)]


def test_a_text_gives_a_text_and_a_list_a_list(model, pages, alone):
    assert len(set(alone)) == len(alone), "each prompt has an answer of its own"
    assert model.generate(PROMPTS, pages, **SHORT) == alone
    assert model.generate(PROMPTS[::-1], pages[::-1], **SHORT) == alone[::-1]
    assert model.generate(PROMPTS[:1], **SHORT) == alone[:1]
    assert model.generate([], **SHORT) == []


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batches_do_not_change_an_answer(pretrained, pages, alone, batch_size):
    assert VLM(pretrained, batch_size=batch_size).generate(PROMPTS, pages, **SHORT) == alone


def test_a_mesh_does_not_change_an_answer(run_folder, pages, alone):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), devices=jax.devices()[:4])
    model = ivx.load(run_folder, dtype="float32", mesh=mesh)
    assert model.generate(PROMPTS, pages, **SHORT) == alone
    assert "".join(model.stream(PROMPTS[2], pages[2], **SHORT)) == alone[2]


def test_rows_of_a_batch_are_few_shapes():
    sizes = BatchSizes(rows=12, shards=2, fit=True)
    assert [sizes.of(n) for n in (1, 2, 3, 5, 8, 9, 12)] == [2, 2, 4, 8, 8, 12, 12]
    assert BatchSizes(rows=12, shards=2, fit=False).of(1) == 12


def test_a_stream_is_the_answer(model, pages, alone):
    for prompt, images, answer in zip(PROMPTS, pages, alone, strict=True):
        pieces = list(model.stream(prompt, images, **SHORT))
        assert len(pieces) > 3 and "".join(pieces) == answer


def test_a_stream_and_a_single_answer_share_executables(model, pages):
    model.generate(PROMPTS[1], pages[1], **SHORT)
    before = model._generator.programs
    list(model.stream(PROMPTS[1], pages[1], **SHORT))
    assert model._generator.programs == before


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "drawn"])
def test_turns_of_a_chat_are_prompts_with_a_history(model, pixels, sampling):
    options = SHORT | sampling | {"system": "Answer briefly."}
    sent = [("What is it?", pixels), ("And now?", None), ("So?", [pixels])]
    chat = model.chat(**options)
    answers = [chat.send(prompt, images) for prompt, images in sent]
    assert [turn.answer for turn in chat.history] == answers and len(set(answers)) == 3
    for n, (prompt, images) in enumerate(sent):
        again = model.generate(prompt, images, history=chat.history[:n], **options)
        assert again == answers[n]
    given = [Turn("What is it?", answers[0], (pixels,))]  # as a caller writes it
    assert model.generate("And now?", history=given, **options) == answers[1]
    options = options | {"system": "Answer at length."}
    assert model.generate("What is it?", pixels, **options) != answers[0], "the message counts"


def test_a_chat_keeps_images_as_they_were_sent(model, pixels, tmp_path):
    path = tmp_path / "page.png"
    Image.fromarray(pixels).save(path)
    chat = model.chat(**SHORT)
    chat.send("What is it?", path)
    path.unlink()
    same = model.chat(**SHORT)
    same.send("What is it?", pixels)
    assert chat.send("And now?") == same.send("And now?")


def test_a_stream_that_is_left_changes_nothing(model):
    chat = model.chat(**SHORT)
    next(chat.stream("Hello"))
    assert chat.history == ()


def test_seeds_decide_what_is_drawn(model, pixels):
    def drawn(**options):
        return model.generate(["Tell me"] * 3, [pixels] * 3, temperature=1.0, **SHORT | options)

    first = drawn(seed=1)
    assert first == drawn(seed=1) != drawn(seed=2)
    assert len(set(first)) == 3, "the same prompt is drawn anew at each place of a list"
    assert model.generate("Tell me", pixels, temperature=1.0, seed=1, **SHORT) == first[0]
    greedy = model.generate("Tell me", pixels, **SHORT)
    assert model.generate("Tell me", pixels, temperature=1.0, top_k=1, seed=3, **SHORT) == greedy


def test_an_answer_ends_at_stop_texts_and_lengths(model, pixels):
    whole = model.generate("Tell me", pixels, **SHORT)
    stop = whole[4:7]
    expected = whole[: whole.index(stop)].strip()
    for given in (stop, [stop, "never"]):
        assert model.generate("Tell me", pixels, stop=given, **SHORT) == expected
    assert whole.startswith(model.generate("Tell me", pixels, max_new_tokens=3))
    assert model.spec().max_new_tokens == 256, "half of the positions, which are few here"


def test_tile_options_replace_those_of_the_model(model, pixels):
    def tiles(image, **options):
        request = Request(prompt="What?", images=image_sources(image))
        (answer,) = model.answer([request], **SHORT | options)
        return answer.tiles

    assert tiles(pixels) == 1
    assert tiles(pixels, dynamic=True, max_num=4) == 3, "2 x 1 and a thumbnail"
    assert tiles(pixels, dynamic=True, max_num=1) == 1
    small = pixels[:28, :56]
    assert tiles(small, dynamic=True, max_num=4) == 1, "the edge rule never enlarges"
    assert tiles(small, dynamic=True, max_num=4, tile_rule="off") == 3


def test_answers_carry_counts_and_errors(model, tmp_path):
    gone = str(tmp_path / "gone.png")
    good, bad = model.answer(
        [Request(prompt="Hello"), Request(prompt="What?", images=(gone,), where="line 2")], **SHORT
    )
    assert (good.finish, good.new_tokens, good.tiles, good.error) == ("length", 12, 0, None)
    assert good.text == model.generate("Hello", **SHORT) and good.prompt_tokens > 5
    assert (bad.finish, bad.text) == ("error", "") and "line 2" in str(bad.error)
    assert isinstance(bad.error, SampleError) and gone in str(bad.error)


def test_placeholders_are_put_in_front_or_counted(model, pixels):
    placed = model.generate(
        f"{IMAGE_PLACEHOLDER}\n{IMAGE_PLACEHOLDER}\nWhat?", [pixels] * 2, **SHORT
    )
    assert model.generate("What?", [pixels] * 2, **SHORT) == placed
    behind = model.generate(f"What? {IMAGE_PLACEHOLDER}", pixels, **SHORT)
    assert behind != model.generate("What?", pixels, **SHORT)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            dict(prompt="<image> or <image>?", images=["IMAGE"]),
            SampleError,
            '1 image but 2 "<image>"',
        ),
        (dict(prompt="<image>?"), SampleError, '0 images but 1 "<image>"'),
        (dict(prompt=["a", "<image>?"]), SampleError, r"prompt\[1\]: 0 images"),
        (dict(prompt="a", images="gone.png"), SampleError, "gone.png"),
        (dict(prompt=["a"], images=[["gone.png"]]), SampleError, "gone.png"),
        (dict(prompt=3), TypeError, "prompt is a int; give a text or a list"),
        (dict(prompt=[3]), TypeError, r"prompt\[0\] is a int; give a text"),
        (
            dict(prompt=["a", "b"], images="IMAGE"),
            TypeError,
            "images is a str, but prompt is a list",
        ),
        (dict(prompt=["a", "b"], images=["IMAGE"]), ValueError, "1 entries for 2 prompts"),
        (dict(prompt=["a"], history=[Turn("a", "b")]), ValueError, "single prompt"),
        (
            dict(prompt="a", max_tokens=3),
            TypeError,
            "unknown option max_tokens; choose from max_new_",
        ),
        (dict(prompt="a", max_new_tokens=0), ConfigError, "max_new_tokens is 0"),
        (dict(prompt="a", top_p=2.0), ConfigError, "top_p is 2.0"),
        (dict(prompt="a", stop=""), ConfigError, "stop holds an empty text"),
        (dict(prompt="a", max_num=0), ValueError, "tiles.max_num is 0, it must be from 1 to 4096"),
        (dict(prompt="a", max_new_tokens=999), SampleError, "512 positions"),
    ],
)
def test_errors_name_the_argument_and_the_remedy(model, image, arguments, error, message):
    known = {"IMAGE": image}
    if isinstance(arguments.get("images"), list):
        images = [known.get(i, i) if isinstance(i, str) else i for i in arguments["images"]]
        arguments = arguments | {"images": images}
    with pytest.raises(error, match=message):
        model.generate(**arguments)


def test_a_run_folder_is_loaded(run_folder, pretrained, pixels):
    loaded = ivx.load(run_folder, dtype="float32")
    assert isinstance(loaded, ivx.VLM) and loaded.report == ()
    assert loaded.config == pretrained.config
    assert loaded.tokenizer.vocab_size == pretrained.tokenizer.vocab_size
    expected = VLM(pretrained).generate("What?", pixels, **SHORT)
    assert loaded.generate("What?", pixels, **SHORT) == expected
    step = run_folder / "checkpoints" / "1"
    assert ivx.load(str(step), dtype="float32").generate("What?", pixels, **SHORT) == expected
    assert loaded.speed["answers"] == 1 and loaded.model is not None


def test_answers_are_those_of_the_evaluator(run_folder, model, image, tmp_path):
    rows = [{"question": "What is it?", "image": image}, {"question": "Which is next?"}]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row | {"answer": "x"}) + "\n" for row in rows))
    selection = EvaluationConfig(data=str(path), metric="exact", **SHORT)
    out = tmp_path / "out"
    job.run(
        EvalConfig(
            checkpoint=str(run_folder),
            out_dir=str(out),
            selection=selection,
            dtype="float32",
            batch_size=8,
        )
    )
    lines = (out / "predictions.jsonl").read_text().splitlines()
    prompts = [row["question"] for row in rows]
    answers = model.generate(prompts, [image, None], **SHORT)
    assert [json.loads(line)["raw"] for line in lines] == answers


def test_what_is_no_checkpoint_is_refused(tmp_path, run_folder):
    with pytest.raises((FileNotFoundError, ConfigError), match="nowhere"):
        ivx.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="average"):
        ivx.load(run_folder, ema=True)


def test_a_checkpoint_without_tokenizer_names_the_remedy(run_folder, pretrained, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run_folder, bare)
    for file in [*bare.rglob("tokenizer*"), *bare.rglob("*added_tokens*"), *bare.rglob("special*")]:
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"bare has no tokenizer files.*tokenizer=FOLDER"):
        ivx.load(bare)
    assert ivx.load(bare, dtype="float32", tokenizer=TOKENIZER_FOLDER).generate("Hi", **SHORT)
    with pytest.raises(ConfigError, match="tokenizer=FOLDER"):
        VLM(dataclasses.replace(pretrained, tokenizer=None))


def test_lvtc_answers_in_the_same_ways(run_folder, pixels):
    """Two caches, and parameters that the checkpoint lacks are in the report."""
    model = ivx.load(
        run_folder, dtype="float32", lvtc=LvtcConfig(expand_layer=1, low_grid=2, high_grid=4)
    )
    assert model.report and model.config.lvtc is not None
    answers = model.generate(["What?", "And?"], [pixels, pixels], **SHORT)
    assert answers[0] == model.generate("What?", pixels, **SHORT)
    assert answers[0] == "".join(model.stream("What?", pixels, **SHORT))


IMPORT = """
import sys, time
begun = time.process_time()
import internvlx_jax
seconds = time.process_time() - begun
assert {"load", "VLM", "load_pretrained"} <= set(dir(internvlx_jax))
assert not {"jax", "numpy", "PIL"} & set(sys.modules), "a light import"
print(seconds)
"""


def test_the_import_is_light():
    seconds = [
        float(
            subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True).stdout
        )
        for _ in range(3)
    ]
    assert min(seconds) < 0.1
    with pytest.raises(AttributeError, match="nothing"):
        _ = ivx.nothing
    assert np.array_equal(sorted(ivx.__all__), ivx.__all__)
