"""What README and docs name exists: files, functions, flags, settings, make targets."""

import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from internvlx_jax import cli
from internvlx_jax.core.overrides import load_config_file, override

ROOT = Path(__file__).parents[1]
DOCS = (
    "README.md",
    *sorted(
        f"docs/{path.name}"
        for path in (ROOT / "docs").glob("*.md")
        if path.name != "evaluation.md"  # tests/evaluation/test_evaluation_docs.py runs that page
    ),
)
PACKAGES = (
    "core",
    "models",
    "data",
    "checkpoints",
    "inference",
    "training",
    "aot",
    "evaluation",
    "convert",
)
GENERATED = (
    "runs/",
    "receipts/",
    ".venv",
    "verify.npz",
    "page.png",
    "metrics.jsonl",
    "predictions.jsonl",
    "summary.json",
    "run.json",
    "config.json",
    "quarantine-0.jsonl",
    "bad_steps.jsonl",
    "starts.jsonl",
    "report.html",
    "curves.png",
    "profile/",
    "OpenGVLab/",  # ids of the Hugging Face hub
    # Files of a checkpoint folder.
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
FILE = re.compile(
    r"[\w.-]+(/[\w.-]+)+/?|[\w-]+(/|\.(py|md|json|jsonl|npz|png|toml))|\.venv|LICENSE|Makefile"
)
NAME = re.compile(rf"({'|'.join(PACKAGES)})(\.\w+){{2,}}")
# A program as a user starts it, and the arguments of `internvlx` that it stands for.
PROGRAMS = {
    "internvlx train": ("train",),
    "internvlx eval": ("eval",),
    "internvlx chat": ("chat",),
    "internvlx serve": ("serve",),
    "internvlx compile": ("compile",),
    "internvlx report": ("report",),
    "internvlx replay": ("replay",),
    **{f"internvlx data {name}": ("data", name) for name in ("check", "show", "generate")},
    **{
        f"internvlx convert {name}": ("convert", name)
        for name in ("import", "export", "inspect", "verify")
    },
}
# Earlier names of the same commands, which keep working.
DOORS = {
    "train.py": "train",
    "eval.py": "eval",
    "internvlx_jax/chat.py": "chat",
    "internvlx_jax/data/__main__.py": "data",
    "internvlx_jax/convert/__main__.py": "convert",
    "internvlx_jax/training/compile.py": "compile",
    "internvlx_jax/training/report.py": "report",
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(doc):
    return FENCE.sub("", (ROOT / doc).read_text())


def spans(doc):
    """Returns the inline code spans of a document."""
    return re.findall(r"`([^`\n]+)`", prose(doc))


def blocks(doc, language):
    return [text for found, text in FENCE.findall((ROOT / doc).read_text()) if found == language]


def commands(*docs):
    """Returns the command lines of documents as words, without comments and continuations."""
    texts = [text for doc in docs or ("README.md",) for text in blocks(doc, "bash")]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def paths(doc):
    """Returns the files and folders that a document names, in spans, commands and links."""
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
    """Returns whether a path exists below the root, configs, the document or the package."""
    return (
        (ROOT / path).exists()
        or (ROOT / "configs" / path).exists()
        or ((ROOT / doc).parent / path).exists()
        or (doc != "README.md" and (ROOT / "internvlx_jax" / path).exists())
    )


def help_of(start):
    """Returns what a program prints for --help, when `start()` runs it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        start()
    assert stopped.value.code == 0
    return out.getvalue()


def flags_in(help_text):
    return set(re.findall(r"(?<![\w-])--[\w-]+", help_text))


@pytest.fixture(scope="module")
def flags():
    """Returns the flags of each subcommand."""
    return {
        program: flags_in(help_of(lambda words=words: cli.main([*words, "--help"])))
        for program, words in PROGRAMS.items()
    }


@pytest.mark.parametrize("file", DOORS)
def test_earlier_names_are_the_same_commands(file, monkeypatch):
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    earlier = help_of(lambda: runpy.run_path(str(ROOT / file), run_name="__main__"))
    now = help_of(lambda: cli.main([DOORS[file], "--help"]))
    assert flags_in(earlier) == flags_in(now)


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
    for command in commands(*DOCS):
        line = shlex.join(command)
        if not line.startswith("internvlx "):
            continue
        program = next((known for known in flags if line.startswith(known)), None)
        assert program, f"no subcommand of PROGRAMS: {line}"
        unknown = {word.split("=")[0] for word in command if word.startswith("--")} - flags[program]
        assert not unknown, f"{line}: {sorted(unknown)}"
        used.add(program)
    assert used == flags.keys(), flags.keys() - used


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
    assert any(settings)
    for together in settings:
        override(config, together)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {span.split()[1] for doc in DOCS for span in spans(doc) if span.startswith("make ")}
    assert (
        named == {"demo", "test", "test-gpu", "test-torch", "test-real", "bench-gpu", "bench-peers"}
        and named <= targets
    )


def test_last_line_of_the_demo_is_the_same_everywhere():
    from internvlx_jax import demo

    (line,) = {span for span in spans("README.md") if span.startswith("demo: ")}
    assert f"`{line}`" in demo.__doc__
    assert re.fullmatch(
        r"demo: exact_match=\d\.\d\d chance=\d\.\d\d blank=\d\.\d\d "
        r"visual_tokens=\d+\.\d \(InternVL: \d+\.\d\)",
        line,
    )
