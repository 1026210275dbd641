"""Template and tiling of transformers' layout, from the files beside config.json."""

import json

import pytest

from internvlx_jax.checkpoints.chat_template import find_chat_template
from internvlx_jax.checkpoints.hf_processor import read_side_fields
from internvlx_jax.cli.convert import main
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.templates import get_template

# In the words of this test, what the public -hf repositories render.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou see images.<|im_end|>\n' }}{% endif %}"
)
PREPROCESSOR = {
    "crop_to_patches": True,
    "min_patches": 2,
    "max_patches": 8,
    "size": {"height": 56, "width": 56},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "do_rescale": True,
}
WRITTEN = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
)
CONFIG = {"model_type": "internvl", "vision_config": {"image_size": [56, 56]}}


@pytest.fixture
def folder(tmp_path):
    def make(template=CHATML, preprocessor=PREPROCESSOR):
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        if preprocessor is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        return tmp_path

    return make


def test_fields_and_what_they_came_from(folder):
    found = read_side_fields(folder(), CONFIG)
    assert found.fields == {
        "template": "internvl_hf",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 2,
        "max_dynamic_patch": 8,
    }
    assert found.notes[0] == "template internvl_hf from chat_template.jinja"
    assert found.notes[1].endswith("max_dynamic_patch 8 from preprocessor_config.json")


def test_defaults_and_fields_that_are_stated_elsewhere(folder):
    path = folder(preprocessor={"image_processor_type": "GotOcr2ImageProcessor"})
    assert read_side_fields(path, CONFIG).fields == {
        "template": "internvl_hf",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
    }
    stated = CONFIG | {"template": "internvl2_5", "max_dynamic_patch": 6}
    found = read_side_fields(path, stated, ["use_thumbnail"])
    assert found.fields == {"dynamic_image_size": True, "min_dynamic_patch": 1}
    assert found.notes[0] == "use_thumbnail from --field"
    (path / "chat_template.jinja").write_text("{{ what }}")  # not read where a template is given
    assert "template" not in read_side_fields(path, CONFIG, ["template"]).fields


def test_images_are_cut_wherever_transformers_cuts_them(folder):
    whole = PREPROCESSOR | {"crop_to_patches": False}
    assert not read_side_fields(folder(preprocessor=whole), CONFIG).fields["dynamic_image_size"]
    named = whole | {"processor_class": "InternVLProcessor"}
    found = read_side_fields(folder(preprocessor=named), CONFIG)
    assert found.fields["dynamic_image_size"]
    assert "crop_to_patches is false in preprocessor_config.json, but" in found.notes[-1]


def test_nested_image_processor_comes_first(folder):
    path = folder()
    nested = {"image_processor": PREPROCESSOR | {"max_patches": 4}, "image_seq_length": 4}
    (path / "processor_config.json").write_text(json.dumps(nested))
    found = read_side_fields(path, CONFIG)
    assert found.fields["max_dynamic_patch"] == 4 and "processor_config" in found.notes[1]


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("image_mean", [0.5, 0.5, 0.5], "image_mean is .*; only ImageNet's"),
        ("image_std", [0.5, 0.5], "image_std is"),
        ("size", {"height": 448, "width": 448}, "size is .* vision_config.image_size 56; correct"),
        ("size", {"shortest_edge": 56}, "size is"),
        ("resample", 2, r"resample is 2; only bicubic \(3\)"),
        ("rescale_factor", 1.0, "rescale_factor is 1.0"),
        ("do_normalize", False, "do_normalize is False; only true"),
        ("max_patches", "12", "max_patches is '12'; it must be a positive integer"),
        ("max_patches", 1, "min_patches is larger than max_patches"),
        ("crop_to_patches", 1, "crop_to_patches is 1; it must be true or false"),
    ],
)
def test_what_is_not_computed_is_refused(field, value, message, folder):
    path = folder(preprocessor=PREPROCESSOR | {field: value})
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: {message}"):
        read_side_fields(path, CONFIG)


def test_default_system_messages(folder, tmp_path):
    found = find_chat_template(folder(DEFAULT + CHATML))
    assert (found.name, found.system_message) == ("internvl2_5", "You see images.")
    own = get_template("internvl2_5").system_message
    found = find_chat_template(folder((DEFAULT + CHATML).replace("You see images.", own)))
    assert (found.name, found.system_message) == ("internvl2_5", None)


def test_where_a_chat_template_may_stand(folder):
    path = folder(template=None)
    assert find_chat_template(path) is None and "template" not in read_side_fields(path, {}).fields
    config = {"chat_template": [{"name": "tools", "template": ""}]}
    config["chat_template"].append({"name": "default", "template": CHATML})
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_chat_template(path).file.name == "tokenizer_config.json"
    older = CHATML.replace("<IMG_CONTEXT>", "<image>")
    (path / "chat_template.json").write_text(json.dumps({"chat_template": older}))
    assert find_chat_template(path).file.name == "chat_template.json"
    (path / "chat_template.jinja").write_text(CHATML)
    assert find_chat_template(path).file.name == "chat_template.jinja"


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            r"is not the ChatML of InternVL. It renders 'system: .*'<\|im_start\|>.*--field templa",
        ),
        (CHATML.replace("assistant", "model"), r"It renders 'model\\n' after"),
        (CHATML.replace("{{ '<|im_end|>\n' }}", "{{ '<|im_end|>' }}"), "is not the ChatML"),
        (CHATML.replace("<IMG_CONTEXT>\n", "<IMG_CONTEXT>"), "It renders '<IMG_CONTEXT>What"),
        (
            CHATML.replace(" is string %}", " is defined %}"),
            r"It renders \"\[\{'type': 'image'\}",
        ),
        (DEFAULT.replace("<|im_end|>", "") + CHATML, "is not the ChatML"),
        ("{% if %}", "no chat template that Jinja reads"),
        ("{{ raise_exception('no system role') }}", "fails for a system message .no system role"),
        ("{{ ''.__class__.__mro__ }}", "chat template fails"),
    ],
)
def test_other_chat_templates_are_refused(template, message, folder):
    with pytest.raises(ConfigError, match=f"chat_template.jinja: .*{message}"):
        find_chat_template(folder(template))


def test_import_needs_no_field(tmp_path, make_checkpoint, capsys):
    """A folder of transformers' layout as it comes, and with a field replaced."""
    make_checkpoint(tmp_path / "source", "qwen2", "mlp1")
    assert run("import", "--from", tmp_path / "source", "--to", tmp_path / "jax") == 0
    hf = ("--layout", "hf", "--dtype", "keep", "--image_token_id", 7)
    assert run("export", "--from", tmp_path / "jax", "--to", tmp_path / "hf", *hf) == 0
    out = capsys.readouterr().out
    for name in WRITTEN:  # as if another program had made the folder
        assert name in out
        (tmp_path / "hf" / name).unlink()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for field in ("template", "use_thumbnail", "max_dynamic_patch", "min_dynamic_patch"):
        config.pop(field, None)
    config.pop("dynamic_image_size")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert run("import", "--from", tmp_path / "hf", "--to", tmp_path / "none") == 1
    assert "does not say template, dynamic_image_size" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    (tmp_path / "hf" / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    assert run("import", "--from", tmp_path / "hf", "--to", tmp_path / "one") == 0
    out = capsys.readouterr().out
    assert "template internvl_hf from chat_template.jinja" in out
    prompt = json.loads((tmp_path / "one" / "config.json").read_text())["model"]["prompt"]
    assert prompt["template"] == "internvl_hf" and prompt["tiles"]["max_num"] == 8
    internvl = ("--layout", "internvl", "--dtype", "keep")
    assert run("export", "--from", tmp_path / "one", "--to", tmp_path / "back", *internvl) == 0
    assert "InternVL's own code does not know" in capsys.readouterr().out
    field = ("--field", "max_dynamic_patch=4")
    assert run("import", "--from", tmp_path / "hf", "--to", tmp_path / "two", *field) == 0
    assert "max_dynamic_patch from --field" in capsys.readouterr().out
    prompt = json.loads((tmp_path / "two" / "config.json").read_text())["model"]["prompt"]
    assert prompt["tiles"]["max_num"] == 4
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    assert run("import", "--from", tmp_path / "hf", "--to", tmp_path / "bad") == 1
    assert "is not the ChatML" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_an_export_has_what_a_processor_reads(tmp_path, make_checkpoint, golden, capsys):
    """What is written reads back as the model's prompt and tiling; the source's own files stay."""
    prompt = {"template": "internvl2_5", "system_message": "It's {{ 1 }}\n\\n 图 😀"}
    tiling = {"min_dynamic_patch": 2, "max_dynamic_patch": 5}
    tiling |= {"dynamic_image_size": True, "use_thumbnail": True}
    make_checkpoint(tmp_path / "source", "qwen3", "mlp1", **prompt, **tiling)
    for file in (golden / "bpe" / "tokenizer").iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    tokens = tmp_path / "source" / "tokenizer_config.json"
    language_model = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fields = json.loads(tokens.read_text()) | {"chat_template": language_model}
    tokens.write_text(json.dumps(fields))
    hf = ("--layout", "hf", "--dtype", "keep", "--image_token_id", 7)
    out = tmp_path / "hf"
    assert run("export", "--from", tmp_path / "source", "--to", out, *hf) == 0
    assert f"wrote {', '.join(WRITTEN)}" in capsys.readouterr().out
    found = read_side_fields(out, CONFIG)
    assert found.fields == {**prompt, **tiling}
    written = json.loads((out / "tokenizer_config.json").read_text())
    named = written.pop("extra_special_tokens")
    assert written == fields and named["context_image_token"] == "<IMG_CONTEXT>"
    assert json.loads((out / "processor_config.json").read_text())["image_seq_length"] == 4

    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    assert run("export", "--from", out, "--to", tmp_path / "again", *hf) == 0
    assert "for AutoProcessor" not in capsys.readouterr().out
    for name in ("chat_template.jinja", "preprocessor_config.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def run(*arguments):
    return main([str(argument) for argument in arguments])
