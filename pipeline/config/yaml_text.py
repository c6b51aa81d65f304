"""YAML by PyYAML: a safe loader for settings, and values on one line. It is loaded where a text needs it."""

from __future__ import annotations

import itertools
import re
from typing import Any

import yaml

from grappa.core.printing import sentence

LINE_ENDS = re.compile("[\n\r\x85\u2028\u2029]")
MAX_VALUES, MAX_DEPTH = 100_000, 32  # of a YAML file; the largest known configuration has 300 values


class _Loader(yaml.SafeLoader):
    """YAML's safe loader for settings: texts, numbers, truth values, null, lists, and mappings whose keys are texts.

    A key that is written twice is refused (else the last value would win in silence), and so is a file that is nested
    too deep or stands for too much, which a few lines can do by references.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._extent: dict[int, tuple[int, int]] = {}  # of each finished node: its values and depth, written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark, is_reference = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels lie in each other", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_reference and id(node) not in self._extent:
            raise yaml.composer.ComposerError(None, None, "a value refers to itself", mark)
        if node is not None and id(node) not in self._extent:
            self._extent[id(node)] = self._checked_extent(node)
        return node

    def _checked_extent(self, node: yaml.Node) -> tuple[int, int]:
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        pairs = itertools.chain.from_iterable(parts) if isinstance(node, yaml.MappingNode) else parts
        extents = [self._extent[id(part)] for part in pairs]
        values, depth = 1 + sum(each[0] for each in extents), 1 + max((each[1] for each in extents), default=0)
        if values > MAX_VALUES or depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_VALUES} values or {MAX_DEPTH} levels", None)
        return values, depth

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = set()
        for key, _ in node.value:
            if key.tag not in (_TEXT, "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"):
                what = f"`{key.value}`" if isinstance(key, yaml.ScalarNode) else "a list or a section"
                raise yaml.constructor.ConstructorError(None, None, f"{what} is a key: quote it", key.start_mark)
            if key.value in written:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is written twice", node.start_mark)
            written.add(key.value)
        return super().construct_mapping(node, deep)


_TEXT = "tag:yaml.org,2002:str"
# A date stays a text, since no setting is one, and what is neither text, number, list nor mapping has no constructor.
_KEPT = ("null", "bool", "int", "float", "seq", "map", "str")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _KEPT
}


def parsed_yaml(text: str) -> Any:
    """Return the value that a YAML text stands for; ValueError with the reason where it is none that is read."""
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, AttributeError, LookupError) as error:  # the last three: `!!int x`, `!!bool x`
        raise ValueError(sentence(error, limit=300)) from None


def on_one_line(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.dump(
        value, Dumper=_Flow, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False
    )
    return text.removesuffix("...\n").rstrip("\n")


class _Flow(yaml.SafeDumper):
    """A dumper of text on one line: what YAML reads as the end of a line is escaped, and so comes back as it was."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if LINE_ENDS.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Flow.add_representer(str, _text_node)
