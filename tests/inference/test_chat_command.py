"""Chat streams, remembers, stops at texts and writes what evaluation writes (design: data.md 4)."""

import io
import sys
from pathlib import Path

import pytest

from internvlx_jax.cli import chat as chat_command
from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.encode import encode_prompt
from internvlx_jax.inference import vlm
from internvlx_jax.inference.batch_generator import settled
from internvlx_jax.inference.requests import Request

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def chat(model):
    return model.chat(max_new_tokens=NEW_TOKENS)


@pytest.fixture
def fresh(chat):
    chat.reset()
    return chat


def test_pieces_add_up_and_turns_are_remembered(fresh, image):
    pieces = list(fresh.stream("What is it?", [image]))
    assert len(pieces) > 3, "the answer streams"
    first = "".join(pieces)
    (turn,) = fresh.history
    assert (turn.prompt, turn.answer) == ("<image>\nWhat is it?", first) and len(turn.images) == 1
    second = "".join(fresh.stream("And now?", [image]))
    assert [turn.prompt for turn in fresh.history] == [
        "<image>\nWhat is it?",
        "<image>\nAnd now?",
    ]
    fresh.reset()
    alone = "".join(fresh.stream("And now?", [image]))
    assert second != alone, "the second answer knows the first turn"
    assert fresh.send("What is it?") != first


def test_a_bad_turn_changes_nothing(fresh, image, tmp_path):
    list(fresh.stream("Hello"))
    before = fresh.history
    gone = str(tmp_path / "gone.png")
    for question, images, problem in (
        ("<image> and <image>?", [image], '1 image but 2 "<image>"'),
        ("What?", [gone], "gone.png"),
        ("a" * 999, [], "512 positions"),
    ):
        with pytest.raises(SampleError, match=problem):
            list(fresh.stream(question, images))
    assert fresh.history == before


def test_stop_strings_never_show(model, fresh):
    whole = "".join(fresh.stream("Tell me"))
    stop = whole[4:7]
    stopping = model.chat(max_new_tokens=NEW_TOKENS, stop=[stop])
    seen = ""
    for piece in stopping.stream("Tell me"):
        seen += piece
        assert stop not in seen and whole.startswith(seen)
    assert seen == whole[: whole.index(stop)].strip()


def test_half_of_a_character_or_a_stop_string_waits():
    texts = ("a \ufffd", "a EN", "a ##", "a E b", "a ")
    assert [settled(text, ("END", "###")) for text in texts] == ["a", "a", "a", "a E b", "a"]


def test_the_prompt_is_that_of_the_template_with_history(model, fresh, image):
    list(fresh.stream("One", [image]))
    request = Request(prompt="Two", history=fresh.history)
    prompts = model._generator.prompts
    tokens = prompts.row(request, prompts.bucket(request, fresh.spec), fresh.spec).tokens
    processor = prompts.processor
    expected = encode_prompt(
        "Two",
        history=[(turn.prompt, turn.answer) for turn in fresh.history],
        system="",
        template=processor.template,
        tokenizer=processor.tokenizer,
        tiles_per_image=[1],
        tokens_per_tile=4,
    ).tokens
    assert tokens.tolist() == expected.tolist()


def test_the_terminal(model, image, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(vlm, "load", lambda path, **settings: model)
    lines = f"What?\n/image {tmp_path / 'gone.png'}\nWhat?\n/reset\nWhat?\n\nnot read"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert (
        chat_command.main(
            ["--checkpoint", "x", "--image", image, "--max_new_tokens", str(NEW_TOKENS)]
        )
        == 0
    )
    out, error = capsys.readouterr()
    chat = model.chat(max_new_tokens=NEW_TOKENS)
    first = chat.send("What?", [image])
    chat.reset()
    alone = chat.send("What?")
    assert out == f"> {first}\n> > > > {alone}\n> ", (
        "the second question has no answer, the third stands alone"
    )
    assert first and alone and first != alone
    assert "gone.png" in error
    assert chat_command.main(["--checkpoint", "x", "--top_p", "2"]) == 1
    assert "error: top_p is 2.0" in capsys.readouterr().err


def test_the_module_runs_as_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat", "--checkpoint", str(Path("nowhere"))])
    assert chat_command.main() == 1 and "nowhere" in capsys.readouterr().err


# --- the terminal ---------------------------------------------------------------------------------


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """talk(text) -> (answers, notes): what a conversation in the terminal prints."""

    def talk(text, *words):
        if isinstance(text, bytes):
            stdin = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8")
        else:
            stdin = io.StringIO(text)
        monkeypatch.setattr(vlm, "load", lambda path, **settings: model)
        monkeypatch.setattr(sys, "stdin", stdin)
        flags = ["--checkpoint", "x", "--max_new_tokens", str(NEW_TOKENS), *words]
        assert chat_command.main(flags) == 0
        out, error = capsys.readouterr()
        return [line for line in out.replace("> ", "\n").splitlines() if line], error.splitlines()

    return talk


def test_a_literal_placeholder_of_an_earlier_turn_does_not_count(talk, image, model):
    asked = f"what does <image> mean?\n/image {image}\nWhat?\n/image {image}\nAnd <image>?\n"
    answers, notes = talk(asked)
    assert len(answers) == 3
    assert notes == ['note: no /image was given, so "<image>" is ordinary text']
    chat = model.chat(max_new_tokens=NEW_TOKENS)
    expected = [
        chat.send("what does <image> mean?"),
        chat.send("What?", [image]),
        chat.send("And <image>?", [image]),
    ]
    assert answers == expected
    prompts = model._generator.prompts
    request = Request(prompt="More?", history=chat.history)
    tokens = prompts.row(request, prompts.bucket(request, chat.spec), chat.spec).tokens.tolist()
    start = model.tokenizer.img_start
    assert tokens.count(start) == 2, "two images, and the text of the first turn"


@pytest.mark.parametrize(
    "text, words",
    [
        ("/image nope.png\nWhat?\n", "nope.png: the image cannot be read (FileNotFoundError: "
         "No such file or directory); give another /image"),
        ("/image data:image/png;base64,@@\nWhat?\n", "the data: URL is not well formed"),
        ("/image\nWhat?\n", "error: /image needs a file: /image FILE"),
        ("/images a.png\nWhat?\n", "error: unknown command /images; did you mean /image? the"),
        ("/video nope.mp4\nWhat?\n", "nope.mp4: the video cannot be decoded"),
        ("/video nope.mp4\n/image a.png\nWhat?\n", "another /image and /video"),
        ("/video\nWhat?\n", "error: /video needs a file: /video FILE"),
        ("/quit\nWhat?\n", "unknown command /quit; the commands are /image FILE, /video FILE and"),
        (b"caf\xe9?\nWhat?\n", "error: this line is not UTF-8"),
        ("caf\udce9?\nWhat?\n", "error: this line is not UTF-8"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line_and_the_conversation_goes_on(text, words, talk):
    answers, notes = talk(text)
    (note,) = notes
    assert words in note and "meta file" not in note
    assert len(answers) == ("What" in str(text)) - ("nope" in str(text) or "data:" in str(text))


def test_a_text_may_begin_with_a_slash(talk, model):
    chat = model.chat(max_new_tokens=NEW_TOKENS)
    first, second = chat.send("/etc/hosts: what is it?"), chat.send("/reset")
    assert talk("/etc/hosts: what is it?\n//reset\n")[0] == [first, second]


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_conversation(model, monkeypatch, capsys):
    monkeypatch.setattr(vlm, "load", lambda path, **settings: model)
    lines = iter(["What?", "And?", KeyboardInterrupt()])

    def read():
        line = next(lines)
        if isinstance(line, KeyboardInterrupt):
            raise line
        return line

    def interrupted(self, request, spec, conversation):
        yield "An"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_command, "read_line", read)
    monkeypatch.setattr(type(model), "stream_request", interrupted)
    assert chat_command.main(["--checkpoint", "x"]) == 130
    out, error = capsys.readouterr()
    assert out == "An\nAn\n" and "Traceback" not in error
    assert error.count("note: the answer was ended, and is not part of the conversation") == 2


def test_a_text_that_is_no_unicode_is_refused_in_python_too(model):
    with pytest.raises(ValueError, match="prompt is not valid Unicode"):
        model.generate("caf\udce9?")
