"""YAML as people read it: 1e-4 is a number, `no` and 12:30 are words, a key given twice is an error.

What comes in may be somebody else's: aliases and nesting are bounded while it is read, so that a short text stays a small value.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import yaml

__all__ = ["read_yaml", "with_arguments", "write_yaml"]

DEEPEST = 60
"""Levels of nesting, at most; a config has six."""
REPEATED = 10_000
"""Values that aliases may repeat, all of them together."""

_INT = re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(r"([-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_PREFIX = "tag:yaml.org,2002:"
_DROPPED = {_PREFIX + name for name in ("bool", "int", "float", "timestamp", "value")}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (1.1 reads 1e-4 as a string, `no` as False, 12:30 as 750 and 2026-01-01 as a date), no duplicate keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._extent: dict[int, tuple[int, int]] = {}
        """Of finished nodes by identity: values in them, and levels."""
        self._repeated = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """An opening bracket; counted here, because what PyYAML does with deep ones takes the square of their number."""
        if self.flow_level >= DEEPEST:
            raise yaml.scanner.ScannerError(None, None, _too_deep(), self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        """A deeper block."""
        if len(self.indents) >= DEEPEST:
            raise yaml.scanner.ScannerError(None, None, _too_deep(), self.get_mark())
        return bool(super().add_indent(column))

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node and how much is in it, with everything that aliases repeat."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if node is None:
            return node
        if isinstance(event, yaml.AliasEvent):
            mark: Any = event.start_mark
            if id(node) not in self._extent:
                raise yaml.composer.ComposerError(None, None, "an alias inside the value it stands for", mark)
            self._repeated += self._extent[id(node)][0]
            if self._repeated > REPEATED:
                problem = f"aliases repeat more than {REPEATED} values; write out what is needed"
                raise yaml.composer.ComposerError(None, None, problem, mark)
            return node
        if isinstance(node, yaml.ScalarNode):
            self._extent[id(node)] = 1 + len(node.value) // 100, 1
            return node
        inside = [self._extent[id(child)] for child in _children(node)]
        depth = 1 + max((levels for _, levels in inside), default=0)
        if depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, _too_deep(), node.start_mark)
        self._extent[id(node)] = 1 + sum(count for count, _ in inside), depth
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A dict; a key that is given twice is a mistake in a config."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        """By YAML 1.2: 014 is 14 and 0o14 is 12."""
        text = str(self.construct_scalar(node)).lower()
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would take for something other than a string."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes some line separators bare and reads them back as spaces.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in _DROPPED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.add_constructor(_PREFIX + "int", _Loader.construct_yaml_int)
_Loader.add_constructor(_PREFIX + "merge", lambda _, node: node.value)  # `<<` that merges nothing is a word
_Loader.add_implicit_resolver(_PREFIX + "bool", _BOOL, list("tTfF"))
for _class in (_Loader, _Dumper):
    # Integers also look like floats: first come, first taken.
    _class.add_implicit_resolver(_PREFIX + "int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver(_PREFIX + "float", _FLOAT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: the text is not YAML, gives a key twice, nests too deeply or repeats too much.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # PyYAML's, of `!!int x` and numbers without end
        raise yaml.YAMLError(f"a value does not fit its type: {error}") from None


def write_yaml(value: Any) -> str:
    """`value` as YAML in the order of its keys; `read_yaml` gives it back."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    # Format characters stand only in double-quoted strings, where an escape means the same and nothing obeys it.
    return re.sub(r"[^ -~\n]", _escaped, text)


def with_arguments(component: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A component with further arguments, `key=value` each, the value in YAML.

    Raises:
        ValueError: a word has another form, or its key is there already.
    """
    found = dict(component)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier() or key in found:
            raise ValueError(f"Argument {word!r} is not of the form key=value, e.g. quality=80, with each key once.")
        found[key] = read_yaml(text)
    return found


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if character.isprintable():
        return character
    return f"\\U{ord(character):08X}" if ord(character) > 0xFFFF else f"\\u{ord(character):04X}"


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _too_deep() -> str:
    return f"more than {DEEPEST} levels of nesting"
