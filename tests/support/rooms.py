"""The rooms of the package and their imports, read from the source.

Run it to write the picture into ``docs/design.md``::

    python tests/support/rooms.py

Every import counts, also inside functions and under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- rooms: written by tests/support/rooms.py -->", "<!-- end of rooms -->"

# Lowest first: a room imports only rooms above it in this list. A module belongs to the room with the longest name that
# is a prefix of its own.
ROOMS = (
    "kernels",
    "passes.graph",
    "passes.rewrite",
    "passes.attention.call",
    "passes.attention.masks",
    "passes.attention",
    "passes.linear",
    "passes",
    "export.common",
    "export.files",
    "export.state",
    "export.models",
    "export.weights",
    "export.lowering.cross_compile",
    "export.lowering",
    "export.speculative",
    "export.runtime",
    "export.pipeline",
    "export.check",
    "export.cli",
)


def room_of(module: str) -> str | None:
    """The room of module ``flashpte.<...>``; ``None`` for the empty packages that only hold rooms."""
    name = module.removeprefix("flashpte").removeprefix(".")
    found = [room for room in ROOMS if name == room or name.startswith(f"{room}.")]
    return max(found, key=len, default=None)


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for folder in ("kernels", "passes", "export"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(("flashpte", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imported(source: str, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a file's source imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            for alias in node.names:
                module = f"{base}.{alias.name}"
                if module in known or base in known:
                    yield module if module in known else base


def arrows(root: Path = ROOT) -> dict[str, dict[str, list[str]]]:
    """For each room, the rooms that it imports, each with the importing modules."""
    known = modules(root)
    found: dict[str, dict[str, list[str]]] = {room: {} for room in ROOMS}
    for name, path in known.items():
        room = room_of(name)
        for target in imported(path.read_text(), known):
            other = room_of(target)
            if other is None or other == room:
                continue
            assert room is not None, f"{name} is in no room and imports {target}"
            found[room].setdefault(other, []).append(f"{name} imports {target}")
    return found


def homeless(root: Path = ROOT) -> list[str]:
    """Modules with code that belong to no room."""
    return [name for name, path in modules(root).items() if room_of(name) is None and _has_code(path)]


def _has_code(path: Path) -> bool:
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


def upward(found: dict[str, dict[str, list[str]]]) -> list[str]:
    """Imports of a higher room; without any there is no cycle either."""
    return [
        line
        for room, others in found.items()
        for other, lines in others.items()
        for line in lines
        if ROOMS.index(other) > ROOMS.index(room)
    ]


def picture(found: dict[str, dict[str, list[str]]]) -> str:
    """A Mermaid graph, without arrows that follow from two others."""
    reach: dict[str, set[str]] = {}
    for room in ROOMS:
        reach[room] = set(found[room]).union(*(reach.get(other, set()) for other in found[room]))
    lines = ["```mermaid", "graph TD"]
    for room in reversed(ROOMS):
        others = found[room]
        direct = [o for o in others if not any(o in reach.get(via, set()) for via in others if via != o)]
        lines += [f"  {room} --> {other}" for other in sorted(direct, key=ROOMS.index, reverse=True)]
    return "\n".join([*lines, "```"])


def page_with_picture(page: str, drawn: str) -> str:
    """The page, with the picture between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{drawn}\n{END}{after}"


def main() -> int:
    """Prints errors, or writes the picture."""
    found = arrows()
    wrong = [*upward(found), *(f"{name} is in no room" for name in homeless())]
    if wrong:
        print("\n".join(wrong))
        return 1
    drawn = picture(found)
    print(drawn)
    PAGE.write_text(page_with_picture(PAGE.read_text(), drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
