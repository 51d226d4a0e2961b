"""Batch normalisation of tokens, whose statistics may leave rows out and span processes."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast.ops._layout import to_map, to_tokens

from ._plain import plain, plain_parameters


@plain
class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that also works when parameters are cast and running statistics are not, as
    in sharded training with mixed precision: it computes in the dtype of the statistics."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.running_mean.dtype
        if self.weight.dtype == dtype:
            return super().forward(x)
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight.to(dtype), self.bias.to(dtype),
            self.training, self.momentum, self.eps,
        )  # fmt: skip


def batch_norm_tokens(
    norm: nn.Module, x: Tensor, height: int, width: int, rows: Tensor | None = None
) -> Tensor:
    """A batch norm on tokens `[R, L, C]`, over rows and tokens.

    norm: `nn.BatchNorm2d`, or what `nn.SyncBatchNorm.convert_sync_batchnorm` makes of it: then the
    statistics in training are those of all its processes, on any device and backend.
    rows `[R]` bool: those that the statistics in training are taken from; rows of absent modalities
    hold nothing real. Without any such row the running statistics serve. A norm that has hooks or
    is of another class is called instead, with these rows alone, and the others are zero.
    """
    synchronised = _synchronised(norm)
    if not norm.training or (rows is None and not synchronised):
        return to_tokens(norm(to_map(x, height, width)))
    if plain_parameters(norm) is None or norm.momentum is None or norm.running_mean is None:
        return _called(norm, x, height, width, rows)

    def total(x: Tensor) -> Tensor:
        return _AllReduce.apply(x, norm.process_group) if synchronised else x

    stats = x.float() if x.element_size() < 4 else x
    rows = x.new_ones(x.shape[0], dtype=torch.bool) if rows is None else rows
    kept = rows[:, None, None]
    count = total(rows.sum().to(stats.dtype) * x.shape[1])
    # Selected, not multiplied by 0: what is left out may be NaN.
    mean = total(torch.where(kept, stats, 0).sum((0, 1))) / count.clamp(min=1)
    var = total(torch.where(kept, stats - mean, 0).square().sum((0, 1))) / count.clamp(min=1)
    _update_running(norm, mean.detach(), var.detach(), count)
    some = count > 0
    mean = torch.where(some, mean, norm.running_mean.to(mean.dtype))
    var = torch.where(some, var, norm.running_var.to(var.dtype))
    scale = (var + norm.eps).rsqrt() * norm.weight
    return ((stats - mean) * scale + norm.bias).to(x.dtype)


def batch_norm_map(norm: nn.Module, x: Tensor) -> Tensor:
    """`batch_norm_tokens` on a map `[B, C, H, W]`."""
    if not (norm.training and _synchronised(norm)):
        return norm(x)
    size = x.shape[2], x.shape[3]
    return to_map(batch_norm_tokens(norm, to_tokens(x), *size), *size)


def _called(norm: nn.Module, x: Tensor, height: int, width: int, rows: Tensor | None) -> Tensor:
    if rows is None:
        return to_tokens(norm(to_map(x, height, width)))
    y = torch.zeros_like(x)
    if rows.any():
        chosen = to_tokens(norm(to_map(x[rows], height, width)))
        y = y.index_put((rows,), chosen.to(x.dtype))
    return y


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a batch norm does outside training: scale and shift, `[C]` each."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _synchronised(norm: nn.Module) -> bool:
    """Whether the statistics of a batch norm in training are those of several processes."""
    return isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()


class _AllReduce(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllReduce.apply(grad.contiguous(), ctx.group), None


def _update_running(norm: nn.Module, mean: Tensor, var: Tensor, count: Tensor) -> None:
    dtype = norm.running_mean.dtype
    momentum = norm.momentum * (count > 0).to(dtype)
    unbiased = var * count / (count - 1).clamp(min=1)
    norm.running_mean.lerp_(mean.to(dtype), momentum)
    norm.running_var.lerp_(unbiased.to(dtype), momentum)
    norm.num_batches_tracked.add_(1)
