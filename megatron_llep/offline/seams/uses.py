"""What a Python file uses of Megatron, and how: imports, calls, attributes, overridden methods.

Collected from the file's own source. A branch that a condition on Megatron's version leaves out
(`if MEGATRON >= (0, 19)`) is left out here too.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_llep.offline.seams.classes import Class, Function
from megatron_llep.offline.seams.gates import LeaveOut
from megatron_llep.offline.seams.names import (
    PACKAGE,
    Names,
    Owner,
    Types,
    is_megatron,
    is_static,
    method_signature,
)
from megatron_llep.offline.seams.signatures import Call, Signature
from megatron_llep.offline.seams.source import Source

OUR_FOLDER = Path(__file__).parents[3]
"""Which holds our package's folder."""


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
        self._source, self._shown = source, shown
        self._tree = LeaveOut(version).visit(ast.parse(text, filename=shown))
        self._names = Names(source)
        self._ours = Source({"megatron_llep": OUR_FOLDER})

    def read(self) -> Iterator[Use]:
        """All uses, imports first."""
        yield from self._read_imports()
        if self._names:
            yield from self._read_scope(self._tree, {}, None)

    def _read_imports(self) -> Iterator[Use]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ImportFrom) and is_megatron(node.module or ""):
                for alias in node.names:
                    yield self._import(node, node.module or "", alias.name, alias)
            elif isinstance(node, ast.Import):
                for alias in [each for each in node.names if is_megatron(each.name)]:
                    yield self._import(node, alias.name, None, alias)

    def _import(self, node: ast.stmt, module: str, name: str | None, alias: ast.alias) -> Use:
        found = self._source.look_up_import(module, name)
        full = f"{module}.{name}" if name else module
        if found is not None and (name or alias.asname):
            self._names.bind(alias.asname or name or "", found, full)
        return Use(
            name=full,
            user=self._at(node, "imports it"),
            file=self._file(module),
            expected=f"{name} in {module}" if name else f"module {module}",
            problem="" if found else "it is not there",
        )

    def _read_scope(self, scope: ast.AST, types: Types, owner: Owner | None) -> Iterator[Use]:
        """Of a module, class or function; functions within know the types around them."""
        types, names = dict(types), self._names
        for node in _own_nodes(scope):
            if isinstance(node, ast.ClassDef):
                yield from self._read_class(node, types)
            elif isinstance(node, Function | ast.Lambda):
                inner = names.types_within(node.args, types)
                if owner is not None and node in owner.node.body and not is_static(node):
                    inner[node.args.args[0].arg] = owner.base
                yield from self._read_scope(node, inner, owner)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                _note(types, node.target.id, names.annotated(node.annotation))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                _note(types, node.targets[0].id, names.type_of(node.value, types, owner))
            elif isinstance(node, ast.Call):
                yield from self._read_call(node, types, owner)
            elif isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
                yield from self._read_attribute(node, types, owner)

    def _read_class(self, node: ast.ClassDef, types: Types) -> Iterator[Use]:
        base = next(filter(None, map(self._names.class_of, node.bases)), None)
        owner = None if base is None else Owner(node=node, base=base)
        if owner is not None:
            for statement in node.body:
                if isinstance(statement, Function):
                    yield from self._read_override(owner, statement, self._shown)
            yield from self._read_inherited(owner)
        yield from self._read_scope(node, types, owner)

    def _read_inherited(self, owner: Owner) -> Iterator[Use]:
        """Methods of other bases, which are ours, that stand in for those of Megatron's class."""
        names = {ast.unparse(base) for base in owner.node.bases}
        own = {each.name for each in owner.node.body if isinstance(each, Function)}
        for node in ast.walk(self._tree):
            if not (isinstance(node, ast.ImportFrom) and self._ours.holds(node.module or "")):
                continue
            for alias in node.names:
                if alias.name not in names:
                    continue
                found = self._ours.look_up_import(node.module or "", alias.name)
                base = Class.of(self._ours, found)
                if base is None:
                    continue
                shown = str(base.module.path.relative_to(OUR_FOLDER))
                for name, method in base.methods().items():
                    if name not in own and owner.base.find_method(name):
                        yield from self._read_override(owner, method, shown)

    def _read_override(self, owner: Owner, method: Function, shown: str) -> Iterator[Use]:
        name = f"{self._names.name_of(owner.base)}.{method.name}"
        user = f"{shown}:{method.lineno} overrides it in {owner.node.name}"
        found = owner.base.find_method(method.name)
        if found is None:
            yield Use(
                name=name,
                user=user,
                file=owner.base.module.path,
                expected=f"method {method.name} of {owner.base.node.name}",
                is_override=True,
            )
        elif is_megatron(found[0].module.name):
            there, own = method_signature(found[1]), method_signature(method)
            # A constructor is called by whoever knows the class.
            misfit = "" if method.name == "__init__" else own.misfit_for(there)
            yield Use(
                name=name,
                user=user,
                file=found[0].module.path,
                expected=f"a method that {method.name}{own} can stand in for",
                signature=there,
                is_override=True,
                problem=misfit and f"it is {method.name}{there}, and the override {misfit}",
            )

    def _read_call(self, node: ast.Call, types: Types, owner: Owner | None) -> Iterator[Use]:
        function, call = node.func, Call.of(node)
        if isinstance(function, ast.Name) and function.id == "partial" and node.args:
            function, call = node.args[0], Call.of(node, skip=1)
        found = self._names.callee(function, types, owner)
        if found is None:
            return
        name, file, signature = found
        misfit = signature.misfit(call)
        yield Use(
            name=name,
            user=self._at(node, "calls it"),
            file=file,
            expected=f"to be called as {ast.unparse(node)[:100]}",
            signature=signature,
            call=call,
            problem=misfit and f"it is {name.split('.')[-1]}{signature}: {misfit}",
        )

    def _read_attribute(
        self, node: ast.Attribute, types: Types, owner: Owner | None
    ) -> Iterator[Use]:
        receiver = self._names.type_of(node.value, types, owner)
        if receiver is not None:
            if not (owner is not None and owner.defines(node)) and not receiver.answers_for_any():
                name = self._names.name_of(receiver)
                yield self._attribute(node, name, receiver.module.path, receiver.has(node.attr))
            return
        found = self._names.definition(node.value)
        if found is None or found.module is None or not is_megatron(found.module.name):
            return
        name, path = self._names.full_name(node.value), found.module.path
        if found.is_module:
            is_there = self._source.look_up(found.module, node.attr) is not None
            yield self._attribute(node, name, path, is_there)
        elif (known := Class.of(self._source, found)) is not None:
            yield self._attribute(node, name, path, known.has(node.attr))

    def _attribute(self, node: ast.Attribute, owner: str, file: Path, is_there: bool) -> Use:
        return Use(
            name=f"{owner}.{node.attr}",
            user=self._at(node, "uses it"),
            file=file,
            expected=f"{node.attr} of {owner}",
            problem="" if is_there else "it is not there",
        )

    def _at(self, node: ast.stmt | ast.expr, what: str) -> str:
        return f"{self._shown}:{node.lineno} {what}"

    def _file(self, module_name: str) -> Path:
        module = self._source.module(module_name)
        if module is not None:
            return module.path
        folder = self._source.folders[PACKAGE]
        return folder.joinpath(*module_name.split(".")).with_suffix(".py")


def _note(types: Types, name: str, found: Class | None) -> None:
    if found is None:
        types.pop(name, None)
    else:
        types[name] = found


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a scope in order; functions and classes within it, not what is in these."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            yield from _own_nodes(node)
