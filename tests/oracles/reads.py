"""Which config fields a piece of source reads, found in its syntax tree.

A section is followed through annotations, assignments, attributes of self, loops and return types, so that
`train = self.config.train; train.lr` counts as a read of TrainConfig.lr and `other.lr` does not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel

Read = tuple[str, str]
"""Name of the section and of the field."""


class Reads(ast.NodeVisitor):
    """Visit a module, then look at `found`.

    A type is the name of a section, or a list of types: the items of a tuple, whatever its length.
    """

    def __init__(
        self,
        sections: Mapping[str, type[BaseModel]],
        returns: Mapping[str, Any] | None = None,
        holders: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.sections = sections
        self.returns = returns or {}
        self.holders = holders or {}
        """Classes that are no section but have one as an attribute: class -> attribute -> type."""
        self.known: dict[str, Any] = {}
        self.found: set[Read] = set()

    # Where types come from

    def from_annotation(self, node: ast.AST | None) -> Any:
        """The section that an annotation names, also inside X | None, tuple[...] and Sequence[...]."""
        if isinstance(node, ast.Constant):
            return node.value if node.value in {*self.sections, *self.holders} else None
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            return name if name in {*self.sections, *self.holders} else None
        if isinstance(node, ast.BinOp):
            return self.from_annotation(node.left) or self.from_annotation(node.right)
        if isinstance(node, ast.Subscript):
            items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return [self.from_annotation(item) for item in items]
        return None

    def from_hint(self, hint: Any) -> Any:
        """The same for the run-time annotation of a field."""
        if isinstance(hint, type) and hint.__name__ in self.sections:
            return hint.__name__
        parts = [part for part in map(self.from_hint, get_args(hint)) if part]
        is_tuple = getattr(hint, "__origin__", None) is tuple
        return ([parts[0]] if is_tuple else parts[0]) if parts else None

    def resolve(self, node: ast.AST) -> Any:
        """The type of an expression; reading a field on the way is noted."""
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            return self.returns.get(name)
        if isinstance(node, ast.Subscript):
            held = self.resolve(node.value)
            return held[0] if isinstance(held, list) and held else None
        if isinstance(node, ast.BoolOp):
            return next((found for found in map(self.resolve, node.values) if found), None)
        if isinstance(node, ast.Name | ast.Attribute):
            known = self.known.get(ast.unparse(node))
            if known is not None or isinstance(node, ast.Name):
                return known
            owner = self.resolve(node.value)
            if isinstance(owner, str) and owner in self.holders:
                return self.holders[owner].get(node.attr)
            if isinstance(owner, str) and node.attr in self.sections[owner].model_fields:
                self.found.add((owner, node.attr))
                return self.from_hint(self.sections[owner].model_fields[node.attr].annotation)
        return None

    # Where names get them

    def bind(self, target: ast.AST, kind: Any) -> None:
        if isinstance(target, ast.Tuple):
            for i, item in enumerate(target.elts):
                self.bind(item, kind[i] if isinstance(kind, list) and i < len(kind) else None)
        elif kind is not None:
            self.known[ast.unparse(target)] = kind
        elif isinstance(target, ast.Name):
            self.known.pop(target.id, None)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        if isinstance(node.value, ast.Tuple):
            kind: Any = [self.resolve(item) for item in node.value.elts]
        else:
            kind = self.resolve(node.value)
        for target in node.targets:
            self.bind(target, kind)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        self.bind(node.target, self.from_annotation(node.annotation))

    def visit_For(self, node: ast.For) -> None:
        self.loop(node)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.loop(node)
        self.generic_visit(node)

    def loop(self, node: ast.For | ast.comprehension) -> None:
        held = self.resolve(node.iter)
        self.bind(node.target, held[0] if isinstance(held, list) and held else None)

    def generic_visit(self, node: ast.AST) -> None:
        # The loop of a comprehension stands after the expression that uses its variables.
        for generator in getattr(node, "generators", ()):
            self.visit(generator)
        super().generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if any("validator" in ast.unparse(decorator) for decorator in node.decorator_list):
            return  # checking a value is not using it
        before = dict(self.known)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            self.bind(ast.Name(argument.arg), self.from_annotation(argument.annotation) or before.get(argument.arg))
        self.generic_visit(node)
        # What self has been given is known in the class's other methods.
        own = {name: kind for name, kind in self.known.items() if name.startswith("self.")}
        self.known = before | own

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before = dict(self.known)
        if node.name in self.sections:
            self.known["self"] = node.name
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and node.name not in self.sections:
                kind = self.from_annotation(item.annotation)
                if kind is not None:
                    self.known[f"self.{ast.unparse(item.target)}"] = kind
        self.generic_visit(node)
        self.known = before

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.resolve(node)
        self.generic_visit(node)


def fields_read(sources: Iterable[str], sections: Iterable[type[BaseModel]]) -> set[Read]:
    """(section, field) pairs that the sources read."""
    named = {section.__name__: section for section in sections}
    trees = [ast.parse(source) for source in sources]
    typed = Reads(named)
    nodes = [node for tree in trees for node in ast.walk(tree)]
    holders = {
        node.name: _held(node, typed) for node in nodes if isinstance(node, ast.ClassDef) and node.name not in named
    }
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    returns = {node.name: typed.from_annotation(node.returns) for node in functions}
    found: set[Read] = set()
    for tree in trees:
        reads = Reads(
            named,
            {name: kind for name, kind in returns.items() if kind},
            {name: held for name, held in holders.items() if held},
        )
        reads.visit(tree)
        found |= reads.found
    return found


def _held(node: ast.ClassDef, typed: Reads) -> dict[str, Any]:
    """The annotated attributes and properties of a class that are sections."""
    annotated = {ast.unparse(item.target): item.annotation for item in node.body if isinstance(item, ast.AnnAssign)}
    properties = {
        item.name: item.returns for item in node.body if isinstance(item, ast.FunctionDef) if item.decorator_list
    }
    kinds = {name: typed.from_annotation(annotation) for name, annotation in (annotated | properties).items()}
    return {name: kind for name, kind in kinds.items() if kind}
