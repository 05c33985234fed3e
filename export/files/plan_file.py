"""The file that divides an export into entries, for a scheduler: one per method and architecture, and one that joins.

Every entry is a command of its own. Entries but the last need nothing of each other, and may run on several machines.
The file is JSON, for people and for schedulers; ``entries[].run`` is what to run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import ExportOptions
from flashpte.export.files.atomic_file import atomic_file
from flashpte.export.files.names import GENERATOR
from flashpte.export.files.output_folder import OutputError

JOIN = "join"
"""The id of the last entry."""

PLAN_VERSION = 1

_COMMAND = "export-model"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method that is compiled alone, for one architecture."""

    method: str
    arch: str

    @property
    def id(self) -> str:
        """Its name in the plan, and that of its part."""
        return f"{self.method}-{self.arch}"


@dataclasses.dataclass(frozen=True)
class PlanFile:
    """An export that several processes do.

    Attributes:
        options: options of the export.
        output_dir: the folder that the last entry writes.
        arches: architectures to compile for.
        methods: the model's methods.
        versions: the result of :func:`flashpte.export.lowering.parts.build_versions`, which every entry must have.
    """

    options: ExportOptions
    output_dir: Path
    arches: tuple[str, ...]
    methods: tuple[str, ...]
    versions: Mapping[str, str]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries but the one that joins."""
        return tuple(Entry(method, arch) for arch in self.arches for method in self.methods)

    def entry(self, id: str) -> Entry:
        """The entry of an id.

        Raises:
            UsageError: there is none; the text names all.
        """
        found = {entry.id: entry for entry in self.entries}
        if id not in found:
            raise UsageError(f"the plan has no entry {id!r}; it has {', '.join((*found, JOIN))}")
        return found[id]

    @property
    def digest(self) -> str:
        """Differs from that of a plan with other options or other versions, or for another output."""
        return hashlib.sha256(json.dumps(self._to_dict(), sort_keys=True).encode()).hexdigest()

    def _to_dict(self) -> dict[str, Any]:
        defaults = ExportOptions(self.options.target)
        options = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self.options).items()
            if name == "target" or value != getattr(defaults, name)
        }
        return {
            "generator": GENERATOR,
            "version": PLAN_VERSION,
            "versions": dict(self.versions),
            "options": options,
            "output_dir": str(self.output_dir),
            "arches": list(self.arches),
            "methods": list(self.methods),
        }

    def to_dict(self, path: Path) -> dict[str, Any]:
        """The content of the file at ``path``."""

        def run(id: str) -> list[str]:
            return [_COMMAND, "--plan", str(path), "--entry", id]

        ids = [entry.id for entry in self.entries]
        compiled = [{"id": entry.id, **vars(entry), "run": run(entry.id)} for entry in self.entries]
        return {**self._to_dict(), "entries": [*compiled, {"id": JOIN, "after": ids, "run": run(JOIN)}]}


def command_line(path: Path, id: str) -> str:
    """What to type for an entry of the plan at ``path``."""
    return shlex.join([_COMMAND, "--plan", str(path), "--entry", id])


def parts_folder(path: Path) -> Path:
    """Where entries of the plan at ``path`` put their parts, by default: ``plan.parts`` for ``plan.json``."""
    return path.with_name(f"{path.stem}.parts")


def write_plan_file(plan: PlanFile, path: Path) -> None:
    """Writes a plan; the file appears complete or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(plan.to_dict(path), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the plan {path}: {error.strerror}") from error


def read_plan_file(path: Path) -> PlanFile:
    """Reads a plan.

    Raises:
        ExportError: the file cannot be read, is no plan, or is one of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"cannot read the plan {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not a plan: it is not JSON") from error
    if not isinstance(content, dict) or content.get("generator") != GENERATOR or "entries" not in content:
        raise ExportError(f"{path} is not a plan that export-model wrote")
    if content.get("version") != PLAN_VERSION:
        raise ExportError(f"{path} is a plan of version {content.get('version')}, this flashpte reads {PLAN_VERSION}")
    try:
        return PlanFile(
            options=_options(content["options"]),
            output_dir=Path(_text(content["output_dir"])),
            arches=_texts(content["arches"]),
            methods=_texts(content["methods"]),
            versions={_text(name): _text(version) for name, version in content["versions"].items()},
        )
    except KeyError as error:
        raise ExportError(f"{path} is not a whole plan: it has no {error.args[0]}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ExportError(f"{path} is not a plan that export-model wrote: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} stands where a text belongs")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    found = tuple(map(_text, values)) if isinstance(values, list) else ()
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{values!r} stands where a list of different texts belongs")
    return found


def _options(values: Mapping[str, Any]) -> ExportOptions:
    kinds = typing.get_type_hints(ExportOptions)
    if unknown := [name for name in values if name not in kinds]:
        raise ValueError(f"unknown option {unknown[0]}")
    return ExportOptions(**{name: _option(name, value, kinds[name]) for name, value in values.items()})


def _option(name: str, value: Any, kind: Any) -> Any:
    kinds: Sequence[Any] = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    literals = [known for each in kinds for known in typing.get_args(each)]
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if value in literals or type(value) in kinds:
        return value
    raise ValueError(f"option {name} is {value!r}")
