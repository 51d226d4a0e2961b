"""Options and environment of the benchmarks under pytest; see `test_bench_suite.py`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.command.options import full_fp32
from benchmarks.measure.record import MACHINE_INFO, environment
from benchmarks.measure.suites import SUITES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-suite", choices=tuple(SUITES), default="quick", help="which cases (default: quick)"
    )


@cache
def environment_here() -> dict[str, Any]:
    full_fp32()
    return environment(DEVICE)


@pytest.fixture(scope="session")
def env_id() -> str:
    return environment_here()["env_id"]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Our environment record into `--benchmark-json`, and the name of the host out of it."""
    machine_info.pop("node", None)
    machine_info[MACHINE_INFO] = environment_here()
