"""How much memory a call needs: allocations, not what the process happens to occupy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def peak_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """(peak bytes allocated during the call above the state before it, what the call returned).

    Outputs count while they are held. On a GPU by the statistics of the caching allocator, on the
    CPU by replaying every allocation and release that PyTorch reports to its profiler, which also
    sees the scratch memory inside operators, but not the release of what was there before. Both
    are exact and neither is the resident set.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # negative of a release
        peak = max(peak, held)
    return peak, result


def saved_bytes(
    forward: Callable[[], tuple[Tensor, ...]], ignored: Iterable[Tensor] = ()
) -> tuple[int, tuple[Tensor, ...]]:
    """(bytes kept for the backward, what forward returned): the storages reached by saved tensors,
    each once, without those of the ignored tensors (parameters and inputs, which exist anyway)."""
    known = {x.untyped_storage().data_ptr() for x in ignored}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = forward()
    total = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in known)
    return total, outputs
