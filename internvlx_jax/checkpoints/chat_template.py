"""Finds the prompt template that a Jinja chat template renders (design: checkpoints.md 5)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import read_json_object
from internvlx_jax.data.templates import TEMPLATES, Turn, prompt_text
from internvlx_jax.data.tokenizer_files import token_text

# How templates write an image, before the processor puts the tokens of its tiles there.
_IMAGE_MARKS = ("<IMG_CONTEXT>", "<image>")
_SYSTEM = "Answer briefly."
_TURNS: tuple[Turn, ...] = (
    ("human", "What is it?"),
    ("gpt", "A page."),
    ("human", "Which one?"),
    ("gpt", ""),
)
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class FoundTemplate:
    """The template that renders what a chat template renders.

    Attributes:
        name: a name in data/templates.py.
        system_message: default system message, where it is not the template's own.
        file: the file that said so.
    """

    name: str
    system_message: str | None
    file: Path


def find_chat_template(folder: Path, *, images: bool = True) -> FoundTemplate | None:
    """Returns the template of a folder's chat template, or None where there is none.

    Args:
        folder: the folder.
        images: whether it has to know images; that of a language model does not.

    Raises:
        ConfigError: a file is damaged, or its template renders prompts that are not built here.
    """
    source, file = _read_source(folder)
    if source is None:
        return None
    path = folder / "tokenizer_config.json"
    config = read_json_object(path)
    names = {
        name: token_text(config.get(name), path, name) or ""
        for name in ("bos_token", "eos_token", "pad_token")
    }
    probe = _Probe(source, file, names)
    probe.expect(_SYSTEM, prompt_text(TEMPLATES["internvl_hf"], _TURNS, system=_SYSTEM))
    for template in (TEMPLATES["internvl_hf"], TEMPLATES["internvl2_5"]):
        frame = prompt_text(template, _TURNS, system="\0" if template.system_message else "")
        before, _, after = frame.partition("\0")
        text = probe.render(None)
        if text == frame:
            if images:
                probe.expect_images(template.name, None)
            return FoundTemplate(template.name, None, file)
        if after and text.startswith(before) and text.endswith(after):
            system = text[len(before) : len(text) - len(after)]
            if images:
                probe.expect_images(template.name, system)
            own = system == template.system_message
            return FoundTemplate(template.name, None if own else system, file)
    raise probe.error(prompt_text(TEMPLATES["internvl_hf"], _TURNS), probe.render(None))


def _read_source(folder: Path) -> tuple[str | None, Path]:
    """Returns the Jinja source of a folder's chat template, and its file."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8"), file
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        source = read_json_object(file).get("chat_template")
        if isinstance(source, list):  # several by their names
            named = {each.get("name"): each.get("template") for each in source}
            source = named.get("default")
        if isinstance(source, str):
            return source, file
    return None, file


class _Probe:
    """Renders a fixed conversation with a chat template, as transformers would.

    Raises:
        ConfigError: the template is no Jinja template.
    """

    def __init__(self, source: str, file: Path, names: Mapping[str, str]):
        self.file, self._names = file, names
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: ""}
        # Marks of what is learned, which render nothing and are not part of Jinja.
        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{file}: no chat template that Jinja reads ({error})") from error

    def render(self, system: str | None, images: int = 0) -> str:
        """Returns the prompt; the first question has `images` images in front.

        Raises:
            ConfigError: the template fails.
        """
        messages: list[dict[str, Any]] = [] if system is None else [_message("system", system)]
        messages += [_message(_ROLES[role], text) for role, text in _TURNS if text]
        if images:
            asked = messages[0 if system is None else 1]
            text = {"type": "text", "text": asked["content"]}
            asked["content"] = [{"type": "image"}] * images + [text]
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._names
            )
        except Exception as error:  # a template may fail in any way
            what = "images" if images else "a system message" if system else "a short conversation"
            raise ConfigError(
                f"{self.file}: the chat template fails for {what} ({error}). {_REMEDY}"
            ) from error

    def expect(self, system: str | None, wanted: str) -> None:
        """Raises ConfigError where the template renders anything but `wanted`."""
        text = self.render(system)
        if text != wanted:
            raise self.error(wanted, text)

    def expect_images(self, name: str, system: str | None) -> None:
        """Raises ConfigError where images are not written in front, one per line."""
        (role, first), *rest = _TURNS
        wanted = prompt_text(TEMPLATES[name], [(role, "\0\n\0\n" + first), *rest], system=system)
        text = self.render(None, images=2)
        if text not in [wanted.replace("\0", mark) for mark in _IMAGE_MARKS]:
            raise self.error(wanted.replace("\0", _IMAGE_MARKS[0]), text)

    def error(self, wanted: str, text: str) -> ConfigError:
        """Returns the error that shows where a rendered text leaves the wanted one."""
        pairs = zip(wanted, text, strict=False)
        shorter = min(len(wanted), len(text))
        at = next((n for n, (one, other) in enumerate(pairs) if one != other), shorter)
        return ConfigError(
            f"{self.file}: the chat template is not the ChatML of InternVL. It renders "
            f"{text[at : at + 40]!r} after {text[max(0, at - 40) : at]!r}, where "
            f"{wanted[at : at + 40]!r} was expected. {_REMEDY}"
        )


_REMEDY = (
    "Name the template that the model was trained with: convert import --field "
    f"template=NAME, one of {', '.join(TEMPLATES)}."
)


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
