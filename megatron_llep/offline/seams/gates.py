"""Branches that a version of Megatron does not run, taken out of a file's syntax tree."""

import ast

VERSION = "MEGATRON"
"""What the version is called in `megatron_llep.compat`."""


class LeaveOut(ast.NodeTransformer):
    """Takes out what `if MEGATRON >= (0, 19)`, or `<`, does not run; also of expressions."""

    def __init__(self, version: tuple[int, int]) -> None:
        self._version = version

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """Statements of the branch that runs."""
        self.generic_visit(node)
        holds = self._judge(node.test)
        if holds is None:
            return node
        return (node.body if holds else node.orelse) or ast.Pass()

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """The value that is taken."""
        self.generic_visit(node)
        holds = self._judge(node.test)
        return node if holds is None else node.body if holds else node.orelse

    def _judge(self, test: ast.expr) -> bool | None:
        if not (isinstance(test, ast.Compare) and ast.unparse(test.left) == VERSION):
            return None
        (bound,) = (ast.literal_eval(each) for each in test.comparators)
        if isinstance(test.ops[0], ast.GtE):
            return self._version >= bound
        return self._version < bound if isinstance(test.ops[0], ast.Lt) else None
