"""Mutants of a Python file: one operator or constant changed in each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


class Mutant(NamedTuple):
    """line: of the change. before, after: the changed expression. source: of the whole mutated file. function: first
    line of the innermost function around the change, decorators included; None outside functions.
    """

    line: int
    before: str
    after: str
    source: str
    function: int | None


def mutants_of(source: str) -> Iterator[Mutant]:
    """Every mutant of a file."""
    tree = ast.parse(source)
    ignored = set(_ignored(tree))
    functions = dict(_functions(tree, None))
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    encoded = source.encode()
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr | ast.AugAssign) or node in ignored or node.end_lineno is None:
            continue
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + (node.end_col_offset or 0)
        for after in _changes(node):
            # Parentheses, where the new expression binds less tightly than the old one; none round a statement.
            text = after if isinstance(node, ast.AugAssign | ast.Constant) else f"({after})"
            before = encoded[begin:end].decode()
            mutated = (encoded[:begin] + text.encode() + encoded[end:]).decode()
            yield Mutant(node.lineno, before, after, mutated, functions[node])


def _functions(node: ast.AST, function: int | None) -> Iterator[tuple[ast.AST, int | None]]:
    """Each node with the first line of the innermost function around it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = min(each.lineno for each in (node, *node.decorator_list))
    yield node, function
    for child in ast.iter_child_nodes(node):
        yield from _functions(child, function)


def _ignored(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that do not run, and those that tests cannot judge: annotations, decorators, messages, checks of zip."""
    for node in ast.walk(tree):
        roots: list[ast.AST | None] = []
        if isinstance(node, ast.AnnAssign | ast.arg):
            roots.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            roots += [node.returns, *node.decorator_list]
        elif isinstance(node, ast.ClassDef):
            roots += node.decorator_list
        elif isinstance(node, ast.Raise | ast.JoinedStr) or _is_log_call(node):
            roots.append(node)
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            roots.append(node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp | ast.Subscript):
            # Aliases of types: ``Input = str | Many[int]``.
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if names and names[0][0].isupper() and not names[0].isupper():
                roots.append(node.value)
        for root in roots:
            if root is not None:
                yield from ast.walk(root)


def _is_log_call(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return isinstance(node.func.value, ast.Name) and node.func.value.id == "log"


def _changes(node: ast.expr | ast.AugAssign) -> Iterator[str]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield ast.unparse(ast.Compare(node.left, [_COMPARISONS[type(node.ops[0])]()], node.comparators))
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        yield ast.unparse(ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right))
    elif isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
        yield ast.unparse(ast.AugAssign(node.target, _OPERATORS[type(node.op)](), node.value))
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.unparse(ast.BoolOp(other, node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield str(not node.value)
        elif isinstance(node.value, int | float):
            yield repr(node.value + 1)
