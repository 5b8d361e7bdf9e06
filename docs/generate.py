"""Pages that are read off the code, so that they cannot disagree with it: the run file, the methods, the command line.

`docs/conf.py` calls `write_pages` before Sphinx reads anything; what it writes is not in the repository.
"""

import ast
import html
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import typer
from pydantic import BaseModel

from ubsmoe import cli
from ubsmoe.bases.pretrain.settings import PretrainSettings
from ubsmoe.config import MethodSettings, RunSettings
from ubsmoe.config.template import section_of, toml_value
from ubsmoe.methods import build
from ubsmoe.methods.method import RunShape
from ubsmoe.methods.refusals import PROPERTIES
from ubsmoe.methods.table import METHODS, PARTS, describe, part_settings

VARIES = {"top_k": "experts per token, K", "rank": "LoRA rank; every client runs K_max experts"}
SMALLEST = RunShape(
    num_layers=1, num_experts=2, k_max=1, rank=1, alpha=1.0
)  # what a page says does not depend on sizes
SYMBOLS = {
    "alpha": "α", "beta": "β", "epsilon": "ε", "eps": "ε", "lambda": "λ", "phi": "φ", "rho": "ρ", "sigma": "σ", "tau": "τ",
    "theta": "θ", "zeta": "ζ", "Delta": "Δ", "Sigma": "Σ", "sum": "∑",
}  # fmt: skip
PROSE_INDEX = re.compile(
    r"\b([A-Za-z]|Delta|theta|phi|alpha|beta|mean|max|sum|load|assignments|tokens)_(?:\{([^{}]*)\}|([A-Za-z]|max|min)\b)"
)
TEXT_SIGNS = (("<->", "↔"), ("<-", "←"), ("->", "→"), (">=", "≥"), ("<=", "≤"), ("!=", "≠"))


def write_pages(folder: Path, tables: Mapping[str, str]) -> None:
    """Write every generated page below `folder`, and the tables of results; pages and tables that are gone are removed."""
    pages = {"run-file.md": run_file_page(), "command-line.md": command_line_page(), "methods.md": methods_page()}
    pages |= {f"methods/{name}.md": method_page(name) for name in METHODS}
    pages |= {f"parts/{part}.md": part_page(part) for part in PARTS}
    pages |= {f"tables/{name}.md": text for name, text in tables.items()}
    for path in folder.rglob("*.md"):
        if str(path.relative_to(folder)) not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # an untouched page is not built again
            path.write_text(text, encoding="utf-8")


def run_file_page() -> str:
    """Every section and key of a run file, and of a file for `ubsmoe base pretrain`."""
    lines = [
        "# Run file",
        "A run file is TOML. Every key has a default; an unknown one is refused with the nearest name. On the command line, "
        "`--set section.key=value` changes one key. Paths are taken relative to the run file where they exist there, "
        "or else to the current folder.",
        "Read off `src/ubsmoe/config/`.",
        "## Top level",
        _table(_scalars(RunSettings)),
    ]
    for prefix, section in _sections(RunSettings, ""):
        said = (inspect.getdoc(section) or "").split(": ", 1)[-1]
        lines += [f"## [{prefix}]", said[0].upper() + said[1:]]
        lines += [_table(_scalars(section))]
        if section is MethodSettings:
            lines.append("Each method's own settings, and the parts that any method can have: [methods](methods.md).")
    lines += [
        "## A file for ubsmoe base pretrain",
        "Not a run file: `ubsmoe base pretrain` reads these keys, all on top level.",
        _table(_scalars(PretrainSettings)),
    ]
    return _page(lines)


def methods_page() -> str:
    """The table of methods, the parts, and what each property of the battery says."""
    rows = [["method", "tiers differ in", "what it is"]]
    for name in METHODS:
        tiers = {"top_k": "K", "rank": "LoRA rank"}[build(name, SMALLEST).varies]
        rows.append([f"[{name}](methods/{name}.md)", tiers, describe(name).summary.partition(": ")[2].rstrip(".")])
    parts = [["section", "what it is"]]
    for part in PARTS:
        parts.append([f"[`[method.{part}]`](parts/{part}.md)", _title_and_text(_part_module(part))[0].rstrip(".")])
    lines = [
        "# Methods",
        "`[method] name` in a run file chooses one; the other keys of `[method]` are its settings. Each is one file in "
        "`src/ubsmoe/methods/`, and its page is that file's docstring: formula, what was reconstructed or is ours, source.",
        _table(rows),
        "## Parts",
        "A part goes around a method: any method can have it that does not refuse it. `[method.dmr]` with settings, or "
        "`dmr = true` in `[method]`, puts it there; `dmr = false` takes it off a method that has it.",
        _table(parts),
        "## Properties",
        "Every method passes one battery of tests. A method may be exempt from these properties, with a reason that its page "
        "gives; the rest of the battery (payloads fit the budget, no NaN, a frozen base, bitwise round trips) holds for all.",
        _table([["property", "what it says"], *([f"`{name}`", said] for name, said in PROPERTIES.items())]),
        _toctree([*(f"methods/{name}" for name in METHODS), *(f"parts/{part}" for part in PARTS)]),
    ]
    return _page(lines)


def method_page(name: str) -> str:
    """One method: its file's docstring, its settings and parts, its properties."""
    module = import_module(f"ubsmoe.methods.{name}")
    method, said, (title, text) = build(name, SMALLEST), describe(name), _title_and_text(module)
    means = dict(re.findall(r"^    (\w+): ((?:.|\n {5,})+)", inspect.getdoc(getattr(module, name)) or "", re.MULTILINE))
    own = _settings_table("method", said.settings, means)
    parts = [
        f"Has the part [`[method.{part}]`](../parts/{part}.md); `{part} = false` takes it off." for part in said.parts
    ]
    lines = [
        f"# {name}",
        f"*{title}*",
        f"Tiers differ in: {VARIES[method.varies]}.",
        "## What it does",
        prose_and_formulas(text),
        "## Settings",
        own if said.settings else "None of its own.",
        *parts,
        "## Properties",
        "Has " + ", ".join(f"`{one}`" for one in PROPERTIES if one not in method.exempt) + ".",
        *(f"Is exempt from `{one}`: {reason}." for one, reason in method.exempt.items()),
        "What they say: [properties](../methods.md#properties).",
        *(f"Refuses `{_section(key)}`: {reason}." for key, reason in method.refuses.items()),
        f"Code: `{_file(module)}`",
    ]
    return _page(lines)


def part_page(part: str) -> str:
    """One part: its file's docstring, its settings, which methods have it and which refuse it."""
    module = _part_module(part)
    title, text = _title_and_text(module)
    home, _, name = PARTS[part].rpartition(".")
    formulas = import_module(home)
    means = _attribute_docs(getattr(formulas, name))
    have = [name for name in METHODS if part in describe(name).parts]
    refuse = {name: build(name, SMALLEST).refuses.get(part) for name in METHODS}  # type: ignore[call-overload]
    lines = [
        f"# method.{part}",
        f"*{title}*",
        "## What it does",
        prose_and_formulas(text),
        *(["## Formulas", prose_and_formulas(_title_and_text(formulas)[1])] if formulas is not module else []),
        "## Settings",
        _settings_table(f"method.{part}", part_settings(part), means),
        "## Methods",
        f"Part of {', '.join(f'[{name}](../methods/{name}.md)' for name in have)}."
        if have
        else "Part of no method by itself.",
        *(f"Refused by [{name}](../methods/{name}.md): {reason}." for name, reason in refuse.items() if reason),
        f"Code: `{_file(module)}`",
    ]
    return _page(lines)


def _part_module(part: str) -> types.ModuleType:
    """The file that tells what a part does: the one of its settings, or of the part that takes them."""
    settings = PARTS[part].rpartition(".")[0].rpartition(".")[2]
    return import_module(f"ubsmoe.methods.{settings if find_spec(f'ubsmoe.methods.{settings}') else part}")


def _title_and_text(module: types.ModuleType) -> tuple[str, str]:
    title, _, text = (inspect.getdoc(module) or "").partition("\n")
    return title, text


def _file(module: types.ModuleType) -> str:
    return f"src/{module.__name__.replace('.', '/')}.py"


def _section(key: str) -> str:
    """A section of a run file by the name under which a method refuses it."""
    return f"[method.{key}]" if key in PARTS else f"[{key}]"


def _attribute_docs(kind: type) -> dict[str, str]:
    """What a class says of its fields: the text below each, or the section Attributes of its docstring."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    below = {}
    for field, text in pairwise(body.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                below[name] = said
    listed = re.findall(r"^    (\w+): ((?:.|\n {5,})+)", inspect.getdoc(kind) or "", re.MULTILINE)
    return {**dict(listed), **below}


def _settings_table(section: str, settings: Mapping[str, Any], means: Mapping[str, str]) -> str:
    rows = [[f"key of [{section}]", "default", "what it does"]]
    for key, default in settings.items():
        rows.append([f"`{key}`", _code(default), _prose(" ".join(means[key].split())).rstrip(".")])
    return _table(rows)


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
        section = section_of(field)
        if section:
            yield f"{prefix}{name}", section
            yield from _sections(section, f"{prefix}{name}.")


def _scalars(model: type[BaseModel]) -> list[list[str]]:
    rows = [["key", "value", "default", "what it does"]]
    for name, field in model.model_fields.items():
        if section_of(field) is None:
            values = _kind_of_value(field.annotation, field.metadata)
            default = "required" if field.is_required() else _code(field.default)
            rows.append([f"`{name}`", values, default, html.escape(field.description or "", quote=False)])
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


def _code(value: Any) -> str:
    """A value as TOML writes it."""
    return "left out" if value is None else f"`{toml_value(value)}`"


def _signs(text: str) -> str:
    for plain, sign in TEXT_SIGNS:
        text = text.replace(plain, sign)
    return text


def _table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table, the first one on top."""
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _toctree(names: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", "", *names, "```"])


def _page(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part.strip()) + "\n"
