"""The words of the language with what they mean, one line each: for editors and highlighters.

Tests hold these tables against the grammar and the built-in functions, so that a new word shows up here.
"""

from __future__ import annotations

KEYWORDS: dict[str, str] = {
    "pattern": "`pattern name(parameters):` starts a mechanism; its result is what `out` is",
    "input": "`input x: real[b, h, t]` declares a tensor that a call gives by keyword",
    "axis": "`axis s = blocks(j, size)` groups positions; its name is then an index",
    "scan": "`scan t:` runs its equations at every token in order; a state starts at 0",
    "repeat": "`repeat n:` runs its equations n times",
    "where": "`softmax[j](score where condition)`: only members where the condition holds take part",
    "if": "`if condition then a else b`, element by element",
    "then": "`if condition then a else b`, element by element",
    "else": "`if condition then a else b`, element by element",
    "for": "`merge(branch(r) for r in rates)` writes a branch for every element of a tuple",
    "in": "`j in picked`: whether a position is in a selection or an int vector; also `mean[j in s](k)`",
    "not": "`not condition`, or `j not in picked`",
    "and": "both conditions",
    "or": "either condition",
    "use": '`use "file.attn"` makes the functions and patterns of another file visible',
    "true": "the condition that holds",
    "false": "the condition that does not hold",
}

TYPES: dict[str, str] = {
    "real": "a floating point number, of the type of q",
    "float": "`real`, by another name",
    "int": "an integer of 64 bits",
    "bool": "true or false",
    "ints": "a tuple of ints, of a length known when the text is checked",
}

TENSORS: dict[str, str] = {
    "q": "the queries: real[b, h, i; d]",
    "k": "the keys: real[b, h, j; d]",
    "v": "the values: real[b, h, j; e]",
    "scale": "a parameter of every pattern, D**-0.5 unless it is given",
}

INDICES: dict[str, str] = {
    "b": "the element of the batch",
    "h": "the head, of q",
    "i": "the query's position; with fewer queries than keys they are the last ones",
    "j": "the key's position",
    "t": "a token, read at i or at j",
}

SIZES: dict[str, str] = {
    "B": "the size of the batch",
    "H": "the number of heads of q",
    "N": "the number of queries",
    "M": "the number of keys",
    "T": "the number of tokens: of keys",
    "D": "the width of q and k",
    "E": "the width of v",
}

# name: (how it is called, what it gives)
FUNCTIONS: dict[str, tuple[str, str]] = {
    "abs": ("abs(x)", "|x|"),
    "argmax": ("argmax[s](score where c)", "the position of the largest score, an int; ties to the lowest"),
    "blocks": ("blocks(j, size, stride)", "an axis of blocks of positions; without a stride they tile the sequence"),
    "clamp": ("clamp(x, low, high)", "x, but at least low and at most high"),
    "concat": ("concat[f](x, y)", "two vectors end to end, along an axis that may be named"),
    "cos": ("cos(x)", "cosine, in radians"),
    "cumsum": ("cumsum[t](x where c)", "the inclusive prefix sum; the index stays"),
    "detach": ("detach(x)", "x without its gradient"),
    "elu": ("elu(x)", "x where positive, else exp(x) - 1"),
    "exp": ("exp(x)", "e to the x"),
    "floor": ("floor(x)", "the largest int not above x"),
    "group_sum": ("group_sum(x)", "the sum over the query heads that share a key head, given to each of them"),
    "identity": ("identity[m]", "the identity matrix over an axis"),
    "log": ("log(x)", "the natural logarithm"),
    "mass": ("mass[s](score, share where c, force = f)", "the best, until their scores sum to a share of the row's"),
    "matrix": ("matrix[m, n](x)", "x with two indices made vector axes, in that order"),
    "max": ("max[j](x where c), max(x, y)", "the maximum over live members, or of two values"),
    "mean": ("mean[j](x where c), mean[j in s](x)", "the mean over live members, or over each block's"),
    "merge": ("merge(a, b)", "one softmax over the keys of several branches; a key that two have counts twice"),
    "min": ("min[j](x where c), min(x, y)", "the minimum over live members, or of two values"),
    "normalize": ("normalize[j](x where c, eps = e)", "x / (its sum + eps), or with floor = f: x / max(|sum|, f)"),
    "orthogonal_gaussian": ("orthogonal_gaussian(features, width, seed)", "a constant random (features, width) matrix"),
    "outer": ("outer(x, y)", "the outer product of two vectors"),
    "real": ("real(x)", "an int as a real, a condition as 1 or 0"),
    "relu": ("relu(x)", "x where positive, else 0"),
    "segments": ("segments(j, count)", "an axis of `count` runs of positions of one length"),
    "sigmoid": ("sigmoid(x)", "1 / (1 + exp(-x))"),
    "silu": ("silu(x)", "x * sigmoid(x)"),
    "sin": ("sin(x)", "sine, in radians"),
    "softmax": ("softmax[j](score where c, sink = x)", "exp(score) over its sum; dead members and empty rows give 0"),
    "softplus": ("softplus(x)", "log(1 + exp(x))"),
    "sqrt": ("sqrt(x)", "the square root"),
    "sum": ("sum[j](x where c), sum[c in s](x)", "the sum over live members, or over each block's"),
    "tanh": ("tanh(x)", "the hyperbolic tangent"),
    "threshold": ("threshold[s](score, bound where c, force = f)", "the members with a score of at least the bound"),
    "topk": ("topk[s](score, count where c, force = f)", "the `count` best; forced ones come first"),
    "transpose": ("transpose(x)", "a matrix with its last two vector axes exchanged"),
    "uniform": ("uniform(seed, x, ..)", "a real in [0, 1) for each value of the ints, the same everywhere"),
}

ATTRIBUTES: dict[str, str] = {
    "index": "the number of a member of a declared axis",
    "start": "the first position of a member of a declared axis",
    "stop": "one past the last position of a member of a declared axis",
}

# Words between the parentheses of a reduction or selection that are followed by `=`.
OPTIONS = ("eps", "floor", "force", "sink")
