"""The tables for editors and highlighters against the language itself: a new word that they lack fails here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pygments.token import Comment, Error, Keyword, Name, Number, Operator, String, Text, Token

from attnc.dsl import vocabulary
from attnc.dsl.builtins import BOUNDS, BRACKETED, OPTIONS, RESERVED
from attnc.dsl.highlighting import AttnLexer
from attnc.dsl.mistakes import WORDS
from attnc.dsl.patterns import BASES
from attnc.dsl.reading import ATTRIBUTES
from attnc.dsl.scopes import PREDEFINED, SIZES
from attnc.dsl.types import BUILT_IN_INDICES

ROOT = Path(__file__).resolve().parents[2]
VSCODE = ROOT / "editors" / "vscode"
FILES = sorted([*(ROOT / "examples").glob("*.attn"), *(ROOT / "tests" / "zoo").glob("*.attn"), ROOT / "dsl/std.attn"])
LEXER: Any = AttnLexer  # pygments has no types
FENCE = re.compile(r"^```attn(?: \w+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_word_of_the_language_is_listed() -> None:
    assert set(vocabulary.KEYWORDS) == WORDS == set(re.findall(r'"([a-z]+)"', (ROOT / "dsl" / "attn.lark").read_text()))
    assert set(vocabulary.FUNCTIONS) == RESERVED | BRACKETED
    assert set(vocabulary.TYPES) == {*BASES, "ints"}
    assert tuple(vocabulary.TENSORS) == PREDEFINED
    assert tuple(vocabulary.INDICES) == BUILT_IN_INDICES
    assert set(vocabulary.SIZES) == set(SIZES)
    assert tuple(vocabulary.ATTRIBUTES) == ATTRIBUTES
    assert set(vocabulary.OPTIONS) == {"force", *(option for options in OPTIONS.values() for option in options)}


def test_functions_are_called_as_they_are_listed() -> None:
    for name, (called, _) in vocabulary.FUNCTIONS.items():
        assert called.startswith(name)
        for option in OPTIONS.get(name, ("force",) if name in BOUNDS else ()):
            assert f"{option} =" in called or name == "normalize"


# The TextMate grammar


def grammar() -> Any:
    return json.loads((VSCODE / "syntaxes" / "attn.tmLanguage.json").read_text(encoding="utf-8"))


def alternatives(pattern: str) -> set[str]:
    """The words of the first `(a|b|c)` of words in a regular expression."""
    found = re.search(r"\((\w+(?:\|\w+)+)\)", pattern)
    return set(found[1].split("|")) if found else set()


def test_the_grammar_has_every_word() -> None:
    repository = grammar()["repository"]
    keywords = [alternatives(rule["match"]) for rule in repository["keyword"]["patterns"]]
    assert set().union(*keywords) == WORDS
    assert sum(map(len, keywords)) == len(WORDS), "a word is of two kinds"
    assert alternatives(repository["function"]["patterns"][0]["match"]) == RESERVED | BRACKETED
    assert alternatives(repository["type"]["match"]) == {*BASES, "ints"}
    variables = [alternatives(rule["match"]) for rule in repository["variable"]["patterns"]]
    assert variables == [set(PREDEFINED), set(BUILT_IN_INDICES), set(SIZES)]


def test_the_grammar_includes_what_it_has() -> None:
    whole = grammar()
    assert {rule["include"] for rule in whole["patterns"]} == {f"#{name}" for name in whole["repository"]}
    rules = [rule for part in whole["repository"].values() for rule in part.get("patterns", [part])]
    for rule in rules:
        groups = re.compile(rule["match"]).groups
        assert "name" in rule or rule["captures"]
        assert all(int(number) <= groups for number in rule.get("captures", {}))


def test_the_extension_has_the_files_that_it_names() -> None:
    package = json.loads((VSCODE / "package.json").read_text(encoding="utf-8"))
    contributes = package["contributes"]
    named = [package["main"], *(entry["path"] for entry in contributes["grammars"])]
    named += [entry["configuration"] for entry in contributes["languages"]]
    for file in named:
        assert (VSCODE / file).is_file(), file
        if file.endswith(".json"):
            json.loads((VSCODE / file).read_text(encoding="utf-8"))
    assert contributes["grammars"][0]["scopeName"] == grammar()["scopeName"]


def test_indentation_and_brackets_of_the_extension() -> None:
    made = json.loads((VSCODE / "language-configuration.json").read_text(encoding="utf-8"))
    deeper, shallower = (
        re.compile(made["indentationRules"][f"{way}IndentPattern"]) for way in ("increase", "decrease")
    )
    for line in ("pattern p(n: int = 3):", "    scan t:  # a state", "    repeat steps:"):
        assert deeper.search(line), line
    assert not deeper.search("    out = q")
    assert shallower.search("pattern p:")
    assert re.fullmatch(made["wordPattern"], "x_1")
    assert {tuple(pair) for pair in made["brackets"]} == {("(", ")"), ("[", "]")}
    assert made["comments"]["lineComment"] == "#"


# What extension.js takes from VS Code and from its client of language servers, as far as it goes.
STARTED = """
const Module = require("module"), load = Module._load, [, , extension, settings] = process.argv;
const getConfiguration = (section) => ({ get: (key) => JSON.parse(settings)[`${section}.${key}`] });
const vscode = { workspace: { getConfiguration } };
class LanguageClient {
  constructor(...given) { this.given = given; }
  start() { return this.given; }
  stop() { return "stopped"; }
}
Module._load = (name, ...rest) =>
  name === "vscode" ? vscode : name === "vscode-languageclient/node" ? { LanguageClient } : load(name, ...rest);
const { activate, deactivate } = require(extension);
console.log(JSON.stringify([deactivate() ?? null, activate(), deactivate()]));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_extension_starts_the_server() -> None:
    package = json.loads((VSCODE / "package.json").read_text(encoding="utf-8"))
    settings = package["contributes"]["configuration"]["properties"]
    defaults = json.dumps({name: setting["default"] for name, setting in settings.items()})
    command = ["node", "-", str(VSCODE / package["main"]), defaults]
    done = subprocess.run(command, input=STARTED, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    before, (_, _, server, client), after = json.loads(done.stdout)
    assert (before, after) == (None, "stopped")
    assert server == {"command": "attnc", "args": ["lsp"]}
    assert client["documentSelector"] == [{"language": package["contributes"]["languages"][0]["id"]}]


# The Pygments lexer


def lexed(text: str) -> list[tuple[Any, str]]:
    return [(kind, part) for kind, part in LEXER().get_tokens(text) if part.strip()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_are_lexed_without_a_gap(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    found = list(LEXER(stripnl=False, ensurenl=False).get_tokens(text))
    assert "".join(part for _, part in found) == text
    assert [part for kind, part in found if kind in Error or kind is Text or kind is Token] == []


def test_blocks_of_the_documentation_are_lexed() -> None:
    texts = [block for page in (ROOT / "docs").glob("*.md") for block in FENCE.findall(page.read_text("utf-8"))]
    assert len(texts) > 10
    wrong = [part for text in texts for kind, part in lexed(text) if kind in Error]
    assert wrong == []


def test_kinds_of_tokens() -> None:
    text = """use "x.attn"
pattern near(w: int = 1e-3):  # all
    out = softmax[j](exp(q) where j in f(t)) @ real(3)
"""
    kinds = {part: kind for kind, part in lexed(text)}
    assert kinds["use"] is Keyword.Declaration
    assert kinds['"x.attn"'] is String
    assert kinds["near"] is Name.Class
    assert kinds["int"] is Keyword.Type
    assert kinds["1e-3"] is Number.Float
    assert kinds["# all"] is Comment.Single
    assert kinds["softmax"] is kinds["exp"] is kinds["real"] is Name.Builtin
    assert kinds["q"] is kinds["j"] is Name.Builtin.Pseudo
    assert kinds["where"] is Keyword
    assert kinds["in"] is Operator.Word
    assert kinds["f"] is Name.Function
    assert kinds["@"] is Operator


def test_pygments_finds_the_lexer_by_its_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pygments.lexers"] == {"attn": f"{AttnLexer.__module__}:{AttnLexer.__name__}"}
