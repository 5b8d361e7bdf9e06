"""The rooms of the package: what each is for, and which others it may import from. CONTRIBUTING.md says the rules in words."""

import ast
from pathlib import Path

import pytest

from rooms import SOURCE, arrows, imported, levels, modules, room_of

MAY_IMPORT: dict[str, set[str]] = {
    # nouns that everybody may use
    "errors": set(),
    "version": set(),
    "seeds": set(),
    "messages": {"costs"},
    "progress": set(),
    # tensors in, tensors out; arithmetic from a model's shape
    "maths": set(),
    "costs": set(),
    # run files, folders, records, bytes
    "config": {"costs", "errors"},
    "storage": {"progress", "errors", "version"},
    "data": {"progress", "config", "errors", "seeds"},
    "secagg": {"errors", "maths", "wire"},
    "wire": {"config", "errors", "maths", "messages"},
    "report": {"progress", "errors", "maths", "messages", "storage"},
    # the model, what a method does with it, what a client does with both
    "model": {"progress", "config", "costs", "data", "errors", "maths", "storage"},
    "methods": {"config", "costs", "errors", "maths", "messages", "model", "seeds"},
    "export": {"progress", "config", "costs", "errors", "model", "storage"},
    "bases": {"progress", "config", "data", "maths", "model", "seeds", "storage"},
    "bases/pretrain": {"progress", "config", "data", "maths"},
    "client": {"config", "costs", "data", "errors", "messages", "methods", "model", "secagg", "seeds", "wire"},
    # a run: planned, carried out, opened again
    "plan": {"progress", "client", "config", "costs", "data", "errors", "methods", "model", "secagg", "seeds"},
    "server": {
        "progress",
        *{"client", "config", "data", "errors", "export", "maths", "messages", "methods", "model"},
        *{"secagg", "seeds", "storage", "wire"},
    },
    "engines": {
        *{"client", "config", "data", "errors", "messages", "methods", "plan", "secagg", "seeds", "server", "wire"},
    },
    "engines/flower": {
        "progress",
        *{"client", "config", "data", "errors", "messages", "report", "secagg", "server", "storage", "version", "wire"},
    },
    "finished": {
        "progress",
        *{"config", "costs", "data", "errors", "export", "messages", "methods", "model", "seeds", "server", "storage"},
    },
    "training": {
        "progress",
        *{
            "client",
            "config",
            "engines",
            "errors",
            "export",
            "finished",
            "messages",
            "methods",
            "plan",
            "server",
            "storage",
        },
    },
    "study": {
        "progress",
        *{"client", "config", "data", "engines", "finished", "maths", "messages", "methods", "model", "plan"},
        *{"report", "seeds", "server", "storage", "training"},
    },
    # what a user sees
    "__init__": {"finished", "training", "version"},
    "cli": {
        "progress",
        *{"__init__", "bases", "bases/pretrain", "client", "config", "data", "engines", "engines/flower", "errors"},
        *{"export", "finished", "methods", "plan", "report", "server", "storage", "study", "training", "version"},
    },
    "__main__": {"cli"},
}
ONLY_IN: dict[str, set[str]] = {
    "transformers": {"bases", "bases/pretrain", "data", "export", "model", "server"},
    "flwr": {"engines/flower"},
    "cryptography": {"engines/flower", "secagg"},
    "typer": {"cli"},
    "matplotlib": {"report", "study"},
    "wandb": {"report"},
    "mlflow": {"report"},
    "pickle": set(),
}
"""Packages that are heavy or foreign, and the rooms that may import them."""

WRITERS = {"storage", "report", "data", "bases/pretrain"}
"""Rooms that write files."""

LOGGING = {"engines/flower/resident.py", "engines/flower/programs.py"}
"""Modules that start other processes, and open a file for what these print."""

MOST_LINES = 300


def test_every_room_has_its_rule() -> None:
    assert arrows().keys() == MAY_IMPORT.keys()


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_from_rooms_that_it_may(room: str) -> None:
    assert arrows()[room] <= MAY_IMPORT[room]


def test_the_rules_themselves_go_one_way() -> None:
    levels(MAY_IMPORT)  # raises for a circle


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_module_is_short_and_imports_heavy_packages_only_where_they_belong(path: Path) -> None:
    room = room_of(path.relative_to(SOURCE))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, f"{path} is longer than {MOST_LINES} lines"
    for name in imported(path):
        package = name.partition(".")[0]
        assert room in ONLY_IN.get(package, {room}), f"{room} must not import {package}"


def test_files_are_written_only_by_those_who_may() -> None:
    for path in modules():
        if room_of(path.relative_to(SOURCE)) not in WRITERS:
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            assert not {"write_text", "write_bytes", "save_file"} & used, path
            if path.relative_to(SOURCE).as_posix() not in LOGGING:
                assert not [node for node in nodes if isinstance(node, ast.Call) and _opens_to_write(node)], path


def _opens_to_write(call: ast.Call) -> bool:
    """Whether a call is `open` with a mode that writes."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = [arg.value for arg in given if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return name == "open" and any(len(mode) <= 3 and set(mode) & set("wxa+") for mode in modes)
