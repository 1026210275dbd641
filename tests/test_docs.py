"""What README and docs name exists: files, functions, flags, settings, make targets."""

import contextlib
import importlib
import io
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from internvlx_jax.core.overrides import load_config_file, override

ROOT = Path(__file__).parents[1]
DOCS = (
    "README.md",
    "docs/architecture.md",
    "docs/conversion.md",
    "docs/data.md",
    "docs/gpu.md",
    "docs/lvtc.md",
    "docs/recipes.md",
    "docs/runs.md",
    "docs/scaling.md",
    "docs/tpu.md",
)
PACKAGES = ("data", "models", "training", "convert", "evaluation")
GENERATED = ("runs/", ".venv", "verify.npz", "page.png", "metrics.jsonl", "predictions.jsonl", "summary.json",
             "run.json", "config.json", "quarantine-0.jsonl", "bad_steps.jsonl", "starts.jsonl",
             "report.html", "curves.png", "profile/")  # fmt: skip
FILE = re.compile(
    r"[\w.-]+(/[\w.-]+)+/?|[\w-]+(/|\.(py|md|json|jsonl|npz|png|toml))|\.venv|LICENSE|Makefile"
)
NAME = re.compile(rf"({'|'.join(PACKAGES)})(\.\w+){{2,}}")
# A program as a user starts it, and its file with the subcommand.
PROGRAMS = {
    "train.py": ("train.py",),
    "eval.py": ("eval.py",),
    "-m internvlx_jax.chat": ("internvlx_jax/chat.py",),
    "-m internvlx_jax.data check": ("internvlx_jax/data/__main__.py", "check"),
    "-m internvlx_jax.data show": ("internvlx_jax/data/__main__.py", "show"),
    **{
        f"-m internvlx_jax.convert {command}": ("internvlx_jax/convert/__main__.py", command)
        for command in ("import", "export", "inspect", "verify")
    },
    "-m internvlx_jax.data.synthetic": ("internvlx_jax/data/synthetic.py",),
    "-m internvlx_jax.training.report": ("internvlx_jax/training/report.py",),
    "-m internvlx_jax.training.compile": ("internvlx_jax/training/compile.py",),
    "benchmarks/convert.py": ("benchmarks/convert.py",),
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(doc):
    return FENCE.sub("", (ROOT / doc).read_text())


def spans(doc):
    """The inline code spans of a document."""
    return re.findall(r"`([^`\n]+)`", prose(doc))


def blocks(doc, language):
    return [text for found, text in FENCE.findall((ROOT / doc).read_text()) if found == language]


def commands(*docs):
    """Every command line of the documents (README) as words, comments and line continuations resolved."""
    texts = [text for doc in docs or ("README.md",) for text in blocks(doc, "bash")]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def paths(doc):
    """Files and folders that a document names, in spans, commands and links."""
    # A table row that begins with a folder lists the files in it.
    words = [
        folder + name
        for folder, row in re.findall(r"^\| `(\w+/)` \|(.*)", prose(doc), re.MULTILINE)
        for name in re.findall(r"`(\w+\.py)`", row)
    ]
    listed = {word.rpartition("/")[2] for word in words}
    words += [word for span in spans(doc) for word in span.split() if word not in listed]
    words += re.findall(r"\]\(([^)#:]+)\)", prose(doc))
    if doc == "README.md":
        words += [word for command in commands() for word in command]
    return {word for word in words if FILE.fullmatch(word) and not word.startswith(GENERATED)}


def exists(doc, path):
    """README names files from the root, docs/architecture.md mostly from the package; links count from the document."""
    return (
        (ROOT / path).exists()
        or ((ROOT / doc).parent / path).exists()
        or (doc != "README.md" and (ROOT / "internvlx_jax" / path).exists())
    )


def help_of(file, *command):
    """What a program prints for --help."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [file, *command, "--help"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / file), run_name="__main__")
    assert stopped.value.code == 0
    return out.getvalue()


def flags_in(help_text):
    return set(re.findall(r"(?<![\w-])--[\w-]+", help_text))


@pytest.fixture(scope="module")
def flags():
    """The flags of each program of the README."""
    return {
        program: flags_in(help_of(*file_and_command))
        for program, file_and_command in PROGRAMS.items()
    }


@pytest.mark.parametrize("doc", DOCS)
def test_named_files_exist(doc):
    named = paths(doc)
    assert named or doc == "docs/data.md"
    assert not sorted(path for path in named if not exists(doc, path))


def test_files_in_the_picture_exist():
    named = re.findall(
        r'class="file"[^>]*>([^<]+)<', (ROOT / "docs" / "architecture.svg").read_text()
    )
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / "internvlx_jax" / name).is_file()]


def test_named_functions_and_classes_exist():
    named = [span for doc in DOCS for span in spans(doc) if NAME.fullmatch(span)]
    assert len(named) > 30
    missing = []
    for name in named:
        package, module, *attributes = name.split(".")
        target = importlib.import_module(f"internvlx_jax.{package}.{module}")
        try:
            for attribute in attributes:
                target = getattr(target, attribute)
        except AttributeError:
            missing.append(name)
    assert not missing


def test_commands_use_flags_of_their_program(flags):
    used = set()
    for command in commands("README.md", "docs/conversion.md"):
        line = shlex.join(command)
        program = next((known for known in flags if line.startswith(f"python {known} ")), None)
        assert program, f"no program of PROGRAMS: {line}"
        unknown = {word for word in command if word.startswith("--")} - flags[program]
        assert not unknown, f"{line}: {sorted(unknown)}"
        used.add(program)
    assert used == flags.keys()


def test_flags_in_the_text_exist(flags):
    known = set().union(*flags.values())
    named = {
        word
        for doc in DOCS
        for span in spans(doc)
        for word in span.split()
        if word.startswith("--")
    }
    assert len(named) > 5
    assert not sorted(named - known)


def test_settings_of_the_commands_are_fields():
    config = load_config_file(ROOT / "configs" / "demo.py")
    settings = [
        [word for word in command if re.match(r"[a-z_.]+=", word)] for command in commands()
    ]
    assert sum(map(bool, settings)) == 3
    for together in settings:
        override(config, together)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {span.split()[1] for doc in DOCS for span in spans(doc) if span.startswith("make ")}
    assert named == {"demo", "test", "test-gpu", "test-torch"} and named <= targets


def test_python_example_runs(golden, tmp_path, monkeypatch):
    (example,) = blocks("README.md", "python")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "demo" / "train"
    shutil.copytree(golden / "internlm2", run)
    shutil.copytree(ROOT / "internvlx_jax/data/assets/synthetic_tokenizer", run, dirs_exist_ok=True)
    Image.new("RGB", (100, 60)).save("page.png")
    names = {}
    exec(example, names)
    tiles, config = names["tiles"], names["loaded"].config
    assert names["visual"].shape == (len(tiles), config.tokens_per_tile, config.decoder.width)
    assert str(names["visual"].dtype) == "float32" and str(tiles.dtype) == "uint8"
    assert names["loaded"].tokenizer.decode(names["ids"]) == "What is the total?"


def test_last_line_of_the_demo_is_the_same_everywhere():
    from internvlx_jax import demo

    (line,) = {span for span in spans("README.md") if span.startswith("demo: ")}
    assert f"`{line}`" in demo.__doc__
    assert re.fullmatch(r"demo: exact_match=\d\.\d\d chance=\d\.\d\d blank=\d\.\d\d", line)
