"""Every block of the documentation is run, and what it claims to print is compared.

```attn blocks are compiled, run and compared with the reference, gradients too. ```attn reference blocks have no
kernels yet; one that gets them fails here, so that its page is brought up to date. ```attn mistake blocks are refused.
```python blocks of a page run in order in one namespace. An ```output block is what the block before it prints, or how
it is refused, and `--update-golden` writes it. ```console blocks run their `attnc` commands. ```py blocks are calls of
libraries that need a GPU: the block after one compares with what they document. The rows of a table of types hold,
links lead somewhere.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import attnc
from attnc.dsl.check import predefine
from attnc.dsl.codes import CODES
from attnc.dsl.expressions import Context, Expressions
from attnc.dsl.inlining import inline
from attnc.dsl.modules import prelude
from attnc.dsl.parse import parse
from attnc.dsl.patterns import Binding, Body, Declarations
from attnc.dsl.rejection import RejectionError
from attnc.dsl.scopes import Scope
from attnc.dsl.source import Source
from attnc.dsl.syntax import PatternDeclaration
from attnc.dsl.terms import Term
from attnc.runtime.pattern import CompiledPattern
from attnc.runtime.tolerance import error, tolerance
from attnc.runtime.tools.comparison import defaults, shrunken
from attnc.runtime.tools.inputs import Made, Shape, made_inputs

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "DESIGN.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("compiler/*.md"))]
FENCE = re.compile(r"^```(\w+(?: \w+)?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)\)")
ANCHOR = re.compile(r"\]\(#([^)]+)\)")
TYPES = re.compile(r"^\| expression \| type \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", re.MULTILINE)
# Shared key heads, a length that no tile divides, E != D.
SHAPE = Shape(1, 4, 2, 21, 21, 8, 12)


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is the line of its first character."""

    kind: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in FENCE.finditer(text)]


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(b, id=f"{page.name}:{b.line}") for page in PAGES for b in blocks(page) if b.kind == kind]


def commands() -> Iterator[Any]:
    for page in PAGES:
        for block in blocks(page):
            for line in block.text.splitlines() if block.kind == "console" else ():
                if line.startswith("$ attnc "):
                    yield pytest.param(line.removeprefix("$ attnc "), id=line.removeprefix("$ "))


def test_the_pages_have_blocks_of_every_kind() -> None:
    kinds = {"attn", "attn reference", "attn mistake", "python", "py", "output", "console"}
    assert {block.kind for page in PAGES for block in blocks(page)} == kinds


def settings(pattern: CompiledPattern) -> tuple[Made, dict[str, Any]]:
    """A call of a pattern of a page, with ints small enough to matter."""
    small = shrunken(pattern)
    made = made_inputs(pattern.pattern, SHAPE, defaults(pattern) | small, dtype=torch.float64)
    return made, {**small, **made.inputs}


@pytest.mark.parametrize("block", of_kind("attn"))
def test_attn_blocks_agree_with_the_reference(block: Block) -> None:
    patterns = attnc.compile(block.text).patterns
    assert patterns
    for pattern in patterns.values():
        made, given = settings(pattern)
        real = [made.q, made.k, made.v, *(x for x in made.inputs.values() if x.is_floating_point())]
        for x in real:
            x.requires_grad_()
        out, expected = (call(made.q, made.k, made.v, **given) for call in (pattern, pattern.reference))
        assert error(out.detach(), expected.detach()) <= tolerance(out.dtype, SHAPE.keys), pattern.__name__
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found, exact = (
            torch.autograd.grad((result * weight).sum(), real, allow_unused=True, materialize_grads=True)
            for result in (out, expected)
        )
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("block", of_kind("attn reference"))
def test_attn_reference_blocks_have_a_meaning_and_no_kernels(block: Block) -> None:
    patterns = attnc.compile(block.text).patterns
    assert patterns
    for pattern in patterns.values():
        made, given = settings(pattern)
        assert pattern.reference(made.q, made.k, made.v, **given).isfinite().all()
        with pytest.raises(attnc.AttnError) as refused:
            pattern(made.q, made.k, made.v, **given)
        assert [found.code for found in refused.value.diagnostics] == ["not-lowered"]


def test_every_code_of_an_error_has_a_section_with_an_example_and_a_remedy() -> None:
    """A program that has the error, what is printed, and a program that has not: each is run by the tests above."""
    page = ROOT / "docs" / "errors.md"
    _, *sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [section.split("\n", 1)[0] for section in sections] == list(CODES)
    for code, section in zip(CODES, sections, strict=True):
        found = [(match[1], match[2]) for match in FENCE.finditer(section)]
        shown = [kind == "output" and text.startswith(f"error[{code}]: ") for kind, text in found]
        assert any(shown), code
        remedies = [kind for kind, _ in found[shown.index(True) + 1 :]]
        assert {*remedies} & {"attn", "attn reference", "python"}, code


def test_internals_name_every_file() -> None:
    page = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8")
    files = {path for layer in ("dsl", "compiler", "runtime") for path in (ROOT / layer).rglob("*.py")}
    named = {(ROOT / "docs" / link).resolve() for link in LINK.findall(page)}
    assert sorted(str(path.relative_to(ROOT)) for path in files - named if path.name != "__init__.py") == []


def tables_of_types() -> Iterator[Any]:
    """Every row of a table of types: the pattern before the table, an expression of its names, the type."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for table in TYPES.finditer(text):
            *_, pattern = (match[2] for match in FENCE.finditer(text, 0, table.start()))
            for row in table[1].splitlines():
                expression, type = (cell.strip().strip("`") for cell in row.strip("|").split("|"))
                yield pytest.param(pattern, expression, type, id=expression)


@pytest.mark.parametrize(("pattern", "expression", "type"), list(tables_of_types()))
def test_types_of_expressions(pattern: str, expression: str, type: str) -> None:
    (declaration,) = parse(Source("page", f"{pattern}    found = {expression}\n")).items
    assert isinstance(declaration, PatternDeclaration)
    at = Expressions(Context(inline), Scope(prelude()))
    predefine(at, declaration.span)
    declared = Declarations(at, {})
    mistakes: list[RejectionError] = []
    Body(at, Binding(declared.parameter, declared.input), mistakes.append).run(declaration)
    assert not mistakes
    found = at.scope.values["found"]
    assert isinstance(found, Term)
    assert str(found.type) == type


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_the_page_says(
    page: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # torch.compile looks functions up by their module
    scope = vars(module)
    printed = ""
    lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
    for block in blocks(page):
        if block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                # The leading newlines make a traceback's line number the page's.
                exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), scope)
            printed = out.getvalue()
        elif block.kind == "attn mistake":
            with pytest.raises(attnc.AttnError) as refused:
                attnc.compile(block.text)
            printed = str(refused.value)
        elif block.kind == "output" and pytestconfig.getoption("--update-golden"):
            first, *rest = range(block.line - 1, block.line - 1 + block.text.count("\n"))
            lines[first] = printed.rstrip() + "\n"
            for line in rest:
                lines[line] = ""
        elif block.kind == "output":
            assert printed.rstrip() == block.text.rstrip(), f"{page.name}:{block.line}"
    if pytestconfig.getoption("--update-golden"):
        page.write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize("command", list(commands()))
def test_commands_succeed(command: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "attnc", *shlex.split(command, comments=True)]
    environment = os.environ | {"ATTNC_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = [target for target in LINK.findall(prose) if "://" not in target]
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []
    headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in prose.splitlines()}
    assert set(ANCHOR.findall(prose)) <= headings
