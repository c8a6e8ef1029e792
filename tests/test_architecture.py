"""The guards: who may import whom, where the environment is read, how long things are, and what must exist."""

import ast
import importlib
import inspect
import pickle
import re
from functools import cache
from pathlib import Path

import pytest

import cluster
import cluster.errors

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cluster", "deployments", "benchmarks", "tests")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_NESTING = 400, 60, 4

FORBIDDEN_IN_CLUSTER = {"ray", "fastapi", "grpc", "starlette", "uvicorn", "deployments", "tests", "benchmarks"}

MAY_IMPORT = {
    "errors": set(),
    "messages": {"errors"},
    "classification": {"errors", "messages"},
    "config": {"errors", "messages"},
    "environment": {"errors", "config"},
    "model": {"errors", "messages", "config"},
    "kernels": {"config", "environment"},
    "lora": {"errors", "messages", "config", "environment", "kernels"},
    "router": {"errors", "messages", "config", "kernels", "model", "lora"},
    "engine": {"errors", "messages", "config", "model", "kernels", "lora"},
    "training": {"errors", "messages", "config", "model", "kernels", "lora", "router", "engine"},
}
"""The rooms of `cluster`, from below to above, and what each may know of."""


def _files(folder: str) -> list[Path]:
    return sorted(file for file in (ROOT / folder).rglob("*.py") if "_pb2" not in file.name)


ALL_FILES = [file for folder in FOLDERS for file in _files(folder)]
CLUSTER_FILES = _files("cluster")


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


every_file = pytest.mark.parametrize("file", ALL_FILES, ids=_name)
every_cluster_file = pytest.mark.parametrize("file", CLUSTER_FILES, ids=_name)


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def _imports(tree: ast.Module) -> set[str]:
    """Full names of what a module imports, at its top or inside functions, `importlib.import_module` included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            assert isinstance(node.args[0], ast.Constant), "an import that no guard can read"
            found.add(str(node.args[0].value))
    return found


def test_the_guards_see_something() -> None:
    assert len(CLUSTER_FILES) > 40
    assert {file.relative_to(ROOT / "cluster").parts[0].removesuffix(".py") for file in CLUSTER_FILES} == {
        "__init__",
        *MAY_IMPORT,
    }
    inside = ast.parse(
        "def f():\n    import ray.serve\n    from grpc import aio\n    importlib.import_module('fastapi')"
    )
    assert {name.partition(".")[0] for name in _imports(inside)} == {"ray", "grpc", "fastapi"}


@every_cluster_file
def test_cluster_knows_nothing_of_where_it_runs(file: Path) -> None:
    assert not {name.partition(".")[0] for name in _imports(_tree(file))} & FORBIDDEN_IN_CLUSTER


@every_cluster_file
def test_rooms_depend_downwards_only(file: Path) -> None:
    room = file.relative_to(ROOT / "cluster").parts[0].removesuffix(".py")
    used = {name.split(".")[1] for name in _imports(_tree(file)) if name.startswith("cluster.")}
    assert used <= MAY_IMPORT.get(room, set()) | {room}


@pytest.mark.parametrize("file", [*CLUSTER_FILES, *_files("deployments")], ids=_name)
def test_one_file_reads_the_environment(file: Path) -> None:
    if file == ROOT / "cluster" / "environment.py":
        return
    for node in ast.walk(_tree(file)):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        assert name not in ("environ", "environb", "getenv"), (
            f"line {node.lineno}: that belongs into cluster/environment.py"
        )
    assert not {name for name in _imports(_tree(file)) if name in ("os.environ", "os.getenv")}


@every_file
def test_files_and_functions_are_short_and_flat(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno - first + 1 <= MAX_FUNCTION_LINES, node.name
            assert _nesting(node) <= MAX_NESTING, node.name


_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def _nesting(node: ast.AST) -> int:
    """The most blocks inside one another below `node`; an `elif` is as deep as its `if`."""
    depth = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        depth = max(depth, _nesting(child) + (isinstance(child, _BLOCKS) and not is_elif))
    return depth


def test_nesting_is_counted_right() -> None:
    code = "def f():\n if a:\n  pass\n elif b:\n  for x in y:\n   with z:\n    pass\n else:\n  pass"
    assert _nesting(ast.parse(code).body[0]) == 3


@every_file
def test_every_module_says_what_it_is(file: Path) -> None:
    if not file.read_text().strip():
        assert file.name == "__init__.py"
        assert "tests" in file.parts, "a package says what it holds"
        return
    docstring = ast.get_docstring(_tree(file))
    assert docstring
    assert docstring.strip()


def test_every_folder_of_code_is_a_package() -> None:
    for file in ALL_FILES:
        if file.parent != ROOT / "benchmarks":
            assert (file.parent / "__init__.py").is_file(), f"{_name(file.parent)} needs an __init__.py"


def test_make_test_looks_for_tests_of_a_cluster_where_they_are() -> None:
    (command,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if " -m ray " in line]
    marked = re.compile(r"\bpytest\.mark\.ray\b")
    folders = {file.parent for file in _files("tests") if marked.search(file.read_text())}
    assert len(folders) > 1
    assert {str(folder.relative_to(ROOT)) for folder in folders} <= set(command.split())


def test_every_path_named_in_the_journey_exists() -> None:
    assert cluster.__doc__
    paths = re.findall(r"[\w./]+\.py\b", cluster.__doc__)
    assert len(paths) >= 7
    for path in paths:
        assert (ROOT / path).is_file(), f"{path} does not exist"


ERRORS = [
    item
    for _, item in inspect.getmembers(cluster.errors, inspect.isclass)
    if item.__module__ == "cluster.errors" and not item.__name__.startswith("_")
]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_survives_pickling(error: type[cluster.errors.ZephyraError]) -> None:
    message = "The weight of law is NaN; expected a number."
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error(message), protocol))
        assert type(back) is error
        assert str(back) == message
        assert back.args == (message,)


def test_the_tree_in_the_docstring_of_the_errors_is_the_real_one() -> None:
    assert cluster.errors.__doc__
    lines = re.findall(r"^( *(?:│   |├── |└── )*)(\w+)(?:  +(.+))?$", cluster.errors.__doc__, re.MULTILINE)
    drawn: dict[str, tuple[str, str]] = {}
    above: dict[int, str] = {}
    for indent, name, what in lines:
        depth = len(indent) // 4
        above[depth] = name
        drawn[name] = (above.get(depth - 1, "Exception"), what)
    real = {error.__name__: error.__bases__[0].__name__ for error in ERRORS}
    assert {name: parent for name, (parent, _) in drawn.items()} == real


def test_importing_cluster_gives_ours() -> None:
    assert Path(str(importlib.import_module("cluster").__file__)) == ROOT / "cluster" / "__init__.py"
    assert cluster.DISTRIBUTION == "zephyra"
