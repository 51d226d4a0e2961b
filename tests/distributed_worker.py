"""What `test_workflows.py` runs in two processes: sharded training equals a single process.

    torchrun --nproc-per-node 2 tests/distributed_worker.py

Every rank computes the gradients of the whole batch alone, then those of its share in a
distributed model, and compares. Normalisation uses running statistics, because those of a batch
are not the same for a share of it, unless `nn.SyncBatchNorm` makes them so: this is checked first.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))

from equiseg_fast import EQUISeg
from equiseg_fast.models.mix_transformer import TransformerBlock
from equiseg_fast.nn import CrossModalBlock

Gradients = dict[str, Tensor]


def build() -> EQUISeg:
    torch.manual_seed(0)
    model = EQUISeg.from_name("nano", modalities=("rgb", "depth"), num_classes=5, drop_path=0.0)
    for gate in model.gates:
        nn.init.normal_(gate.fc2.weight, std=0.1)
    return model.double().eval()


def gradients(
    model: nn.Module, images: Tensor, wrapped: Callable[[Tensor], Tensor] | None = None
) -> Gradients:
    logits = (model if wrapped is None else wrapped)(images)
    logits.double().square().mean().backward()
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        found[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return found


def compare(label: str, actual: Gradients, expected: Gradients, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    norm = sum(float(g.double().square().sum()) for g in expected.values()) ** 0.5
    worst = max(float((actual[n].double() - g).norm()) for n, g in expected.items()) / norm
    assert worst <= tolerance, f"{label}: gradients differ by {worst:.1e}"
    if dist.get_rank() == 0:
        print(f"{label}: gradients of {len(expected)} parameters differ by {worst:.1e} at most")


def sharded(model: EQUISeg, **options: object) -> EQUISeg:
    for module in model.modules():
        if isinstance(module, TransformerBlock | CrossModalBlock):
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def compare_synchronised_statistics(rank: int, ranks: int) -> None:
    """A cross-modal block with `nn.SyncBatchNorm` sees the statistics of the whole batch."""
    torch.manual_seed(0)
    block = CrossModalBlock(16, 3, 2, 2, ppx_ratio=2).double().train()
    maps = torch.randn(2, 3, 2 * ranks, 16, 4, 6, dtype=torch.float64)
    absent = torch.zeros(3, 2 * ranks, dtype=torch.bool)
    absent[0, 0] = absent[1:, 3] = True  # other rows take part on every rank
    share = slice(2 * rank, 2 * rank + 2)
    for label, present in (("statistics of all rows", None), ("statistics of some", ~absent)):
        alone = copy.deepcopy(block)
        mine = None if present is None else present[:, share]
        alone(*maps, present=present).square().mean().backward()
        ours = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
        ours(*maps[:, :, share], present=mine).square().mean().backward()
        for p in ours.parameters():  # DistributedDataParallel takes SyncBatchNorm on GPUs alone
            dist.all_reduce(p.grad)
            p.grad /= ranks
        actual, expected = ({n: p.grad for n, p in m.named_parameters()} for m in (ours, alone))
        compare(label, actual, expected, 1e-12)
        for a, b in zip(ours.buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    compare_synchronised_statistics(rank, ranks)
    if "--statistics" not in sys.argv:
        compare_wrappers(rank, ranks)
    dist.destroy_process_group()


def compare_wrappers(rank: int, ranks: int) -> None:
    """The whole model, sharded and not."""
    model = build()
    images = torch.randn(2, 2 * ranks, 3, 32, 64, dtype=torch.float64)
    share = images[:, 2 * rank : 2 * rank + 2]
    expected = gradients(copy.deepcopy(model), images)

    ours = copy.deepcopy(model)
    wrapped = DistributedDataParallel(ours)
    compare("DDP", gradients(ours, share, wrapped), expected, 1e-12)

    ours = sharded(copy.deepcopy(model))
    compare("FSDP2", gradients(ours, share), expected, 1e-12)

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ours = sharded(copy.deepcopy(model).float(), mp_policy=half)
    compare("FSDP2 in bf16", gradients(ours, share.float()), expected, 0.1)

    compare_compiled(rank, ranks)


def compare_compiled(rank: int, ranks: int) -> None:
    """A cross-modal block, sharded and compiled: of the whole model this takes a minute."""
    block = CrossModalBlock(16, 3, 2, 2, ppx_ratio=2).double().eval()
    maps = torch.randn(2, 3, 2 * ranks, 16, 4, 6, dtype=torch.float64)
    share = maps[:, :, 2 * rank : 2 * rank + 2]
    ours = fully_shard(copy.deepcopy(block))
    compiled: Callable[..., Tensor] = torch.compile(ours, backend="aot_eager")
    expected = gradients(block, maps, lambda x: block(*x))
    actual = gradients(ours, share, lambda x: compiled(*x))
    compare("FSDP2 compiled", actual, expected, 1e-12)


if __name__ == "__main__":
    main()
