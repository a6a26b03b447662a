"""The layers dsl <- compiler <- runtime, and the packaging that lists them."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"dsl": {"dsl"}, "compiler": {"dsl", "compiler"}, "runtime": {"dsl", "compiler", "runtime"}}
DEVICE_LIBRARIES = {"torch", "triton"}  # the compiler and the language never need them
FILES = sorted(path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imports(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement of a file, the ones inside functions included."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def modules(path: Path) -> Iterator[str]:
    """Full names of the modules that a file may import; `from a import b` may mean a.b."""
    for statement in imports(path):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        else:
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)


def test_there_are_files_in_every_layer() -> None:
    assert {path.parts[0] for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path: Path) -> None:
    allowed = LAYERS[path.parts[0]]
    own = [name.split(".")[1] for name in modules(path) if name.startswith("attnc.")]
    assert [layer for layer in own if layer in LAYERS and layer not in allowed] == []
    if path.parts[0] != "runtime":
        assert [layer for layer in own if layer not in LAYERS] == [], "the package itself imports the runtime"


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "runtime"], ids=str)
def test_only_the_runtime_needs_a_device_library(path: Path) -> None:
    assert DEVICE_LIBRARIES & {name.split(".")[0] for name in modules(path)} == set()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_are_absolute_and_through_the_package(path: Path) -> None:
    assert [node.lineno for node in imports(path) if isinstance(node, ast.ImportFrom) and node.level > 0] == []
    # `import compiler.x` would be a second copy of attnc.compiler.x
    assert [name for name in modules(path) if name.split(".")[0] in LAYERS] == []


def packaging() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_packages_are_the_folders() -> None:
    listed = packaging()["packages"]
    folders = {path.parent for path in FILES}
    shown = {"attnc", "attnc.integrations", "attnc.examples"}  # no code of the package: names and patterns
    assert set(listed) == shown | {"attnc." + ".".join(folder.parts) for folder in folders}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_every_file_of_data_is_packaged() -> None:
    listed = packaging()["package-data"]
    found = {
        package: {path for pattern in patterns for path in (ROOT / package.replace(".", "/")).glob(pattern)}
        for package, patterns in listed.items()
    }
    data = {
        path
        for folder in (ROOT / "attnc", *((ROOT / "attnc" / layer) for layer in (*LAYERS, "examples")))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert set().union(*found.values()) == data
    assert ROOT / "attnc" / "py.typed" in data


def test_links_lead_to_the_layers() -> None:
    assert {layer: (ROOT / "attnc" / layer).readlink() for layer in LAYERS} == {
        layer: Path("..") / layer for layer in LAYERS
    }
