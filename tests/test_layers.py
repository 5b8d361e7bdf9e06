"""The import arrows: one way, and heavy or foreign packages only where they belong."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "ubsmoe"

# who may import whom, by the first part of the module's name inside ubsmoe; what is not listed may import anything
MAY_IMPORT = {
    "errors": set(),
    "seeds": set(),
    "messages": set(),
    "config": {"config", "errors"},
    "maths": {"maths"},
    "model": {"config", "data", "errors", "maths", "model"},
    "data": {"config", "data", "errors", "seeds"},
    "storage": {"errors", "storage"},
    "methods": {"errors", "maths", "messages", "methods", "model", "seeds"},
    "evaluate": {"config", "data", "model"},
    "client": {"config", "data", "errors", "messages", "methods", "model", "seeds"},
    "wire": {"config", "errors", "maths", "messages", "methods", "model", "seeds", "wire"},
    "deploy": {"config", "deploy", "errors", "storage", "worker"},
    "worker": {"config", "errors", "node", "wire"},
    "engines": {
        *{"client", "config", "data", "deploy", "engines", "errors", "evaluate", "federation", "messages", "node"},
        *{"forecast", "rounds", "seeds", "storage", "wire", "worker"},
    },
    "pretrain": {"config", "data", "maths", "pretrain"},
    "lab": {"maths", "seeds"},
    "report": {"errors", "maths", "messages", "report", "storage"},
}
ONLY_IN = {
    "transformers": {"model", "data", "evaluate", "pretrain"},
    "flwr": {"engines/flower"},
    "cryptography": {"deploy"},
    "typer": {"cli"},
    "matplotlib": {"report"},
    "plotly": {"report"},
    "wandb": {"report"},
    "mlflow": {"report"},
    "pickle": set(),
}
MODULES = sorted(SOURCE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    layer = layer_of(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "ubsmoe" and len(parts) > 1 and layer in MAY_IMPORT:
            assert parts[1] in MAY_IMPORT[layer] or parts[1] == "__version__", f"{layer} must not import {name}"
        if parts[0] in ONLY_IN:
            assert {layer, str(path.parent.relative_to(SOURCE))} & ONLY_IN[parts[0]], (
                f"{parts[0]} must not be in {path}"
            )


def test_files_are_written_only_by_those_who_may() -> None:
    writers = {"storage", "report", "data", "pretrain"}
    for path in MODULES:
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)]
        if layer_of(path) not in writers:
            assert not {"write_text", "write_bytes", "save_file"} & {call.attr for call in calls}, path
