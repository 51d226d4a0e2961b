"""An operation held to the policy: all outputs and all gradients, against an oracle and eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from equiseg_fast.ops._checks import (
    FLOATING,
    check_callable,
    check_choice,
    check_memory,
    check_seed,
    check_sequence,
)

from .memory import LAYOUTS, random_normal, storage_bytes
from .policy import HALF, Override, Parity, assert_parity, check_policy


def check_op_parity(
    fn: Callable[..., Any],
    reference_fn: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    differentiable: Sequence[str],
    eager_fn: Callable[..., Any] | None = None,
    seed: int = 0,
    cotangent: str = "contiguous",
    kinds: Mapping[str, str] = MappingProxyType({}),
    output_names: Sequence[str] | None = None,
    tf32: bool = False,
    chain: int = 1,
    contraction: int | None = None,
    overrides: Sequence[Override] = (),
) -> dict[str, Parity]:
    """Holds all outputs and all gradients of an operation to the policy.

    Runs `fn(**inputs)`, the oracle `reference_fn` on float64 copies and plain eager PyTorch, then
    all three backward with the same random normal cotangents (a sum as loss would hide transposed
    and permuted gradients). fp32 results of half-precision inputs are measured against eager fp32.

    Args:
        fn: the operation under test; returns a tensor or a tuple of tensors.
        reference_fn: the mathematics in plain PyTorch, in any floating dtype.
        inputs: keyword arguments. Tensors keep their strides; anything that is no floating tensor
            (labels, masks, sizes) is passed through as it is.
        differentiable: the names of the inputs whose gradients are checked, as "d" + name.
        eager_fn: another eager implementation; `reference_fn` if None.
        seed: seeds the cotangents.
        cotangent: their memory layout, one of `LAYOUTS` (1-D and 0-D ones are contiguous).
        kinds: the kind of a result by its name, where it is not "forward", "gradient", or (for
            results that are not floating) "exact".
        output_names: "out", or "out0", "out1", ... if None.
        tf32, chain, contraction: see `assert_parity`.
        overrides: see `assert_parity`; each holds for the results its tier applies to.

    Returns:
        What was measured, by result name.

    Raises:
        AssertionError: from `assert_parity`; a result that is missing or cut off from the graph;
            inputs or cotangents (or the memory around them) that changed.
        ValueError: names that do not exist; a `reference_fn` that does not stay in float64.
    """
    eager_fn = reference_fn if eager_fn is None else eager_fn
    check_callable(fn=fn, reference_fn=reference_fn, eager_fn=eager_fn)
    for label, mapping in (("inputs", inputs), ("kinds", kinds)):
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{label} must be a mapping by name; got {mapping!r}")
    check_sequence("differentiable", differentiable, str, "names of inputs")
    if output_names is not None:
        check_sequence("output_names", output_names, str, "names")
    check_seed(seed)
    check_choice("cotangent", cotangent, LAYOUTS)
    check_policy(tf32, chain, contraction, overrides)
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    for label, x in tensors.items():
        check_memory(f"inputs[{label!r}]", x)
    floating = tuple(label for label, x in tensors.items() if x.dtype in FLOATING)
    if not set(differentiable) <= set(floating):
        raise ValueError(
            f"differentiable must name some of the floating tensors in inputs, {floating}; "
            f"got {tuple(differentiable)}"
        )
    watched = dict(tensors)
    before = {name: storage_bytes(x).clone() for name, x in watched.items()}

    def assert_untouched() -> None:
        for name, x in watched.items():
            if not torch.equal(before[name], storage_bytes(x)):
                raise AssertionError(f"{name} was changed, or the memory around it")

    half = any(x.dtype in HALF for x in tensors.values())
    runs = {"actual": _Run(fn, inputs, differentiable, None)}
    assert_untouched()
    runs["oracle"] = _Run(reference_fn, inputs, differentiable, torch.float64)
    with _no_tf32():
        runs["eager"] = _Run(eager_fn, inputs, differentiable, None)
        if half:
            runs["eager32"] = _Run(eager_fn, inputs, differentiable, torch.float32)
    counts = {name: len(run.outputs) for name, run in runs.items()}
    if len(set(counts.values())) != 1:
        raise AssertionError(f"not the same number of outputs: {counts}")

    count = counts["actual"]
    names = output_names
    if names is None:
        names = ["out"] if count == 1 else [f"out{i}" for i in range(count)]
    gradient_names = [f"d{name}" for name in differentiable]
    if len(names) != count or not set(kinds) <= {*names, *gradient_names}:
        raise ValueError(
            f"output_names must be {count}, got {tuple(names)}; kinds must name some of those or of"
            f" {tuple(gradient_names)}, got {tuple(kinds)}"
        )

    records: dict[str, Parity] = {}

    def compare(name: str, default: str, results: Mapping[str, Tensor]) -> None:
        actual, eager = results["actual"], results["eager"]
        if results["oracle"].dtype in (torch.float32, *HALF):
            raise ValueError(f"{name}: no oracle, reference_fn computed {results['oracle'].dtype}")
        kind = kinds.get(name, default if actual.is_floating_point() else "exact")
        # Summed or normalised in fp32, whatever came in: half precision is no yardstick for that.
        wide = default == "forward" and kind in ("statistic", "parameter")
        if half and (wide or eager.dtype == torch.float32):
            eager = results["eager32"]
        records[name] = assert_parity(
            actual,
            results["oracle"],
            eager,
            name=name,
            kind=kind,
            tf32=tf32,
            chain=chain,
            contraction=contraction,
            overrides=overrides,
        )

    for i, name in enumerate(names):
        compare(name, "forward", {run: runs[run].outputs[i] for run in runs})

    cotangents: list[Tensor | None] = [None] * count
    for i, (name, x) in enumerate(zip(names, runs["actual"].outputs, strict=True)):
        if x.requires_grad != runs["oracle"].outputs[i].requires_grad:
            raise AssertionError(f"{name}: requires_grad is {x.requires_grad}, the oracle differs")
        if x.requires_grad:
            layout = cotangent if x.dim() >= 2 else "contiguous"
            g = random_normal(x.shape, x.dtype, seed=seed + i, layout=layout, device=x.device)
            watched[f"cotangent of {name}"] = cotangents[i] = g
            before[f"cotangent of {name}"] = storage_bytes(g).clone()
    if any(g is not None for g in cotangents):
        gradients = {"actual": runs["actual"].backward(cotangents)}
        assert_untouched()
        with _no_tf32():
            gradients |= {r: runs[r].backward(cotangents) for r in runs if r != "actual"}
        for i, name in enumerate(gradient_names):
            compare(name, "gradient", {run: gradients[run][i] for run in runs})
    return records


class _Run:
    """One forward of `fn`, with floating inputs cast to `dtype` (None: as they are)."""

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Mapping[str, Any],
        differentiable: Sequence[str],
        dtype: torch.dtype | None,
    ) -> None:
        arguments = dict(inputs)
        for name, x in inputs.items():
            if isinstance(x, Tensor):
                x = x.detach()
                arguments[name] = x.to(dtype) if dtype and x.is_floating_point() else x
        self.leaves = [arguments[name].requires_grad_() for name in differentiable]
        outputs = fn(**arguments)
        self.outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def backward(self, cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        outputs, grads = [], []
        for x, g in zip(self.outputs, cotangents, strict=True):
            if g is not None:
                outputs.append(x)
                grads.append(g.to(x.dtype))
        return torch.autograd.grad(
            outputs, self.leaves, grads, allow_unused=True, materialize_grads=True
        )


@contextmanager
def _no_tf32() -> Iterator[None]:
    """A yardstick is multiplied in full precision; cuDNN's convolutions default to TF32."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    value: Any = "ieee"
    settings = [(matmul, "fp32_precision"), (getattr(cudnn, "conv", None), "fp32_precision")]
    if not hasattr(matmul, "fp32_precision"):
        value, settings = False, [(matmul, "allow_tf32"), (cudnn, "allow_tf32")]
    saved = [getattr(owner, name) for owner, name in settings]
    try:
        for owner, name in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), old in zip(settings, saved, strict=True):
            setattr(owner, name, old)
