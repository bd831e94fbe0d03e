"""Modules, classes and functions of packages, read from their source and never imported.

A *name* is looked up as Python would: through imports, star imports and base classes. What comes
from a package whose source is not at hand is `OUTSIDE`: it exists, and no more is known.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What a name stands for: `node` in a module; None: a module or package itself."""

    module: "Module | None"
    node: ast.AST | None = None

    @property
    def is_module(self) -> bool:
        """Whether the name is a module's."""
        return self.module is not None and self.node is None


OUTSIDE = Definition(module=None)


@dataclass(eq=False, kw_only=True)
class Module:
    """One module's source."""

    name: str
    path: Path
    """A folder of a package without `__init__.py`."""
    is_package: bool

    @cached_property
    def tree(self) -> ast.Module:
        """Parsed."""
        text = self.path.read_text() if self.path.is_file() else ""
        return ast.parse(text, filename=str(self.path))

    @cached_property
    def bound(self) -> dict[str, list[ast.stmt]]:
        """Statements that bind each name of the module."""
        bound: dict[str, list[ast.stmt]] = {}
        for statement in statements(self.tree.body):
            for name in names_bound(statement):
                bound.setdefault(name, []).append(statement)
        return bound

    def absolute(self, statement: ast.ImportFrom) -> str:
        """The module that is imported from."""
        if not statement.level:
            return statement.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - statement.level + self.is_package]
        return ".".join([*parts, *([statement.module] if statement.module else [])])


@dataclass(eq=False)
class Source:
    """Packages by name, each with the folder that holds the package's folder."""

    folders: Mapping[str, Path]
    _modules: dict[str, Module | None] = field(default_factory=dict)

    def module(self, name: str) -> Module | None:
        """A module by its full name; None where there is none."""
        if name not in self._modules:
            self._modules[name] = self._find(name)
        return self._modules[name]

    def holds(self, name: str) -> bool:
        """Whether the package of a module is one of those that are read."""
        return name.split(".")[0] in self.folders

    def look_up(self, module: Module, name: str) -> Definition | None:
        """What a module's name stands for; dots lead on into modules. None: it is not there."""
        found: Definition | None = Definition(module=module)
        for part in name.split("."):
            if found is None or found is OUTSIDE:
                return found
            if not found.is_module or found.module is None:
                return OUTSIDE
            found = self._look_up(found.module, part, frozenset())
        return found

    def look_up_import(self, module_name: str, name: str | None) -> Definition | None:
        """What `from module import name`, or `import module`, binds."""
        if not self.holds(module_name):
            return OUTSIDE
        module = self.module(module_name)
        if module is None:
            return None
        return self.look_up(module, name) if name else Definition(module=module)

    def _find(self, name: str) -> Module | None:
        if not self.holds(name):
            return None
        base = self.folders[name.split(".")[0]].joinpath(*name.split("."))
        if (init := base / "__init__.py").is_file():
            return Module(name=name, path=init, is_package=True)
        if (file := base.with_suffix(".py")).is_file():
            return Module(name=name, path=file, is_package=False)
        return Module(name=name, path=base, is_package=True) if base.is_dir() else None

    def _look_up(
        self, module: Module, name: str, seen: frozenset[tuple[str, str]]
    ) -> Definition | None:
        if (module.name, name) in seen:
            return None
        seen |= {(module.name, name)}
        # A class or function before what replaces it where a package is missing.
        for statement in sorted(module.bound.get(name, ()), key=_rank):
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                return Definition(module=module, node=statement)
            found = self._follow(module, statement, name, seen)
            if found is not None or statement not in module.tree.body:  # may fail: in `try`
                return found or OUTSIDE
            if not _is_of_package(statement, module):
                return None  # a module of that name does not help: the import fails
        for statement in module.bound.get("*", ()):
            assert isinstance(statement, ast.ImportFrom)
            source = module.absolute(statement)
            origin = self.module(source)
            if origin is not None and (found := self._look_up(origin, name, seen)) is not None:
                return found
        if module.is_package and (inner := self.module(f"{module.name}.{name}")) is not None:
            return Definition(module=inner)
        return None

    def _follow(
        self,
        module: Module,
        statement: ast.Import | ast.ImportFrom,
        name: str,
        seen: frozenset[tuple[str, str]],
    ) -> Definition | None:
        alias = next(each for each in statement.names if name in _names_of(each, statement))
        if isinstance(statement, ast.Import):
            target = alias.name if alias.asname else alias.name.split(".")[0]
            return self.look_up_import(target, None)
        source = module.absolute(statement)
        if not self.holds(source):
            return OUTSIDE
        origin = self.module(source)
        return None if origin is None else self._look_up(origin, alias.name, seen)


def _is_of_package(statement: ast.stmt, module: Module) -> bool:
    """Whether it is `from . import name`, which takes modules too."""
    return isinstance(statement, ast.ImportFrom) and module.absolute(statement) == module.name


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a body, and those within its conditions and `try`, not those within functions."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With | ast.For):
                yield from statements(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from statements(handler.body)


def names_bound(statement: ast.stmt) -> list[str]:
    """What a statement binds by itself."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [name for alias in statement.names for name in _names_of(alias, statement)]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    return [node.id for each in targets for node in ast.walk(each) if isinstance(node, ast.Name)]


def _names_of(alias: ast.alias, statement: ast.Import | ast.ImportFrom) -> list[str]:
    if alias.asname:
        return [alias.asname]
    return [alias.name.split(".")[0] if isinstance(statement, ast.Import) else alias.name]


def _rank(statement: ast.stmt) -> int:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return 0
    return 1 if isinstance(statement, ast.Import | ast.ImportFrom) else 2
