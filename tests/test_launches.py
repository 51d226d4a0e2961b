"""How many kernels a forward and a backward give to a GPU, their work, and how both are counted."""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.command.options import ROOT
from benchmarks.measure import kernel_work
from benchmarks.measure.kernel_work import Kernel
from benchmarks.measure.launches import H100, META, Call, counting, on_meta
from benchmarks.providers import baselines
from equiseg_fast import (
    EQUISeg,
    add_layer_norm,
    attention,
    depthwise_conv_gelu,
    pooling_mixer,
    upsample_cross_entropy,
)
from equiseg_fast.kernels import _common
from equiseg_fast.nn import CrossModalBlock
from equiseg_fast.ops import _backend

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="counting launches needs triton"
)


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> None:
    """Not here: the poison itself would be counted."""


SIZE = 8


def block(stage: int, modalities: int, training: bool) -> tuple[CrossModalBlock, list[Tensor]]:
    names = [f"m{i}" for i in range(modalities)]
    model = EQUISeg.from_name("b0", modalities=names, num_classes=25, drop_path=0.0)
    sizes = (modalities, 1, SIZE**2, model.config.dims[stage - 1])
    return model.fusion[stage - 1].train(training), [torch.randn(sizes) for _ in range(2)]


def fused(calls: list[Call]) -> Counter[str]:
    """Launches of ours by name."""
    return Counter(call.name for call in calls if call.ours)


def stock(calls: list[Call]) -> Counter[str]:
    """Calls of stock operators by name."""
    return Counter(call.name for call in calls if not call.ours)


def kernels(calls: list[Call]) -> list[Kernel]:
    return [kernel for call in calls for kernel in call.kernels]


class TestCounting:
    def test_views_and_allocations_are_no_kernels(self) -> None:
        x = torch.randn(2, 3, 4)
        with counting(H100) as calls:
            x.mT.unflatten(0, (2, 1)).detach().expand(2, 5, 4, 3)
            torch.empty_like(x)
            x.flatten(0, 1)
        assert stock(calls) == {}
        with counting(H100) as calls:
            torch.addmm(x[0, 0], x[0], x[0].T @ x[0]).sum().clone()
            x.mT.contiguous()
        assert stock(calls) == {"addmm": 1, "mm": 1, "sum": 1, "clone": 2}

    def test_our_operations_are_looked_into(self) -> None:
        q, k, v = (torch.randn(1, 64, 2, 32, requires_grad=True) for _ in range(3))
        with counting(H100) as calls:
            attention(q, k, v).backward(torch.ones(1, 64, 2, 32))
        names = ("attention_fwd", "attention_bwd_delta", "attention_bwd_dq", "attention_bwd_dkdv")
        assert fused(calls).items() >= dict.fromkeys(names, 1).items()
        assert "attention_bwd" not in stock(calls)

    def test_copies_inside_our_operations_count(self) -> None:
        x, weight, bias = torch.randn(1, 64, 32), torch.randn(32, 1, 7, 7), torch.randn(32)
        with torch.no_grad(), counting(H100) as calls:
            pooling_mixer(x, weight, bias, 8, 8)
        assert stock(calls) == {"clone": 1}  # the taps, channels last
        x = x.mT.contiguous().mT
        with torch.no_grad(), counting(H100) as calls:
            pooling_mixer(x, weight, bias, 8, 8)
        assert stock(calls) == {"clone": 2}

    def test_nothing_stays_changed(self) -> None:
        from equiseg_fast.kernels import attention as kernels

        before = _backend.INTERPRET
        with pytest.raises(ValueError, match="stop"), counting(H100):
            raise ValueError("stop")
        assert kernels.launch is _common.launch
        assert _backend.INTERPRET is before
        assert _backend.current() == "auto"


class TestCrossModalBlock:
    """The fewer launches, the more of a step a GPU computes."""

    @pytest.mark.parametrize(
        ("stage", "launched", "total", "folded"), [(1, 5, 32, 30), (2, 5, 33, 31), (3, 6, 34, 32)]
    )
    def test_forward(self, stage: int, launched: int, total: int, folded: int) -> None:
        """Stages beyond 128 channels have a kernel for scores; the others are one or two copies
        and products of small weights apart."""
        module, (x, y) = block(stage, 4, training=False)
        with torch.no_grad(), counting(H100) as ours:
            module(x, y, SIZE, SIZE)
        assert (fused(ours).total(), len(ours)) == (launched, total)
        maps = [tokens.mT.unflatten(-1, (SIZE, SIZE)).contiguous() for tokens in x]
        with torch.no_grad(), counting(H100) as eager:
            baselines.cross_modal_block(module, maps, list(y))
        assert len(eager) > 4 * total
        whole = EQUISeg.from_name("b0", num_classes=25).fold_()
        with torch.no_grad(), counting(H100) as ours:
            whole.fusion[stage - 1](x, y, SIZE, SIZE)
        assert len(ours) == folded

    def test_gate(self) -> None:
        model = EQUISeg.from_name("b0", num_classes=25).eval()
        for s, width in enumerate(model.config.dims):
            y = torch.randn(4, 1, SIZE**2, width)
            with torch.no_grad(), counting(H100) as ours:
                model._balance(s, y, None)
            assert (fused(ours).total(), len(ours)) == (1, 16)
            with torch.no_grad(), counting(H100) as eager:
                baselines.balance(model.gates[s], list(y))
            assert len(eager) > 4 * 16

    def test_the_number_of_modalities_does_not_matter(self) -> None:
        totals = set()
        for modalities in (2, 3, 4, 8):
            module, (x, y) = block(1, modalities, training=False)
            with torch.no_grad(), counting(H100) as calls:
                module(x, y, SIZE, SIZE)
            totals.add(len(calls))
        assert len(totals) == 1

    def test_training(self) -> None:
        module, (x, y) = block(1, 4, training=True)
        with counting(H100) as forward:
            out = module(x, y, SIZE, SIZE)
        cotangent = torch.randn_like(out)
        with counting(H100) as backward:
            out.backward(cotangent)
        assert (fused(forward).total(), fused(backward).total()) == (5, 12)
        assert stock(forward).total() <= 30
        assert stock(backward).total() <= 60
        # No reordering of features, no indexing, nothing that waits for the device.
        assert not {"index_put_", "nonzero", "_local_scalar_dense", "avg_pool2d"} & {
            *stock(forward),
            *stock(backward),
        }

    def test_baseline_is_counted_by_the_same_rule(self) -> None:
        q = torch.randn(1, 64, 1, 32)
        with counting(H100) as calls:
            baselines.attention(q, q, q)
        assert fused(calls) == {}
        assert stock(calls) == {"bmm": 2, "mul": 1, "_softmax": 1}


def new(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=grad)


def step(function: Callable[..., Tensor], *leaves: Tensor) -> list[Call]:
    with counting(H100) as calls:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    return calls


def named(calls: list[Call]) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels(calls)}


class TestWork:
    def test_kernels_with_an_entry_of_their_own_exist(self) -> None:
        """A kernel that is renamed would be taken for one that waits for memory only."""
        sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
        known = set(re.findall(r"def _?(\w+?)(?:_kernel)?\(", sources))
        assert (kernel_work.SLOTS.keys() | kernel_work.PRODUCTS.keys()) <= known

    def test_one_launch_of_ours(self) -> None:
        x, update, weight, bias = new(2, 64, 32), new(2, 64, 32), new(32), new(32)
        with counting(H100) as calls:
            add_layer_norm(x, update, weight, bias)
        (kernel,) = kernels(calls)
        # x, update, total, normed; weight, bias; mean, rstd in fp32
        assert kernel.bytes == 4 * 2 * 64 * 32 * 2 + 2 * 32 * 2 + 2 * 128 * 4
        assert kernel.slots == 28.5 * 2 * 64 * 32
        assert (kernel.name, kernel.kind) == ("add_layer_norm_fwd", "ours")
        assert fused(calls) == {"add_layer_norm_fwd": 1}

    def test_attention(self) -> None:
        q, k, v = (new(2, length, 5, 64, grad=True) for length in (1024, 256, 256))
        found = named(step(attention, q, k, v))
        scores, size = 2 * 5 * 1024 * 256, 2 * 1024 * 5 * 64 * 2
        forward = found["attention_fwd"]
        assert (forward.matrix, forward.exps) == (4 * 64 * scores, scores)
        assert forward.bytes == 2 * size + 2 * size // 4 + 2 * 5 * 1024 * 4
        assert forward.kind == "attention forward D=64"
        assert forward.programs == 2 * 5 * 1024 // 128
        assert found["attention_bwd_dkdv"].matrix == 8 * 64 * scores
        assert found["attention_bwd_dq"].matrix == 6 * 64 * scores
        assert found["attention_bwd_dq"].kind == "attention backward D=64"
        with counting(H100) as calls:
            attention(q[..., :32], k[..., :32], v[..., :32])
        assert kernels(calls)[0].kind == "attention forward D=32"

    def test_issue_slots_of_both_directions(self) -> None:
        x, weight, bias = (new(*n, grad=True) for n in ((2, 64, 32), (32, 1, 3, 3), (32,)))
        calls = step(lambda *a: depthwise_conv_gelu(*a, 8, 8), x, weight, bias)
        slots = {(call.phase, k.name): k.slots for call in calls for k in call.kernels}
        assert slots["fwd", "depthwise_conv"] == 28.4 * x.numel()
        assert slots["bwd", "depthwise_conv"] == 19.5 * x.numel()
        assert slots["bwd", "depthwise_bwd"] == 51 * x.numel()
        assert slots["bwd", "sum_partials"] == 0
        logits, labels = new(1, 32, 8, 8), torch.zeros(1, 64, 64, dtype=torch.uint8, device=META)
        with counting(H100) as calls:
            upsample_cross_entropy(logits, labels)
        assert named(calls)["upsample_cross_entropy_fwd"].slots == 20 * 32 * 64 * 64

    def test_stock_linear(self) -> None:
        calls = step(F.linear, new(4096, 32, grad=True), new(64, 32, grad=True), new(64, grad=True))
        forward, *backward = kernels(calls)
        assert (forward.name, forward.kind) == ("addmm", "GEMM")
        assert forward.matrix == 2 * 4096 * 32 * 64
        assert forward.bytes == 2 * (4096 * 32 + 64 * 32 + 64 + 4096 * 64)
        assert [k.kind for k in backward] == ["GEMM", "weight-gradient GEMM", "reduction"]
        assert [call.phase for call in calls] == ["fwd", "bwd", "bwd", "bwd"]
        with counting(H100) as calls:
            F.linear(new(4, 32, dtype=torch.float32), new(64, 32, dtype=torch.float32))
        (single,) = kernels(calls)
        assert (single.matrix, single.vector) == (0, 2 * 4 * 32 * 64)

    def test_convolution_is_several_kernels(self) -> None:
        x, weight, bias = new(2, 16, 8, 8, grad=True), new(32, 16, 3, 3, grad=True), new(32)
        found = kernels(step(lambda x, w: F.conv2d(x, w, bias, padding=1), x, weight))
        product, size = 2 * 2 * 64 * 9 * 16 * 32, 2 * 2 * 64 * 32
        assert [k.name for k in found] == [
            "convolution", "add_", "convolution_backward dx", "convolution_backward dweight",
        ]  # fmt: skip
        assert [k.matrix for k in found] == [product, 0, product, product]
        assert found[1].bytes == 2 * size
        assert {found[i].kind for i in (0, 2, 3)} == {"convolution"}

    def test_stencils_and_pools(self) -> None:
        x, weight = new(2, 16, 8, 8), new(16, 1, 7, 7)
        with counting(H100) as calls:
            F.conv2d(x, weight, new(16), padding=3, groups=16)
            F.avg_pool2d(x, 11, 1, 5)
        convolution, pool = kernels(calls)
        assert convolution.slots == 3.25 * 49 * x.numel()
        assert convolution.matrix == 0
        assert pool.slots == 3.25 * 121 * x.numel()
        assert convolution.kind == pool.kind == "stencil"

    def test_norms_read_twice(self) -> None:
        x, weight, bias = new(8, 64, 32, grad=True), new(32, grad=True), new(32, grad=True)
        found = kernels(step(lambda *a: F.layer_norm(a[0], (32,), *a[1:]), x, weight, bias))
        size = 8 * 64 * 32 * 2
        kinds = ["LayerNorm forward", *2 * ["LayerNorm backward"]]
        assert [k.kind for k in found] == kinds
        assert [k.bytes // size for k in found] == [2, 3, 2]
        maps = new(2, 32, 8, 8, grad=True)
        mean, var = new(32, dtype=torch.float32), new(32, dtype=torch.float32)
        found = kernels(step(lambda x: F.batch_norm(x, mean, var, training=True), maps))
        size = 2 * 32 * 64 * 2
        assert [k.bytes // size for k in found if k.kind == "BatchNorm"] == [1, 2, 2, 3]
        with counting(H100) as calls:
            F.batch_norm(maps, mean, var)
        assert [k.bytes // size for k in kernels(calls)] == [2]

    def test_copies_and_what_is_overwritten(self) -> None:
        x = new(64, 32)
        with counting(H100) as calls:
            x.clone()
            x.mT.contiguous()
            x.copy_(new(64, 32))
            x.zero_()
            x.add_(x)
            new(1, 32).expand(64, 32) + 1
        size = 64 * 32 * 2
        found = kernels(calls)
        kinds = ["pointwise", "transposing copy", *4 * ["pointwise"]]
        assert [k.kind for k in found] == kinds
        assert [k.bytes for k in found] == [*3 * [2 * size], size, 2 * size, size + 64]

    def test_flash_attention_has_a_program_per_block_of_keys(self) -> None:
        q, k, v = (new(4, 2, n, 64, grad=True) for n in (4096, 256, 256))
        with on_meta():
            found = kernels(step(F.scaled_dot_product_attention, q, k, v))
        forward, _, backward, _ = found
        scores = 4 * 2 * 4096 * 256
        assert (forward.kind, forward.matrix) == ("SDPA forward D=64", 4 * 64 * scores)
        assert (backward.kind, backward.matrix) == ("SDPA backward", 10 * 64 * scores)
        assert (forward.programs, backward.programs) == (4 * 2 * 32, 4 * 2 * 2)

    def test_sums_of_gradients_are_backward(self) -> None:
        calls = step(lambda x: x.exp() + x.sin(), new(8, grad=True))
        added = [call.phase for call in calls if call.name.startswith("add")]
        assert added == ["fwd", "bwd"]


class TestMeta:
    def test_casts_as_autocast_of_cuda_does(self) -> None:
        x, weight = new(4, 8, dtype=torch.float32), new(8, 8, dtype=torch.float32)
        with on_meta(torch.bfloat16):
            y = F.linear(x, weight)
            assert y.dtype == torch.bfloat16
            assert F.gelu(y).dtype == torch.bfloat16
            assert {F.layer_norm(y, (8,)).dtype, y.softmax(-1).dtype, y.sum().dtype} == {
                torch.float32
            }
            assert (y @ y.T.float()[:, :4]).dtype == torch.bfloat16
        with on_meta():
            assert F.linear(x, weight).dtype == torch.float32

    def test_everything_is_made_there(self) -> None:
        with on_meta():
            generator = torch.Generator().manual_seed(0)
            assert torch.randn(2**40, generator=generator).device == META
            assert torch.randperm(4, generator=generator).device.type == "cpu"
        assert torch.zeros(1).device.type == "cpu"

    def test_who_waits_for_a_value_goes_on(self) -> None:
        with on_meta(), counting(H100) as calls:
            marks = torch.zeros(64, dtype=torch.int64)
            mask = marks == 3
            assert mask.sum() > 0
            assert int(mask.sum()) == mask.sum().item() == 1
            assert torch.zeros(64, 8)[mask].shape == (64, 8)
        assert stock(calls)["nonzero"] + stock(calls)["index"] >= 1
