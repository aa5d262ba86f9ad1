"""The rules of the code base as functions: a source file in, what is wrong with it out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import NamedTuple

__all__ = ["RULES", "SourceFile", "cycles", "imported_modules"]

# From the bottom up: a module imports from its own layer and the ones above it in this list.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("mover", "mover.streams", "mover.policies", "flows"),
    ("mover.errors", "mover.model", "mover.tasks"),
    ("mover.streams.interfaces", "mover.policies.*", "mover.settings", "mover.settings_*"),
    ("mover.streams.*",),
    (
        *("mover.plan", "mover.plan_*", "mover.verify", "mover.verify_*", "mover.journal", "mover.cleanup"),
        *("mover.catalogue", "mover.scicat", "mover.scicat_*", "mover.parts", "mover.stages", "mover.reports"),
        "mover.amounts",
    ),
    (
        *("mover.archive", "mover.archive_*", "mover.retrieve", "mover.retrieve_*", "mover.download_script"),
        *("mover.datablock", "mover.datablock_*", "mover.staging", "mover.repair"),
        *("mover.listing", "mover.verification", "mover.proof"),
    ),
    ("mover.engine", "mover.engine_*", "mover.capacity", "mover.capacity_*"),
    ("mover.jobs", "mover.jobs_*"),
    ("mover.api", "mover.api_*"),
    (
        *("mover.daemon", "mover.daemon_*", "mover.cli", "mover.cli_*", "mover.__main__"),
        *("mover.doctor", "mover.doctor_*", "mover.demo", "mover.demo_*", "mover.shown", "mover.wiring"),
        *("mover.progress", "mover.trial"),
    ),
    ("flows.*",),
)
FACES = (
    *("mover.api*", "mover.daemon*", "mover.cli*", "mover.doctor*", "mover.demo*", "mover.wiring"),
    *("mover.settings*", "flows.*"),
)
PIPELINES_THAT_DELETE = ("mover.cleanup", "mover.staging", "mover.streams.s3*", "mover.doctor*", "mover.demo*")
# A foreign library and the modules that may import it.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "prefect": ("flows.*",),
    "tarfile": ("mover.streams.tar",),
    "aiobotocore": ("mover.streams.s3*",),
    "botocore": ("mover.streams.s3*",),
    "boto3": ("mover.streams.s3*",),
    "aiohttp": ("mover.streams.s3*",),
    "httpx": ("mover.scicat*", "mover.demo*", "mover.doctor*", "mover.trial", "mover.api*", "mover.daemon*", "flows.*"),
    "obstore": ("mover.streams.s3*",),
    "http.client": ("mover.streams.s3*",),
    "moto": ("mover.demo*",),
    "typer": ("mover.cli*",),
    "rich": ("mover.cli*", "mover.demo*", "mover.doctor*", "mover.shown", "mover.progress"),
    "sqlite3": ("mover.daemon_store*", "mover.daemon_queries", "mover.daemon_streams"),
    "litestar": ("mover.daemon*",),
    "prometheus_client": ("mover.daemon*",),
    "uvicorn": ("mover.daemon*",),
    "unittest.mock": (),
}
DURABLE = "mover.streams.durable"
DURABLE_CALLS = frozenset({"os.replace", "os.rename", "os.renames", "os.fsync", "os.fdatasync", "shutil.move"})
BARE_NAMES = frozenset({"size", "timeout", "interval"})
MODULE_LINES, TEST_MODULE_LINES, FUNCTION_LINES = 300, 500, 40
LONGER_MODULES = {"mover.errors": 540}  # one list of short classes; the tree is read as a whole


class SourceFile(NamedTuple):
    """A source file; ``path`` is relative to the root of the project."""

    path: str
    text: str

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def product(self) -> bool:
        return self.path.startswith(("mover/", "flows/"))

    def within(self, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch(self.module, pattern) for pattern in patterns)


def imported_modules(source: SourceFile) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, lazy ones included; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _layer(module: str) -> int | None:
    for index, patterns in enumerate(LAYERS):
        if any(fnmatch(module, pattern) for pattern in patterns):
            return index
    return None


def _own(name: str) -> str | None:
    """The project's module that the imported name is, or is in."""
    if name.split(".", maxsplit=1)[0] not in {"mover", "flows"}:
        return None
    parts = name.split(".")
    head, last = ".".join(parts[:-1]), parts[-1]
    # ``from mover.streams import tar`` names a module, ``from mover.errors import LtsError`` something in one.
    if head in LAYERS[0] and last.islower() and not last.startswith("_"):
        return name
    return head or name


def import_direction(source: SourceFile) -> Iterator[str]:
    if not source.product:
        return
    own = _layer(source.module)
    if own is None:
        yield f"{source.path}: has no place in the table of layers"
        return
    for line, name in imported_modules(source):
        if name == "relative import":
            yield f"{source.path}:{line}: relative import"
        other = _own(name)
        rank = _layer(other) if other else 0
        if other and (rank is None or rank > own):
            yield f"{source.path}:{line}: imports {other}, which is above it"


def cycles(sources: list[SourceFile]) -> list[str]:
    """Chains of modules that import each other in a ring."""
    known = {source.module for source in sources if source.product}
    edges = {
        source.module: {own for _, name in imported_modules(source) if (own := _own(name)) in known}
        for source in sources
        if source.product
    }
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        if module in chain:
            found.append(" -> ".join((*chain[chain.index(module) :], module)))
        elif module not in done:
            for other in sorted(edges[module]):
                visit(other, (*chain, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())
    return found


def libraries(source: SourceFile) -> Iterator[str]:
    for line, name in imported_modules(source):
        for library, homes in LIBRARIES.items():
            checked = source.product or library == "unittest.mock"
            if checked and f"{name}.".startswith(f"{library}.") and not source.within(homes):
                yield f"{source.path}:{line}: imports {library}, allowed in {', '.join(homes) or 'no module'}"


def settings_at_the_faces(source: SourceFile) -> Iterator[str]:
    for line, name in imported_modules(source):
        if (
            source.product
            and f"{name}.".startswith(("mover.settings.", "mover.settings_"))
            and not source.within(FACES)
        ):
            yield f"{source.path}:{line}: settings are read at the faces only; take values"


def _calls(source: SourceFile) -> Iterator[tuple[ast.Call, str, str]]:
    """Each call with its dotted name (``os.replace``) and the last part of it."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            dotted = ast.unparse(node.func)
            yield node, dotted, dotted.rpartition(".")[2]


def durable_calls(source: SourceFile) -> Iterator[str]:
    if not source.product or source.module == DURABLE:
        return
    for call, dotted, last in _calls(source):
        # str.replace has two arguments, datetime.replace has keywords: one argument alone is Path's.
        of_path = "." in dotted and (
            last == "rename" or (last == "replace" and len(call.args) == 1 and not call.keywords)
        )
        if dotted in DURABLE_CALLS or of_path:
            yield f"{source.path}:{call.lineno}: {dotted}() belongs into {DURABLE}"
    for line, name in imported_modules(source):
        if name in DURABLE_CALLS:
            yield f"{source.path}:{line}: {name} belongs into {DURABLE}"


def deletion(source: SourceFile) -> Iterator[str]:
    if source.product and not source.within(PIPELINES_THAT_DELETE):
        for call, dotted, last in _calls(source):
            if last in {"delete", "delete_object", "delete_objects", "delete_async"} and "." in dotted:
                yield f"{source.path}:{call.lineno}: {dotted}() belongs into mover.cleanup"


def tasks_and_sleeps(source: SourceFile) -> Iterator[str]:
    if not source.product:
        return
    for call, dotted, last in _calls(source):
        if last in {"create_task", "ensure_future"}:
            yield f"{source.path}:{call.lineno}: {dotted}(): tasks live in task groups"
        if dotted == "time.sleep":
            yield f"{source.path}:{call.lineno}: time.sleep()"
    for line, name in imported_modules(source):
        if name in {"time.sleep", "asyncio.create_task", "asyncio.ensure_future"}:
            yield f"{source.path}:{line}: {name}"


def module_size(source: SourceFile) -> Iterator[str]:
    budget = LONGER_MODULES.get(source.module, MODULE_LINES if source.product else TEST_MODULE_LINES)
    count = len(source.text.splitlines())
    if count > budget:
        yield f"{source.path}: {count} lines, at most {budget}"


def function_size(source: SourceFile) -> Iterator[str]:
    if source.product:
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > FUNCTION_LINES:
                    yield f"{source.path}:{node.lineno}: {node.name} has {count} lines, at most {FUNCTION_LINES}"


def _targets(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return []


def _type_variable(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) in {"TypeVar", "ParamSpec"}
    )


def exports(source: SourceFile) -> Iterator[str]:
    body = source.tree.body
    if not source.product or (source.path.endswith("__init__.py") and len(body) <= 1):
        return
    listed: list[str] | None = None
    for node in body:
        if "__all__" in _targets(node) and isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            listed = list(ast.literal_eval(node.value))
    if listed is None:
        yield f"{source.path}: no __all__"
        return
    defined = {name for node in body if not _type_variable(node) for name in _targets(node)}
    imported = {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    missing = sorted(name for name in defined if not name.startswith("_") and name not in listed)
    yield from (f"{source.path}: {name} is missing in __all__" for name in missing)
    unknown = sorted(set(listed) - defined - imported)
    yield from (f"{source.path}: __all__ lists {name}, which is not there" for name in unknown)


def units_in_names(source: SourceFile) -> Iterator[str]:
    if not source.product:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.arg) and node.arg in BARE_NAMES:
            yield f"{source.path}:{node.lineno}: parameter {node.arg!r} without its unit"
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                for name in BARE_NAMES.intersection(_targets(statement)):
                    yield f"{source.path}:{statement.lineno}: field {name!r} without its unit"


def docstrings(source: SourceFile) -> Iterator[str]:
    if not source.product:
        return
    tree = source.tree
    if ast.get_docstring(tree) is None:
        yield f"{source.path}: no docstring"
    for node in tree.body:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield f"{source.path}:{node.lineno}: {node.name} has no docstring"


RULES = {
    rule.__name__: rule
    for rule in (
        *(import_direction, libraries, settings_at_the_faces, durable_calls, deletion, tasks_and_sleeps),
        *(module_size, function_size, exports, units_in_names, docstrings),
    )
}
