"""The expressions of a signature that Cog's static generator reads as Python does: plain literals and simple types."""

from __future__ import annotations

import ast
import re

from clip_gen.serving.inputs import TYPES, Kind


class NotPlainError(Exception):
    """Something Cog's generator does not read as Python does; the message says what."""


def literal(source: str, keyword: ast.keyword) -> object:
    """The value of a keyword argument. NotPlainError when Cog would read another or none."""
    text = ast.get_source_segment(source, keyword)
    value = ast.get_source_segment(source, keyword.value)
    if re.sub(r"^\w+\s*=\s*", "", text) != value:
        raise NotPlainError(f"in brackets, {text}")
    return _plain(source, keyword.value)


def _plain(source: str, node: ast.expr) -> object:
    text = ast.get_source_segment(source, node)
    if isinstance(node, ast.List):
        return [_plain(source, item) for item in node.elts]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        # Cog cuts the quotes off and takes what is between as it stands: escapes and a second part stay raw.
        quotes = ('"', "'", '"""', "'''", 'r"', "r'")
        if text not in [f"{quote}{node.value}{quote.removeprefix('r')}" for quote in quotes]:
            raise NotPlainError(f"a string of parts, escapes or prefixes, {text}")
        return node.value
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | None):
        return node.value
    if re.fullmatch(r"-?[\d_.]+(e-?\d+)?", text) and abs(number := ast.literal_eval(text)) < 2**63:
        return number
    raise NotPlainError(f"not a literal, {text}")


def parse_kind(node: ast.expr) -> Kind | None:
    """The kind an annotation names, or None where Cog or we do not take it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return parse_kind(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        sides = [side for side in (node.left, node.right) if not _is_none(side)]
        inner = parse_kind(sides[0]) if len(sides) == 1 else None
        return inner and Kind(inner.name, inner.is_list, nullable=True)
    if isinstance(node, ast.Subscript):
        inner, outer = parse_kind(node.slice), dotted(node.value).rpartition(".")[2]
        if inner is None or inner.nullable:
            return None
        if outer == "Optional":
            return Kind(inner.name, inner.is_list, nullable=True)
        return Kind(inner.name, is_list=True) if outer in ("list", "List") and not inner.is_list else None
    name = dotted(node).removeprefix("cog.")
    return Kind(name) if name in TYPES else None


def dotted(node: ast.expr) -> str:
    """`cog.Path` for that expression, and nothing for one that is no name."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
