"""Template strings against the release (design: data.md 4)."""

import json

import pytest

from internvlx_jax.data.templates import TEMPLATES, get_template, prompt_text, render


@pytest.mark.parametrize("name", ["internlm2-chat", "Hermes-2", "phi3-chat"])
def test_golden_templates(golden, name):
    expected = json.loads((golden / "labels" / "templates.json").read_text(encoding="utf-8"))[name]
    template = get_template(name)
    assert template.system_message == expected["system_message"]
    assert template.stop == expected["sep"]
    assert [template.user_header, template.answer_header] == expected["roles"]
    first = [("human", "Q1"), ("gpt", "")]
    two = [("human", "Q1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "")]
    assert prompt_text(template, first) == expected["prompt_1"]
    assert prompt_text(template, two) == expected["prompt_2"]
    assert prompt_text(template, two[:2], system="") == expected["prompt_no_system"]


def test_internvl2_5_text():
    template = get_template("internvl2_5")
    text = prompt_text(
        template, [("human", " Q1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "")], system="S"
    )
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n Q1<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.system_message == (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )


def test_bos_and_strip_rules():
    assert {name: (t.bos, t.strip_values) for name, t in TEMPLATES.items()} == {
        "internlm2-chat": (True, True),
        "Hermes-2": (False, False),
        "phi3-chat": (True, False),
        "internvl2_5": (None, False),
        "internvl_hf": (None, False),
    }


def test_internvl_hf_has_no_system_part_of_its_own():
    template = get_template("internvl_hf")
    turns = [("human", "<image>\nQ"), ("gpt", "")]
    plain = "<|im_start|>user\n<image>\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(template, turns) == prompt_text(template, turns, system="") == plain
    assert prompt_text(template, turns, system="S") == f"<|im_start|>system\nS<|im_end|>\n{plain}"


def test_only_answers_and_their_separator_are_supervised():
    turns = [("human", " Q1 "), ("gpt", " A1\n"), ("human", "Q2")]
    parts = list(render(get_template("internvl2_5"), turns, strip=True))
    assert [part.text for part in parts if part.supervised] == ["A1", "<|im_end|>"]
    assert [part.text for part in parts if part.source == "human"] == ["Q1", "Q2"]


def test_errors():
    with pytest.raises(
        ValueError, match='"internlm2_chat" is unknown. Did you mean "internlm2-chat"[?] Use'
    ):
        get_template("internlm2_chat")
    with pytest.raises(ValueError, match='role "user". Use human or gpt'):
        list(render(get_template("phi3-chat"), [("user", "Q")]))
