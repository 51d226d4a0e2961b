"""What every test gets: the Triton interpreter where there is no GPU, a seed, poisoned memory."""

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest

# Tensors here are tiny: on a busy machine threads that wait for one another cost up to 100 times
# what they save. Read when torch is imported, here and by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    # Triton reads the variable while it is imported; set later, kernels that call tl.sum fail.
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/conftest.py could ask to interpret")
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What is tested are the default launch configurations.
os.environ.pop("EQUISEG_FAST_TUNED", None)

from torch._dynamo import trace_rules  # noqa: E402  (after the lines above)

from equiseg_fast.testing import nan_poison  # noqa: E402

# The compiler lists the functions of torch on first use, and keeps the list: made while memory is
# poisoned, it would know the wrappers of that one test instead of `torch.empty` itself.
trace_rules.get_torch_obj_rule_map()

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from equiseg_fast.kernels import _interpreter

    _interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: started last, they would leave all other cores without work."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not HAS_CUDA:
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(42)


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    with nan_poison():
        yield
