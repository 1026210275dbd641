"""What the site is made of besides the pages in this folder: API pages, design pages, links.

MkDocs calls the functions by name. API pages are generated: one for each room of the package,
with every public module in it, so that no list has to be kept when files move. Modules are read
from their source; nothing is imported.
"""

import re
from functools import cache
from pathlib import Path

from markdown.extensions.toc import slugify
from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = "internvlx_jax"
# Rooms in the order in which they may import each other; others follow by name.
ROOMS = (
    "core",
    "models",
    "data",
    "checkpoints",
    "inference",
    "training",
    "aot",
    "evaluation",
    "convert",
    "cli",
)
# "design: model.md 4" in docstrings and pages, outside code.
CITATION = re.compile(r"design:\s+(\w+)\.md(?:\s+(\d+))?")
FENCED = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#:]+)(#[^)]*)?\)")


def rooms() -> list[str]:
    """Returns the subpackages of the package, known ones first."""
    found = {path.parent.name for path in (ROOT / PACKAGE).glob("[a-z]*/__init__.py")}
    return [room for room in ROOMS if room in found] + sorted(found.difference(ROOMS))


def modules(folder: Path, recursive: bool) -> list[str]:
    """Returns the dotted names of the public modules in a folder, the package itself first."""
    names = set()
    for path in folder.glob("**/*.py" if recursive else "*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            names.add(".".join(parts))
    return sorted(names)


def api_page(title: str, names: list[str]) -> str:
    """Returns the Markdown of an API page: a title, then a directive for each module."""
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)]) + "\n"


def api_pages() -> dict[str, str]:
    """Returns path -> Markdown of all API pages."""
    pages = {"api/index.md": api_page(PACKAGE, modules(ROOT / PACKAGE, recursive=False))}
    for room in rooms():
        names = modules(ROOT / PACKAGE / room, recursive=True)
        pages[f"api/{room}.md"] = api_page(f"{PACKAGE}.{room}", names)
    return pages


def design_pages() -> list[str]:
    """Returns the paths of the design pages, the index first."""
    paths = [path.relative_to(DOCS).as_posix() for path in (DOCS / "design").glob("*.md")]
    return sorted(paths, key=lambda path: (Path(path).stem not in ("index", "README"), path))


@cache
def section_anchor(page: str, number: str | None) -> str | None:
    """Returns the URL of a design page (and numbered section) from the root of the site."""
    path = DOCS / "design" / f"{page}.md"
    if not path.exists():
        return None
    if number is None:
        return f"design/{page}/"
    heading = re.search(rf"^#+ ({number}\.? .*)$", path.read_text("utf-8"), re.MULTILINE)
    if heading is None:
        return None
    return f"design/{page}/#{slugify(heading[1].replace('`', ''), '-')}"


def on_config(config):
    """Fills the navigation with the generated pages and with the folder of design pages."""
    api = [{PACKAGE: "api/index.md"}, *({room: f"api/{room}.md"} for room in rooms())]
    generated = {"Design": design_pages(), "API": api}
    navigation = []
    for entry in config["nav"]:
        title = next(iter(entry))
        pages = generated.get(title)
        if pages is None:
            navigation.append(entry)
        elif pages:
            navigation.append({title: pages})
    config["nav"] = navigation
    return config


def on_files(files, config):
    """Adds the generated API pages."""
    for path, content in api_pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def outside_link(match: re.Match, repository: str | None) -> str:
    """Returns a link that leaves docs/ as one to the repository, or as its bare text."""
    text, path, anchor = match.groups()
    if not (ROOT / path).exists():
        return match[0]  # left for MkDocs to warn about
    if not repository:
        return text
    return f"[{text}]({repository.rstrip('/')}/blob/main/{path}{anchor or ''})"


def on_page_markdown(markdown, page, config, files):
    """Turns links out of docs/, which work on GitHub, into links to the repository."""
    parts = FENCED.split(markdown)
    for i in range(0, len(parts), 2):
        parts[i] = OUTSIDE.sub(lambda match: outside_link(match, config["repo_url"]), parts[i])
    return "".join(parts)


def on_page_content(html, page, config, files):
    """Links citations such as "design: model.md 4", also those in docstrings, to their section."""
    root = "../" * page.url.count("/")

    def link(match):
        target = section_anchor(match[1], match[2])
        return match[0] if target is None else f'<a href="{root}{target}">{match[0]}</a>'

    parts = re.split(r"(<pre.*?</pre>|<code.*?</code>|<[^>]+>)", html, flags=re.DOTALL)
    parts[::2] = [CITATION.sub(link, part) for part in parts[::2]]
    return "".join(parts)
