"""YAML file -> checked, frozen model. Every mistake becomes a RecipeError with path and line.

A file may say `extends: other.yaml`; mappings are merged key by key, everything else is replaced.
Any pydantic schema can be loaded this way (`load_yaml`); `load_recipe` is the one for recipes.
"""

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fewstep.errors import RecipeError, did_you_mean
from fewstep.recipe.schema import Recipe

T = TypeVar("T", bound=BaseModel)
Keys = tuple[str | int, ...]
Origins = dict[Keys, str]
"""Where each value was written, `file:line` or the override, by its path."""


class Loaded(NamedTuple):
    data: dict[str, Any]
    origins: Origins


def load_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe; `overrides` are dotted paths with YAML values, {"budget.updates": "10"}."""
    return load_yaml(path, Recipe, overrides)


def load_yaml(path: str | Path, schema: type[T], overrides: Mapping[str, str] | None = None) -> T:
    data, origins = _read(Path(path), chain=())
    for dotted, text in (overrides or {}).items():
        _override(data, origins, dotted, text)
    return _checked(data, origins, schema, default=str(path))


def load_layered(path: str | Path, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Recipe:
    """Read a recipe and lay mappings over it as `extends` does, the last one uppermost.

    Each layer has a name for messages; its keys may be dotted, {"data.mixture.edit": 0}.
    """
    data, origins = _read(Path(path), chain=())
    for where, layer in layers:
        for dotted, value in layer.items():
            *outer, last = dotted.split(".")
            own: dict[str, Any] = {last: value}
            for key in reversed(outer):
                own = {key: own}
            data = _merge(data, own)
            for at in _leaves(own):
                for stale in [keys for keys in origins if keys[: len(at)] == at]:
                    del origins[stale]
                origins[at] = where
    return _checked(data, origins, Recipe, default=str(path))


def _leaves(data: Mapping[str, Any], at: Keys = ()) -> Iterator[Keys]:
    """The paths of everything that is no mapping, or an empty one."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key)


def _checked(data: dict[str, Any], origins: Origins, schema: type[T], *, default: str) -> T:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        for keys, (what, hint) in _OTHERS.items():
            if keys <= data.keys() and not keys & schema.model_fields.keys():
                raise RecipeError(f"is {what}", where=default, hint=hint) from None
        raise _explain(error, schema, origins, default=default) from None


_OTHERS = {
    frozenset({"teachers", "student"}): ("a recipe", "`fewstep distill` takes it"),
    frozenset({"base", "variants"}): ("a study", "`fewstep sweep` takes it"),
    frozenset({"source", "composition"}): ("a teacher's recipe", "`fewstep teach` takes it"),
    frozenset({"templates", "grid"}): ("a spec of prompts", "`fewstep prompts write` takes it"),
}
"""Files of one shape that are given where another belongs, by keys that no other shape has."""


def dump_yaml(model: BaseModel) -> str:
    """The model as YAML that `load_yaml` reads back to an equal model."""
    return _as_yaml(model.model_dump(mode="json"))


def dump_brief_yaml(model: BaseModel) -> str:
    """The same with nothing but what differs from the defaults."""
    return _as_yaml(model.model_dump(mode="json", exclude_defaults=True))


def _as_yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _read(path: Path, *, chain: tuple[Path, ...]) -> Loaded:
    path = path.expanduser()
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(file.name for file in (*chain, resolved))
        raise RecipeError(f"extends itself: {circle}", where=str(path), field="extends")
    own = _parse(path, _text(path))
    if "extends" not in own.data:
        return own
    parent = own.data.pop("extends")
    if not isinstance(parent, str):
        raise RecipeError(
            f"{parent!r} is no file name", where=own.origins["extends",], field="extends"
        )
    base_path = path.parent / Path(parent).expanduser()
    if not base_path.is_file():
        raise RecipeError(
            f"there is no file {base_path}",
            where=own.origins["extends",],
            field="extends",
            hint=f"the name is taken relative to {path.parent}",
        )
    base = _read(base_path, chain=(*chain, resolved))
    return Loaded(_merge(base.data, own.data), base.origins | own.origins)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        siblings = sorted(file.name for file in folder.glob("*.yaml")) if folder.is_dir() else []
        hint = did_you_mean(path.name, siblings) if siblings else "give the path of a YAML file"
        raise RecipeError("there is no such file", where=str(path), hint=hint) from None
    except IsADirectoryError:
        raise RecipeError(
            "is a folder", where=str(path), hint="give the path of a YAML file"
        ) from None
    except PermissionError:
        raise RecipeError("may not be read by you", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not UTF-8 text (byte {error.start})", where=str(path)) from None


def _parse(path: Path, text: str) -> Loaded:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise RecipeError(f"is not valid YAML: {error.problem}", where=where) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"is not valid YAML: {error}", where=str(path)) from None
    if not isinstance(node, yaml.MappingNode):
        what = "is empty" if node is None else "does not hold `key: value` lines"
        raise RecipeError(what, where=str(path), hint="see recipes/lab/unified.yaml for an example")
    origins: Origins = {}
    data = _build(node, (), str(path), origins, parents=())
    return Loaded(data, origins)


def _build(
    node: yaml.Node, at: Keys, file: str, origins: Origins, parents: tuple[yaml.Node, ...]
) -> Any:
    """Plain data from a YAML node; refuses duplicate keys, keeps the line of every value."""
    where = f"{file}:{node.start_mark.line + 1}"
    origins[at] = where
    if any(node is parent for parent in parents):
        raise RecipeError("an alias contains itself", where=where, field=_dotted(at))
    parents = (*parents, node)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = f"{file}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError("a key must be a word", where=line, field=_dotted(at))
            key = key_node.value
            if key in mapping:
                raise RecipeError(
                    f"the key is given twice, first at {origins[*at, key]}",
                    where=line,
                    field=_dotted((*at, key)),
                    hint="keep one of them",
                )
            mapping[key] = _build(value_node, (*at, key), file, origins, parents)
            origins[*at, key] = line
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*at, i), file, origins, parents) for i, item in enumerate(node.value)]
    return _scalar(node, where, at)


def _scalar(node: yaml.Node, where: str, at: Keys) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"cannot be read: {error}", where=where, field=_dotted(at)) from None
    finally:
        loader.dispose()


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`. A mapping of another `kind` replaces instead of mixing two variants."""
    merged = dict(base)
    for key, value in own.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and _same_kind(before, value):
            merged[key] = _merge(before, value)
        else:
            merged[key] = value
    return merged


def _same_kind(before: dict[str, Any], value: dict[str, Any]) -> bool:
    return "kind" not in value or value["kind"] == before.get("kind")


def _override(data: dict[str, Any], origins: Origins, dotted: str, text: str) -> None:
    where = f"--set {dotted}={text}"
    keys = dotted.split(".")
    if not all(keys):
        raise RecipeError("is no dotted path", where=where, hint="such as budget.updates=10")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        raise RecipeError(f"{text!r} is not a valid YAML value", where=where) from None
    at: Keys = ()
    holder: Any = data
    for depth, key in enumerate(keys):
        step = _step(holder, key, at, where)
        if depth == len(keys) - 1:
            value = None if node is None else _build(node, (*at, step), where, {}, ())
            holder[step] = value
            below = len(at) + 1
            for stale in [keys for keys in origins if keys[:below] == (*at, step)]:
                del origins[stale]
        elif isinstance(holder, dict) and holder.get(key) is None:
            holder[key] = {}
        at = (*at, step)
        origins[at] = where
        holder = holder[step]


def _step(holder: Any, key: str, at: Keys, where: str) -> str | int:
    if isinstance(holder, dict):
        return key
    field = _dotted(at)
    if not isinstance(holder, list):
        raise RecipeError(f"is {holder!r} and has nothing called {key!r}", where=where, field=field)
    if not key.isdigit() or int(key) >= len(holder):
        raise RecipeError(
            f"has no entry {key!r}", where=where, field=field, hint=f"use 0 to {len(holder) - 1}"
        )
    return int(key)


def _explain(
    error: ValidationError, schema: type[BaseModel], origins: Origins, *, default: str
) -> RecipeError:
    """One RecipeError that lists everything pydantic found."""
    found = []
    for entry in error.errors(include_url=False):
        at, holder, annotation = _locate(schema, entry["loc"])
        kind, value = entry["type"], entry["input"]
        where = _origin(origins, at, default)
        field, hint = _dotted(at), ""
        if kind == "extra_forbidden":
            problem = "unknown key"
            hint = did_you_mean(str(at[-1]), _fields(holder))
        elif kind == "missing":
            problem = "is missing"
        elif kind in ("union_tag_invalid", "literal_error"):
            context = entry.get("ctx", {})
            expected = context.get("expected_tags") or context["expected"]
            field = _dotted((*at, "kind")) if kind == "union_tag_invalid" else field
            shown = value.get("kind") if isinstance(value, dict) else value
            problem, hint = f"{shown!r} is none of the choices", f"use {expected}"
        elif kind == "union_tag_not_found":
            problem = "has no `kind`"
            hint = f"use one of: {', '.join(_tags(annotation))}"
        elif kind == "string_pattern_mismatch":
            problem = f"{value!r} is no name"
            hint = "use letters, digits, '_', '-' and '.', and start with a letter or a digit"
        elif kind in ("int_parsing", "int_type", "float_parsing", "float_type"):
            problem = f"{value!r} is no {'whole ' if kind.startswith('int') else ''}number"
            hint = _as_whole(value) if kind.startswith("int") else ""
        elif kind in ("model_type", "model_attributes_type", "dict_type"):
            problem, hint = f"{value!r} holds no `key: value` pairs", _as_mapping(annotation)
        else:
            message = entry["msg"].replace("Input should", "should")
            problem = message if isinstance(value, dict | list) else f"{value!r} {message}"
        found.append(RecipeError(problem, field=field, hint=hint, where=where))
    if len(found) == 1:
        return found[0]
    lines = "\n".join(f"  {entry}" for entry in found)
    return RecipeError(f"{len(found)} mistakes\n{lines}", where=default)


def _as_whole(value: Any) -> str:
    """YAML takes 1e3 for a word, and a whole number may come as one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    return f"write {number:.0f}" if number.is_integer() else ""


def _as_mapping(annotation: Any) -> str:
    """What to write where a mapping belongs."""
    tags = _tags(annotation)
    if tags:
        return f"such as {{kind: {tags[0]}}}; kinds: {', '.join(tags)}"
    names = _fields(annotation)
    return f"its keys: {', '.join(names)}" if names else ""


class Location(NamedTuple):
    at: Keys
    """The path as the user wrote it; pydantic adds union tags."""
    holder: Any
    """The type that holds the last key."""
    annotation: Any
    """The type of the value itself."""


def _locate(schema: Any, loc: Keys) -> Location:
    at: Keys = ()
    current, holder = schema, schema
    for part in loc:
        current = _bare(current)
        if part == "[key]":
            continue
        tagged = [member for member in typing.get_args(current) if _tag(member) == part]
        if tagged and typing.get_origin(current) in (typing.Union, types.UnionType):
            current = tagged[0]
            continue
        holder = current
        at = (*at, part)
        current = _child(current, part)
    return Location(at, holder, current)


def _child(annotation: Any, part: str | int) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return field.annotation if field else None
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        return arguments[1]
    if typing.get_origin(annotation) is tuple:
        return arguments[0]
    return None


def _bare(annotation: Any) -> Any:
    """Without Annotated and without `| None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(annotation) if m is not types.NoneType]
        if len(members) == 1:
            return _bare(members[0])
    return annotation


def _tag(member: Any) -> str | None:
    if isinstance(member, type) and issubclass(member, BaseModel) and "kind" in member.model_fields:
        return typing.get_args(member.model_fields["kind"].annotation)[0]
    return None


def _tags(annotation: Any) -> list[str]:
    return [tag for member in typing.get_args(_bare(annotation)) if (tag := _tag(member))]


def _fields(annotation: Any) -> list[str]:
    bare = _bare(annotation)
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        return list(bare.model_fields)
    return []


def _origin(origins: Origins, at: Keys, default: str) -> str:
    """The line of the value, or of the nearest enclosing one for what is missing."""
    for length in range(len(at), 0, -1):
        if at[:length] in origins:
            return origins[at[:length]]
    return default


def _dotted(at: Keys) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).lstrip(".")
