"""Typed reading of config.json: null is the default, and messages spell a field as it stands there.

(design: checkpoints.md 7)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import shown
from internvlx_jax.core.ranges import LARGEST


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields of config.json, or of one object in it.

    Attributes:
        values: The fields by the names that the reader knows.
        prefix: What stands before a field's name in messages, such as `llm_config.`.
        spelled: The reader's name -> the name in the file, where they differ.
    """

    values: Mapping[str, Any]
    prefix: str = ""
    spelled: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def name(self, field: str) -> str:
        """Returns a field's full name as config.json spells it."""
        return self.prefix + self.spelled.get(field, field)

    def get(self, field: str, default: Any = None) -> Any:
        """Returns a field of any kind; null is the default."""
        value = self.values.get(field)
        return default if value is None else value

    def section(self, field: str) -> Section:
        """Returns an object in this one.

        Raises:
            ConfigError: It is missing, null, or no object.
        """
        if field not in self.values:
            raise ConfigError(f"config.json: {self.name(field)} is missing")
        value = self.values[field]
        if not isinstance(value, Mapping):
            raise self.wrong(field, "an object with the fields of that part")
        return Section(value, self.name(field) + ".")

    def integer(
        self,
        field: str,
        default: int | None = None,
        *,
        least: int | None = None,
        most: float = LARGEST,
    ) -> int:
        """Returns a whole number.

        Args:
            field: Its name.
            default: For null and for a missing field; None makes both an error.
            least: The smallest value that is accepted.
            most: The largest one.

        Raises:
            ConfigError: The field is missing, or no such number.
        """
        value = self.get(field, default)
        if value is None:
            raise self._absent(field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(field, "a whole number")
        if least is not None and value < least:
            raise self.wrong(field, f"a whole number from {least} up")
        if value > most:
            raise self.wrong(field, f"a whole number up to {most:.0f}")
        return value

    def number(self, field: str, default: float, *, above: float | None = None) -> float:
        """Returns a finite number as a float; `above` is what it has to exceed."""
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(field, "a number")
        if not math.isfinite(value) or (above is not None and value <= above):
            bound = "" if above is None else f" above {above:g}"
            raise self.wrong(field, f"a finite number{bound}")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        """Returns true or false."""
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self.wrong(field, "true or false")
        return value

    def text(self, field: str, default: str | None = None) -> str | None:
        """Returns text, or the default."""
        value = self.get(field, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong(field, "text")
        return value

    def choice(self, field: str, choices: Collection[str], default: str) -> Any:
        """Returns one of a few words."""
        value = self.get(field, default)
        if value not in choices:
            raise self.wrong(field, f"one of {', '.join(choices)}")
        return value

    def ids(self, field: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Returns token ids: one or a list of them; null is none, missing is the default."""
        if field not in self.values:
            return default
        value = self.values[field]
        ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
        if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in ids):
            raise self.wrong(field, "a token id, a list of them, or null")
        return ids

    def refuse(self, *fields: str) -> None:
        """Raises ConfigError for the first of these fields that is set to anything but 0."""
        for field in fields:
            if self.get(field):
                raise ConfigError(
                    f"config.json: {self.name(field)} = {self.values[field]!r} is not supported "
                    "here; it must be 0 or false"
                )

    def expect(self, field: str, only: Any) -> None:
        """Raises ConfigError where a field is neither absent, null, nor the one that is computed.

        A misleading default would change what the model computes.
        """
        if self.get(field, only) != only:
            raise ConfigError(
                f"config.json: {self.name(field)} is {self.values[field]!r}; only {only!r} is "
                "computed"
            )

    def check_divides(self, field: str, value: int, other: str, total: int) -> None:
        """Raises ConfigError where a field's value does not divide that of another."""
        if total % value:
            raise ConfigError(
                f"config.json: {self.name(field)} {value} does not divide {self.name(other)} "
                f"{total}; a missing field or null is its default. Correct the one that is wrong"
            )

    def wrong(self, field: str, expected: str) -> ConfigError:
        """Returns the error of a field that is not what is expected."""
        value = self.values.get(field)
        found = shown(value) if value is not None else "null" if field in self.values else "missing"
        return ConfigError(
            f"config.json: {self.name(field)} is {found}; expected {expected}. "
            "Correct it, or replace it by convert import --field"
        )

    def _absent(self, field: str) -> ConfigError:
        what = "null" if field in self.values else "missing"
        return ConfigError(
            f"config.json: {self.name(field)} is {what}, and this decoder has no default for it"
        )
