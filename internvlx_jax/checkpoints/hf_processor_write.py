"""Writes what transformers' AutoProcessor reads beside the weights (design: checkpoints.md 5).

A checkpoint that came in another layout has no such files: the processor of pictures, the chat
template, and the names of the image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvlx_jax.checkpoints.chat_template import find_chat_template
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import read_json_object, write_json, write_text
from internvlx_jax.core.model_config import ModelConfig, PromptConfig
from internvlx_jax.core.tile_config import NORMALIZATIONS, TileConfig
from internvlx_jax.data.templates import Template, get_template

_BICUBIC = 3  # the number that Pillow gives it
# Attributes that InternVLProcessor asks its tokenizer for.
_NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",  # only a mark in prompts, which the model never sees
}
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_VIDEO_FILE = "video_preprocessor_config.json"


def write_processor(folder: Path, config: ModelConfig) -> list[str]:
    """Completes an exported folder so that AutoProcessor of transformers loads it.

    Files that the folder has stay as they are, except that the tokenizer's config names the image
    tokens where it does not. A chat template in that config which is not the model's, such as that
    of its language model alone, gives way to a file of its own.

    Args:
        folder: holds the tokenizer's files and what the source had.
        config: the model.

    Returns:
        Notes for a report: what was written, and where transformers does something else.
    """
    written, notes = [], []
    tiles = config.prompt.tiles
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        write_json(folder / "preprocessor_config.json", image_processor(tiles))
        processor = {
            "processor_class": "InternVLProcessor",
            "image_seq_length": config.tokens_per_tile,
        }
        write_json(folder / "processor_config.json", processor)
        written += _PROCESSOR_FILES
        notes += _other_tiles(tiles)
    if not (folder / _VIDEO_FILE).is_file():
        write_json(folder / _VIDEO_FILE, _video_processor(tiles))
        written.append(_VIDEO_FILE)
    if not _renders(folder, config.prompt):
        kept = [name for name in _TEMPLATE_FILES if (folder / name).is_file()]
        if kept:
            notes.append(
                f"{kept[0]} is the source's and does not render template {config.prompt.template}, "
                "which the model has: transformers prompts it in another way"
            )
        else:
            source = chat_template(get_template(config.prompt.template), config.prompt)
            write_text(folder / _TEMPLATE_FILES[0], source)
            written.append(_TEMPLATE_FILES[0])
    tokenizer = folder / "tokenizer_config.json"
    fields = read_json_object(tokenizer)
    if fields and (named := _with_names(fields)) is not fields:
        write_json(tokenizer, named)
        notes.append("tokenizer_config.json names the image tokens (extra_special_tokens)")
    if written:
        notes.insert(0, f"for AutoProcessor of transformers, wrote {', '.join(written)}")
    return notes


def _renders(folder: Path, prompt: PromptConfig) -> bool:
    """Whether a folder's chat template writes the prompts of a model."""
    try:
        found = find_chat_template(folder)
    except ConfigError:  # it renders something else, such as a language model's own prompts
        return False
    if found is None or found.name != prompt.template:
        return False
    own = get_template(found.name).system_message
    one, other = (
        own if each is None else each for each in (found.system_message, prompt.system_message)
    )
    return one == other


def image_processor(tiles: TileConfig) -> dict[str, Any]:
    """Returns the preprocessor_config.json that cuts images as `tiles` does.

    Where nothing is cut, one patch is the most: InternVLProcessor cuts whatever the file says.
    """
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": tiles.dynamic,
        "min_patches": tiles.min_num if tiles.dynamic else 1,
        "max_patches": tiles.max_num if tiles.dynamic else 1,
        **_pixels(tiles),
    }


def _video_processor(tiles: TileConfig) -> dict[str, Any]:
    return {
        "video_processor_type": "InternVLVideoProcessor",
        "processor_class": "InternVLProcessor",
        **_pixels(tiles),
    }


def _pixels(tiles: TileConfig) -> dict[str, Any]:
    """Returns how pixels become numbers, as both processors spell it."""
    mean, std = NORMALIZATIONS["imagenet"]
    return {
        "size": {"height": tiles.tile_size, "width": tiles.tile_size},
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _other_tiles(tiles: TileConfig) -> list[str]:
    """Says where transformers cuts images in another way than the model was made for."""
    notes = []
    if tiles.dynamic and tiles.rule != "off":
        notes.append(
            f"transformers has no tile rule {tiles.rule!r}: it cuts small images into more tiles"
        )
    if tiles.dynamic and not tiles.use_thumbnail and tiles.max_num > 1:
        notes.append("transformers adds the thumbnail that this model does without")
    return notes


def _with_names(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a tokenizer_config.json that names the image tokens; itself where it does."""
    extra = fields.get("extra_special_tokens")
    named = dict(extra) if isinstance(extra, Mapping) else {}
    absent = {
        name: text
        for name, text in _NAMED_TOKENS.items()
        if name not in named and name not in fields
    }
    if not absent:
        return fields
    changed = dict(fields)
    if isinstance(extra, list):  # a list of further tokens goes by another name in the same file
        changed["additional_special_tokens"] = [
            *(fields.get("additional_special_tokens") or ()),
            *extra,
        ]
    return changed | {"extra_special_tokens": named | absent}


def chat_template(template: Template, prompt: PromptConfig) -> str:
    """Returns the Jinja source that renders what `templates.render` does.

    Images of a message are `<IMG_CONTEXT>` lines where they stand among its parts; the processor
    puts the tokens of the tiles there. A beginning token is left to the tokenizer.

    Args:
        template: the fixed text.
        prompt: its system message may replace that of the template.
    """
    own = prompt.system_message
    system = template.system_message if own is None else own
    end = template.stop + template.after_stop
    opening = ""
    if system or not template.omits_empty_system:
        text = _quoted(template.system_header + system + end)
        opening = "{%- if not messages or messages[0].role != 'system' -%}{{- " + text
        opening += " -}}{%- endif -%}\n"
    headers = {
        "system": template.system_header,
        "user": template.user_header,
        "assistant": template.answer_header,
    }
    pairs = ", ".join(f"{_quoted(role)}: {_quoted(text)}" for role, text in headers.items())
    return (
        "{%- set headers = {" + pairs + "} -%}\n" + opening + "{%- for message in messages -%}\n"
        "{{- headers[message.role] -}}\n"
        "{%- if message.content is string -%}{{- message.content -}}{%- else -%}\n"
        "{%- for part in message.content -%}\n"
        "{%- if part.type == 'image' -%}{{- '<IMG_CONTEXT>\\n' -}}\n"
        "{%- elif part.type == 'video' -%}{{- '<video>\\n' -}}\n"
        "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- endif -%}\n"
        "{{- " + _quoted(end) + " -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{- "
        + _quoted(template.answer_header)
        + " -}}{%- endif -%}\n"
    )


def _quoted(text: str) -> str:
    """Returns a Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
