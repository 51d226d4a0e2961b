"""Problems made of modules: whole models and parts of them, on the same parameters for everybody.

The weights are random (`enliven`) and nothing else is: no stochastic depth, no dropout, teachers
drawn from a fixed seed, so that every provider computes the same. Half precision means autocast.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.cases.common.problem import Outputs, Problem
from benchmarks.providers import baselines
from benchmarks.providers.provider import COMPILED, lazily_compiled
from equiseg_fast import use_backend

# Relative RMS error of outputs and of all gradients, against the fp32 reference. The maxima and
# the selection of hard pixels are not continuous: one pixel that decides otherwise in the last bit
# sends its whole gradient elsewhere, which costs more than rounding does: up to 4e-3 of images of
# 64 x 96, and less of larger ones; without such a pixel it is 1e-5.
AGREEMENT = {torch.float32: (1e-4, 5e-3)}
HALF_AGREEMENT = (5e-2, 0.3)

Call = Callable[[], Outputs]
Module = TypeVar("Module", bound=nn.Module)


def network_problem(
    network: Callable[..., Any],
    run: Callable[[Callable[..., Any]], Outputs],
    baseline: Call,
    leaves: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    plain: Callable[..., Any] | None = None,
    others: Mapping[str, Call] | None = None,
    ignored: Sequence[Tensor] = (),
    **fields: Any,
) -> Problem:
    """A problem that every backend can do.

    network: ours, an nn.Module or a function over modules, which can be compiled. run: calls it, or
    what was made of it, on the inputs. baseline: the same in the style of `baselines`. plain: the
    network that the reference and the oracle run, if it is another. others: further providers.
    ignored, fields: of `Problem`; leaves are ignored anyway.
    """
    owner = getattr(network, "__self__", network)  # of a method

    def on(backend: str, made: Callable[..., Any]) -> Call:
        return lambda: _with(use_backend(backend), lambda: run(made))

    reference = on("reference", plain or network)
    calls = {
        "baseline": baseline,
        "baseline_cl": baselines.channels_last(baseline),
        "reference": reference,
        "torch": on("torch", network),
        "triton": on("auto", network),
        "tuned": on("auto", network),
        **{name: on("torch", lazily_compiled(network, m)) for name, m in COMPILED.items()},
        **(others or {}),
    }

    def cast_to(wanted: torch.dtype, call: Call) -> Call:
        return lambda: _with(_autocast(device, wanted), call)

    return Problem(
        calls={name: cast_to(dtype, call) for name, call in calls.items()},
        leaves=dict(leaves),
        cast=lambda wanted: (cast_to(wanted, reference), list(leaves.values())),
        agreement=AGREEMENT.get(dtype, HALF_AGREEMENT),
        ignored=(*ignored, *leaves.values()),
        root=owner if isinstance(owner, nn.Module) else None,
        **fields,
    )


def _with(context: AbstractContextManager[Any], call: Call) -> Outputs:
    with context:
        return call()


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def alive(make: Callable[[], Module], seed: int, device: torch.device) -> Module:
    """A module of random weights that let everything matter, from this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        enliven(module)
    return module.to(device)


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    """Give weights a standard deviation of fan-in ** -0.5 and layer scales one around 1, in place.

    Fresh models have branches so weak, and gates so equal, that whatever is wrong in them vanishes
    beside the residual stream: the gate of parity would not see it.
    """
    for name, weight in module.named_parameters():
        if "layer_scale" in name:
            nn.init.normal_(weight, 1.0, 0.1)
        elif weight.dim() > 1:
            # The query hub has the depthwise filters of all modalities in one parameter.
            filter_of_one = weight[0, 0] if name.endswith("dw_weight") else weight[0]
            nn.init.normal_(weight, std=filter_of_one.numel() ** -0.5)
