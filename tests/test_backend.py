"""Whom a choice of backend reaches: this thread or task, its forwards and their backwards."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from equiseg_fast import mix_ffn, use_backend
from equiseg_fast.ops import _backend
from tests.every_operation import OPERATIONS
from tests.operations import Sizes, needs_interpreter

current = _backend.current


def in_new_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


class TestOverlap:
    """Enter A, enter B, leave A, leave B: nobody sees another's choice, and nothing is left."""

    def test_of_threads(self) -> None:
        both_in, first_out = threading.Barrier(2, timeout=60), threading.Event()

        def first() -> list[str]:
            with use_backend("torch"):
                both_in.wait()
                inside = current()
            first_out.set()
            return [inside, current()]

        def second() -> list[str]:
            with use_backend("reference"):
                both_in.wait()
                first_out.wait(60)
                inside = current()
            return [inside, current()]

        with ThreadPoolExecutor(2) as pool:
            seen = [f.result(timeout=60) for f in (pool.submit(first), pool.submit(second))]
        assert seen == [["torch", "auto"], ["reference", "auto"]]
        assert current() == "auto" == in_new_thread(current)

    def test_of_tasks(self) -> None:
        async def use(name: str, before: float, inside: float) -> list[str]:
            await asyncio.sleep(before)
            with use_backend(name):
                await asyncio.sleep(inside)
                child = asyncio.create_task(asyncio.sleep(0, current()))
                return [current(), await child]

        async def run() -> list[list[str]]:
            return await asyncio.gather(use("torch", 0, 0.02), use("reference", 0.01, 0.04))

        assert asyncio.run(run()) == [["torch"] * 2, ["reference"] * 2]
        assert current() == "auto"

    def test_of_generators_which_share_a_context(self) -> None:
        def use(name: str) -> Iterator[str]:
            with use_backend(name):
                yield current()

        first, second, third = use("torch"), use("reference"), use("torch")
        assert [next(first), next(second), next(third)] == ["torch", "reference", "torch"]
        first.close()
        assert current() == "torch"  # the third's
        third.close()
        assert current() == "reference"
        second.close()
        assert current() == "auto"

    def test_left_in_another_context(self) -> None:
        block = use_backend("torch")
        contextvars.copy_context().run(block.__enter__)
        block.__exit__(None, None, None)
        assert current() == "auto"

    def test_threads_started_inside_have_the_default_of_the_process(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with use_backend("reference"):
            assert in_new_thread(current) == "auto"
            monkeypatch.setattr(_backend, "_default", "torch")  # as the environment would
            assert (current(), in_new_thread(current)) == ("reference", "torch")


class TestCompiled:
    def test_guards_follow_the_choice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def function(x: Tensor) -> Tensor:
            return x + _backend.CHOICES.index(current())

        torch._dynamo.reset()
        counter = CompileCounter()
        compiled, zero = torch.compile(function, fullgraph=True, backend=counter), torch.zeros(())
        for _ in range(2):
            for i, name in enumerate(_backend.CHOICES):
                with use_backend(name):
                    assert compiled(zero) == i
                    assert in_new_thread(lambda: compiled(zero)) == 3
            assert compiled(zero) == 3
        assert counter.frame_count == 5  # four choices, and none
        monkeypatch.setattr(_backend, "_default", "torch")
        assert compiled(zero) == 1

    def test_block_inside(self) -> None:
        def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with use_backend("torch"):
                y = x + _backend.CHOICES.index(current())
                with use_backend("reference"):
                    z = x + _backend.CHOICES.index(current())
            return y, z, x + _backend.CHOICES.index(current())

        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(())) == (1, 2, 3)
        assert current() == "auto"


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("name", [n for n in OPERATIONS if n != "ohem"])
def test_backwards_ask_nothing_anew(name: str, backend: str) -> None:
    """A GPU runs them in threads of autograd, which know no choice."""
    operation = OPERATIONS[name]
    sizes = Sizes(modalities=2, batch=1, height=2, width=2, channels=3)
    inputs = operation.inputs(sizes)
    tensors = [inputs[name].requires_grad_() for name in operation.shapes(sizes)]
    with use_backend(backend):
        out = operation.function(**inputs)
    first = out if isinstance(out, Tensor) else out[0]
    cotangent = torch.randn_like(first)

    def backward(again: bool) -> Any:
        return torch.autograd.grad(first, tensors, cotangent, again, again, allow_unused=True)

    with patch.object(_backend, "resolve", side_effect=AssertionError("asked in the backward")):
        twice, once = in_new_thread(lambda: backward(True)), in_new_thread(lambda: backward(False))
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)
    assert any(g is not None and g.any() for g in once)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_function_that_chooses_itself(reentrant: bool) -> None:
    inputs = OPERATIONS["mix_ffn"].inputs()
    chosen: list[str] = []
    resolve = _backend.resolve

    def noted(*args: Any) -> str:
        chosen.append(resolve(*args))
        return chosen[-1]

    def function(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return mix_ffn(**{**inputs, "x": x})

    with patch.object(_backend, "resolve", noted):
        out = checkpoint(function, inputs["x"].requires_grad_(), use_reentrant=reentrant)
        in_new_thread(lambda: out.square().sum().backward())
    assert chosen == ["reference"] * 2
