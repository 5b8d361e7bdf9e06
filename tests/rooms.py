"""The rooms of the package and the imports between them, read from the source as text: nothing is imported.

python tests/rooms.py            the number of rooms, levels and arrows, and the longest files
"""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "ubsmoe"
NESTED = ("engines/flower", "bases/pretrain")
"""Rooms that lie inside another room."""


def modules(source: Path = SOURCE) -> list[Path]:
    """Every module of the package."""
    return sorted(source.rglob("*.py"))


def room_of(place: Path) -> str:
    """The room of a file or module path below the package: its folder, or its own name where it lies at the top.

    >>> room_of(Path("engines/flower/app.py")), room_of(Path("engines/local.py")), room_of(Path("seeds.py"))
    ('engines/flower', 'engines', 'seeds')
    """
    nested = next((room for room in NESTED if place.as_posix().startswith(f"{room}/")), None)
    return nested or place.parts[0].removesuffix(".py")


def imported(path: Path) -> Iterable[str]:
    """The dotted names that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(source: Path = SOURCE) -> dict[str, set[str]]:
    """From each room to the rooms that it imports from."""
    found: dict[str, set[str]] = {}
    for path in modules(source):
        room = room_of(path.relative_to(source))
        targets = found.setdefault(room, set())
        for name in imported(path):
            package, _, rest = name.partition(".")
            if package == "ubsmoe" and rest:
                targets.add(room_of(Path(*rest.split("."), "module")))
    return {room: (targets & set(found)) - {room} for room, targets in found.items()}


def levels(found: Mapping[str, set[str]]) -> dict[str, int]:
    """The floor of each room: 0 imports from no other room, every other one more than the highest that it imports from.

    Raises:
        ValueError: if rooms import one another in a circle.
    """
    floor: dict[str, int] = {}
    while left := [room for room in found if room not in floor]:
        ready = [room for room in left if found[room] <= floor.keys()]
        if not ready:
            raise ValueError(f"a circle among {', '.join(left)}")
        floor |= {room: 1 + max((floor[target] for target in found[room]), default=-1) for room in ready}
    return floor


def main() -> None:
    """Print what the structure comes to."""
    found = arrows()
    floor = levels(found)
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    print(f"rooms {len(found)}, levels {1 + max(floor.values())}, arrows {sum(map(len, found.values()))}")
    print(f"modules {len(lines)}, lines {sum(lines.values())}")
    for room in sorted(found, key=lambda name: (floor[name], name)):
        print(f"{floor[room]:3} {room:16} <- {', '.join(sorted(found[room])) or 'nothing'}")
    for path in sorted(lines, key=lines.__getitem__, reverse=True)[:5]:
        print(f"{lines[path]:5} {path.relative_to(SOURCE)}")


if __name__ == "__main__":
    main()
