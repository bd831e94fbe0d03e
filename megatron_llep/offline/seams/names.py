"""What the names of one of our files stand for in Megatron, and of which class values are."""

import ast
from pathlib import Path

from megatron_llep.offline.seams.classes import Class, Function
from megatron_llep.offline.seams.signatures import Signature
from megatron_llep.offline.seams.source import Definition, Source

PACKAGE = "megatron"
Types = dict[str, Class]
"""The Megatron class of each variable that has one."""


class Owner:
    """Our class with a base of Megatron's, whose methods are being read."""

    def __init__(self, *, node: ast.ClassDef, base: Class) -> None:
        self.node, self.base = node, base
        own = Class(source=base.source, module=base.module, node=node)
        self._own_names = {*own.methods(), *(name for name, _ in own.fields())}

    def defines(self, node: ast.Attribute) -> bool:
        """Whether it is an attribute of `self` that our class defines or sets.

        What Megatron's class lacks counts as such where there is another base, which is ours.
        """
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "layer", "cls")):
            return False
        may_inherit = len(self.node.bases) > 1 and not self.base.has(node.attr)
        return node.attr in self._own_names or may_inherit


class Names:
    """Imported names of a file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._bound: dict[str, Definition] = {}
        self._full: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._bound)

    def bind(self, name: str, found: Definition, full: str) -> None:
        """Note what an import binds, and the name it was imported by."""
        self._bound[name], self._full[name] = found, full

    def definition(self, node: ast.expr) -> Definition | None:
        """What an imported name, or a name of an imported module, stands for."""
        if isinstance(node, ast.Name):
            return self._bound.get(node.id)
        if isinstance(node, ast.Attribute):
            outer = self.definition(node.value)
            if outer is not None and outer.is_module and outer.module is not None:
                return self.source.look_up(outer.module, node.attr)
            if outer is not None and isinstance(outer.node, ast.ClassDef):
                return Definition(module=outer.module, node=node)
        return None

    def class_of(self, node: ast.expr) -> Class | None:
        """The Megatron class that an expression names."""
        if not isinstance(node, ast.Name | ast.Attribute):
            return None
        found = Class.of(self.source, self.definition(node))
        return found if found and is_megatron(found.module.name) else None

    def annotated(self, annotation: ast.expr | None) -> Class | None:
        """The Megatron class that an annotation names, by itself or beside None."""
        if isinstance(annotation, ast.BinOp):
            sides = [annotation.left, annotation.right]
            if "None" not in map(ast.unparse, sides):
                return None
            return next(filter(None, map(self.annotated, sides)), None)
        return None if annotation is None else self.class_of(annotation)

    def types_within(self, arguments: ast.arguments, around: Types) -> Types:
        """Those that a function sees: its parameters', and what is around it."""
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        own = {each.arg: self.annotated(each.annotation) for each in every}
        kept = {name: each for name, each in around.items() if name not in own}
        return kept | {name: each for name, each in own.items() if each is not None}

    def type_of(self, node: ast.expr, types: Types, owner: Owner | None) -> Class | None:
        """The Megatron class of a value, where source says it."""
        if isinstance(node, ast.Name):
            return types.get(node.id)
        if isinstance(node, ast.Attribute):
            receiver = self.type_of(node.value, types, owner)
            if receiver is None or (owner is not None and owner.defines(node)):
                return None
            found = receiver.type_of(node.attr)
            return found if found and is_megatron(found.module.name) else None
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "super":
                return owner.base if owner else None
            return self.class_of(node.func)
        return None

    def callee(
        self, function: ast.expr, types: Types, owner: Owner | None
    ) -> tuple[str, Path, Signature] | None:
        """Name, file and signature of what is called, if it is Megatron's and known."""
        if isinstance(function, ast.Attribute):
            receiver = self.type_of(function.value, types, owner)
            if receiver is not None:
                return self._method(receiver, function, owner)
        found = self.definition(function)
        if found is None or found.module is None or not is_megatron(found.module.name):
            return None
        name, path = self.full_name(function), found.module.path
        if isinstance(found.node, Function):
            # What a decorator makes of it is another's to say, but those keep the parameters.
            return name, path, Signature.of(found.node.args)
        made = Class.of(self.source, found)
        if made is not None:
            constructor = made.constructor()
            return None if constructor is None else (name, path, constructor)
        if isinstance(function, ast.Attribute):  # of a class, not of an instance
            receiver = Class.of(self.source, self.definition(function.value))
            if receiver and (method := receiver.find_method(function.attr)):
                is_bound = any(ast.unparse(m) == "classmethod" for m in method[1].decorator_list)
                signature = Signature.of(method[1].args)
                return name, method[0].module.path, signature.bound() if is_bound else signature
        return None

    def _method(
        self, receiver: Class, function: ast.Attribute, owner: Owner | None
    ) -> tuple[str, Path, Signature] | None:
        if owner is not None and owner.defines(function):
            return None
        found = receiver.find_method(function.attr)
        if found is None or not is_megatron(found[0].module.name):
            return None
        name = f"{self.name_of(receiver)}.{function.attr}"
        return name, found[0].module.path, method_signature(found[1])

    def full_name(self, node: ast.expr) -> str:
        """A dotted expression with the module that its first name was imported from."""
        first, *rest = ast.unparse(node).split(".")
        return ".".join([self._full.get(first, first), *rest])

    def name_of(self, found: Class) -> str:
        """As the file imports it, where it does."""
        for bound_as, definition in self._bound.items():
            if definition.node is found.node:
                return self._full[bound_as]
        return found.name


def is_megatron(module: str) -> bool:
    """Of megatron-core's wheel; megatron-bridge shares the name."""
    return module.split(".")[0] == PACKAGE and not module.startswith("megatron.bridge")


def method_signature(method: Function) -> Signature:
    """As called on an instance."""
    signature = Signature.of(method.args)
    return signature if is_static(method) else signature.bound()


def is_static(node: ast.AST) -> bool:
    """Whether a function is a static method."""
    marks = node.decorator_list if isinstance(node, Function) else []
    return any(ast.unparse(mark) == "staticmethod" for mark in marks)
