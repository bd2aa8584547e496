"""How a message's fields are read from JSON, and in which words a wrong one is refused: those of FastAPI on pydantic 2, without either.

What pydantic (2.14, lax mode) takes in place of a type (``"8"`` for 8, ``"yes"`` for true) is taken here too. NaN and infinity are no JSON:
they are refused, where FastAPI answers 500.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from enum import Enum
from typing import Any, ClassVar, Self

from assayer.errors import ProtocolError

__all__ = [
    "BOOLEAN",
    "INTEGER",
    "OBJECT",
    "STRING",
    "STRINGS",
    "Location",
    "Message",
    "Read",
    "boolean",
    "dictionary",
    "dump",
    "field_of",
    "integer",
    "integer_or_string",
    "list_of",
    "number",
    "one_of",
    "optional",
    "parse",
    "string",
]

Location = tuple[str | int, ...]

# Levels of lists and dictionaries in a message: far below where Python's own encoder gives up.
DEPTH_MAX = 64
# What is told of one message that is wrong; it may be wrong in any number of places.
DETAILS_MAX = 100
# Digits of a whole number in a string: as many as Python reads.
DIGITS_MAX = 4300

BODY_ERROR = "There was an error parsing the body"


def parse(body: bytes) -> Any:
    """The JSON value of a request's body.

    Raises:
        ProtocolError: it is empty or no JSON (status 422); not text, too deep, or a number of it has too many digits (status 400).
    """
    if not body:
        raise ProtocolError([detail("missing", ("body",), "Field required", None)])
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        told = detail("json_invalid", ("body", error.pos), "JSON decode error", {}) | {"ctx": {"error": error.msg}}
        raise ProtocolError([told]) from None
    except (ValueError, RecursionError):
        raise ProtocolError(BODY_ERROR, status=400) from None


def dump(value: object) -> bytes:
    """``value`` as JSON in ASCII alone, so that a file name of any bytes survives the way there and back.

    Raises:
        ValueError: a NaN or an infinity is in it.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def detail(kind: str, loc: Location, message: str, value: object) -> dict[str, Any]:
    return {"type": kind, "loc": list(loc), "msg": message, "input": _shown(value)}


def _shown(value: object) -> object:
    """The input as an answer can hold it."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return repr(value)[:200]
    return value


def wrong(kind: str, loc: Location, message: str, value: object) -> ProtocolError:
    return ProtocolError([detail(kind, loc, message, value)])


Read = Callable[[Any, Location], Any]


def string(value: Any, loc: Location) -> str:
    """A string, as it is."""
    if not isinstance(value, str):
        raise wrong("string_type", loc, "Input should be a valid string", value)
    return value


_WHOLE = re.compile(r"([+-]?[0-9]+(?:_[0-9]+)*)(?:\.0+)?")
_SIZE = "Unable to parse input string as an integer, exceeded maximum size"


def _bare(text: str) -> str:
    """The text without the blanks around it, by Unicode's count of them: Python counts four separators more."""
    return "" if text.strip("\x1c\x1d\x1e\x1f") != text else text.strip()


def integer(value: Any, loc: Location) -> int:
    """A whole number: also from a string of digits, a float without a fraction, or a truth value."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _not_finite(value, loc)
        if not value.is_integer():
            raise wrong("int_from_float", loc, "Input should be a valid integer, got a number with a fractional part", value)
        if abs(value) >= 2.0**63:
            raise wrong("int_parsing_size", loc, _SIZE, value)
        return int(value)
    if isinstance(value, str):
        match = _WHOLE.fullmatch(_bare(value))
        if not match:
            raise wrong("int_parsing", loc, "Input should be a valid integer, unable to parse string as an integer", value)
        if len(match[1].lstrip("+-")) > DIGITS_MAX:
            raise wrong("int_parsing_size", loc, _SIZE, value)
        return int(match[1])
    raise wrong("int_type", loc, "Input should be a valid integer", value)


def _not_finite(value: object, loc: Location) -> ProtocolError:
    return wrong("finite_number", loc, "Input should be a finite number", value)


def floating(value: Any, loc: Location) -> float:
    if isinstance(value, str):
        try:
            number = float(bare if (bare := _bare(value)).isascii() else "no number")
        except ValueError:
            raise wrong("float_parsing", loc, "Input should be a valid number, unable to parse string as a number", value) from None
    elif isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            raise _not_finite(value, loc) from None
    else:
        raise wrong("float_type", loc, "Input should be a valid number", value)
    if not math.isfinite(number):
        raise _not_finite(value, loc)
    return number


_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")


def boolean(value: Any, loc: Location) -> bool:
    """True or False: also from 0, 1 and their usual words."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        raise wrong("bool_parsing", loc, "Input should be a valid boolean, unable to interpret input", value)
    raise wrong("bool_type", loc, "Input should be a valid boolean", value)


def dictionary(value: Any, loc: Location) -> dict[str, Any]:
    """A JSON object whose values an answer can hold again."""
    if not isinstance(value, dict):
        raise wrong("dict_type", loc, "Input should be a valid dictionary", value)
    _check_inside(value, loc)
    return value


def _check_inside(value: object, loc: Location) -> None:
    """Refuses what an answer could not hold again; a loop of its own stack, since the depth is a stranger's."""
    todo: list[tuple[object, Location]] = [(value, loc)]
    while todo:
        item, where = todo.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise _not_finite(item, where)
        inner = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        if inner and len(where) - len(loc) >= DEPTH_MAX:
            message = f"nested deeper than {DEPTH_MAX} levels"
            raise ProtocolError([detail("value_error", loc, f"Value error, {message}", None) | {"ctx": {"error": message}}])
        todo += [(part, (*where, key)) for key, part in inner]


def list_of(read: Read) -> Read:
    """Reads a list, each item of it with ``read``."""

    def read_list(value: Any, loc: Location) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise wrong("list_type", loc, "Input should be a valid list", value)
        return tuple(_all(value, [(read, (*loc, index)) for index in range(len(value))]))

    return read_list


def _all(values: Any, readers: list[tuple[Read, Location]]) -> list[Any]:
    """Each value through its reader; what is wrong with any of them is told together."""
    found, wrong = [], []
    for value, (read, loc) in zip(values, readers, strict=True):
        try:
            found.append(read(value, loc))
        except ProtocolError as error:
            wrong += error.details
            if len(wrong) >= DETAILS_MAX:
                break
    if wrong:
        raise ProtocolError(wrong)
    return found


def _or_none(read: Read) -> Read:
    return lambda value, loc: None if value is None else read(value, loc)


def number(value: Any, loc: Location) -> int | float:
    """A whole number, else one with a fraction."""
    if isinstance(value, float):
        return floating(value, (*loc, "float"))
    return _either(value, loc, ("int", integer), ("float", floating))  # type: ignore[no-any-return]


def integer_or_string(value: Any, loc: Location) -> int | str:
    """A string as it is, else a whole number."""
    return value if isinstance(value, str) else _either(value, loc, ("int", integer), ("str", string))


def _either(value: Any, loc: Location, *readers: tuple[str, Read]) -> Any:
    wrong: list[dict[str, Any]] = []
    for name, read in readers:
        try:
            return read(value, (*loc, name))
        except ProtocolError as error:
            wrong += error.details
    raise ProtocolError(wrong)


def one_of(*allowed: str) -> Read:
    """Reads one of these words."""
    quoted = [f"'{word}'" for word in allowed]
    words = f"{', '.join(quoted[:-1])} or {quoted[-1]}"

    def read(value: Any, loc: Location) -> str:
        if isinstance(value, str) and value in allowed:
            return value
        raise ProtocolError([detail("literal_error", loc, f"Input should be {words}", value) | {"ctx": {"expected": words}}])

    return read


def field_of(read: Read, schema: dict[str, Any], text: str = "", default: Any = MISSING) -> Any:
    """A field of a message: how its JSON is read, its JSON schema, what it means, and its default."""
    return field(default=default, metadata={"read": read, "schema": schema | ({"description": text} if text else {})})


def optional(read: Read, schema: dict[str, Any], text: str = "") -> Any:
    """A field that may be null, and is where the message does not name it."""
    types = schema.get("anyOf", [schema])
    return field_of(_or_none(read), {"anyOf": [*types, {"type": "null"}]}, text, None)


STRING: dict[str, Any] = {"type": "string"}
INTEGER: dict[str, Any] = {"type": "integer"}
BOOLEAN: dict[str, Any] = {"type": "boolean"}
OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": True}
STRINGS: dict[str, Any] = {"type": "array", "items": STRING}


class Message:
    """What all messages do: read JSON, become JSON, tell their JSON schema."""

    # Fields that are left out of the JSON where they are None: an old client does not know them.
    QUIET: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_json(cls, value: Any, loc: Location = ("body",)) -> Self:
        """The message that this JSON value is.

        Raises:
            ProtocolError: it is none; ``details`` says all that is wrong, as pydantic words it.
        """
        if not isinstance(value, Mapping):
            raise wrong("model_attributes_type", loc, "Input should be a valid dictionary or object to extract fields from", value)
        read: dict[str, Any] = {}
        details: list[dict[str, Any]] = []
        for known in fields(cls):  # type: ignore[arg-type]
            at = (*loc, known.name)
            try:
                if known.name in value:
                    read[known.name] = known.metadata["read"](value[known.name], at)
                elif known.default is MISSING:
                    raise wrong("missing", at, "Field required", value)
            except ProtocolError as error:
                details += error.details
        if details:
            raise ProtocolError(details)
        return cls(**read)

    def to_json(self) -> dict[str, Any]:
        """All fields, defaults filled in; those of ``QUIET`` only where they are set."""
        items = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return {name: _plain(item) for name, item in items if item is not None or name not in self.QUIET}

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """Its JSON schema, as OpenAPI 3.1 takes it."""
        known = fields(cls)  # type: ignore[arg-type]
        defaults = {f.name: {} if f.default is MISSING else {"default": f.default} for f in known}
        return {
            "title": cls.__name__,
            "type": "object",
            "properties": {f.name: {**f.metadata["schema"], **defaults[f.name]} for f in known},
            "required": [f.name for f in known if f.default is MISSING],
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
