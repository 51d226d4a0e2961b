"""What people do to the children of a layer (hooks, adapters, pruning, quantisation) works.

Layers read the parameters of plain children and call all others. So whatever is done to a child
must have the effect that it has where everything is called.
"""

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from equiseg_fast import EQUISeg
from equiseg_fast import nn as layers
from equiseg_fast.models.mix_transformer import MixTransformer, TransformerBlock
from equiseg_fast.nn import _plain
from equiseg_fast.nn.norm import BatchNorm2d, batch_norm_tokens

C, H, W, M = 8, 4, 6, 3
HEAD = (4, 8, 12, 16)

Layer = tuple[nn.Module, tuple[Any, ...]]


def tokens(*lead: int) -> Tensor:
    return torch.randn(*lead, H * W, C)


def head_maps() -> list[Tensor]:
    return [torch.randn(2, c, 8 >> s, 8 >> s) for s, c in enumerate(HEAD)]


LAYERS: dict[str, Callable[[], Layer]] = {
    "attention": lambda: (layers.EfficientSelfAttention(C, 2, 2), (tokens(2), H, W)),
    "cross attention": lambda: (layers.CrossModalAttention(C, 2, 2), (tokens(2), tokens(2), H, W)),
    "Mix-FFN": lambda: (layers.MixFFN(C, 12), (tokens(2), H, W)),
    "depthwise": lambda: (layers.DepthwiseConv(C), (tokens(2), H, W)),
    "mixer": lambda: (layers.ParallelPoolingMixer(C, 2, layer_scale=0.5), (tokens(2), H, W)),
    "gate": lambda: (layers.SelfGuidedGate(C, 2), (tokens(M, 2),)),
    "fusion": lambda: (
        layers.CrossModalBlock(C, M, 2, 2, ppx_ratio=2),
        (tokens(M, 2), tokens(M, 2), H, W),
    ),
    "embedding": lambda: (layers.PatchEmbed(3, C, 3, 2), (torch.randn(2, 3, H, W),)),
    "transformer": lambda: (TransformerBlock(C, 2, 2, 0.0, 1e-5, 1e-6), (tokens(2), H, W)),
    "head": lambda: (layers.SegmentationHead(HEAD, C, 3), (head_maps(),)),
    "head as published": lambda: (
        layers.SegmentationHead(HEAD, C, 3, fold=False),
        (head_maps(),),
    ),
}


@cache
def pristine(name: str) -> Layer:
    """A layer in evaluation with random values everywhere, and the arguments of a call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        layer, args = LAYERS[name]()
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(0.5 * torch.randn(p.shape))
            for b in layer.buffers():
                if b.is_floating_point():
                    b.uniform_(0.5, 1.5)
    return layer.double().eval(), tuple(_double(a) for a in args)


def _double(x: Any) -> Any:
    if isinstance(x, list):
        return [_double(y) for y in x]
    return x.double() if isinstance(x, Tensor) else x


def copies(name: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """For each child: its path, a copy of the layer, the child of the copy."""
    layer, _ = pristine(name)
    for path, child in layer.named_modules():
        if path and not isinstance(child, nn.ModuleList):
            twin = copy.deepcopy(layer)
            yield path, twin, twin.get_submodule(path)


def run(name: str, layer: nn.Module) -> Tensor:
    """The first result."""
    out = layer(*pristine(name)[1])
    return out[0] if isinstance(out, tuple) else out


def has_weight(child: nn.Module) -> bool:
    return isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d)


def put(layer: nn.Module, path: str, child: nn.Module) -> nn.Module:
    layer.set_submodule(path, child)
    return layer


def with_weight(name: str, path: str, **values: Tensor) -> Tensor:
    """The result where the child is plain and has other parameters."""
    layer = copy.deepcopy(pristine(name)[0])
    for key, value in values.items():
        setattr(layer.get_submodule(path), key, nn.Parameter(value.detach().clone()))
    return run(name, layer)


def close(actual: Tensor, expected: Tensor, message: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{message}: {m}"
    )


class Scaled(nn.Module):
    """An adapter around a module."""

    def __init__(self, base: nn.Module, before: float = 1.0, after: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self.before = before
        self.after = after

    def forward(self, x: Tensor, *more: Any, **others: Any) -> Tensor:
        return self.after * self.base(self.before * x, *more, **others)


def scale_by_hook(child: nn.Module) -> None:
    child.register_forward_hook(lambda module, args, out: 1.5 * out)


def scale_by_forward(child: Any) -> None:
    forward = child.forward
    child.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def scale_input(child: nn.Module) -> None:
    child.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))


def calls(path: str) -> int:
    """How often a layer calls the child: stochastic depth serves two branches."""
    return 2 if path.endswith("drop_path") else 1


QUANTISATION = pytest.mark.filterwarnings("ignore:(?s).*quantiz")
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)


class TestHooks:
    @EVERY_LAYER
    def test_fire_once_and_change_nothing(self, name: str) -> None:
        expected = run(name, pristine(name)[0])
        cotangent = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, list(pristine(name)[0].parameters()), cotangent)
        for path, layer, child in copies(name):
            fired: list[str] = []
            handles = [
                child.register_forward_pre_hook(lambda m, a, f=fired: f.append("before")),
                child.register_forward_hook(lambda m, a, out, f=fired: f.append("after")),
                child.register_full_backward_hook(lambda m, i, o, f=fired: f.append("backward")),
            ]
            result = run(name, layer)
            close(result, expected, path)
            grads = torch.autograd.grad(result, list(layer.parameters()), cotangent)
            assert sorted(fired) == sorted(["before", "after", "backward"] * calls(path)), path
            for a, b in zip(grads, wanted, strict=True):
                close(a, b, path)
            for handle in handles:
                handle.remove()
            assert torch.equal(run(name, layer), expected), path
            assert len(fired) == 3 * calls(path), path

    @EVERY_LAYER
    def test_what_is_done_to_results_has_its_effect(self, name: str) -> None:
        before = run(name, pristine(name)[0])
        for path, layer, child in copies(name):
            scale_by_hook(child)
            result = run(name, layer)
            if has_weight(child):
                values = {n: 1.5 * p for n, p in child.named_parameters()}
                close(result, with_weight(name, path, **values), path)
            assert not torch.allclose(result, before), path
            twin = copy.deepcopy(pristine(name)[0])
            scale_by_forward(twin.get_submodule(path))
            close(run(name, twin), result, path)
            twin = copy.deepcopy(pristine(name)[0])
            put(twin, path, Scaled(twin.get_submodule(path), after=1.5))
            close(run(name, twin), result, path)

    @EVERY_LAYER
    def test_what_is_done_to_inputs_has_its_effect(self, name: str) -> None:
        before = run(name, pristine(name)[0])
        for path, layer, child in copies(name):
            scale_input(child)
            result = run(name, layer)
            if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d):
                close(result, with_weight(name, path, weight=1.5 * child.weight), path)
            if not isinstance(child, nn.LayerNorm):  # which takes the scale out again
                assert not torch.allclose(result, before), path
            twin = copy.deepcopy(pristine(name)[0])
            put(twin, path, Scaled(twin.get_submodule(path), before=1.5))
            close(run(name, twin), result, path)

    @EVERY_LAYER
    def test_of_all_modules_fire_too(self, name: str) -> None:
        layer, _ = pristine(name)
        expected, seen = run(name, layer), []
        handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
        try:
            close(run(name, layer), expected, name)
        finally:
            handle.remove()
        names = {id(m): n for n, m in layer.named_modules() if not isinstance(m, nn.ModuleList)}
        assert Counter(names[id(m)] for m in seen) == {n: calls(n) for n in names.values()}

    @EVERY_LAYER
    def test_of_counters_leave_the_fused_path(self, name: str) -> None:
        layer, _ = pristine(name)
        expected = run(name, layer)
        with FlopCounterMode(display=False):
            assert torch.equal(run(name, layer), expected)

    def test_see_tokens_and_maps(self) -> None:
        seen = {}
        for name in ("mixer", "Mix-FFN", "head", "transformer"):
            for path, layer, child in copies(name):
                child.register_forward_hook(
                    lambda m, args, out, key=(name, path): seen.update({key: args[0].shape})
                )
                run(name, layer)
        assert seen["mixer", "norm2"] == seen["mixer", "attn.conv0"] == (2, C, H, W)
        assert seen["mixer", "mlp.fc2"] == (2, 2 * C, H, W)
        assert seen["Mix-FFN", "fc2"] == seen["Mix-FFN", "dwconv"] == (2, H * W, 12)
        assert seen["head", "linear_c3.proj"] == seen["head", "linear_c3"] == (2, 4, 12)
        assert seen["head", "linear_fuse"] == (2, 4 * C, 8, 8)
        assert seen["transformer", "norm2"] == (2, H * W, C)
        assert seen["transformer", "attn.sr"] == (2, C, H, W)

    def test_see_results_that_stay(self) -> None:
        """Nothing works in place on what a hook has kept."""
        for name in LAYERS:
            for path, layer, child in copies(name):
                kept: list[Tensor] = []
                child.register_forward_hook(lambda m, a, out, k=kept: k.extend((out, out.clone())))
                run(name, layer)
                assert all(map(torch.equal, kept[::2], kept[1::2])), (name, path)


WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "parametrised": parametrizations.weight_norm,
    "old weight norm": weight_norm,
    "pruned": lambda child: prune.l1_unstructured(child, "weight", 0.3),
    "pruned bias": lambda child: prune.random_unstructured(child, "bias", 0.3),
}


class TestWeights:
    @pytest.mark.filterwarnings("ignore:(?s).*weight_norm:FutureWarning")
    @pytest.mark.parametrize("change", WEIGHTS)
    @EVERY_LAYER
    def test_trains_and_computes_with_the_weights_of_the_child(
        self, name: str, change: str
    ) -> None:
        for path, layer, child in copies(name):
            if not has_weight(child) or (change == "pruned bias" and child.bias is None):
                continue
            WEIGHTS[change](child)
            optimiser = torch.optim.SGD(layer.parameters(), lr=0.01)
            for _ in range(2):
                optimiser.zero_grad()
                run(name, layer).square().mean().backward()
                assert all(p.grad is not None for p in child.parameters()), path
                optimiser.step()
            result = run(name, layer)
            state = {n: p for n, p in layer.named_parameters() if not n.startswith(f"{path}.")}
            twin = copy.deepcopy(pristine(name)[0])
            twin.load_state_dict(state, strict=False)
            plain = twin.get_submodule(path)
            for key in ("weight", "bias"):
                if getattr(plain, key) is not None:
                    setattr(plain, key, nn.Parameter(getattr(child, key).detach().clone()))
            close(result, run(name, twin), path)

    @QUANTISATION
    @pytest.mark.parametrize("name", ["Mix-FFN", "gate", "head", "head as published"])
    def test_quantised(self, name: str) -> None:
        layer, args = copy.deepcopy(pristine(name))
        layer.float()
        single = [x.float() for x in args[0]] if isinstance(args[0], list) else args[0].float()
        expected, shown = layer(single, *args[1:]), repr(layer)
        quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
        actual = quantised(single, *args[1:])
        for a, b in zip(actual, expected, strict=True):
            assert 0 < (a - b).norm() < 0.05 * b.norm()
        assert quantised.extra_repr() == layer.extra_repr()
        assert repr(quantised) != shown

    @EVERY_LAYER
    def test_layers_with_adapters_can_be_shown(self, name: str) -> None:
        for path, layer, child in copies(name):
            shown = layer.extra_repr()
            assert "Scaled" in repr(put(layer, path, Scaled(child)))
            assert layer.extra_repr() == shown


class TestSettings:
    """A child of the same class that is set up otherwise is called."""

    @pytest.mark.parametrize(
        ("name", "path", "settings"),
        [
            ("depthwise", "dwconv", {"dilation": (2, 2), "padding": (2, 2)}),
            ("Mix-FFN", "dwconv.dwconv", {"dilation": (2, 2), "padding": (2, 2)}),
            ("Mix-FFN", "fc1", {"bias": None}),
            ("mixer", "attn.conv0", {"dilation": (2, 2), "padding": (6, 6)}),
            ("mixer", "mlp.fc1", {"bias": None}),
            ("attention", "sr", {"dilation": (2, 2), "padding": (1, 1)}),
            ("gate", "fc1", {"bias": None}),
            ("transformer", "norm2", {"bias": None}),
            ("head", "linear_c2.proj", {"bias": None}),
            ("head", "linear_fuse.conv", {"bias": nn.Parameter(torch.ones(C).double())}),
        ],
    )
    def test_are_kept(self, name: str, path: str, settings: dict[str, Any]) -> None:
        layer = copy.deepcopy(pristine(name)[0])
        child = layer.get_submodule(path)
        for key, value in settings.items():
            setattr(child, key, value)
        result = run(name, layer)
        assert not torch.allclose(result, run(name, pristine(name)[0]))
        for module in layer.modules():
            module.register_forward_hook(lambda m, a, out: None)
        close(result, run(name, layer), path)


class TestNorms:
    """Batch norms whose statistics leave rows out."""

    ROWS = torch.tensor([True, False, True])

    @pytest.mark.parametrize("kind", [BatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm])
    def test_with_hooks_see_the_rows_that_count(self, kind: type[nn.Module]) -> None:
        x = torch.randn(3, H * W, C)
        norm, seen = kind(C).train(), []
        plain = copy.deepcopy(norm)
        norm.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
        expected = batch_norm_tokens(plain, x, H, W, self.ROWS)
        actual = batch_norm_tokens(norm, x, H, W, self.ROWS)
        assert seen == [(2, C, H, W)]
        torch.testing.assert_close(actual[self.ROWS], expected[self.ROWS])
        assert not actual[~self.ROWS].any()
        for a, b in zip(norm.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)
        none = batch_norm_tokens(norm, x, H, W, torch.zeros(3, dtype=torch.bool))
        assert not none.any()

    @pytest.mark.parametrize("settings", [{"momentum": None}, {"affine": False}])
    def test_of_other_settings(self, settings: dict[str, Any]) -> None:
        x = torch.randn(3, H * W, C)
        norm = nn.BatchNorm2d(C, **settings).train()
        actual = batch_norm_tokens(norm, x, H, W, self.ROWS)[self.ROWS]
        expected = nn.BatchNorm2d(C)(x[self.ROWS].mT.unflatten(-1, (H, W))).flatten(2).mT
        torch.testing.assert_close(actual, expected)


class TestFolding:
    @pytest.mark.parametrize("name", ["mixer", "head"])
    @pytest.mark.parametrize("change", [scale_by_hook, scale_by_forward, "adapter"])
    def test_refuses_what_it_cannot_multiply(self, name: str, change: Any) -> None:
        free = ("attn", "norm1", "c_nets", "mlp.dwconv", "drop", "linear_pred")
        for path, layer, child in copies(name):
            put(layer, path, Scaled(child)) if change == "adapter" else change(child)
            before = {n: p.clone() for n, p in layer.named_parameters()}
            if path.startswith(free):
                expected = run(name, layer)
                close(run(name, layer.fold_()), expected, path)
                continue
            with pytest.raises(RuntimeError, match=f"so {path} of .* must be a plain module"):
                layer.fold_()
            assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())

    @QUANTISATION
    def test_quantised_afterwards(self) -> None:
        layer = copy.deepcopy(pristine("head")[0]).fold_().float()
        maps = [x.float() for x in pristine("head")[1][0]]
        expected = layer(maps)
        actual = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})(maps)
        assert 0 < (actual - expected).norm() < 0.05 * expected.norm()

    def test_of_a_model_is_all_or_nothing(self) -> None:
        model = EQUISeg.from_name("b0", modalities=("rgb", "depth"))
        model.head.linear_c1.proj.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match=r"linear_c1\.proj of SegmentationHead"):
            model.fold_()
        assert all(block.mixer[0].norm2 is not None for block in model.fusion)


class TestModel:
    def test_every_child_is_called_once(self) -> None:
        """But for the encoder, whose stages are called, and lists."""
        torch.manual_seed(0)
        model = EQUISeg.from_name("b0", modalities=("rgb", "depth"), num_classes=5).eval()
        images, labels = torch.randn(2, 1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long)
        expected = model(images)
        total, _ = model.loss(images, labels, order=torch.tensor([0, 1]))
        seen: dict[str, list[str]] = {"forward": [], "backward": []}
        names = {
            name: module
            for name, module in model.named_modules()
            if not isinstance(module, nn.ModuleList | MixTransformer | EQUISeg)
        }
        for name, module in names.items():
            module.register_forward_hook(lambda m, a, out, n=name: seen["forward"].append(n))
            if any(True for _ in module.parameters()):
                module.register_full_backward_hook(
                    lambda m, i, o, n=name: seen["backward"].append(n)
                )
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
        once = {n: calls(n) for n in names if n != "prototype_loss"}
        assert Counter(seen["forward"]) == once
        seen["forward"].clear()
        hooked, _ = model.loss(images, labels, order=torch.tensor([0, 1]))
        torch.testing.assert_close(hooked, total, rtol=1e-4, atol=1e-5)
        hooked.backward()
        assert Counter(seen["forward"]) == {**once, "prototype_loss": 4}  # one per stage
        assert Counter(seen["backward"]) == {
            n: 1 for n, m in names.items() if any(True for _ in m.parameters())
        }

    def test_adapters_at_both_ends(self) -> None:
        model = EQUISeg.from_name("b0", modalities=("rgb",), num_classes=5).eval()
        images = torch.randn(1, 1, 3, 32, 32)
        expected = model(images)
        model.head.linear_pred = Scaled(model.head.linear_pred, after=1.5)
        model.encoder.patch_embed1.proj = Scaled(model.encoder.patch_embed1.proj)
        torch.testing.assert_close(model(images), 1.5 * expected)


class TestTools:
    """What PyTorch does with modules keeps working with hooks on children."""

    def test_compiles_with_hooks(self) -> None:
        for name in ("Mix-FFN", "gate"):
            layer = copy.deepcopy(pristine(name)[0])
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    scale_by_hook(module)
            torch._dynamo.reset()
            compiled = torch.compile(layer, fullgraph=True, backend="eager")
            close(run(name, compiled), run(name, layer), name)

    def test_functional_calls_take_the_fused_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, args = pristine("Mix-FFN")
        parameters = {n: 1.5 * p for n, p in layer.named_parameters()}
        twin = copy.deepcopy(layer)
        twin.load_state_dict(parameters)
        monkeypatch.setattr(nn.Linear, "forward", None)  # whose call would fail
        result = torch.func.functional_call(layer, parameters, args)
        assert torch.equal(result, run("Mix-FFN", twin))

    def test_hooks_are_copied_and_pickled(self) -> None:
        layer = copy.deepcopy(pristine("Mix-FFN")[0])
        scale_by_hook_of_a_module(layer.fc1)
        expected = run("Mix-FFN", layer)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(run("Mix-FFN", twin), expected)

    def test_plain_is_the_exact_class(self) -> None:
        class Other(nn.Linear):
            pass

        assert _plain.is_plain(nn.Linear(2, 2), nn.LayerNorm(2))
        assert not _plain.is_plain(nn.Linear(2, 2), Other(2, 2))
        assert not _plain.is_plain(nn.ReLU())


def double_output(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


def scale_by_hook_of_a_module(child: nn.Module) -> None:
    child.register_forward_hook(double_output)


def test_linear_layers_are_those_of_pytorch() -> None:
    """What replaces linear layers by their class, as quantisation does, finds them all."""
    layer = layers.EfficientSelfAttention(16, 2, 2)
    assert {type(m) for m in (layer.q, layer.kv, layer.proj)} == {nn.Linear}
