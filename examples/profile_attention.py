"""Attention of stage 1 of SegFormer-B0: checked, profiled, and timed beside PyTorch's own.

python examples/profile_attention.py [--side 128]
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from equiseg_fast import attention, explain, reference
from equiseg_fast.testing import check_op_parity, random_normal


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by PyTorch, which wants heads before tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def step(function: object, inputs: dict[str, Tensor], cotangent: Tensor) -> None:
    torch.autograd.grad(function(**inputs), list(inputs.values()), cotangent)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Returns the median milliseconds of a forward and backward, by implementation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=128, help="of the map of queries")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, each")
    args = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    queries, keys = args.side**2, (args.side // 8) ** 2  # keys are reduced 8 x 8
    inputs = {
        name: random_normal((4, length, 1, 32), dtype, seed=seed, device=device)
        for seed, (name, length) in enumerate([("q", queries), ("k", keys), ("v", keys)])
    }

    # First correct: against fp64, under the tolerance policy of the tests.
    found = check_op_parity(
        attention, reference.attention, inputs, differentiable=tuple(inputs), contraction=keys
    )
    used = {name: f"{parity.budget_used:.0%}" for name, parity in found.items()}
    print(f"share of the allowed error used: {used}")
    print(explain("attention", **inputs))

    # Then where the time goes.
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    cotangent = random_normal(inputs["q"].shape, dtype, seed=3, device=device)
    step(attention, inputs, cotangent)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        step(attention, inputs, cotangent)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=8))

    # Then how long. `python -m benchmarks run --op attention` does this with more care.
    medians, threads = {}, torch.get_num_threads()
    print(f"ms of a forward and backward, {dtype} on {device}, {threads} threads:")
    for name, function in (("equiseg_fast", attention), ("SDPA", sdpa)):
        names = {"step": step, "function": function, "inputs": inputs, "cotangent": cotangent}
        timer = Timer("step(function, inputs, cotangent)", globals=names, num_threads=threads)
        medians[name] = 1e3 * timer.blocked_autorange(min_run_time=args.seconds).median
        print(f"{name}: {medians[name]:.2f}")
    return medians


if __name__ == "__main__":
    main()
