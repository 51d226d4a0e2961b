"""The reference is an oracle and nothing else: production neither imports it nor is imported by it.

What both need is written twice, in `equiseg_fast.reference` and in `equiseg_fast.ops._math`, and
held one against the other here.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from equiseg_fast import reference
from equiseg_fast.nn import SelfGuidedGate
from equiseg_fast.ops import _math
from tests.every_operation import OPERATIONS

PACKAGE = Path(reference.__file__).parent
# Who has a "reference" backend, and a file of one of them that has a double backward.
STEMS = {"_attention_cpu": "attention"} | {stem: stem for stem in OPERATIONS if stem != "ohem"}


def imported(node: ast.AST) -> Iterator[str]:
    """Every module and name that an import asks for; a name of a package may be a module of it."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def uses(node: ast.AST, allowed: bool = False) -> Iterator[tuple[str, bool]]:
    """What is taken from `reference`, and whether where only the backend and double backwards are:
    in `_reference...` functions, after `chosen == "reference"`, in a call of `differentiable`."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "reference":
        yield node.attr, allowed
    for child in ast.iter_child_nodes(node):
        here = (
            (isinstance(node, ast.FunctionDef) and node.name.startswith("_reference"))
            or (isinstance(node, ast.Call) and ast.unparse(node.func) == "differentiable")
            or (
                isinstance(node, ast.If)
                and ast.unparse(node.test) == "chosen == 'reference'"
                and child in node.body
            )
        )
        yield from uses(child, allowed or here)


class TestRule:
    def test_only_operations_import_the_reference(self) -> None:
        found = {
            path.relative_to(PACKAGE).as_posix()
            # The folder of the kernels is a link, which a search does not follow.
            for path in (*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py"))
            for node in ast.walk(ast.parse(path.read_text()))
            for name in imported(node)
            if "reference" in name.split(".")
        }
        assert found == {f"ops/{stem}.py" for stem in STEMS}

    @pytest.mark.parametrize("stem", STEMS)
    def test_they_use_it_for_their_backend_and_double_backward(self, stem: str) -> None:
        tree = ast.parse((PACKAGE / "ops" / f"{stem}.py").read_text())
        assert set(uses(tree)) == {(STEMS[stem], True)}

    def test_the_reference_imports_nothing_of_ours(self) -> None:
        tree = ast.parse((PACKAGE / "reference.py").read_text())
        names = [name.lstrip(".") for node in ast.walk(tree) for name in imported(node)]
        relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        assert "torch" in names
        assert not relative
        assert not [name for name in names if name.split(".")[0] == "equiseg_fast"]


# Per image (column): all but one modality, another pair, a modality alone, none, all of them.
PRESENT = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
masks = pytest.mark.parametrize("present", [PRESENT, PRESENT | True, None], ids=["m", "all", "-"])


def compare(function: Callable[..., Tensor], oracle: Callable[..., Tensor], x: Tensor) -> None:
    """One value, dtype and gradient, whatever absent modalities hold."""
    results = []
    for f in (function, oracle):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        results.append((y, *torch.autograd.grad(y, leaf, cotangent)))
    torch.testing.assert_close(*results, equal_nan=True)


def features(*shape: int, dtype: torch.dtype, present: Tensor | None = None) -> Tensor:
    x = (3 + torch.randn(shape)).to(dtype)
    return x if present is None else x.masked_fill(~present[:, :, None, None], torch.nan)


class TestAgreement:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_statistics_dtype(self, dtype: torch.dtype) -> None:
        x = torch.ones(2, dtype=dtype)
        assert _math.statistics_dtype(x) == reference.statistics_dtype(x)

    def test_has_others(self) -> None:
        assert torch.equal(_math.has_others(PRESENT), reference.has_others(PRESENT))

    @masks
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", [1, 37, 1024])
    def test_gate_descriptors(
        self, tokens: int, dtype: torch.dtype, present: Tensor | None
    ) -> None:
        compare(
            lambda x: _math.gate_descriptors(x, present=present),
            lambda x: reference.gate_descriptors(x, present=present),
            features(3, 5, tokens, 7, dtype=dtype, present=present),
        )

    @masks
    def test_gate_weights(self, present: Tensor | None) -> None:
        compare(
            lambda x: _math.gate_weights(x, present=present),
            lambda x: reference.gate_weights(x, present=present),
            features(3, 5, 7, dtype=torch.float32),
        )

    @masks
    @pytest.mark.parametrize("dtype", DTYPES[:2])
    def test_logits_of_the_layer(self, dtype: torch.dtype, present: Tensor | None) -> None:
        gate = SelfGuidedGate(8, tau=0.7).to(dtype)
        weights = [torch.randn(p.shape, dtype=dtype) for p in gate.parameters()]
        for p, value in zip(gate.parameters(), weights, strict=True):
            p.detach().copy_(value)
        compare(
            lambda x: gate.logits(x, present=present),
            lambda x: reference.gate_logits(
                reference.gate_descriptors(x, present=present), *weights, tau=0.7
            ),
            features(3, 5, 6, 8, dtype=dtype, present=present),
        )

    def test_split_teachers(self) -> None:
        for order in torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]]):
            found = _math.split_teachers(PRESENT, order)
            assert torch.equal(found, reference.split_teachers(PRESENT, order))

    @masks
    @pytest.mark.parametrize("tau", [1.0, 2.5])
    @pytest.mark.parametrize("shift", range(5))
    def test_prototype_kl(self, shift: int, tau: float, present: Tensor | None) -> None:
        # Rolled, so that every mask meets three, two, one and no class.
        counts = torch.tensor(
            [[3, 0, 1, 2], [0, 0, 4, 1], [7, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
        )
        counts = counts.roll(shift, dims=0)
        here = PRESENT if present is None else present
        teacher = reference.split_teachers(here, torch.tensor([1, 0, 2]))
        compare(
            lambda p: _math.prototype_kl(p, counts, teacher, present=present, tau=tau),
            lambda p: reference.prototype_kl(p, counts, teacher, present=present, tau=tau),
            features(3, 5, 4, 2, dtype=torch.float32, present=present),
        )
