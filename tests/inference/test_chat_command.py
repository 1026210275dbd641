"""Chat streams, remembers, stops at texts and writes what evaluation writes (design: data.md 4)."""

import io
import sys
from pathlib import Path

import pytest

from internvlx_jax.cli import chat as chat_command
from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.encode import encode_prompt
from internvlx_jax.inference.decoding import settled
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
    monkeypatch.setattr(chat_command, "load", lambda path, **settings: model)
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
