"""Pages, errors and help use the field's words, and their sentences are short enough to be read once.

Left out: docs/log.md and CHANGELOG.md, which keep the words of their day; in sentences also code, tables, and names of links.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from documents import FENCE, PAGES, ROOT

HISTORY = {ROOT / "docs/log.md", ROOT / "docs/changelog.md"}
CHECKED = [page for page in PAGES if page not in HISTORY]
MOST_WORDS = 40

FORBIDDEN = {  # what is not said: what is said instead
    r"\bliars?\b|\blying (clients?|servers?|about)\b": "malicious (Byzantine) clients, falsified counts",
    r"\b(stands?|tells?|clients?|server)( that)? lies?\b": "malicious clients, a malicious server",
    r"\bpass(es)? a gate\b|\b(update|passes the) gate\b": "update validation: in a mixture of experts the gate is the router",
    r"\bworker-seconds\b": "resident-seconds",
    r"\b(made-up|small|its|another|the) worlds?\b": "synthetic QA data set",
    r"\bruins?\b": "near-chance accuracy; collapses",
    r"\b(same|equal|other|different) bits\b|\bto the bit\b": "bit-identical, bitwise reproducible",
    r"\b(unpromised|does not promise)\b|\b(these|set of|the|under) laws\b": "properties; exempt; does not satisfy",
    r"\bforesee\w*|\bforesight\b": "estimate",
    r"\bowed\b": "scaled_missing",
    r"\blearners?\b": "trainable experts",
    r"\btides?\b|\bbills?\b": "peak; cost",
    r"\bmiddling\b": "median",
    r"\bdealt?\b|\bdealing\b": "partition; assign",
    r"\bstock (software|routers?|weights|files?|file formats)\b": "plain transformers, PEFT",
    r"\bloopback (federation|run)\b": "local federation (localhost)",
    r"\bdraw curves\b": "log metrics to",
    r"\bmade-up\b": "synthetic, forged, tiny",
    r"\branked %": "mc_accuracy",
}


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_the_fields_words(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert list(_forbidden(re.sub(r"\]\([^)]*\)", "]", text))) == []


def test_errors_and_help_use_the_fields_words() -> None:
    found = {place: list(_forbidden(text)) for place, text in _messages()}
    assert len(found) > 300  # messages are found at all
    assert {place: words for place, words in found.items() if words} == {}


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_sentence_has_at_most_forty_words(page: Path) -> None:
    long = [one for one in _sentences(page.read_text(encoding="utf-8")) if len(_words(one)) > MOST_WORDS]
    assert long == []


def test_the_checks_find_what_they_are_for() -> None:
    assert list(_forbidden("No liar\nreturns the same\nbits.")) == [
        ("liar", "malicious (Byzantine) clients, falsified counts"),
        ("same\nbits", "bit-identical, bitwise reproducible"),
    ]
    assert list(_forbidden("The gate weight lies between 0 and 1; multiplying, 8 bits, the same bit.")) == []
    page = """# Title\n
One two.\nThree `a b c` [four](x.md).\n
- five\n- six (Bell et al. 2020). Seven\n
| not | this |\n
```sh\nnot this\n```\n"""
    assert [len(_words(one)) for one in _sentences(page)] == [1, 2, 3, 1, 5, 1]


def _forbidden(text: str) -> Iterator[tuple[str, str]]:
    for pattern, instead in FORBIDDEN.items():
        for found in re.finditer(pattern.replace(" ", r"\s+"), text, re.IGNORECASE):
            yield found[0], instead


def _sentences(page: str) -> Iterator[str]:
    """Sentences of paragraphs and list items; code in backticks and a link are a word each."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("\n", page), flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", lambda link: re.sub(r"\s+", "-", link[1]), text)
    text = re.sub(r"`[^`\n]+(\n[^`\n]+)?`", "Code", text)
    text = re.sub(r"^(?:    |\|).*$", "", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*:] |\s*\d+\. |#)", text):
        if paragraph.strip():
            yield from re.split(r"(?<=[.!?])[)*\"”]*\s+(?=[^a-z0-9\s])", " ".join(paragraph.split()))


def _words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if re.search(r"\w", word)]


def _messages() -> Iterator[tuple[str, str]]:
    """Place and text of what is raised anywhere, and of every string in cli/ and export/: help, cards, and what is printed."""
    for path in sorted((ROOT / "src/ubsmoe").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        spoken = (
            [tree]
            if path.parent.name in ("cli", "export")
            else [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
        )
        for node in spoken:
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and "is now called" not in part.value:
                    yield f"{path.relative_to(ROOT)}:{part.lineno}:{part.col_offset}", part.value
