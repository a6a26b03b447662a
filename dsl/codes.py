"""The closed list of diagnostic codes: what `error[code]` can say, one line of meaning each."""

from __future__ import annotations

# Sorted by code; a test checks the order and that every code is used.
CODES: dict[str, str] = {
    "character": "a character that the language has no use for",
    "encoding": "a file that is not UTF-8",
    "file-size": "a file that is longer than an .attn file may be",
    "indentation": "a line that is indented differently from the block it stands in",
    "nesting": "brackets or blocks inside one another, deeper than the language allows",
    "number": "a number that the language cannot hold",
    "syntax": "text that does not have the form of the language",
    "unreadable": "a file that cannot be opened",
}
