"""A function's parameters, as its source has them."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one call gives."""

    positional: int = 0
    names: frozenset[str] = frozenset()
    is_partial: bool = False
    """Others may follow: `partial`, or a call with `*` or `**`."""

    @classmethod
    def of(cls, node: ast.Call, *, skip: int = 0) -> "Call":
        """Of a call; `skip` arguments are not the function's (`partial`'s first)."""
        given = node.args[skip:]
        spread = any(isinstance(each, ast.Starred) for each in given)
        names = {each.arg for each in node.keywords if each.arg is not None}
        more = spread or any(each.arg is None for each in node.keywords)
        count = 0 if spread else len(given)
        return cls(positional=count, names=frozenset(names), is_partial=more or skip > 0)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Names of parameters; of those with a default also that they have one."""

    positional: tuple[str, ...] = ()
    by_name: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    takes_more: bool = False
    """`*args`."""
    takes_any_name: bool = False
    """`**kwargs`."""

    @classmethod
    def of(cls, arguments: ast.arguments) -> "Signature":
        """Of a function definition."""
        positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        by_name = [each.arg for each in arguments.kwonlyargs]
        optional = set(positional[len(positional) - len(arguments.defaults) :])
        optional |= {
            name
            for name, default in zip(by_name, arguments.kw_defaults, strict=True)
            if default is not None
        }
        return cls(
            positional=tuple(positional),
            by_name=tuple(by_name),
            optional=frozenset(optional),
            takes_more=arguments.vararg is not None,
            takes_any_name=arguments.kwarg is not None,
        )

    def bound(self) -> "Signature":
        """Without the first parameter: self or cls."""
        return replace(self, positional=self.positional[1:])

    def misfit(self, call: Call) -> str:
        """Why a call cannot be made, in words; empty if it can."""
        if call.positional > len(self.positional) and not self.takes_more:
            return f"takes {len(self.positional)} arguments by position, {call.positional} given"
        known = {*self.positional[call.positional :], *self.by_name}
        unknown = sorted(call.names - known)
        if unknown and not self.takes_any_name:
            return f"has no parameter {', '.join(unknown)}"
        required = [
            name
            for name in (*self.positional[call.positional :], *self.by_name)
            if name not in self.optional and name not in call.names
        ]
        if required and not call.is_partial:
            return f"requires {', '.join(required)}"
        return ""

    def misfit_for(self, base: "Signature") -> str:
        """Why a method cannot stand in for another that is called by position; empty if it can.

        Names by which callers may give positional parameters are left to the recorded signatures:
        Megatron's steps are called by position.
        """
        required = [name for name in base.positional if name not in base.optional]
        most = len(base.positional)
        if self.takes_any_name:  # what it does not name is given by name
            most = max(len(required), min(most, len(self.positional)))
        names = frozenset({*base.positional[most:], *base.by_name})
        return self.misfit(Call(positional=len(required))) or self.misfit(
            Call(positional=most, names=names)
        )

    def reads_as(self, known: "Signature", call: Call) -> bool:
        """Whether what a call gives by position goes to the same parameters."""
        return self.positional[: call.positional] == known.positional[: call.positional]

    def __str__(self) -> str:
        def mark(names: Iterable[str]) -> list[str]:
            return [f"{name}=" if name in self.optional else name for name in names]

        parts = mark(self.positional)
        if self.takes_more:
            parts.append("*args")
        elif self.by_name:
            parts.append("*")
        parts += mark(self.by_name)
        if self.takes_any_name:
            parts.append("**kwargs")
        return f"({', '.join(parts)})"

    @classmethod
    def parse(cls, text: str) -> "Signature":
        """The inverse of `str`."""
        source = f"def f{text.replace('=', '=0')}: ..."
        function = ast.parse(source).body[0]
        assert isinstance(function, ast.FunctionDef)
        return cls.of(function.args)
