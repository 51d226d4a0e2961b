"""How many kernels a forward and a backward give to a GPU, and how the count is made."""

import importlib.util

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, launches
from equiseg_fast import EQUISeg, attention, pooling_mixer
from equiseg_fast.kernels import _common
from equiseg_fast.ops import _backend

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="counting launches needs triton"
)


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> None:
    """Not here: the poison itself would be counted."""


@pytest.fixture(scope="module")
def rows() -> dict[tuple[int, str, str], launches.Row]:
    return {(r.stage, r.part, r.provider): r for r in launches.cross_modal_blocks()}


def block(stage: int, modalities: int, training: bool) -> tuple[torch.nn.Module, list[Tensor]]:
    names = [f"m{i}" for i in range(modalities)]
    model = EQUISeg.from_name("b0", modalities=names, num_classes=25, drop_path=0.0)
    sizes = (modalities, 1, launches.SIZE**2, model.config.dims[stage - 1])
    return model.fusion[stage - 1].train(training), [torch.randn(sizes) for _ in range(2)]


class TestCounter:
    def test_views_and_allocations_are_no_kernels(self) -> None:
        x = torch.randn(2, 3, 4)
        with launches.counting() as counter:
            x.mT.unflatten(0, (2, 1)).detach().expand(2, 5, 4, 3)
            torch.empty_like(x)
            x.flatten(0, 1)
        assert counter.stock == {}
        with launches.counting() as counter:
            torch.addmm(x[0, 0], x[0], x[0].T @ x[0]).sum().clone()
            x.mT.contiguous()
        assert counter.stock == {"addmm": 1, "mm": 1, "sum": 1, "clone": 2}

    def test_our_operations_are_looked_into(self) -> None:
        q, k, v = (torch.randn(1, 64, 2, 32, requires_grad=True) for _ in range(3))
        with launches.counting() as counter:
            attention(q, k, v).backward(torch.ones(1, 64, 2, 32))
        fused = {"attention_fwd": 1, "attention_bwd_delta": 1, "attention_bwd_dq": 1}
        assert counter.fused.items() >= (fused | {"attention_bwd_dkdv": 1}).items()
        assert "attention_bwd" not in counter.stock

    def test_copies_inside_our_operations_count(self) -> None:
        x, weight, bias = torch.randn(1, 64, 32), torch.randn(32, 1, 7, 7), torch.randn(32)
        with torch.no_grad(), launches.counting() as counter:
            pooling_mixer(x, weight, bias, 8, 8)
        assert counter.stock == {"clone": 1}  # the taps, channels last
        x = x.mT.contiguous().mT
        with torch.no_grad(), launches.counting() as counter:
            pooling_mixer(x, weight, bias, 8, 8)
        assert counter.stock == {"clone": 2}

    def test_nothing_stays_changed(self) -> None:
        from equiseg_fast.kernels import attention as kernels

        before = _backend.INTERPRET
        with pytest.raises(ValueError, match="stop"), launches.counting():
            raise ValueError("stop")
        assert kernels.launch is _common.launch
        assert _backend.INTERPRET is before
        assert _backend._default == "auto"


class TestCrossModalBlock:
    """The fewer launches, the more of a step a GPU computes; see the table in a report."""

    @pytest.mark.parametrize(
        ("stage", "fused", "total", "folded"), [(1, 5, 32, 30), (2, 5, 33, 31), (3, 6, 34, 32)]
    )
    def test_forward(self, rows: dict, stage: int, fused: int, total: int, folded: int) -> None:
        """Stages beyond 128 channels have a kernel for scores; the others are one or two copies
        and products of small weights apart."""
        ours = rows[stage, "block", "ours"]
        assert (ours.fused, ours.total) == (fused, total)
        assert rows[stage, "block", "ours, folded"].total == folded
        assert rows[stage, "block", "baseline"].total > 4 * total

    def test_gate(self, rows: dict) -> None:
        for stage in (1, 2, 3, 4):
            assert rows[stage, "gate", "ours"].fused == 1
            assert rows[stage, "gate", "ours"].total == 16
            assert rows[stage, "gate", "baseline"].total > 4 * 16

    def test_the_number_of_modalities_does_not_matter(self) -> None:
        totals = set()
        for modalities in (2, 3, 4, 8):
            module, (x, y) = block(1, modalities, training=False)
            with torch.no_grad(), launches.counting() as counter:
                module(x, y, launches.SIZE, launches.SIZE)
            totals.add(counter.fused.total() + counter.stock.total())
        assert len(totals) == 1

    def test_training(self) -> None:
        module, (x, y) = block(1, 4, training=True)
        with launches.counting() as forward:
            out = module(x, y, launches.SIZE, launches.SIZE)
        cotangent = torch.randn_like(out)
        with launches.counting() as backward:
            out.backward(cotangent)
        assert (forward.fused.total(), backward.fused.total()) == (5, 12)
        assert forward.stock.total() <= 30
        assert backward.stock.total() <= 60
        # No reordering of features, no indexing, nothing that waits for the device.
        assert not {"index_put_", "nonzero", "_local_scalar_dense", "avg_pool2d"} & {
            *forward.stock,
            *backward.stock,
        }

    def test_baseline_is_counted_by_the_same_rule(self) -> None:
        q = torch.randn(1, 64, 1, 32)
        with launches.counting() as counter:
            baselines.attention(q, q, q)
        assert counter.fused == {}
        assert counter.stock == {"bmm": 2, "mul": 1, "_softmax": 1}
