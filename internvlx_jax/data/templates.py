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
    """Holds the fixed text around the messages of a conversation.

    Attributes:
        name: how configs and checkpoints call it.
        system_message: used when the conversation brings none.
        system_header: text before the system message.
        user_header: text before each question.
        answer_header: text before each answer.
        stop: separator after each message, one token: supervised after an answer, and the token
            that ends generation.
        after_stop: text after each separator, never supervised.
        bos: whether a bos token comes first; None leaves it to the tokenizer.
        strip_values: whether training strips white space around message texts.
        omits_empty_system: whether an empty system message leaves out the text around it, too.
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
    # Not in the repr, which plan hashes take: they stay those of earlier versions.
    omits_empty_system: bool = dataclasses.field(default=False, repr=False)


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

_INTERNVL2_5 = dataclasses.replace(
    _CHATML,
    name="internvl2_5",
    system_message=_SYSTEM_B,
    after_stop="\n",
    bos=None,
    strip_values=False,
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
        _INTERNVL2_5,
        # What transformers renders for InternVL (repositories ending in -hf).
        dataclasses.replace(
            _INTERNVL2_5, name="internvl_hf", system_message="", omits_empty_system=True
        ),
    )
}


def get_template(name: str) -> Template:
    """Returns a template by its name.

    Raises:
        ConfigError: the name is unknown; the message lists the known ones.
    """
    if name not in TEMPLATES:
        raise ConfigError(
            f'template "{name}" is unknown.{did_you_mean(name, TEMPLATES)} Use one of '
            f"{', '.join(TEMPLATES)}."
        )
    return TEMPLATES[name]


class Part(NamedTuple):
    """A stretch of a rendered conversation.

    Attributes:
        text: what it says.
        source: whose text it is; `text` is a human turn whose "<image>" means itself.
        supervised: whether the model learns to write it.
    """

    text: str
    source: Literal["template", "system", "human", "gpt", "text"]
    supervised: bool


def render(
    template: Template, turns: Iterable[Turn], *, system: str | None = None, strip: bool = False
) -> Iterator[Part]:
    """Yields the parts of a conversation in order, bos excluded, images still placeholders.

    An empty answer is its header alone, so a generation prompt is a conversation that ends with
    ("gpt", "").

    Args:
        template: the fixed text.
        turns: (role, text) of each message.
        system: replaces the template's message; an empty one keeps the text around it, unless the
            template says otherwise.
        strip: whether white space around the texts of the turns is removed.

    Raises:
        ValueError: a role is neither human nor gpt.
    """
    end = template.stop, template.after_stop
    system = template.system_message if system is None else system
    if system or not template.omits_empty_system:
        yield Part(template.system_header, "template", False)
        yield Part(system, "system", False)
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
    """Returns the whole conversation as one string, unstripped.

    Turns that end with ("gpt", "") ask for an answer.
    """
    return "".join(part.text for part in render(template, turns, system=system))
