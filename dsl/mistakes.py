"""What lark could not read, in human words: what was expected, what was found, and how it is written."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from lark.exceptions import UnexpectedToken

from attnc.dsl.diagnostics import Diagnostic
from attnc.dsl.layout import DEDENT, INDENT, NEWLINE
from attnc.dsl.source import Source, Span

END = "$END"
LONGEST_CONTEXT = 1000  # characters of a line that hints look at: some take quadratic time
# The words of the language; lark names their terminals by the upper-cased word.
WORDS = frozenset(
    {"pattern", "input", "axis", "scan", "repeat", "where", "if", "then", "else", "for", "in", "not", "and", "or"}
    | {"use", "true", "false"}
)
_WORD = "(?:" + "|".join(sorted(WORDS)) + r")\b"

# The other terminals of attn.lark, as they are spelled or called.
_SPELLED = {
    "NAME": "a name",
    "INTEGER": "a number",
    "STRING": "a file name in double quotes",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "LSQB": "`[`",
    "RSQB": "`]`",
    "COMMA": "`,`",
    "COLON": "`:`",
    "EQUAL": "`=`",
    NEWLINE: "the end of the line",
    INDENT: "an indented block",
    END: "the end of the file",
}
# What starts an expression, a statement or an item of a file: named as a whole where the group is accepted.
_EXPRESSION = frozenset({"NAME", "INTEGER", "REAL", "TRUE", "FALSE", "LPAR"})
_STATEMENT = frozenset({"NAME", "INPUT", "AXIS", "SCAN", "REPEAT"})
_ITEM = frozenset({"NAME", "USE", "PATTERN"})
_OPERATOR = frozenset(
    {"AND", "OR", "NOT", "IN", "BELOW", "AT_MOST", "ABOVE", "AT_LEAST", "EQUALS", "DIFFERS"}
    | {"PLUS", "MINUS", "TIMES", "AT", "OVER", "FLOOR", "MODULO", "POWER"}
)
# What may follow a finished expression nearly everywhere, and would only lengthen the list.
_AFTER_EXPRESSION = frozenset({"DOT", "LSQB", "LPAR", "EQUAL", "WHERE", "FOR"})


class Hint(NamedTuple):
    """A common slip: what stands before it on its line, what stands there, and what to say instead.

    `before` is matched up to the end of the text before the place, `found` from the place on. Without a
    message the general one (expected, found) is kept. In both texts `{0}` is what was found, `{1}` the first
    group of `before`.
    """

    before: str
    found: str
    message: str | None
    help: str


CONTINUE = "a line continues on the next only inside brackets: put the expression in parentheses"
RENAME = "take another name"
CHOICE = "a condition on keys follows `where`; a choice is `if condition then a else b`"
PARAMETER = "write `{1}: int = 4`; the types are int, real, bool and ints"
INPUT = "write `input {1}: real[b, h, i]`, with the axes that it has"
WHERE = (
    "`where` stands once inside the parentheses of a reduction, after its plain arguments: "
    "`softmax[j](score where j <= i, sink = x)`"
)
UNDER_PATTERN = "indent it under a line `pattern name:`"
_OPENS_BLOCK = r"^\s*(?:(?:scan|repeat)\b[^:]*|pattern\s+\w+\s*(?:\([^()]*\))?\s*):\s*"

# The first one that fits is used.
HINTS = (
    Hint(r"^\s*(pattern|input|axis|scan|repeat|use)\s*", r"=(?!=)", "`{1}` is a word of the language", RENAME),
    Hint(r"(?:^|[(,])\s*", _WORD + r"\s*=(?!=)", "`{0}` is a word of the language", RENAME),
    Hint(r"^\s*(?:pattern|input|axis)\s+|\.\s*", _WORD, "`{0}` is a word of the language", RENAME),
    Hint(r"^(\w+)\s*", r"=(?!=)", "`{1}` is defined outside a pattern", UNDER_PATTERN),
    Hint(r"^", r"(?:input|axis|scan|repeat)\b", "`{0}` stands outside a pattern", UNDER_PATTERN),
    Hint(r"^\s+", r"pattern\b", "a pattern stands inside another", "start its line without indentation"),
    Hint(r"^\s+", r"use\b", "`use` stands inside a pattern", "move it to the top of the file, without indentation"),
    Hint(r"^\s*(?:def|fn|func|function)\s+", r"\w", "a function has no introducing word", "write `name(x) = ..`"),
    Hint(r"^\s*(?:let|var|const|set)\s+", r"\w", "an equation has no introducing word", "write `name = ..`"),
    Hint(r"^\s*return\b\s*", r".", "there is no `return`", "the result of a pattern is called out: `out = ..`"),
    Hint(r"^\s*(?:import|from|include)\b\s*", r".", "there is no `import`", 'write `use "file.attn"`'),
    Hint(r"", r"[-+*/@%]=", "there is no `{0}=`", "write `x = x {0} ..`"),
    Hint(_OPENS_BLOCK, r"\w", "a block starts on a line of its own", "indent its equations under this line"),
    Hint(r"", r"=<", None, "at most is written `<=`"),
    Hint(r"", r"=>", None, "at least is written `>=`"),
    Hint(r"<", r">", None, "unlike is written `!=`"),
    Hint(r"^\s*pattern\s.*[(,]\s*(\w+)\s*", r"[=,)]", "the parameter `{1}` has no type", PARAMETER),
    Hint(r"^\s*input\s+(\w+)\s*", r"[=\n\[]|$", "the input `{1}` has no type", INPUT),
    Hint(r"^\s*axis\s+(\w+)\s*", r"[:\n]|$", None, "write `axis {1} = blocks(j, size)`, or `segments(j, count)`"),
    Hint(r"^\s+(\w+)\s*", r":", None, "only inputs and parameters have a type: `input {1}: real[b, h, t]`"),
    Hint(r"\bif\b(?!.*\bthen\b).*", r"[:\n]|$", None, "write `if condition then a else b`"),
    Hint(r"\bthen\b(?!.*\belse\b).*", r"[:\n]|$", None, "an `if` always has its `else`: `if condition then a else b`"),
    Hint(r"[-+*/@%<>=]\s*", r"if\b", None, "put the `if` in parentheses"),
    Hint(r"[\w)\]]\s+", r"if\b", None, CHOICE),
    Hint(r"", r"where\b", None, WHERE),
    Hint(r"", r"for\b", None, "`for` unrolls the only argument of a function: `merge(branch(r) for r in rates)`"),
    Hint(r"[-+*/@%<>=]\s*|\b(?:and|or|not|in|then|else)\s*", r"\n|$", None, CONTINUE),
    Hint(r"\d", r"[A-Za-z_]", None, "a name starts with a letter; a product is written with `*`"),
    Hint(r"\[.*", r":", None, "there are no slices; an axis keeps its whole length"),
    Hint(r"", r"=(?!=)", None, "`=` gives a name its value; `==` compares"),
)
_CONTINUING = re.compile(r"[-+*/@%<>=!.,)\]]|(?:and|or|in|where|then|else)\b")

# Characters of other languages and of typeset mathematics.
_CHARACTERS = {
    "&": "write `and`",
    "|": "write `or`",
    "!": "write `not`, or `!=` for unlike",
    "~": "write `not`",
    "^": "a power is written `**`",
    "{": "there are no braces; blocks are made by indentation",
    "}": "there are no braces; blocks are made by indentation",
    ";": "every equation stands on a line of its own",
    "\\": CONTINUE,
    "'": "text stands in double quotes",
    "“": 'text stands in plain double quotes: `"`',
    "”": 'text stands in plain double quotes: `"`',
    "−": "write `-`",
    "–": "write `-`",
    "×": "write `*`",
    "·": "write `*`",
    "⋅": "write `*`, or `@` for the product of two vectors",
    "÷": "write `/`",
    "≤": "write `<=`",
    "≥": "write `>=`",
    "≠": "write `!=`",
    "∈": "write `in`",
    "∧": "write `and`",
    "∨": "write `or`",
    "¬": "write `not`",
    "√": "write `sqrt(x)`",
}


def explain_character(source: Source, at: int) -> Diagnostic:
    """The diagnostic for a character at which no word, number or sign starts."""
    character = source.text[at]
    span = Span(source=source, start=at, stop=at + 1)
    if character == '"':
        end = at + len(source.text[at:].split("\n", 1)[0])
        return Diagnostic("syntax", "this text is not closed on its line", Span(source=source, start=at, stop=end))
    help = _CHARACTERS.get(character)
    if help is None and character.isalpha():
        help = "names are written with the letters a to z, digits and `_`"
    elif help is None and character.isspace():
        help = "put an ordinary space in its place"
    shown = f"`{character}`" if character.isprintable() else unicodedata.name(character, "a control character").lower()
    number = "" if character.isascii() and character.isprintable() else f" (U+{ord(character):04X})"
    return Diagnostic("character", f"{shown}{number} means nothing here", span, help=help)


def explain_token(source: Source, error: UnexpectedToken, start: int, line_start: int) -> Diagnostic:
    """The diagnostic for a token at offset `start` that the grammar does not accept.

    `line_start` is where its logical line starts.
    """
    kind, accepted = error.token.type, frozenset(error.accepts or ())
    if kind == INDENT:
        return _indented(source, start)
    if INDENT in accepted:
        place = _line_code(source, start) if kind != END else Span(source=source, start=start, stop=start)
        message = "expected an indented block after the line that ends in `:`"
        return Diagnostic("indentation", message, place, help="indent its lines by four spaces")
    if kind in (NEWLINE, DEDENT, END):
        start = len(source.text[:start].rstrip())
        span = Span(source=source, start=start, stop=start)
    else:
        span = Span(source=source, start=start, stop=start + len(error.token))
    message = f"expected {_expected(accepted)}, found {_found(error)}"
    help: str | None = None
    if accepted == {"EQUAL"} and kind == "LPAR":
        help = "inside `scan` and `repeat` stand equations only: define the function above"
    elif accepted == {"NAME"} and error.token in ("input", "axis"):
        help = "inside `scan` and `repeat` stand equations only: declare it above"
    line = source.text[line_start : span.start]
    if len(line) > LONGEST_CONTEXT:  # the mark keeps the cut from looking like the start of the line
        line = "…" + line[-LONGEST_CONTEXT:]
    for hint in HINTS:
        before = re.search(f"(?:{hint.before})$", line, re.DOTALL)
        if before and re.compile(hint.found).match(source.text, span.start):
            given = (span.text, before.group(1) if before.re.groups else "")
            message = hint.message.format(*given) if hint.message else message
            help = help or hint.help.format(*given)
            break
    return Diagnostic("syntax", message, span, help=help)


def _indented(source: Source, start: int) -> Diagnostic:
    place = _line_code(source, start)
    message = "this line is indented more than the line above it"
    help = "start it where the line above starts; a block follows `pattern name:`, `scan t:` or `repeat n:`"
    if _CONTINUING.match(source.text, place.start):
        help = CONTINUE
    elif not re.sub(r"#[^\n]*", "", source.text[: place.start]).strip():
        message, help = "the first line is indented", "patterns start without indentation"
    return Diagnostic("indentation", message, place, help=help)


def _expected(accepted: frozenset[str]) -> str:
    """What is accepted, in words: `an expression`, "`,`, `)` or an operator"."""
    words: list[str] = []
    left = accepted - {DEDENT}
    for group, name in ((_EXPRESSION, "an expression"), (_STATEMENT, "a statement"), (_ITEM, "a pattern")):
        if group <= left:
            words.append(name)
            left -= group | {"MINUS", "NOT", "IF"}
    operators = left & _OPERATOR
    if len(operators) > 1:
        left -= _OPERATOR | _AFTER_EXPRESSION
    spelled = {_SPELLED.get(name, f"`{name.lower()}`") for name in left}
    words += sorted(spelled, key=lambda word: (not word.startswith("`"), word))
    if len(operators) > 1:
        words.append("an operator")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _found(error: UnexpectedToken) -> str:
    if error.token.type in (NEWLINE, DEDENT):
        return "the end of the line"
    return "the end of the file" if error.token.type == END else f"`{error.token}`"


def _line_code(source: Source, offset: int) -> Span:
    """The text of the first line with code at or after an offset."""
    text = re.compile(r"(?:\s|#[^\n]*)*([^\n]*)").match(source.text, offset)
    assert text is not None  # the expression matches the empty text
    return Span(source=source, start=text.start(1), stop=len(source.text[: text.end(1)].rstrip()))
