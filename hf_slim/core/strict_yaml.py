"""The part of YAML that a recipe needs, read with line numbers: mappings, lists, and words, nothing else.

Words are read as YAML 1.2 does: only `true` and `false` are booleans (`no` stays a word), `1e-4` is a number, and
`1:30` or `2024-01-01` are words. Anchors, aliases and tags are refused: a recipe needs none, and they are how a small
file becomes a huge object or a Python call.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from hf_slim.core.errors import RecipeError

MAX_BYTES = 2**16  # the pure Python scanner needs about two seconds for a hostile text of this size
MAX_DEPTH = 32

Path = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = [  # kind, pattern, possible first characters
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", r"[-+]?[0-9]+\Z", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z",
        list("-+.0123456789"),
    ),
]


class _Forbidden(yaml.MarkedYAMLError):
    """Valid YAML that a recipe may not use."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # none of YAML 1.1's
    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        problem = None
        if event.anchor is not None:
            problem = f"anchors and aliases are not allowed, got {event.anchor!r}; write the value out where it is used"
        elif getattr(event, "tag", None) is not None:
            tag = event.tag.replace(_TAG, "!!", 1)
            problem = f"tags are not allowed, got {tag!r}; write a plain value"
        elif self.depth == MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep; a recipe needs fewer"
        if problem:
            raise _Forbidden(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every word that YAML 1.1 or 1.2 would read as something else."""

    def represent_str(self, data: str) -> ScalarNode:
        # Only double quotes escape; the other styles fold or change rare line breaks such as U+0085.
        return self.represent_scalar(_TAG + "str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


for _kind, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), _first)


@dataclass
class Document:
    """Plain Python values of one text, and where each came from.

    Args:
        name: what messages call the text.
        value: dicts with text keys, lists, str, int, float, bool or None.
        origins: path -> "recipe.yaml, line 3".
        problems: messages about what is wrong although the text could be read.
    """

    name: str
    value: Any = None
    origins: dict[Path, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def complain(self, path: Path, message: str, about: Path | None = None) -> None:
        """Add a problem found at `path`; the message speaks of `about` if that is another path."""
        subject = path if about is None else about
        if len(subject) > 2 and subject[0] == "stages":  # the method's address says enough
            subject = subject[2:]
        prefix = ".".join(map(str, subject)) + ": " if subject else ""
        self.problems.append(f"{self.origin(path)}: {prefix}{message}")

    def known(self, path: Path) -> Path:
        """`path`, or else the nearest thing around it that was written; () is the whole text."""
        while path and path not in self.origins:
            path = path[:-1]
        return path

    def origin(self, path: Path) -> str:
        """Where the value at `path` was written, or else the nearest thing around it."""
        return self.origins.get(self.known(path), self.name)

    def build(self, node: Node, path: Path = ()) -> Any:
        """Turn a node into plain Python, noting lines and problems."""
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        return _scalar(node)

    def _item(self, node: Node, path: Path) -> Any:
        self.origins[path] = f"{self.name}, line {_line(node)}"
        return self.build(node, path)

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        value: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self.problems.append(f"{self.name}, line {_line(key_node)}: a key must be a single word")
                continue
            key, here = key_node.value, (*path, key_node.value)
            self.origins[here] = f"{self.name}, line {_line(key_node)}"
            if key in value:
                self.complain(here, f"key {key!r} is given twice, first on line {first_lines[key]}; keep one", path)
            first_lines.setdefault(key, _line(key_node))
            value[key] = self.build(value_node, here)
        return value


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _scalar(node: Node) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "float":
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    # Python refuses to read thousands of digits; as a word the value meets the ordinary type error.
    if kind == "int" and len(text) < 1000:
        return int(text)
    return text


def read_file(path: str | os.PathLike[str]) -> str:
    """Text of a small UTF-8 file.

    Raises:
        RecipeError: missing, a folder, unreadable, larger than `MAX_BYTES`, or not UTF-8.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        raise RecipeError(f"{name}: is a folder; name a recipe file, such as {os.path.join(name, 'recipe.yaml')}")
    try:
        with open(name, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{name}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(_too_large(name))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise RecipeError(f"{name}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None


def _too_large(name: str) -> str:
    return f"{name}: larger than {MAX_BYTES // 2**10} KiB; a recipe is a page of text"


def parse(text: str, name: str) -> Document:
    """Read one YAML document; an empty text gives the value None.

    Args:
        text: the document.
        name: what messages call it, usually the file.

    Raises:
        RecipeError: too large, not YAML, or YAML with anchors, aliases, tags, or more than `MAX_DEPTH` levels.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(_too_large(name))
    document = Document(name)
    try:
        node = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_problem(error, name)) from None
    except (ValueError, OverflowError) as error:  # such as "\UFFFFFFFF", which names no character
        raise RecipeError(f"{name}: not valid YAML: an escape or a number is out of range; write it plainly") from error
    if node is not None:
        document.value = document.build(node)
    return document


def _syntax_problem(error: yaml.YAMLError, name: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"{name}: not valid YAML: character {error.character:#06x} is not allowed; use printable text"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{name}: not valid YAML: {error}"
    mark = error.problem_mark
    if isinstance(error, _Forbidden):
        return f"{name}, line {mark.line + 1}: {error.problem}"
    what = ", ".join(part for part in (error.context, error.problem) if part)
    return f"{name}, line {mark.line + 1}, column {mark.column + 1}: not valid YAML: {what}"


def dump(value: Any) -> str:
    """YAML text that `parse` reads back as the same value; innermost lists and mappings stay on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
