"""The closed list of diagnostic codes: what `error[code]` can say, one line of meaning each."""

from __future__ import annotations

# Sorted by code; a test checks the order and that every code is used.
CODES: dict[str, str] = {
    "argument": "a call that lacks an argument, has one too many, or gives one of the wrong kind",
    "character": "a character that the language has no use for",
    "device": "tensors of one call on different devices",
    "dtype": "a tensor of a call whose element type is not the declared one",
    "encoding": "a file that is not UTF-8",
    "file-size": "a file that is longer than an .attn file may be",
    "indentation": "a line that is indented differently from the block it stands in",
    "nesting": "brackets or blocks inside one another, deeper than the language allows",
    "not-positive": "a divisor or size that a call makes zero or negative",
    "number": "a number that the language cannot hold",
    "setting": "a `# check:` or `# run:` comment that cannot be read",
    "shape": "tensors of a call whose shapes don't agree with the declared axes",
    "syntax": "text that does not have the form of the language",
    "transform": "a torch transform that a compiled pattern does not support",
    "unreadable": "a file that cannot be opened",
}
