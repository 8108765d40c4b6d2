"""YAML and `key=value` settings into frozen dataclasses, strictly: nothing is guessed, nothing is ignored.

An unknown key names the nearest known one, a value of the wrong type or out of range names its key, and a key
that stands twice in a file is an error. The only conversion is exact: a whole number where a real one is wanted.

A field's metadata may hold `key` (its name in YAML where Python forbids it, as with `lambda`), `instead_of` (the
setting it excludes: given on the command line, it replaces that one from the file) and `may_change` (a run may be
resumed with another value).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lalic.errors import LalicError
from lalic.sizes import Size, parse_size

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML without two of its traps: `1e-4` is a number, and a key that stands twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Writes lists of numbers on one line, as people do."""


_Dumper.add_representer(
    list,
    lambda dumper, value: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", value, flow_style=not any(isinstance(item, dict) for item in value)
    ),
)


class _Text(str):
    """The unparsed right-hand side of a `key=value`: what it means depends on the type of its field."""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; LalicError when it is missing, no YAML, or no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise LalicError(f"cannot read the config {path}: {reason}") from error
    document = _parse(text, str(path))
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise LalicError(f"{path}: a config is a mapping of sections, not {_shown(document)}")
    return document


def dump_yaml(value: Any) -> str:
    """The YAML text of a dataclass built by `build`."""
    return yaml.dump(as_mapping(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def override(cls: type, document: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`document` with `a.b=value` assignments applied, keys and values still unchecked where `build` does it."""
    document = _copied(document)
    given: list[str] = []
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        key = key.strip()
        if not separator or not key:
            raise LalicError(f"'{assignment}' is no setting: write key=value, for example run.dir=runs/q3")
        if key in given:
            raise LalicError(f"{key} is given twice on the command line")
        given.append(key)
        _assign(cls, document, key, _Text(value))
    for key in given:
        _drop_excluded(cls, document, key, given)
    return document


def build(cls: type[T], document: Any, where: str = "", root: type | None = None) -> T:
    """A `cls` from a mapping. Raises LalicError naming the key and what is allowed.

    `where` is the dotted key of the mapping within `root`, both for messages.
    """
    root = root or cls
    if isinstance(document, _Text):
        document = _parse(document, where)
    if not isinstance(document, Mapping):
        raise LalicError(f"{where or 'the config'} must be a mapping of settings, not {_shown(document)}")
    hints = typing.get_type_hints(cls)
    fields = {_key(field): field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in document.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise LalicError(f"unknown key '{path}'{_nearest(cls, root, where, str(key))}")
        values[fields[key].name] = _value(hints[fields[key].name], value, path, root)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise LalicError(f"{where}.{key} is missing" if where else f"the section {key} is missing")
    try:
        return cls(**values)
    except LalicError as error:
        # A section knows its own name, but not which item of a list it is.
        place = re.match(r"(.*)\.\d+$", where)
        raise LalicError(str(error).replace(f"{place[1]}.N.", f"{where}.") if place else str(error)) from None


def as_mapping(value: Any) -> Any:
    """The plain mappings, lists and scalars that `build` makes `value` of."""
    if dataclasses.is_dataclass(value):
        return {_key(field): as_mapping(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [as_mapping(item) for item in value]
    return int(value) if isinstance(value, Size) else value


def differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of everything that differs and is not marked `may_change`."""
    for field in dataclasses.fields(old):
        path = f"{where}.{_key(field)}" if where else _key(field)
        a, b = getattr(old, field.name), getattr(new, field.name)
        if field.metadata.get("may_change") or a == b:
            continue
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            yield from differences(a, b, path)
        else:
            yield path, as_mapping(a), as_mapping(b)


def known_keys(cls: type, where: str = "") -> Iterator[str]:
    """All dotted keys of a dataclass; items of a list stand as `stages.0`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        path = f"{where}.{_key(field)}" if where else _key(field)
        section, is_list = _section(hints[field.name])
        yield path
        if section is not None:
            yield from known_keys(section, f"{path}.0" if is_list else path)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise LalicError(f"{where}{line}: not valid YAML: {problem}") from error


def _assign(cls: type, document: dict[str, Any], key: str, value: _Text) -> None:
    """Set one dotted key, making the sections on its way."""
    place: Any = document
    *way, last = key.split(".")
    for depth, part in enumerate(way):
        here = ".".join(way[: depth + 1])
        if isinstance(place, list):
            place = place[_item(place, part, here, key)]
        else:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        if isinstance(place, _Text):
            raise LalicError(f"{key} and {here} are both given on the command line")
        if not isinstance(place, dict | list):
            raise LalicError(f"unknown key '{key}': {here} is {_shown(place)}, not a section")
    if isinstance(place, list):
        place[_item(place, last, key, key)] = value
    else:
        place[last] = value


def _item(items: list[Any], part: str, here: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        last = f"0 to {len(items) - 1}" if items else "none"
        raise LalicError(f"unknown key '{key}': {here} is no item of its list (there are {last})")
    return int(part)


def _drop_excluded(cls: type, document: dict[str, Any], key: str, given: list[str]) -> None:
    """A setting given on the command line replaces the one in the file that it excludes."""
    *way, last = key.split(".")
    section: Any = cls
    place: Any = document
    for part in way:
        if part.isdigit():
            place = place[int(part)]
            continue
        field = next((f for f in dataclasses.fields(section) if _key(f) == part), None)
        if field is None:
            return
        section, _ = _section(typing.get_type_hints(section)[field.name])
        if section is None:
            return
        place = place[part]
    for field in dataclasses.fields(section):
        other = field.metadata.get("instead_of")
        if _key(field) == last and other and ".".join([*way, other]) not in given:
            place.pop(other, None)


def _value(hint: Any, value: Any, path: str, root: type) -> Any:
    """`value` checked against a type hint: scalars, Literal, tuple[X, ...], dataclasses, or several of these and None,
    of which one is a tuple: a list is meant for that one."""
    optional, choices = _choices(hint)
    if isinstance(value, _Text):
        empty = value.strip() in ("", "null", "~")
        value = str(value) if any(map(_wants_text, choices)) and not empty else _parse(value, path)
    if value is None and optional:
        return None
    allowed = _allowed(hint)
    hint = next((c for c in choices if (typing.get_origin(c) is tuple) == isinstance(value, list)), choices[0])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path, root)
    if origin is tuple:
        if not isinstance(value, list):
            raise LalicError(f"{path} must be {allowed}, not {_shown(value)}")
        return tuple(_value(arguments[0], item, f"{path}.{i}", root) for i, item in enumerate(value))
    if origin is typing.Literal:
        if value not in arguments:
            raise LalicError(f"{path} must be {allowed}, not {_shown(value)}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is Size and type(value) in (int, str):
        try:
            return parse_size(str(value))
        except LalicError:
            pass  # told below as for any other type
    # `type`, not `isinstance`: True is an int to Python, but not to people.
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise LalicError(f"{path} must be {allowed}, not {_shown(value)}")
    return value


def _choices(hint: Any) -> tuple[bool, list[Any]]:
    """Whether null is allowed, and the types that a field's hint allows besides."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return False, [hint]
    arguments = typing.get_args(hint)
    return type(None) in arguments, [a for a in arguments if a is not type(None)]


def _wants_text(hint: Any) -> bool:
    arguments = typing.get_args(hint)
    return hint is str or (typing.get_origin(hint) is typing.Literal and all(isinstance(a, str) for a in arguments))


def _allowed(hint: Any) -> str:
    """The values of a type hint, in words."""
    optional, choices = _choices(hint)
    return " or ".join([*map(_allowed_of_one, choices), *(["null"] if optional else [])])


def _allowed_of_one(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        _, is_list = _section(hint)
        return "a list" if is_list else f"a list of {_PLURAL[arguments[0]]}"
    if origin is typing.Literal:
        return " or ".join(repr(a) if not isinstance(a, str) else a for a in arguments)
    return _SINGULAR.get(hint, "a mapping of settings")


_SINGULAR = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Size: "a size such as 512MiB or 200GiB",
}
_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}


def _section(hint: Any) -> tuple[Any, bool]:
    """(dataclass or None, whether the field is a list of them) of a field's type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return (arguments[0], True) if dataclasses.is_dataclass(arguments[0]) else (None, False)
    for candidate in (hint, *arguments):
        if dataclasses.is_dataclass(candidate):
            return candidate, False
    return None, False


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _nearest(cls: type, root: type, where: str, key: str) -> str:
    """Help for an unknown key: the nearest one in its section, or a key of that name elsewhere, or all."""
    known = [_key(field) for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    near = difflib.get_close_matches(key, known, 1, 0.6)
    if near:
        return f": did you mean '{where + '.' if where else ''}{near[0]}'?"
    elsewhere = [full for full in known_keys(root) if full.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f": did you mean '{elsewhere[0]}'?"
    return f": {'the keys of ' + where if where else 'the sections'} are {', '.join(known)}"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}'"
    return " ".join(str(value).split())[:60]


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
