"""Chat templates and the one rendering that prompts and labels share (design: data.md 4)."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from internvlx_jax.core.errors import ConfigError, did_you_mean

IMAGE_PLACEHOLDER = "<image>"  # stands for one image in the text of a human turn
VIDEO_PLACEHOLDER = "<video>"  # becomes a line with an "<image>" for each frame

Turn = tuple[str, str]  # ("human" | "gpt", text)

_SYSTEM_A = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_B = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclasses.dataclass(frozen=True)
class Template:
    """The fixed text around the messages of a conversation.

    Attributes
      system_message: used when the conversation brings none.
      system_header, user_header, answer_header: text before each kind of message.
      stop: the separator after each message, one token: supervised after an answer, and the stop token.
      after_stop: text after each separator, never supervised.
      bos: whether a bos token comes first; None leaves it to the tokenizer.
      strip_values: whether training strips white space around message texts.
    """

    name: str
    system_message: str
    system_header: str
    user_header: str
    answer_header: str
    stop: str
    after_stop: str
    bos: bool | None
    strip_values: bool


_CHATML = Template(
    name="internlm2-chat",
    system_message=_SYSTEM_A,
    system_header="<|im_start|>system\n",
    user_header="<|im_start|>user\n",
    answer_header="<|im_start|>assistant\n",
    stop="<|im_end|>",
    after_stop="",
    bos=True,
    strip_values=True,
)

TEMPLATES = {
    template.name: template
    for template in (
        _CHATML,
        dataclasses.replace(_CHATML, name="Hermes-2", bos=False, strip_values=False),
        Template(
            name="phi3-chat",
            system_message=_SYSTEM_A,
            system_header="<|system|>\n",
            user_header="<|user|>\n",
            answer_header="<|assistant|>\n",
            stop="<|end|>",
            after_stop="",
            bos=True,
            strip_values=False,
        ),
        dataclasses.replace(
            _CHATML,
            name="internvl2_5",
            system_message=_SYSTEM_B,
            after_stop="\n",
            bos=None,
            strip_values=False,
        ),
    )
}


def get_template(name: str) -> Template:
    """The template of that name. Raises ValueError listing the names."""
    if name not in TEMPLATES:
        raise ConfigError(
            f'template "{name}" is unknown.{did_you_mean(name, TEMPLATES)} Use one of {", ".join(TEMPLATES)}.'
        )
    return TEMPLATES[name]


class Part(NamedTuple):
    """A stretch of a rendered conversation: whose text it is, and whether the model learns to write it."""

    text: str
    source: Literal["template", "system", "human", "gpt"]
    supervised: bool


def render(
    template: Template, turns: Iterable[Turn], *, system: str | None = None, strip: bool = False
) -> Iterator[Part]:
    """The parts of a conversation in order, bos excluded, images still placeholders.

    `system` replaces the template's message; an empty one keeps its frame. An empty answer is its header
    alone, so a generation prompt is a conversation that ends with ("gpt", ""). `strip` strips the turns.
    Raises ValueError on another role than human and gpt.
    """
    end = template.stop, template.after_stop
    yield Part(template.system_header, "template", False)
    yield Part(template.system_message if system is None else system, "system", False)
    yield from (Part(text, "template", False) for text in end)
    for role, text in turns:
        text = text.strip() if strip else text
        if role == "human":
            yield Part(template.user_header, "template", False)
            yield Part(text, "human", False)
            yield from (Part(text, "template", False) for text in end)
        elif role == "gpt":
            yield Part(template.answer_header, "template", False)
            if text:
                yield Part(text, "gpt", True)
                yield Part(template.stop, "template", True)
                yield Part(template.after_stop, "template", False)
        else:
            raise ValueError(f'a turn has role "{role}". Use human or gpt.')


def prompt_text(template: Template, turns: Iterable[Turn], *, system: str | None = None) -> str:
    """The whole conversation as one string, unstripped; end `turns` with ("gpt", "") to ask for an answer."""
    return "".join(part.text for part in render(template, turns, system=system))
