"""Typed YAML configuration: one file, a tree of sections, `--section.key=value` on top.

Everything a user can get wrong in a config is reported at once, one line a mistake, each with the key, what was
found, what was expected and, for an unknown key, the nearest one that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationInfo, field_validator


class Section(BaseModel):
    """Base of every config section: unknown keys are refused, values are frozen, defaults are validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take it for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = typing.get_args(annotation) or (annotation,)
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError(f"expected a number, found {str(value).lower()}")
        return value


class ConfigError(ValueError):
    """All problems of one configuration; the message has one line for each."""


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a section, of which YAML would take the last in silence, and leaves texts that
    YAML 1.1 takes for dates and for numbers to the base 60 (2024-11-29, 12:30) the texts that they are."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:  # before `<<` is resolved, whose keys may be given anew
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise yaml.YAMLError(
                    f"key {key.value!r} stands in line {lines[key.value]} and again in line {line}"
                )
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return node


def _number_or_text(loader: Any, node: Any) -> Any:
    if ":" in node.value:
        return loader.construct_scalar(node)
    kind = "int" if node.tag.endswith("int") else "float"
    return getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node)


_CONSTRUCTORS: dict[str, Any] = {
    "timestamp": yaml.SafeLoader.construct_yaml_str,
    "int": _number_or_text,
    "float": _number_or_text,
}
for _kind, _constructor in _CONSTRUCTORS.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _constructor)


def load_config(schema: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read a YAML file, apply `--section.key=value` overrides, validate against `schema`.

    Override values are parsed as YAML (`--train.steps=100`, `--data.paths=[a,b]`).
    Raises ConfigError naming the file and listing every mistake found.
    """
    path = Path(path)
    tree = read_tree(path)
    problems = [problem for override in overrides if (problem := apply_override(tree, override))]
    config, found = _validate(schema, tree)
    problems += [_describe(item, schema) for item in found]
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return config


def read_tree(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, not validated. Raises ConfigError naming the file."""
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections (`key: value`), found a {type(tree).__name__}")
    return tree


def _parse(text: str) -> Any:
    """The tree of a YAML document. Raises yaml.YAMLError, also for a key that stands twice."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except ValueError as error:  # what looks like a number and is none, such as 0b_
        raise yaml.YAMLError(str(error)) from None


def _validate(schema: type[S], tree: dict[str, Any]) -> tuple[S, list[Any]]:
    """The validated configuration, or every error. A check across keys only runs once those keys are valid by
    themselves, so what is wrong is taken out and the rest validated again, until nothing new is found."""
    found: list[Any] = []
    while True:
        try:
            return schema.model_validate(tree), found
        except pydantic.ValidationError as error:
            new = [item for item in error.errors() if all(item["loc"] != known["loc"] for known in found)]
            removed = [_without(tree, item["loc"]) for item in new if item["type"] not in _MISSING]
            found += [item for item in new if not _made_by_removal(item, found)]
            if not any(removed):
                return None, found  # type: ignore[return-value]


_MISSING = ("missing", "missing_argument")


def _made_by_removal(item: Any, found: list[Any]) -> bool:
    """Is this key missing only because a wrong value was taken out of it?"""
    return item["type"] in _MISSING and any(item["loc"] == known["loc"] for known in found)


def _without(tree: Any, location: Sequence[int | str]) -> bool:
    """Take the value at a location out of a tree of dicts; False where that is not possible (a list item, the root)."""
    *parents, last = location or (None,)
    for parent in parents:
        try:
            tree = tree[parent]
        except (KeyError, IndexError, TypeError):
            return False
    return isinstance(tree, dict) and tree.pop(last, _REQUIRED) is not _REQUIRED


def split_arguments(arguments: Sequence[str], *options: str) -> tuple[list[str], list[str]]:
    """Part a command line into (overrides, rest): an override is `--key=value` or `--a.b=value` whose key is none of
    the program's own `options`; whether the schema has such a key, `load_config` says."""
    overrides: list[str] = []
    rest: list[str] = []
    for argument in arguments:
        key, equals, _ = argument.removeprefix("--").partition("=")
        is_override = equals and argument.startswith("--") and key not in options
        (overrides if is_override else rest).append(argument)
    return overrides, rest


def to_yaml(config: Section) -> str:
    """The resolved configuration as YAML, keys in the order of the schema; `load_config` reads it back."""
    tree = TypeAdapter(type(config)).dump_python(config, mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def field_help(schema: type, prefix: str = "") -> str:
    """Every key of a schema as `section.key  type = default   description`, one a line, for `--help`."""
    lines = []
    for name, annotation, default, text in _fields(schema):
        key = f"{prefix}{name}"
        section = _section_of(annotation)
        if section is not None:
            item = "[]." if typing.get_origin(annotation) in (list, tuple) else "."
            lines.append(field_help(section, f"{key}{item}"))
        else:
            shown = "required" if default is _REQUIRED else f"= {_as_typed(default)}"
            lines.append(f"  {key}  ({_type_name(annotation)}, {shown})  {text}".rstrip())
    return "\n".join(lines)


_REQUIRED = object()


def _as_typed(value: Any) -> str:
    """A value as one types it behind `--section.key=`: null, true, [a, b]. (None would be taken for a text.)"""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    except yaml.YAMLError:  # a path, …
        return str(value)
    return text.removesuffix("\n").removesuffix("\n...")


def apply_override(tree: dict[str, Any], override: str) -> str | None:
    """Set one dotted key in place; returns the problem as a line, or None."""
    key, equals, text = override.removeprefix("--").partition("=")
    if not equals or not key:
        return f"override {override!r}: expected --section.key=value"
    try:
        value = _parse(text)
    except yaml.YAMLError:
        return f"override {override!r}: the value is not valid YAML"
    node: Any = tree
    *parents, last = key.split(".")
    for parent in parents:
        node = _child(node, parent)
        if node is None:
            return f"override {override!r}: {parent!r} is not a section"
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        return f"override {override!r}: cannot set {last!r} there"
    return None


def _child(node: Any, name: str) -> Any:
    if isinstance(node, list) and name.isdigit() and int(name) < len(node):
        return node[int(name)]
    if isinstance(node, dict):
        if node.get(name) is None:
            node[name] = {}
        return node[name] if isinstance(node[name], dict | list) else None
    return None


def _describe(item: Any, schema: type) -> str:
    """One pydantic error as one line: where, what was found, what was expected."""
    location = [part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    key = ".".join(str(part) for part in location) or "config"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [name for name, *_ in _fields(_schema_at(schema, location[:-1]))]
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if item["type"] in ("missing", "missing_argument"):
        return f"{key}: required key is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        lines = (
            line if line.startswith(f"{key}.") or key == "config" else f"{key}: {line}"
            for line in message.splitlines()
        )
        return "; ".join(lines)
    return f"{key}: {message[0].lower()}{message[1:]}, found {item['input']!r}"


def _schema_at(schema: type, location: Sequence[int | str]) -> type:
    for part in location:
        if isinstance(part, int):
            continue
        annotation = next((a for name, a, *_ in _fields(schema) if name == part), None)
        section = _section_of(annotation)
        if section is None:
            break
        schema = section
    return schema


def _fields(schema: type) -> Iterator[tuple[str, Any, Any, str]]:
    """(name, annotation, default, description) of a pydantic section or of a standard dataclass."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        for name, field in schema.model_fields.items():
            default = _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
            yield name, field.annotation, default, field.description or ""
    else:
        hints = typing.get_type_hints(schema)
        for item in dataclasses.fields(schema):  # type: ignore[arg-type]
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            else:
                default = _REQUIRED if item.default is dataclasses.MISSING else item.default
            yield item.name, hints[item.name], default, item.metadata.get("help", "")


def _section_of(annotation: Any) -> type | None:
    """The section class inside an annotation such as `Section`, `list[Section]` or `Section | None`."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        is_section = issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
        return annotation if is_section else None
    return next((s for argument in typing.get_args(annotation) if (s := _section_of(argument))), None)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is not None:
        return f"{getattr(origin, '__name__', origin)}[{', '.join(map(_type_name, arguments))}]"
    return getattr(annotation, "__name__", str(annotation))
