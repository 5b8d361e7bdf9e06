"""README, CONTRIBUTING and docs/ as a reader who types along sees them: fenced blocks, commands, and what is marked as not run."""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import invalidate_caches
from pathlib import Path

import pytest

from ubsmoe import methods
from ubsmoe.methods import table

ROOT = Path(__file__).parent.parent
WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "generated" not in page.parts]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]
SHELL = {"sh", "bash", "shell", "console"}

MARK = re.compile(r"<!--\s*not run(?: `(?P<start>[^`]+)`)?: (?P<reason>.+?)\s*-->", re.DOTALL)
"""`<!-- not run: REASON -->` above a block is about all of it, <!-- not run `make test`: REASON --> about what begins so."""

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: language, `title="..."` if it has one, and the marks that stand directly above it."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    marks: tuple[tuple[str, str], ...]

    def unrun(self, command: str = "") -> str | None:
        """Why the block, or a command of it, is not run; None if it is."""
        return next((reason for start, reason in self.marks if command.startswith(start)), None)

    @property
    def is_method(self) -> bool:
        """Whether the block is a file that the reader is to put among the methods."""
        return self.title.startswith("src/ubsmoe/methods/")

    @property
    def place(self) -> str:
        """Where the block begins, as an editor takes it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    end = 0
    for found in FENCE.finditer(text):
        above = text[end : found.start()]
        # marks count when nothing but other comments and blank lines stands between them and the block
        tail = re.search(r"(?:<!--(?:(?!-->).)*-->\s*)*\Z", above, re.DOTALL)
        marks = tuple((m["start"] or "", m["reason"]) for m in MARK.finditer(tail[0] if tail else ""))
        language, _, rest = found["info"].strip().partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        yield Block(
            page,
            text.count("\n", 0, found.start()) + 1,
            language,
            title[1] if title else "",
            found["text"],
            marks,
        )
        end = found.end()


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, a list of words each; comments, prompts and line continuations are taken off."""
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        command: list[str] = []
        for word in [*words, "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                yield command
                command = []


def add_method(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Do what the page says, until the test ends: put the block's file among the methods and its name into the table."""
    name = Path(block.title).stem
    if name in table.METHODS:
        assert (ROOT / block.title).read_text(encoding="utf-8") == block.text, f"{block.place} is not {block.title}"
        return name
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(block.text, encoding="utf-8")
    if str(folder) not in methods.__path__:
        monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"ubsmoe.methods.{name}", raising=False)
    invalidate_caches()
    monkeypatch.setattr(table, "METHODS", (*table.METHODS, name))
    return name


def inline_commands(page: Path) -> Iterator[list[str]]:
    """What stands in prose as `ubsmoe ...`."""
    prose = re.sub(r"<!--.*?-->", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)
    for code in re.findall(r"`(ubsmoe [^`]+)`", prose):
        yield shlex.split(" ".join(code.split()))
