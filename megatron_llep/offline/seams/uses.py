"""What Python files use of Megatron, and how: imports, calls, attributes, overridden methods.

Collected from the files' own source. A branch that a condition on Megatron's version leaves out
(`if MEGATRON >= (0, 19)`) is left out here too.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_llep.offline.seams.classes import Class, Function
from megatron_llep.offline.seams.signatures import Call, Signature
from megatron_llep.offline.seams.source import Definition, Source

PACKAGE = "megatron"
VERSION = "MEGATRON"
"""What the version is called in `megatron_llep.compat`."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One place where Megatron is used."""

    name: str
    """Of what is used: module and name."""
    user: str
    """File and line, and what it does."""
    file: Path
    """Of Megatron, where it is expected."""
    expected: str
    signature: Signature | None = None
    """Of a function that is called or overridden, as the tree has it."""
    call: Call | None = None
    is_override: bool = False
    """Without a signature: a method of ours that overrides nothing in this tree."""
    problem: str = ""
    """What is wrong, if something is."""


class Reader:
    """Reads one file."""

    def __init__(self, source: Source, version: tuple[int, int], text: str, shown: str) -> None:
        self._source, self._version, self._shown = source, version, shown
        tree = ast.parse(text, filename=shown)
        self._tree = _LeaveOut(version).visit(tree)
        self._bound: dict[str, Definition] = {}
        self._full: dict[str, str] = {}
        """The full name of what a name was imported as."""

    def read(self) -> Iterator[Use]:
        """All uses, imports first."""
        yield from self._read_imports()
        if self._bound:
            yield from self._read_scope(self._tree, {}, None)

    def _read_imports(self) -> Iterator[Use]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ImportFrom) and _is_megatron(node.module or ""):
                for alias in node.names:
                    yield self._import(node, node.module or "", alias.name, alias)
            elif isinstance(node, ast.Import):
                for alias in [each for each in node.names if _is_megatron(each.name)]:
                    yield self._import(node, alias.name, None, alias)

    def _import(self, node: ast.stmt, module: str, name: str | None, alias: ast.alias) -> Use:
        found = self._source.look_up_import(module, name)
        full = f"{module}.{name}" if name else module
        if found is not None and (name or alias.asname):
            bound_as = alias.asname or name or ""
            self._bound[bound_as], self._full[bound_as] = found, full
        return Use(
            name=full,
            user=self._at(node, "imports it"),
            file=self._file(module),
            expected=f"{name} in {module}" if name else f"module {module}",
            problem="" if found else "it is not there",
        )

    def _read_scope(
        self, scope: ast.AST, types: dict[str, Class], owner: "_Owner | None"
    ) -> Iterator[Use]:
        """Of a module, class or function; functions within know the types around them."""
        types = dict(types)
        for node in _own_nodes(scope):
            if isinstance(node, ast.ClassDef):
                yield from self._read_class(node, types)
            elif isinstance(node, Function | ast.Lambda):
                inner = types | self._parameter_types(node.args)
                if owner is not None and node in owner.node.body and not _is_static(node):
                    inner[node.args.args[0].arg] = owner.base
                yield from self._read_scope(node, inner, owner)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self._note(types, node.target.id, self._annotated(node.annotation))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._note(types, node.targets[0].id, self._type_of(node.value, types, owner))
            if isinstance(node, ast.Call):
                yield from self._read_call(node, types, owner)
            elif isinstance(node, ast.Attribute):
                yield from self._read_attribute(node, types, owner)

    def _read_class(self, node: ast.ClassDef, types: dict[str, Class]) -> Iterator[Use]:
        bases = [self._class_of(base) for base in node.bases]
        base = next(filter(None, bases), None)
        owner = _Owner(node=node, base=base) if base is not None else None
        if owner is not None:
            yield from self._read_overrides(owner)
        yield from self._read_scope(node, types, owner)

    def _read_overrides(self, owner: "_Owner") -> Iterator[Use]:
        for statement in owner.node.body:
            if not isinstance(statement, Function):
                continue
            found = owner.base.find_method(statement.name)
            if found is None:
                yield Use(
                    name=f"{self._name_of(owner.base)}.{statement.name}",
                    user=self._at(statement, f"overrides it in {owner.node.name}"),
                    file=owner.base.module.path,
                    expected=f"method {statement.name} of {owner.base.node.name}",
                    is_override=True,
                )
                continue
            if not _is_megatron(found[0].module.name):
                continue
            signature = _method_signature(found[1])
            # A constructor is called by whoever knows the class.
            own = _method_signature(statement)
            is_constructor = statement.name == "__init__"
            misfit = "" if is_constructor else own.misfit_for(signature)
            yield Use(
                name=f"{self._name_of(owner.base)}.{statement.name}",
                user=self._at(statement, f"overrides it in {owner.node.name}"),
                file=found[0].module.path,
                expected=f"a method that {statement.name}{own} can stand in for",
                signature=signature,
                is_override=True,
                problem=f"it is {statement.name}{signature}, and the override {misfit}"
                if misfit
                else "",
            )

    def _read_call(
        self, node: ast.Call, types: dict[str, Class], owner: "_Owner | None"
    ) -> Iterator[Use]:
        function, call = node.func, Call.of(node)
        if isinstance(function, ast.Name) and function.id == "partial" and node.args:
            function, call = node.args[0], Call.of(node, skip=1)
        name, file, signature = self._callee(function, types, owner)
        if signature is None:
            return
        misfit = signature.misfit(call)
        yield Use(
            name=name,
            user=self._at(node, "calls it"),
            file=file,
            expected=f"to be called as {ast.unparse(node)[:100]}",
            signature=signature,
            call=call,
            problem=f"it is {name.split('.')[-1]}{signature}: {misfit}" if misfit else "",
        )

    def _callee(
        self, function: ast.expr, types: dict[str, Class], owner: "_Owner | None"
    ) -> tuple[str, Path, Signature | None]:
        """Name, file and signature of what is called, if it is Megatron's."""
        nothing = "", Path(), None
        if isinstance(function, ast.Attribute):
            receiver = self._type_of(function.value, types, owner)
            if receiver is not None:
                if owner is not None and self._is_own(function, owner):
                    return nothing
                found = receiver.find_method(function.attr)
                if found is None or not _is_megatron(found[0].module.name):
                    return nothing
                name = f"{self._name_of(receiver)}.{function.attr}"
                return name, found[0].module.path, _method_signature(found[1])
        found_definition = self._definition(function)
        if found_definition is None or found_definition.module is None:
            return nothing
        path, node = found_definition.module.path, found_definition.node
        if not _is_megatron(found_definition.module.name):
            return nothing
        name = self._full_name(function)
        if isinstance(node, Function):
            # What a decorator makes of it is another's to say, but those keep the parameters.
            return name, path, Signature.of(node.args)
        made = Class.of(self._source, found_definition)
        if made is not None:
            return name, path, made.constructor()
        if isinstance(function, ast.Attribute):  # a class's own method
            receiver = Class.of(self._source, self._definition(function.value))
            if receiver and (method := receiver.find_method(function.attr)):
                is_bound = any(ast.unparse(m) == "classmethod" for m in method[1].decorator_list)
                signature = Signature.of(method[1].args)
                return name, method[0].module.path, signature.bound() if is_bound else signature
        return nothing

    def _read_attribute(
        self, node: ast.Attribute, types: dict[str, Class], owner: "_Owner | None"
    ) -> Iterator[Use]:
        receiver = self._type_of(node.value, types, owner)
        if receiver is not None:
            if owner is not None and self._is_own(node, owner):
                return
            if node.attr.startswith("__") or receiver.answers_for_any():
                return
            yield Use(
                name=f"{self._name_of(receiver)}.{node.attr}",
                user=self._at(node, "uses it"),
                file=receiver.module.path,
                expected=f"attribute {node.attr} of {receiver.node.name}",
                problem="" if receiver.has(node.attr) else "it has none",
            )
            return
        found = self._definition(node.value)
        if found is None or found.module is None or not _is_megatron(found.module.name):
            return
        if node.attr.startswith("__"):
            return
        full = f"{self._full_name(node.value)}.{node.attr}"
        problem = ""
        if found.is_module:
            if self._source.look_up(found.module, node.attr) is None:
                problem = "it is not there"
        else:
            known = Class.of(self._source, found)
            if known is None:
                return
            if not known.has(node.attr):
                problem = "it has none"
        yield Use(
            name=full,
            user=self._at(node, "uses it"),
            file=found.module.path,
            expected=f"{node.attr} in {self._full_name(node.value)}",
            problem=problem,
        )

    def _type_of(
        self, node: ast.expr, types: dict[str, Class], owner: "_Owner | None"
    ) -> Class | None:
        """The Megatron class of a value, where source says it."""
        if isinstance(node, ast.Name):
            return types.get(node.id)
        if isinstance(node, ast.Attribute):
            receiver = self._type_of(node.value, types, owner)
            if receiver is None or (owner is not None and self._is_own(node, owner)):
                return None
            found = receiver.type_of(node.attr)
            return found if found and _is_megatron(found.module.name) else None
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "super":
                return owner.base if owner else None
            return self._class_of(node.func)
        return None

    def _is_own(self, node: ast.Attribute, owner: "_Owner") -> bool:
        """Whether `self.name` is defined or set by our class itself."""
        is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "layer", "cls")
        return is_self and node.attr in owner.own_names

    def _parameter_types(self, arguments: ast.arguments) -> dict[str, Class]:
        types: dict[str, Class] = {}
        for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            self._note(types, each.arg, self._annotated(each.annotation))
        return types

    def _annotated(self, annotation: ast.expr | None) -> Class | None:
        if annotation is None:
            return None
        if isinstance(annotation, ast.BinOp):
            sides = [annotation.left, annotation.right]
            if "None" not in map(ast.unparse, sides):
                return None
            return next(filter(None, map(self._annotated, sides)), None)
        return self._class_of(annotation)

    @staticmethod
    def _note(types: dict[str, Class], name: str, found: Class | None) -> None:
        if found is not None and _is_megatron(found.module.name):
            types[name] = found
        else:
            types.pop(name, None)

    def _class_of(self, node: ast.expr) -> Class | None:
        if not isinstance(node, ast.Name | ast.Attribute):
            return None
        found = Class.of(self._source, self._definition(node))
        return found if found and _is_megatron(found.module.name) else None

    def _definition(self, node: ast.expr) -> Definition | None:
        """What an imported name, or a name of an imported module, stands for."""
        if isinstance(node, ast.Name):
            return self._bound.get(node.id)
        if isinstance(node, ast.Attribute):
            outer = self._definition(node.value)
            if outer is not None and outer.is_module and outer.module is not None:
                return self._source.look_up(outer.module, node.attr)
            if outer is not None and isinstance(outer.node, ast.ClassDef):
                return Definition(module=outer.module, node=node)
        return None

    def _full_name(self, node: ast.expr) -> str:
        first, *rest = ast.unparse(node).split(".")
        return ".".join([self._full.get(first, first), *rest])

    def _name_of(self, found: Class) -> str:
        """As the package imports it, where it does."""
        for bound_as, definition in self._bound.items():
            if definition.node is found.node:
                return self._full[bound_as]
        return found.name

    def _at(self, node: ast.AST, what: str) -> str:
        return f"{self._shown}:{getattr(node, 'lineno', 0)} {what}"

    def _file(self, module_name: str) -> Path:
        module = self._source.module(module_name)
        if module is not None:
            return module.path
        folder = self._source.folders[PACKAGE]
        return folder.joinpath(*module_name.split(".")).with_suffix(".py")


class _Owner:
    """Our class with a base of Megatron's, whose methods are being read."""

    def __init__(self, *, node: ast.ClassDef, base: Class) -> None:
        self.node, self.base = node, base
        own = Class(source=base.source, module=base.module, node=node)
        self.own_names = {*own.methods(), *(name for name, _ in own.fields())}


class _LeaveOut(ast.NodeTransformer):
    """Takes the branches out that a condition on the version does not run."""

    def __init__(self, version: tuple[int, int]) -> None:
        self._version = version

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        holds = self._judge(node.test)
        if holds is None:
            return node
        return (node.body if holds else node.orelse) or ast.Pass()

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
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


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a scope in order; functions and classes within it, not what is in these."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            yield from _own_nodes(node)


def _is_megatron(module: str) -> bool:
    """Of megatron-core's wheel; megatron-bridge shares the name."""
    return module.split(".")[0] == PACKAGE and not module.startswith("megatron.bridge")


def _method_signature(method: Function) -> Signature:
    """As called on an instance."""
    signature = Signature.of(method.args)
    return signature if _is_static(method) else signature.bound()


def _is_static(node: ast.AST) -> bool:
    marks = node.decorator_list if isinstance(node, Function) else []
    return any(ast.unparse(mark) == "staticmethod" for mark in marks)
