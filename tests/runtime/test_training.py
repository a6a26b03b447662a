"""A training step under torch's transforms: compiled, exported, checkpointed, in mixed precision, on two processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnc
from attnc.runtime.tolerance import error, tolerance

TEXT = """
pattern causal:
    out = softmax[j](q @ k * scale where j <= i) @ v
pattern biased(window: int = 5):
    input slope: real[h]
    input doc: int[b, t]
    out = softmax[j](q @ k * scale - slope * (i - j) where 0 <= i - j < window and doc[i] == doc[j]) @ v
pattern gated(window: int = 4):
    input gate: real[b, h, t]
    near = softmax[j](q @ k * scale where 0 <= i - j < window) @ v
    far  = softmax[j](q @ k * scale where i - j >= window) @ v
    out = sigmoid(gate[i]) * near + far
pattern dilated(segments: ints = (4, 8), rates: ints = (1, 2)):
    out = merge(softmax[j](q @ k * scale where i // segment == j // segment and i % rate == j % rate) @ v
                for segment, rate in segments, rates)
"""


@pytest.fixture(scope="module")
def patterns() -> Any:
    return attnc.compile(TEXT, name="training.attn")


def drawn(length: int = 9, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors of `biased`."""
    generator = torch.Generator().manual_seed(length)
    shapes = {"q": (2, 4, length, 16), "k": (2, 2, length, 16), "v": (2, 2, length, 12), "slope": (4,)}
    made = {name: torch.randn(shape, generator=generator).to(dtype).requires_grad_() for name, shape in shapes.items()}
    return {**made, "doc": (torch.arange(length) // 6).expand(2, length)}


def real(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [x for x in tensors.values() if x.requires_grad]


def steps_agree(step: Callable[..., Tensor], pattern: Any, tensors: dict[str, Tensor], **settings: Any) -> None:
    """A step's gradients are those of the reference."""
    found = torch.autograd.grad(step(**tensors, **settings).pow(2).sum(), real(tensors))
    expected = torch.autograd.grad(pattern.reference(**tensors, **settings).pow(2).sum(), real(tensors))
    for gradient, wanted in zip(found, expected, strict=True):
        assert gradient.dtype == wanted.dtype
        assert error(gradient, wanted) <= 2 * tolerance(gradient.dtype, tensors["q"].shape[2])


@pytest.mark.parametrize("window", [3, 7])
def test_compiled_steps(patterns: Any, window: int) -> None:
    torch._dynamo.reset()
    step = torch.compile(patterns.biased.__call__, fullgraph=True, backend="aot_eager")
    steps_agree(step, patterns.biased, drawn(), window=window)


def test_compiled_steps_of_every_form(patterns: Any) -> None:
    q, k, v = real(drawn())[:3]
    for name, extra in (("causal", {}), ("gated", {"gate": torch.randn(2, 4, 9, requires_grad=True)}), ("dilated", {})):
        pattern = getattr(patterns, name)
        torch._dynamo.reset()
        step = torch.compile(lambda pattern=pattern, **given: pattern(**given), fullgraph=True, backend="aot_eager")
        steps_agree(step, pattern, {"q": q, "k": k, "v": v, **extra})


def test_one_graph_trains_all_lengths_and_windows(patterns: Any) -> None:
    graphs: list[int] = []

    def count(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(len(inputs))
        return torch._dynamo.backends.debugging.aot_eager(module, inputs)

    torch._dynamo.reset()
    step = torch.compile(
        lambda q, k, v, slope, doc, window: patterns.biased(q, k, v, slope=slope, doc=doc, window=window),
        fullgraph=True,
        backend=count,
        dynamic=True,
    )
    for length, window in ((9, 4), (14, 2), (33, 7), (27, 5)):
        steps_agree(step, patterns.biased, drawn(length), window=window)
    assert len(graphs) == 1


def test_lse_in_a_compiled_step(patterns: Any) -> None:
    def loss(call: Callable[..., Any], tensors: dict[str, Tensor]) -> Tensor:
        out, lse = call(**tensors)
        total: Tensor = out.pow(2).sum() + lse.exp().sum()
        return total

    torch._dynamo.reset()
    tensors = drawn(dtype=torch.float64)
    compiled = torch.compile(patterns.biased.with_lse, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(loss(compiled, tensors), real(tensors))
    wanted = torch.autograd.grad(loss(patterns.biased.reference_with_lse, tensors), real(tensors))
    torch.testing.assert_close(found, wanted)


class Layer(torch.nn.Module):
    """One layer of attention with learned slopes."""

    def __init__(self, pattern: Any, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.pattern, self.heads = pattern, heads
        self.into = torch.nn.Linear(width, 3 * width)
        self.slope = torch.nn.Parameter(torch.linspace(0.1, 1, heads))

    def forward(self, x: Tensor, doc: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.pattern(q, k, v, slope=self.slope, doc=doc)
        return out.transpose(1, 2).flatten(2)


def layer_gradients(layer: Layer, run: Callable[..., Tensor], x: Tensor, doc: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(run(x, doc).float().pow(2).sum(), [x, *layer.parameters()]))


def test_an_exported_layer_trains(patterns: Any) -> None:
    torch.manual_seed(0)
    layer = Layer(patterns.biased)
    x, doc = torch.randn(2, 9, 16, requires_grad=True), torch.zeros(2, 9, dtype=torch.int64)
    length = torch.export.Dim("length", min=2)
    exported = torch.export.export(layer, (x, doc), dynamic_shapes=({1: length}, {1: length})).module()
    x, doc = torch.randn(2, 14, 16, requires_grad=True), (torch.arange(14) // 5).expand(2, 14)
    wanted = layer_gradients(layer, layer, x, doc)
    parameters = dict(exported.named_parameters())
    order = [parameters[name] for name, _ in layer.named_parameters()]
    found = torch.autograd.grad(exported(x, doc).pow(2).sum(), [x, *order])
    torch.testing.assert_close(list(found), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(patterns: Any, reentrant: bool) -> None:
    torch.manual_seed(0)
    layer = Layer(patterns.biased)
    x, doc = torch.randn(2, 9, 16, requires_grad=True), torch.zeros(2, 9, dtype=torch.int64)
    wanted = layer_gradients(layer, layer, x, doc)
    checkpoint(layer, x, doc, use_reentrant=reentrant).float().pow(2).sum().backward()
    found = [one.grad for one in (x, *layer.parameters())]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_autocast_gives_gradients_of_the_parameters_own_type(patterns: Any) -> None:
    torch.manual_seed(0)
    layer = Layer(patterns.biased)
    x, doc = torch.randn(2, 9, 16, requires_grad=True), torch.zeros(2, 9, dtype=torch.int64)
    wanted = layer_gradients(layer, layer, x, doc)

    def mixed(x: Tensor, doc: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = layer(x, doc)
        assert out.dtype == torch.bfloat16
        return out

    for gradient, expected in zip(layer_gradients(layer, mixed, x, doc), wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert error(gradient, expected) < 0.05


@pytest.mark.parametrize("name", ["causal", "biased", "gated", "dilated"])
def test_opcheck(patterns: Any, name: str) -> None:
    """Schema, fake tensors, autograd registration and the traced step, with gradients of everything."""
    pattern = getattr(patterns, name)
    tensors = drawn(dtype=torch.float64)
    q, k, v, slope = real(tensors)
    gate = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    inputs = {"biased": [slope, tensors["doc"]], "gated": [gate]}.get(name, [])
    ints = {"biased": [5], "gated": [4], "dilated": [4, 8, 1, 2]}.get(name, [])
    arguments = (pattern.program.key, q, k, v, inputs, ints, [0.25], "auto")
    checked = torch.library.opcheck(torch.ops.attnc.attention.default, arguments)
    assert set(checked.values()) == {"SUCCESS"}


def test_opcheck_of_the_gradient(patterns: Any) -> None:
    q, k, v, slope = (x.detach() for x in real(drawn()))
    doc = drawn()["doc"]
    head = (patterns.biased.program.key,)
    tail = ([slope, doc], [5], [0.25], "auto")
    out, lse, saved = torch.ops.attnc.attention(*head, q, k, v, *tail)
    for grad_lse, needed in (
        (None, [True, False, True, True, False]),
        (torch.randn_like(lse), [False, True] * 2 + [False]),
    ):
        arguments: tuple[Any, ...] = (
            *head,
            torch.randn_like(out),
            grad_lse,
            [],
            out,
            lse,
            saved,
            q,
            k,
            v,
            *tail,
            needed,
        )
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        checked = torch.library.opcheck(torch.ops.attnc.attention_backward.default, arguments, test_utils=tests)
        assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["causal", "gated"])
def test_gradients_by_torch_func(patterns: Any, name: str) -> None:
    tensors = drawn(dtype=torch.float64)
    given = [x.detach() for x in real(tensors)[:3]]
    extra = {"gate": torch.randn(2, 4, 9, dtype=torch.float64)} if name == "gated" else {}

    def loss(*qkv: Tensor) -> Tensor:
        out: Tensor = getattr(patterns, name)(*qkv, **extra)
        return out.square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(*given)
    leaves = [x.clone().requires_grad_() for x in given]
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves), leaves), rtol=0, atol=0)
    pulled = torch.func.vjp(loss, *given)[1](torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(pulled, found, rtol=0, atol=0)


# torch's own forward mode compiles its rules with what it has since deprecated.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@FORWARD_MODE
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda call, q: torch.func.jvp(call, (q,), (q,)), "forward-mode derivatives are not supported"),
        (lambda call, q: torch.func.jacrev(call)(q), r"torch\.vmap over a pattern is not supported"),
        (lambda call, q: torch.vmap(torch.func.grad(call))(q[None]), r"torch\.vmap over a pattern is not supported"),
        (
            lambda call, q: torch.func.grad(lambda x: torch.func.grad(lambda y: call(y).square().sum())(x).sum())(q),
            "second derivatives are not supported",
        ),
    ],
    ids=["jvp", "jacrev", "each_sample", "twice"],
)
def test_transforms_of_torch_func_that_are_refused(patterns: Any, transform: Any, message: str) -> None:
    q, k, v = (x.detach() for x in real(drawn())[:3])
    with pytest.raises(attnc.AttnError, match=rf"causal: {message}"):
        transform(lambda x: patterns.causal(x, k, v), q)


@FORWARD_MODE
def test_tangents_are_refused_and_not_lost(patterns: Any) -> None:
    q, k, v = (x.detach() for x in real(drawn())[:3])
    with torch.autograd.forward_ad.dual_level():
        assert patterns.causal(q, k, v).shape == q.shape[:3] + v.shape[3:]
        with pytest.raises(attnc.AttnError, match="causal: forward-mode derivatives are not supported"):
            patterns.causal(q, k, torch.autograd.forward_ad.make_dual(v, v))


def test_transforms_that_are_refused(patterns: Any) -> None:
    q, k, v = real(drawn())[:3]
    out = patterns.causal(q, k, v)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for attnc::attention_backward"):
        torch.autograd.grad(out, q, torch.randn(3, *out.shape), is_grads_batched=True)
    (gradient,) = torch.autograd.grad(patterns.causal(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(attnc.AttnError, match=r"causal: second derivatives are not supported"):
        torch.autograd.grad(gradient.sum(), k)


WORKER = """
import sys
sys.path[:0] = sys.argv[3:]
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import attnc
from test_training import TEXT, Layer

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
layer = DistributedDataParallel(Layer(attnc.compile(TEXT, name="training.attn").biased))
x = torch.load(f"{folder}/x.pt")[rank : rank + 1]
layer(x, torch.zeros(1, 9, dtype=torch.int64)).pow(2).sum().backward()
torch.save([parameter.grad for parameter in layer.parameters()], f"{folder}/gradients{rank}.pt")
dist.barrier()  # neither leaves while the other still talks to it
del layer
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_their_gradients(patterns: Any, tmp_path: Path) -> None:
    """DistributedDataParallel over gloo gives both processes the mean of the gradients of their halves."""
    torch.manual_seed(0)
    layer = Layer(patterns.biased)
    x, doc = torch.randn(2, 9, 16), torch.zeros(2, 9, dtype=torch.int64)
    torch.save(x, tmp_path / "x.pt")
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", WORKER]
    paths = [str(here), str(here.parents[1])]
    started = [
        subprocess.Popen([*command, str(rank), str(tmp_path), *paths], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    complaints = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], complaints
    wanted = torch.autograd.grad(layer(x, doc).pow(2).sum() / 2, list(layer.parameters()))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"gradients{rank}.pt"), list(wanted))
