"""A Pygments lexer for `.attn`: Sphinx, MkDocs and every other user of Pygments finds it by the name `attn`."""

from __future__ import annotations

from pygments.lexer import RegexLexer, bygroups, words
from pygments.token import Comment, Keyword, Name, Number, Operator, Punctuation, String, Text, Whitespace

from attnc.dsl.vocabulary import FUNCTIONS, INDICES, KEYWORDS, SIZES, TENSORS, TYPES

DECLARING = ("axis", "input", "pattern", "repeat", "scan", "use")
WORD_OPERATORS = ("and", "in", "not", "or")
CONSTANTS = ("false", "true")
_OTHERS = sorted(set(KEYWORDS) - {*DECLARING, *WORD_OPERATORS, *CONSTANTS})
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"


class AttnLexer(RegexLexer):
    """Tokens of a `.attn` text, right or wrong."""

    name = "attn"  # type: ignore[assignment]  # pygments has no types: None, says its base class
    aliases = ["attn"]  # noqa: RUF012  # a list of the class, as in the base class
    filenames = ["*.attn"]  # noqa: RUF012

    tokens = {  # noqa: RUF012
        "root": [
            (r"\n", Whitespace),
            (r"[ \t\r]+", Whitespace),
            (r"#[^\n]*", Comment.Single),
            (r'"[^"\n]*"', String),
            (rf"(pattern)([ \t]+)({_NAME})", bygroups(Keyword.Declaration, Whitespace, Name.Class)),
            (words(DECLARING, suffix=r"\b"), Keyword.Declaration),
            (words(WORD_OPERATORS, suffix=r"\b"), Operator.Word),
            (words(CONSTANTS, suffix=r"\b"), Keyword.Constant),
            (words(_OTHERS, suffix=r"\b"), Keyword),
            # `real` is a type, and a function where it is called.
            (rf"(:)([ \t]*)({'|'.join(sorted(TYPES))})\b", bygroups(Punctuation, Whitespace, Keyword.Type)),
            (words(sorted(FUNCTIONS), suffix=r"(?=[ \t]*[\[(])"), Name.Builtin),
            (words(sorted([*TENSORS, *INDICES, *SIZES]), suffix=r"\b"), Name.Builtin.Pseudo),
            (rf"{_NAME}(?=[ \t]*\()", Name.Function),
            (_NAME, Name),
            (r"(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+", Number.Float),
            (r"\d+", Number.Integer),
            (r"\*\*|//|<=|>=|==|!=|[-+*/@%<>=]", Operator),
            (r"[()\[\]:,.]", Punctuation),
            (r".", Text),
        ],
    }
