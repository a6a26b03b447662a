"""Random programs that mostly check: what hypothesis and the atheris harness feed to the parser, checker and compiler.

A program is drawn through one function, `choose(n)`, which gives an int in 0 .. n - 1; 0 is the plainest choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Choose = Callable[[int], int]

HEADER = """pattern p(window: int = 5, stride: int = 3, rates: ints = (1, 4), cap: real = 50.0, soft: bool = true):
    input doc: int[b, t]
    input live: bool[b, t]
    input slope: real[h]
    input gate: real[b, h, i, 3]
    input table: real[h, buckets]
    input bias: real[b, h, i, j]
    input columns: int[h, y]
    input forget: real[b, h, t]
    input E: real[r, j]
    axis s = blocks(j, 8)
    axis c = blocks(j, 8, 4)
    G = cumsum[t](forget)
    picked = topk[s](q @ mean[j in s](k), 2 where s.stop <= i)
    phi(x) = elu(x) + 1
"""
INTS = ("j", "i", "window", "stride", "0", "1", "2", "7", "h", "b", "N", "M", "H", "D", "doc[i]", "doc[j]", "BUCKETS")
LARGE = ("4294967296", "9223372036854775807", "s.index", "64", "1024")
REALS = ("q @ k", "q @ k * scale", "slope", "scale", "0.5", "cap", "gate[0]", "bias", "forget[i] - forget[j]", "1e300")
UNARY = ("exp", "tanh", "sigmoid", "log", "sqrt", "abs", "relu", "softplus", "elu", "silu", "sin", "cos", "detach")
NOISE = (
    "",
    " ",
    "(",
    ")",
    "[",
    "]",
    "\n",
    "\n    ",
    ",",
    ":",
    "where",
    "q",
    "in",
    "@",
    "9" * 20,
    "é",
    '"',
    "#",
    "\t",
    "%",
)


class Programs:
    """Draws one program. `budget` bounds the number of its operations."""

    def __init__(self, choose: Choose, budget: int = 60) -> None:
        self.choose = choose
        self.budget = budget

    def pick(self, *options: str) -> str:
        return options[self.choose(len(options))]

    def spent(self) -> bool:
        """Whether only leaves may follow."""
        self.budget -= 1
        return self.budget <= 0

    def int(self) -> str:
        if self.spent():
            return self.pick(*INTS)
        match self.choose(9):
            case 0:
                return self.pick(*INTS)
            case 1:
                return f"(i - {self.pick('j', 'window', 'j * 2', 'stride * j')})"
            case 2 | 3:
                return f"({self.int()} {self.pick('+', '-', '*')} {self.int()})"
            case 4:
                return f"({self.int()} {self.pick('//', '%')} {self.pick('stride', '3', '8', 'window', self.int())})"
            case 5:
                return f"{self.pick('min', 'max')}({self.int()}, {self.int()})"
            case 6:
                return f"{self.pick('abs', '-')}({self.int()})"
            case 7:
                return f"(if {self.bool()} then {self.int()} else {self.int()})"
            case _:
                return self.pick(*LARGE, f"floor({self.real()})", f"clamp({self.int()}, 0, {self.int()})")

    def bool(self) -> str:
        if self.spent():
            return self.pick("j <= i", "i - j < window", "live[j]", "doc[i] == doc[j]", "soft", "true", "h % 2 == 0")
        match self.choose(8):
            case 0:
                return self.pick("j <= i", "0 <= i - j < window", "live[j]", "doc[i] == doc[j]", "soft", "false")
            case 1 | 2:
                return f"{self.int()} {self.pick('<', '<=', '>', '>=', '==', '!=')} {self.int()}"
            case 3:
                return f"({self.bool()} {self.pick('and', 'or')} {self.bool()})"
            case 4:
                return f"(not ({self.bool()}))"
            case 5:
                return f"({self.int()} < {self.int()} <= {self.int()})"
            case 6:
                return self.pick("j in columns[h]", "i - j in columns[h]", f"{self.int()} in columns[h]", self.drawn())
            case _:
                return f"(if {self.bool()} then {self.bool()} else {self.bool()})"

    def drawn(self) -> str:
        return f"(j in topk[s](uniform(1, {self.int()}, s.index), 2 where s.index <= {self.int()}))"

    def real(self) -> str:
        if self.spent():
            return self.pick(*REALS)
        match self.choose(7):
            case 0:
                return self.pick(*REALS)
            case 1 | 2:
                return f"({self.real()} {self.pick('+', '-', '*', '/')} {self.pick(self.real(), self.int())})"
            case 3:
                return f"{self.pick(*UNARY)}({self.real()})"
            case 4:
                return f"(if {self.bool()} then {self.real()} else {self.real()})"
            case 5:
                return f"table[{self.int()}]"
            case _:
                return self.pick(f"real({self.int()})", f"({self.real()} ** 2)", f"max({self.real()}, 0.0)", "k @ k")

    def branch(self) -> str:
        sink = self.pick("", ", sink = slope", "")
        where = f" where {self.bool()}" if self.choose(5) else ""
        return f"softmax[j]({self.pick('q @ k * scale', f'q @ k + {self.real()}', self.real())}{where}{sink}) @ v"

    def of_row(self, expression: str) -> str:
        """An expression that varies over nothing of the keys."""
        for of_keys, of_row in (("q @ k", "slope"), ("k @ k", "slope"), ("bias", "gate[1]"), ("s.index", "1")):
            expression = expression.replace(of_keys, of_row)
        return re.sub(r"\bj\b", "i", re.sub(r"topk\[s\]", "topk[h]", expression))

    def out(self) -> str:
        match self.choose(11):
            case 0 | 1 | 2:
                return self.branch()
            case 9 | 10:
                return self.other()
            case 3:
                return f"merge({self.branch()}, {self.branch()})"
            case 4:
                return f"sigmoid(gate[0]) * ({self.branch()}) + {self.of_row(self.real())} * ({self.branch()})"
            case 5:
                return f"if {self.of_row(self.bool())} then {self.branch()} else {self.branch()}"
            case 6:
                return f"merge({self.branch().replace('stride', 'rate')} for rate in rates)"
            case 7:
                return f"sum[j]({self.real()} * v where {self.bool()})"
            case _:
                return f"normalize[j]({self.real()} where {self.bool()}, eps = 1e-6) @ v"

    def other(self) -> str:
        """A result of another family: low rank, features, decays, selections, and mixes of them with a branch."""
        pools = self.pick("mean[j in c](k)", "mean[j in s](k)", "E @ k", "max[j in s](k)")
        index = "s" if "in s" in pools else "c" if "in c" in pools else "r"
        weight = self.pick("phi(q) @ phi(k)", "exp(G[i] - G[j]) * (q @ k)", "slope ** (i - j) * (q @ k)", self.real())
        live = self.pick("j <= i", "i - j >= window", "true", "doc[i] == doc[j] and j <= i", self.bool())
        seen = self.pick("j in picked", "i // 8 == j // 8 or j in picked", f"j in picked and {self.bool()}")
        made = self.pick(
            f"normalize[j]({weight} where {live}, eps = 1e-6) @ v",
            f"sum[j]({weight} * v where {live})",
            f"softmax[{index}](q @ ({pools}) * scale) @ ({pools.replace('k', 'v')})",
            f"softmax[j](q @ k * scale where j <= i and ({seen})) @ v",
            f"phi(q) @ {self.pick('sum', 'mean', 'cumsum')}[j](outer(phi(k), v) where {live})",
        )
        return self.pick(made, made, f"tanh(slope) * ({made}) + {self.branch()}")

    def named(self) -> list[str]:
        """A few equations and functions, so that values are shared."""
        lines = []
        for number in range(self.choose(4)):
            kind = self.choose(4)
            if kind == 0:
                lines.append(f"x{number} = {self.bool()}")
            elif kind == 1:
                lines.append(f"x{number} = {self.int()}")
            elif kind == 2:
                lines.append(f"f{number}(x) = x {self.pick('+', '*', '%', '//')} {self.int()}")
            else:
                lines.append(f"x{number} = {self.real()}")
        return lines

    def scanned(self) -> list[str]:
        """A recurrence."""
        decay = self.pick("exp(forget) * ", "", "sigmoid(forget) * ", "tanh(slope) * ")
        added = self.pick("outer(k, v)", "outer(k, v - k @ S)", f"{self.of_row(self.real())} * outer(phi(k), v)")
        read = self.pick("q * scale @ S", "phi(q) @ S", "q @ S + v")
        return ["scan t:", f"    S = {decay}S + {added}", f"    out = {read}"]

    def program(self) -> str:
        """The text; sometimes with a piece of noise somewhere in it."""
        body = [*self.named(), *(self.scanned() if self.choose(12) == 11 else [f"out = {self.out()}"])]
        text = HEADER + "".join(f"    {line}\n" for line in body)
        if self.choose(8) == 7:
            at = self.choose(len(text))
            text = text[:at] + self.pick(*NOISE) + text[at + self.choose(4) :]
        return text
