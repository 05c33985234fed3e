"""Fields of a config's ``quantization_config``, read so that an error names the file and the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flashpte.export.common.errors import ExportError
from flashpte.kernels.linear.format import GROUPS, TILE_COLUMNS

SECTION = "quantization_config"


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of ``quantization_config`` or of an object in it.

    Attributes:
        path: the config's file.
        values: the fields.
        place: the object's name, with those of the objects around it.
    """

    path: Path
    values: Mapping[str, Any]
    place: str = SECTION

    def get(self, name: str) -> Any:
        """A field's value; ``None`` if it is missing."""
        return self.values.get(name)

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raises an ExportError about a field."""
        raise ExportError(f"{self.path}: {self.place}.{name} {why}")

    def part(self, name: str) -> Fields:
        """An object in this one.

        Raises:
            ExportError: it is missing or no object.
        """
        value = self.get(name)
        if not isinstance(value, Mapping):
            self.refuse(name, f"is {value!r}, must be an object")
        return Fields(self.path, value, f"{self.place}.{name}")

    def names(self, name: str) -> tuple[str, ...]:
        """A field that is a list of names; none if it is missing.

        Raises:
            ExportError: it is something else.
        """
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self.refuse(name, f"is {value!r}, must be a list of names")
        return tuple(value)

    def nothing(self, name: str, why: str) -> None:
        """Checks that a field is missing, null or empty.

        Raises:
            ExportError: it says something.
        """
        if self.get(name):
            self.refuse(name, why)

    def choice(self, name: str, known: Collection[Any], default: Any = None) -> Any:
        """A field that must have one of some values; ``default`` if it is missing or null.

        Raises:
            ExportError: it has another one.
        """
        value = default if self.get(name) is None else self.get(name)
        if not any(type(value) is type(one) and value == one for one in known):  # 1 == True
            self.refuse(name, f"is {value!r}; read are {', '.join(map(str, known))}")
        return value

    def either(self, names: Sequence[str], known: Collection[str], default: str) -> str:
        """A word that writers give under one of some names, in any case.

        Raises:
            ExportError: it is another word, or two names give different ones.
        """
        given = {name: value for name in names if (value := self.get(name)) is not None}
        for name, value in given.items():
            if not isinstance(value, str) or value.lower() not in known:
                self.refuse(name, f"is {value!r}; read are {', '.join(known)}")
        words = {value.lower() for value in given.values()}
        if len(words) > 1:
            self.refuse(names[0], f"is {given[names[0]]!r}, but {names[1]} is {given[names[1]]!r}")
        return words.pop() if words else default

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false.

        Raises:
            ExportError: it is neither.
        """
        return bool(self.choice(name, (True, False), default))

    def group(self) -> int | None:
        """``group_size``; ``None`` for a whole row, which configs write as -1.

        Raises:
            ExportError: it is no size, or one that no format serves.
        """
        name, value = "group_size", self.get("group_size")
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
            self.refuse(name, f"is {value!r}, must be a number of columns or -1 for a whole row")
        if value == -1:
            return None
        if value not in GROUPS and value % TILE_COLUMNS:
            self.refuse(name, f"is {value}; served are 32, 64, multiples of 128, and -1 for a whole row")
        return value
