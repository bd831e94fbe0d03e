"""Classes of a source: their members, inherited ones too, and the types that they say they have."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_llep.offline.seams.signatures import Signature
from megatron_llep.offline.seams.source import OUTSIDE, Definition, Module, Source, statements

Function = ast.FunctionDef | ast.AsyncFunctionDef
# Bases from which nothing comes that we use: those of enumerations among them.
_WITHOUT_MEMBERS = ("Generic", "Protocol", "ABC", "abc.ABC", "object", "str", "int")


@dataclass(frozen=True, kw_only=True)
class Class:
    """A class and where it stands."""

    source: Source
    module: Module
    node: ast.ClassDef

    @classmethod
    def of(cls, source: Source, found: Definition | None) -> "Class | None":
        """The class that a name stands for, if it is one."""
        if found is None or found.module is None or not isinstance(found.node, ast.ClassDef):
            return None
        return cls(source=source, module=found.module, node=found.node)

    @property
    def name(self) -> str:
        """With its module."""
        return f"{self.module.name}.{self.node.name}"

    def bases(self) -> Iterator["Class | None"]:
        """Direct ones; None for one whose source is not read."""
        for base in self.node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base
            if ast.unparse(expression) in _WITHOUT_MEMBERS:
                continue
            yield Class.of(self.source, resolve(self.source, self.module, expression))

    def line(self) -> Iterator["Class | None"]:
        """This class and all that it inherits from, depth first."""
        yield self
        for base in self.bases():
            if base is None:
                yield None
            else:
                yield from base.line()

    def methods(self) -> dict[str, Function]:
        """Its own; of several (overloads, setters) the first."""
        found: dict[str, Function] = {}
        for statement in statements(self.node.body):
            if isinstance(statement, Function):
                found.setdefault(statement.name, statement)
        return found

    def find_method(self, name: str) -> "tuple[Class, Function] | None":
        """A method, its own or inherited."""
        for each in self.line():
            if each is not None and name in (methods := each.methods()):
                return each, methods[name]
        return None

    def has(self, name: str) -> bool:
        """Whether instances have an attribute: defined, set on `self`, or not to be known."""
        for each in self.line():
            if each is not None and (
                name in each.methods() or any(key == name for key, _ in each.fields())
            ):
                return True
        return self.answers_for_any()

    def answers_for_any(self) -> bool:
        """Whether it inherits what is not read, or has a `__getattr__`.

        Not torch's modules, whose `__getattr__` finds what was set on them.
        """
        for each in self.line():
            if each is None:
                return True
            if "__getattr__" in each.methods() and not each.module.name.startswith("torch."):
                return True
        return False

    def fields(self) -> Iterator[tuple[str, ast.expr | None]]:
        """What the class body or a method binds, with its annotation where there is one."""
        for statement in statements(self.node.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                yield statement.target.id, statement.annotation
            elif isinstance(statement, ast.Assign):
                for target in statement.targets:
                    if isinstance(target, ast.Name):
                        yield target.id, None
        for method in self.methods().values():
            given = {
                each.arg: each.annotation
                for each in (*method.args.args, *method.args.kwonlyargs)
                if each.annotation is not None
            }
            for node in ast.walk(method):
                yield from _set_on_self(node, given)
            if method.name == "__init__" and self.module.name.startswith("torch."):
                yield from ((each, None) for each in _set_by_name(method))

    def type_of(self, name: str) -> "Class | None":
        """The class of an attribute, where an annotation says it."""
        for each in self.line():
            if each is None:
                continue
            if (method := each.methods().get(name)) is not None:
                is_property = any(
                    ast.unparse(mark).endswith("property") for mark in method.decorator_list
                )
                return annotated(self.source, each.module, method.returns) if is_property else None
            for key, annotation in each.fields():
                if key == name and annotation is not None:
                    return annotated(self.source, each.module, annotation)
        return None

    def constructor(self) -> Signature | None:
        """What making an instance takes; None where that is not known."""
        if any(_is_dataclass(each.node) for each in self.line() if each is not None):
            return self._dataclass_constructor()
        found = self.find_method("__init__")
        return Signature.of(found[1].args).bound() if found else None

    def _dataclass_constructor(self) -> Signature | None:
        if "__init__" in self.methods() or any(each is None for each in self.line()):
            return None
        optional: dict[str, bool] = {}
        for each in reversed([each for each in self.line() if each is not None]):
            for statement in statements(each.node.body):
                if not isinstance(statement, ast.AnnAssign):
                    continue
                text = ast.unparse(statement.annotation)
                value = ast.unparse(statement.value) if statement.value else ""
                if "ClassVar" not in text and "init=False" not in value:
                    name = ast.unparse(statement.target)
                    optional[name] = _has_default(statement.value)
        by_name = any("kw_only=True" in ast.unparse(mark) for mark in self.node.decorator_list)
        return Signature(
            positional=() if by_name else tuple(optional),
            by_name=tuple(optional) if by_name else (),
            optional=frozenset(name for name, has_default in optional.items() if has_default),
        )


def resolve(source: Source, module: Module, expression: ast.expr) -> Definition | None:
    """What a dotted expression stands for in a module."""
    text = ast.unparse(expression)
    if not all(part.isidentifier() for part in text.split(".")):
        return OUTSIDE
    return source.look_up(module, text)


def annotated(source: Source, module: Module, annotation: ast.expr | None) -> Class | None:
    """The class that an annotation names, by itself or beside None."""
    if annotation is None:
        return None
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            annotation = ast.parse(annotation.value, mode="eval").body
        except SyntaxError:
            return None
    if isinstance(annotation, ast.BinOp):
        sides = [annotated(source, module, each) for each in (annotation.left, annotation.right)]
        is_optional = "None" in (ast.unparse(annotation.left), ast.unparse(annotation.right))
        return next(filter(None, sides), None) if is_optional else None
    if isinstance(annotation, ast.Subscript):
        is_optional = ast.unparse(annotation.value).split(".")[-1] == "Optional"
        return annotated(source, module, annotation.slice) if is_optional else None
    if not isinstance(annotation, ast.Name | ast.Attribute):
        return None
    return Class.of(source, resolve(source, module, annotation))


def _set_on_self(
    node: ast.AST, given: dict[str, ast.expr]
) -> Iterator[tuple[str, ast.expr | None]]:
    """`self.name: T = ...`, or `self.name = parameter`, whose annotation it gets."""
    if isinstance(node, ast.AnnAssign) and _is_on_self(node.target):
        assert isinstance(node.target, ast.Attribute)
        yield node.target.attr, node.annotation
    elif isinstance(node, ast.Assign):
        value = node.value.id if isinstance(node.value, ast.Name) else ""
        for outer in node.targets:
            for target in outer.elts if isinstance(outer, ast.Tuple) else [outer]:
                if isinstance(target, ast.Attribute) and _is_on_self(target):
                    yield target.attr, given.get(value)


def _is_on_self(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _set_by_name(method: Function) -> Iterator[str]:
    """`super().__setattr__("name", value)`, as torch's modules begin."""
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("__setattr__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def _is_dataclass(node: ast.ClassDef) -> bool:
    marks = [mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list]
    return any(ast.unparse(mark).split(".")[-1] == "dataclass" for mark in marks)


def _has_default(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] == "field":
        return any(each.arg in ("default", "default_factory") for each in value.keywords)
    return value is not None
