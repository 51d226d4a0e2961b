"""Attention over blocks of queries on the CPU, against the fp64 oracle.

The limits are made small here, so that there are many blocks.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from equiseg_fast import attention, reference
from equiseg_fast.ops import _attention_cpu, _layout
from equiseg_fast.testing import assert_deterministic, check_op_parity, random_normal
from tests.operations import MEAN

torch_attention = partial(attention, backend="torch")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """With one, convolutions are another library's, and there are no blocks."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 40 queries for 2 heads and 32 keys, or for 1 head and 64 keys, on any processor."""
    monkeypatch.setattr(_layout, "_WIDE_CONVOLUTIONS", True)
    monkeypatch.setattr(_attention_cpu, "_SCORE_BYTES", 40 * 2 * 32 * 4)
    monkeypatch.setattr(_attention_cpu, "_MIN_QUERIES", 8)
    monkeypatch.setattr(_attention_cpu, "_MIN_SCORES", 1)


def make(
    batch: int = 2,
    queries: int = 104,
    keys: int = 21,
    heads: int = 2,
    dim: int = 16,
    layout: str = "contiguous",
) -> dict[str, Tensor]:
    lengths = {"q": queries, "k": keys, "v": keys}
    return {
        name: random_normal((batch, length, heads, dim), seed=i, mean=MEAN, layout=layout)
        for i, (name, length) in enumerate(lengths.items())
    }


def parity(inputs: dict[str, Tensor], cotangent: str = "contiguous", **options: float) -> None:
    assert _attention_cpu.suits(inputs["q"], inputs["k"])
    check_op_parity(
        partial(torch_attention, **options),
        partial(reference.attention, **options),
        inputs,
        differentiable=("q", "k", "v"),
        cotangent=cotangent,
        contraction=min(inputs["q"].shape[1], inputs["k"].shape[1]),
    )


@pytest.mark.parametrize(("heads", "keys"), [(1, 1), (1, 64), (2, 16), (2, 21), (5, 3), (8, 7)])
def test_keys_and_heads(heads: int, keys: int) -> None:
    """With the number of keys a multiple of 16, and padded to one."""
    parity(make(heads=heads, keys=keys))


@pytest.mark.parametrize("queries", [8, 40, 48, 104, 168])
def test_blocks(queries: int) -> None:
    """One block, full ones, nearly equal shares, a smaller last one."""
    parity(make(batch=1, queries=queries, dim=32))


def test_shares() -> None:
    q, k, _ = make(queries=168).values()
    blocks = [(block.start, block.stop) for block in _attention_cpu._blocks(q, k)]
    assert blocks == [(0, 40), (40, 80), (80, 120), (120, 160), (160, 168)]
    q, k, _ = make(queries=104).values()
    blocks = [(block.start, block.stop) for block in _attention_cpu._blocks(q, k)]
    assert blocks == [(0, 40), (40, 80), (80, 104)]
    q, k, _ = make(queries=88).values()
    blocks = [(block.start, block.stop) for block in _attention_cpu._blocks(q, k)]
    assert blocks == [(0, 32), (32, 64), (64, 88)]


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
def test_strides(layout: str) -> None:
    parity(make(layout=layout), cotangent=layout)


def test_scale() -> None:
    parity(make(), scale=-0.7)
    parity(make(), scale=0.0)


def test_empty_batch() -> None:
    tensors = [x.requires_grad_() for x in make(batch=0).values()]
    out = torch_attention(*tensors)
    assert out.shape == (0, 104, 2, 16)
    for x, g in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert g.shape == x.shape


def test_one_input_needs_a_gradient() -> None:
    q, k, v = make().values()
    k.requires_grad_()
    (grad,) = torch.autograd.grad(torch_attention(q, k, v).square().sum(), k)
    (expected,) = torch.autograd.grad(reference.attention(q, k, v).square().sum(), k)
    torch.testing.assert_close(grad, expected)
    assert q.grad is None
    assert v.grad is None


def test_double_backward() -> None:
    def penalty(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.to(dtype).requires_grad_() for x in make(queries=16, keys=5).values()]
        out = function(*inputs)
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    actual = penalty(torch_attention, torch.float32)
    expected = penalty(reference.attention, torch.float64)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_saves_the_inputs_alone() -> None:
    saved: list[Tensor] = []
    tensors = [x.requires_grad_() for x in make().values()]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        torch_attention(*tensors)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in tensors}


def test_under_autocast_for_something_else() -> None:
    """Convolutions are not cast behind the back of an operation that has decided for fp32."""
    q, k, v = make().values()
    expected = _attention_cpu.attend(q, k, v, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_attention_cpu.attend(q, k, v, 0.25), expected)


def test_repeats_are_bit_identical() -> None:
    tensors = [x.requires_grad_() for x in make().values()]

    def step() -> tuple[Tensor, ...]:
        out = torch_attention(*tensors)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    assert_deterministic(step)


def test_what_it_does_not_suit() -> None:
    q, k, _ = make().values()
    assert _attention_cpu.suits(q, k)
    assert not _attention_cpu.suits(q.double(), k.double())
    assert not _attention_cpu.suits(q.bfloat16(), k.bfloat16())
    assert not _attention_cpu.suits(q[:, 1:], k)  # 103 queries make no map of width 8
    assert not _attention_cpu.suits(q[..., 1:], k[..., 1:])  # 15 channels per head
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _attention_cpu.suits(q, k)
    with FakeTensorMode() as mode:
        assert not _attention_cpu.suits(mode.from_tensor(q), mode.from_tensor(k))
    torch.set_num_threads(1)
    assert not _attention_cpu.suits(q, k)


def test_double_backward_under_autocast() -> None:
    """What was cast when the operation was called is not cast again."""
    q, k, v = (x.requires_grad_() for x in make(queries=16, keys=5).values())
    out = _attention_cpu.attend(q, k, v, 0.25)
    g = torch.randn_like(out)
    plain = torch.autograd.grad(out, (q, k, v), g, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = torch.autograd.grad(out, (q, k, v), g, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_batched_cotangents() -> None:
    tensors = [x.requires_grad_() for x in make(queries=16, keys=5).values()]
    g = torch.randn(3, 2, 16, 2, 16)
    batched = torch.autograd.grad(torch_attention(*tensors), tensors, g, is_grads_batched=True)
    for i in range(3):
        alone = torch.autograd.grad(torch_attention(*tensors), tensors, g[i])
        for a, b in zip(batched, alone, strict=True):
            torch.testing.assert_close(a[i], b)


def test_traces_serve_other_batches() -> None:
    """A loop over images would be recorded with as many rounds as the example has."""
    q, k, v = make(batch=3).values()
    pair = q[:2], k[:2], v[:2]
    expected = reference.attention(q, k, v)
    graph = make_fx(torch_attention, tracing_mode="symbolic")(*pair)
    torch.testing.assert_close(graph(q, k, v), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_see_stock_operators() -> None:
    q, k, v = make().values()
    batched = torch.vmap(lambda *x: torch_attention(*(t[None] for t in x))[0])(q, k, v)
    torch.testing.assert_close(batched, reference.attention(q, k, v))


@pytest.mark.parametrize(("queries", "heads", "keys"), [(4096, 1, 256), (4096, 2, 256)])
def test_parity_as_in_the_model(
    queries: int, heads: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real limits, where convolutions are certainly oneDNN's."""
    monkeypatch.undo()
    monkeypatch.setattr(_layout, "_WIDE_CONVOLUTIONS", True)
    inputs = make(batch=1, queries=queries, heads=heads, keys=keys, dim=32)
    block = inputs["q"][0, : _attention_cpu._block(heads, keys)]
    weight = torch.empty((heads * keys, 32, 1, 1))
    backend = torch._C._select_conv_backend(
        _attention_cpu._map(block), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], heads
    )
    assert backend == torch._C._ConvBackend.Mkldnn
    parity(inputs)


@pytest.mark.parametrize("wide", [False, True])
def test_sizes_of_the_model(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real limits: stages 1 and 2 of EQUISeg-B0 at 512 x 512, not the small ones; none
    where products of matrices are as wide as convolutions."""
    monkeypatch.undo()
    monkeypatch.setattr(_layout, "_WIDE_CONVOLUTIONS", wide)
    for queries, heads, keys, expected in (
        (16384, 1, 256, True), (4096, 2, 256, True), (1024, 5, 256, False), (256, 8, 256, False),
        (2048, 1, 16, False),
    ):  # fmt: skip
        q, k = (torch.empty((1, n, heads, 32)) for n in (queries, keys))
        assert _attention_cpu.suits(q, k) is (expected and wide)
