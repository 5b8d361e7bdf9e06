"""Pages that are read off the code, so that they cannot disagree with it: the run file, the methods, the command line.

`docs/conf.py` calls `write_pages` before Sphinx reads anything; what it writes is not in the repository.
"""

import html
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ubsmoe import cli
from ubsmoe.bases.pretrain.settings import PretrainSettings
from ubsmoe.config import MethodSettings, RunSettings
from ubsmoe.methods import METHODS, summary_line
from ubsmoe.methods.method import LAWS, Base, Method

VARIES = {"top_k": "experts per token, K", "rank": "LoRA rank; every client runs K_max experts"}
SMALLEST = Base(num_layers=1, num_experts=2, k_max=1, rank=1, alpha=1.0)  # what a page says does not depend on sizes
SYMBOLS = {
    "alpha": "α", "beta": "β", "epsilon": "ε", "eps": "ε", "lambda": "λ", "phi": "φ", "rho": "ρ", "sigma": "σ", "tau": "τ",
    "theta": "θ", "zeta": "ζ", "Delta": "Δ", "Sigma": "Σ", "sum": "∑",
}  # fmt: skip
PROSE_INDEX = re.compile(
    r"\b([A-Za-z]|Delta|theta|phi|alpha|beta|mean|max|sum|load|assignments|tokens)_(?:\{([^{}]*)\}|([A-Za-z]|max|min)\b)"
)
TEXT_SIGNS = (("<->", "↔"), ("<-", "←"), ("->", "→"), (">=", "≥"), ("<=", "≤"), ("!=", "≠"))


def write_pages(folder: Path) -> None:
    """Write every generated page below `folder`; pages of methods that are gone are removed."""
    pages = {"run-file.md": run_file_page(), "command-line.md": command_line_page(), "methods.md": methods_page()}
    pages |= {f"methods/{name}.md": method_page(name, builder) for name, builder in METHODS.items()}
    for path in folder.rglob("*.md"):
        if str(path.relative_to(folder)) not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # an untouched page is not built again
            path.write_text(text, encoding="utf-8")


def run_file_page() -> str:
    """Every section and key of a run file, and of a file for `ubsmoe pretrain`."""
    lines = [
        "# Run file",
        "A run file is TOML. Every key has a default; an unknown one is refused with the nearest name. On the command line, "
        "`--set section.key=value` changes one key. Paths are taken relative to the run file where they exist there, "
        "or else to the current folder.",
        "Read off `src/ubsmoe/config/settings.py`.",
        "## Top level",
        _table(_scalars(RunSettings)),
    ]
    for prefix, section in _sections(RunSettings, ""):
        said = (inspect.getdoc(section) or "").split(": ", 1)[-1]
        lines += [f"## [{prefix}]", said[0].upper() + said[1:]]
        lines += [_table(_scalars(section))]
        if section is MethodSettings:
            lines.append("Each method's own settings: [methods](methods.md).")
    lines += [
        "## A file for ubsmoe pretrain",
        "Not a run file: `ubsmoe pretrain` reads these keys, all on top level.",
        _table(_scalars(PretrainSettings)),
    ]
    return _page(lines)


def methods_page() -> str:
    """The table of methods, and what each law of the battery says."""
    rows = [["method", "tiers differ in", "what it is"]]
    for name, builder in METHODS.items():
        rows.append(
            [
                f"[{name}](methods/{name}.md)",
                _kind(builder(SMALLEST)),
                summary_line(name).partition(": ")[2].rstrip("."),
            ]
        )
    lines = [
        "# Methods",
        "`[method] name` in a run file chooses one; the other keys of `[method]` are its settings. Each is one file in "
        "`src/ubsmoe/methods/`, and its page is that file's docstring: formula, what was reconstructed or is ours, source.",
        _table(rows),
        "## Laws",
        "Every method passes one battery of tests. A method may decline these laws, with a reason that its page gives; the "
        "rest of the battery (payloads fit the budget, no NaN, a frozen base, bitwise round trips) holds for all.",
        _table([["law", "what it says"], *([f"`{law}`", said] for law, said in LAWS.items())]),
        _toctree(f"methods/{name}" for name in METHODS),
    ]
    return _page(lines)


def method_page(name: str, builder: Callable[..., Method]) -> str:
    """One method: its file's docstring, its settings, its laws."""
    method = builder(SMALLEST)
    title, _, text = (inspect.getdoc(inspect.getmodule(builder)) or "").partition("\n")
    said = dict(re.findall(r"^    (\w+): ((?:.|\n {5,})+)", inspect.getdoc(builder) or "", re.MULTILINE))
    rows = [["key of [method]", "default", "what it does"]]
    for parameter in list(inspect.signature(builder).parameters.values())[1:]:
        rows.append(
            [
                f"`{parameter.name}`",
                _code(parameter.default),
                _prose(" ".join(said[parameter.name].split())).rstrip("."),
            ]
        )
    lines = [
        f"# {name}",
        f"*{title}*",
        f"Tiers differ in: {VARIES[method.varies]}.",
        "## What it does",
        prose_and_formulas(text),
        "## Settings",
        _table(rows) if len(rows) > 1 else "None of its own.",
        "## Laws",
        "Keeps " + ", ".join(f"`{law}`" for law in LAWS if law not in method.exempt) + ".",
        *(f"Does not promise `{law}`: {reason}." for law, reason in method.exempt.items()),
        "What they say: [laws](../methods.md#laws).",
        *(f"Refuses `[{section}]`: {reason}." for section, reason in method.refuses.items()),
        f"Code: `src/ubsmoe/methods/{inspect.getmodule(builder).__name__.rpartition('.')[2]}.py`",  # type: ignore[union-attr]
    ]
    return _page(lines)


def command_line_page() -> str:
    """Every verb with its arguments and options, and the exit codes."""
    codes = re.search(r"Exit codes: (.*)", inspect.getdoc(cli) or "")
    assert codes, "cli/__init__.py says what exit codes mean"
    lines = ["# Command line", "`ubsmoe VERB --help` prints the same.", "## Exit codes"]
    rows = [["code", "meaning"], *([code[0], code[2:]] for code in codes[1].rstrip(".").split("; "))]
    lines += [_table(rows), *_verbs(typer.main.get_command(cli.app), "ubsmoe")]
    return _page(lines)


def prose_and_formulas(text: str) -> str:
    """A docstring as Markdown: paragraphs as they are, indented formulas set with Greek letters and indices."""
    parts = re.split(r"\n\n(?=\S)|\n\n(?=    )", text.strip("\n"))
    return "\n\n".join(formula(part) if part.startswith("    ") else _prose(part) for part in parts)


def formula(text: str) -> str:
    """Plain-text formulas as HTML.

    >>> formula("    theta_i <- sum_c p_c theta_{c,i}^2")
    '<pre class="formula">θ<sub>i</sub> ← ∑<sub>c</sub> p<sub>c</sub> θ<sub>c,i</sub><sup>2</sup></pre>'
    """
    text = html.escape(_signs(textwrap.dedent(text)), quote=False)
    text = re.sub(r"(?<![A-Za-z])(" + "|".join(SYMBOLS) + r")(?![A-Za-z])", lambda m: SYMBOLS[m[1]], text)
    text = re.sub(r"_\{([^{}]*)\}", r"<sub>\1</sub>", text)
    text = re.sub(r"(?<=[\w∑|)])_([A-Za-zα-ω0-9]|max|min|matrices)(?!\w)", r"<sub>\1</sub>", text)
    text = re.sub(r"\^(?:\{([^{}]*)\}|(\w+))", lambda m: f"<sup>{m[1] or m[2]}</sup>", text)
    return f'<pre class="formula">{text}</pre>'


def _prose(text: str) -> str:
    """A paragraph with its indices set; what stands in backticks is left alone."""
    code_apart = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else PROSE_INDEX.sub(lambda m: f"{m[1]}<sub>{m[2] or m[3]}</sub>", _signs(part))
        for part in code_apart
    )


def _verbs(verb: click.Command, name: str) -> Iterator[str]:
    """A heading, the help and the tables of each verb; groups are taken apart."""
    if isinstance(verb, click.Group):
        for word, inner in verb.commands.items():
            yield from _verbs(inner, f"{name} {word}")
        return
    context = click.Context(verb, info_name=name)
    yield f"## {name}"
    yield verb.help or ""
    yield f"```text\n{verb.get_usage(context).removeprefix('Usage: ')}\n```"
    rows = []
    for parameter in verb.params:
        said = parameter.get_help_record(context)
        if said and parameter.name != "help":
            rows.append([f"`{said[0]}`", html.escape(said[1], quote=False)])
    if rows:
        yield _table([["argument, option", "meaning"], *rows])


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        section = _section_of(field)
        if section:
            yield f"{prefix}{name}", section
            yield from _sections(section, f"{prefix}{name}.")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The settings a field is a section of, `Settings` or `Settings | None`; None for a plain key."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            return kind
    return None


def _scalars(model: type[BaseModel]) -> list[list[str]]:
    rows = [["key", "value", "default", "what it does"]]
    for name, field in model.model_fields.items():
        if _section_of(field) is None:
            values = _kind_of_value(field.annotation, field.metadata)
            rows.append([f"`{name}`", values, _code(field.default), html.escape(field.description or "", quote=False)])
    return rows


def _kind_of_value(kind: Any, limits: Any = ()) -> str:
    """What a key takes, in words: choices, or a type and its bounds."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kind_of_value(inner[0], [*inner[1:], *limits])
    if origin is Literal:
        return ", ".join(_code(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return _kind_of_value(next(one for one in inner if one is not type(None)), limits)
    if origin is tuple:
        return f"list: {_kind_of_value(inner[0])}"
    return " ".join(
        [
            {"str": "text", "int": "whole number", "float": "number", "bool": "true, false"}[kind.__name__],
            *_bounds(limits),
        ]
    )


def _bounds(limits: Any) -> Iterator[str]:
    for limit in limits:
        for inner in getattr(limit, "metadata", [limit]):
            for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
                if getattr(inner, name, None) is not None:
                    yield f"{sign} {getattr(inner, name)}"


def _kind(method: Method) -> str:
    return {"top_k": "K", "rank": "LoRA rank"}[method.varies]


def _code(value: Any) -> str:
    """A value as TOML writes it."""
    if value is None:
        return "left out"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    return f"`{list(value)}`".replace("'", '"') if isinstance(value, tuple) else f"`{value}`"


def _signs(text: str) -> str:
    for plain, sign in TEXT_SIGNS:
        text = text.replace(plain, sign)
    return text


def _table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table, the first one on top."""
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _toctree(names: Iterator[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", "", *names, "```"])


def _page(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part.strip()) + "\n"
