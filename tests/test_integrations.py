"""Accelerating models that others wrote: parity, what must survive, what is refused, the way back.

Real SegFormers come from `transformers` 5; the layouts of transformers 4 and of CMNeXt are written
out in `foreign.py`, as small as they can be.
"""

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equiseg_fast import mix_ffn, use_backend
from equiseg_fast.integrations import (
    MIT_RULES,
    MMSEG_RULES,
    PVT_RULES,
    SEGFORMER_RULES,
    Report,
    Rule,
    accelerate_module,
    accelerate_segformer,
    attention_forward,
    hooked,
    modules,
    register_attention,
    revert,
)
from equiseg_fast.models import MixTransformer
from equiseg_fast.ops import _backend
from equiseg_fast.ops.mix_ffn import gains
from tests.foreign import (
    MLPPVT,
    Attention4,
    AttentionMiT,
    AttentionMM,
    AttentionPVT,
    MixFFN4,
    MixFFNMM,
    MLPMiT,
)

transformers = pytest.importorskip("transformers", reason="transformers not installed")

MODELS = ("SegformerModel", "SegformerForImageClassification", "SegformerForSemanticSegmentation")
ATTENTION = "segformer.stages.0.blocks.0.attention"
FFN = "segformer.stages.0.blocks.0.mlp"


def randomise(model: nn.Module) -> nn.Module:
    """Random values everywhere, so that nothing hides behind zeros, ones or equal weights."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def segformer(name: str = MODELS[1], **fields: Any) -> Any:
    settings: dict[str, Any] = {
        "num_encoder_blocks": 2,
        "depths": [2, 1],
        "sr_ratios": [4, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
        "num_labels": 3,
        "drop_path_rate": 0.0,
        "classifier_dropout_prob": 0.0,
    }
    config = transformers.SegformerConfig(**{**settings, **fields})
    return randomise(getattr(transformers, name)(config))


def images(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


def result(model: Any, *args: Any) -> Tensor:
    out = model(*args)
    return out if isinstance(out, Tensor) else out[0]


def gradients(model: nn.Module, *args: Any) -> list[Tensor]:
    out = result(model, *args)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return list(torch.autograd.grad(out, [*inputs, *model.parameters()], cotangent))


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def quick(model: nn.Module, rules: Any = SEGFORMER_RULES) -> Report:
    return accelerate_module(model, rules, verbose=False)


def assert_same_function(model: nn.Module, rules: Any, *args: Any) -> None:
    """Result and gradients before and while accelerated, and bit by bit afterwards."""
    args = tuple(a.requires_grad_() if isinstance(a, Tensor) else a for a in args)
    before, slow = result(model, *args), gradients(model, *args)
    kinds = [type(m) for m in model.modules()]
    assert not quick(model, rules).paths("skipped")
    assert_close(result(model, *args), before)
    assert_close(gradients(model, *args), slow)
    revert(model, verbose=False)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(result(model, *args), before)


class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + result(self.attn, x, height, width)
        return x + self.mlp(x, height, width)


class SizedBlock(Block):
    """A block whose modules take height and width as one."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.attn(x, (height, width))
        return self.mlp(x, (height, width))


class SwappedMiT(AttentionMiT):
    def split(self, kv: Tensor) -> tuple[Tensor, ...]:
        return super().split(kv)[::-1]


class TanhMiT(MLPMiT):
    approximate = "tanh"


class OtherForward(AttentionMiT):
    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return super().forward(x, H, W) + x


class AttentionModules(AttentionMiT):
    """Everything is a module that can have hooks or be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        q = self.q(x).unflatten(-1, (self.head, -1)).transpose(1, 2)
        x = self.norm(self.sr(x.mT.unflatten(-1, (H, W))).flatten(2).mT)
        k, v = self.split(self.kv(x))
        weights = self.attn_drop(self.softmax(q @ k.mT * self.scale))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class Squashed(nn.Module):
    """An adapter that has all the attributes of what it wraps, as those of libraries have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return out.tanh() if isinstance(out, Tensor) else (out[0].tanh(), *out[1:])


class OneDropout(MixFFN4):
    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        x = self.dwconv(self.dense1(hidden_states), height, width)
        return self.dropout(self.dense2(self.intermediate_act_fn(x)))


class HiddenDropout(AttentionMiT):
    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return F.dropout(super().forward(x, H, W), 0.5, self.training)


class BareTensor(Attention4):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)[0]


def block4(**fields: Any) -> nn.Module:
    return randomise(Block(Attention4(**fields), MixFFN4()))


def mit_block(sr_ratio: int = 2) -> nn.Module:
    return randomise(Block(AttentionMiT(sr_ratio=sr_ratio), MLPMiT()))


def mm_block(sr_ratio: int = 2, **fields: Any) -> nn.Module:
    return randomise(SizedBlock(AttentionMM(sr_ratio, **fields), MixFFNMM()))


def pvt_block(sr_ratio: int = 2) -> nn.Module:
    return randomise(SizedBlock(AttentionPVT(sr_ratio), MLPPVT()))


BLOCKS: list[tuple[Callable[..., nn.Module], Any]] = [
    (block4, SEGFORMER_RULES),
    (mit_block, MIT_RULES),
    (mm_block, MMSEG_RULES),
    (pvt_block, PVT_RULES),
]


def tokens(height: int = 4, width: int = 6) -> tuple[Tensor, int, int]:
    return torch.randn(2, height * width, 16, dtype=torch.float64), height, width


class TestSameFunction:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("size", [(64, 96), (51, 77)])
    def test_segformer(self, name: str, size: tuple[int, int]) -> None:
        assert_same_function(segformer(name), SEGFORMER_RULES, images(*size))

    @pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3)])
    @pytest.mark.parametrize("sr_ratio", [1, 2])
    def test_other_layouts(self, size: tuple[int, int], sr_ratio: int) -> None:
        for block, rules in BLOCKS:
            assert_same_function(block(sr_ratio=sr_ratio), rules, *tokens(*size))

    def test_residuals_and_biases_of_mmsegmentation(self) -> None:
        model, x, identity = mm_block(bias=False), *(tokens()[0] for _ in range(2))
        for part in (model.attn, model.mlp):
            before = part(x, (4, 6), identity), part(x, hw_shape=(4, 6), identity=identity)
            assert quick(part, MMSEG_RULES).paths("replaced") == [""]
            assert_close((part(x, (4, 6), identity), part(x, (4, 6), identity=identity)), before)
            revert(part, verbose=False)

    def test_one_call_for_all_spellings(self) -> None:
        model = nn.ModuleList([block() for block, _ in BLOCKS])
        report = accelerate_segformer(model, verbose=False)
        assert len(report.paths("replaced")) == 8 == len(report.changes)

    def test_loss_with_labels_and_hidden_states(self) -> None:
        model, x, labels = segformer(MODELS[2]), images(), torch.randint(0, 3, (2, 64, 96))
        before = model(x, labels=labels, output_hidden_states=True)
        quick(model)
        after = model(x, labels=labels, output_hidden_states=True)
        assert_close(after.loss, before.loss)
        assert len(before.hidden_states) == 2
        assert_close(after.hidden_states, before.hidden_states)

    def test_eager_attention_of_transformers(self) -> None:
        model, x = segformer(attn_implementation="eager"), images()
        before = result(model, x)
        assert not quick(model).paths("skipped")
        # its softmax is in fp32
        torch.testing.assert_close(result(model, x), before, rtol=1e-5, atol=1e-6)

    def test_the_operations_run(self) -> None:
        model, args = mit_block().float(), (tokens()[0].float(), 4, 6)
        before = model(*args)
        with use_backend("triton"):  # does not reach into the examination, which is in float64
            assert not quick(model, MIT_RULES).paths("skipped")
            torch.testing.assert_close(model(*args), before, rtol=1e-4, atol=1e-5)
        for part in (model.double().attn, model.mlp):
            with pytest.raises(ValueError, match="'triton' cannot run"), use_backend("triton"):
                part(*tokens())

    def test_half_precision_and_autocast(self) -> None:
        # How close is tested with the operations; this is about dtypes that meet.
        model, args = mit_block().float(), tokens()
        exact = result(model.double(), *args)
        quick(model, MIT_RULES)
        model.bfloat16()
        torch.testing.assert_close(
            model(args[0].bfloat16(), *args[1:]).double(), exact, rtol=0.05, atol=0.05
        )
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.float()(args[0].float(), *args[1:])
        torch.testing.assert_close(cast.double(), exact, rtol=0.05, atol=0.05)

    def test_keys_parameters_and_random_numbers_stay(self) -> None:
        model = segformer().train()
        keys, objects = list(model.state_dict()), [id(p) for p in model.parameters()]
        values = {k: v.clone() for k, v in model.state_dict().items()}
        attributes = [set(vars(m)) for m in model.modules()]
        state = torch.get_rng_state()
        for step in (quick, partial(revert, verbose=False)):
            step(model)
            assert list(model.state_dict()) == keys
            assert [id(p) for p in model.parameters()] == objects
            assert [set(vars(m)) for m in model.modules()] == attributes
            assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
            assert all(m.training for m in model.modules())
            assert torch.equal(torch.get_rng_state(), state)
        assert not any("Fast" in type(m).__name__ for m in model.modules())


class TestOtherThreads:
    """What threads share stays as it is all the time, not only afterwards."""

    def test_random_numbers_default_device_and_backend(self) -> None:
        seen: list[Any] = []

        def shared() -> Any:
            return (
                torch.default_generator.get_state().tolist(),
                torch.utils._device.CURRENT_DEVICE,
                _backend._default,
            )

        class Watched(HiddenDropout):
            def forward(self, *args: Any) -> Tensor:
                out = super().forward(*args)
                seen.append(shared())
                return out

        def examples(module: Any) -> Any:
            seen.append(shared())
            for args in MIT_RULES[0].examples(module):
                seen.append(shared())
                yield args

        rule = replace(MIT_RULES[0], examples=examples)
        with torch.device("meta"):
            model, before = Watched(), shared()
            assert "something else" in quick(model, [rule]).changes[0].remark
            assert len(seen) == 4
            assert all(s == before for s in [*seen, shared()])


class TestOwnForward:
    """On the CPU a Mix-FFN in fp32 that would gain nothing runs the code it came with."""

    @pytest.mark.parametrize(
        ("batch", "side", "dtype", "expected"),
        [
            (2, 4, torch.float32, False), (1, 4, torch.float32, False),
            (1, 74, torch.float32, True), (2, 182, torch.float32, True),
            (2, 4, torch.float64, True), (2, 4, torch.bfloat16, True),
        ],
    )  # fmt: skip
    def test_by_size(self, batch: int, side: int, dtype: torch.dtype, expected: bool) -> None:
        ffn = MixFFN4().to(dtype).eval()
        quick(ffn)
        x = torch.randn(batch, side * side, 16, dtype=dtype)
        with (
            torch.no_grad(),
            mock.patch("equiseg_fast.integrations.segformer.mix_ffn", wraps=mix_ffn) as ours,
        ):
            ffn(x, side, side)
        assert ours.called is expected

    def test_never_against_a_choice(self) -> None:
        x, weight = torch.randn(2, 16, 16), torch.randn(24, 1, 3, 3)
        assert not gains(x, weight)
        with use_backend("reference"):
            assert gains(x, weight)
        with mock.patch("torch.compiler.is_compiling", return_value=True):
            assert gains(x, weight)  # it would be one more size to compile for


class TestWhatSurvives:
    def test_repeated_calls(self) -> None:
        model = segformer()
        assert len(quick(model).paths("replaced")) == 6
        kinds = [type(m) for m in model.modules()]
        again = quick(model)
        assert len(again.paths("already replaced")) == 6
        assert len(again.changes) == 6
        assert [type(m) for m in model.modules()] == kinds
        assert len(revert(model, verbose=False).paths("restored")) == 6
        assert revert(model, verbose=False).changes == ()

    def test_parameters_are_looked_up_at_the_call(self) -> None:
        model, args = mit_block(), tokens()
        quick(model, MIT_RULES)
        other = randomise(mit_block())
        model.load_state_dict(other.state_dict())
        assert_close(model(*args), other(*args))
        for part in (model, other):
            part.mlp.dwconv.dwconv.weight = nn.Parameter(torch.ones(24, 1, 3, 3).double())
            part.attn.sr.weight = nn.Parameter(torch.ones(16, 16, 2, 2).double())
        assert_close(model(*args), other(*args))
        model.requires_grad_(False)
        assert not model(*args).requires_grad
        # low-rank adapters replace linear layers; those are called, whatever they are
        for part in (model, other):
            part.attn.q = nn.Sequential(nn.Identity(), nn.Linear(16, 16, bias=False).double())
            part.attn.q[1].weight = nn.Parameter(torch.ones(16, 16).double())
        assert_close(model(*args), other(*args))

    @pytest.mark.parametrize("rebuild", ["deepcopy", "pickle", "torch.save"])
    def test_copies_are_their_own(self, rebuild: str) -> None:
        model, args = segformer(), (images(),)
        before = result(model, *args)
        quick(model)
        fast = result(model, *args)
        data = pickle.dumps(model)
        if rebuild == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            # as in another process, which has made no classes yet
            modules._subclass.cache_clear()
            if rebuild == "pickle":
                twin = pickle.loads(data)
            else:
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                twin = torch.load(file, weights_only=False)
        assert len(quick(twin).paths("already replaced")) == 6
        assert torch.equal(result(twin, *args), fast)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert not result(twin, *args).any()
        assert torch.equal(result(model, *args), fast)
        revert(twin, verbose=False)
        assert not any("Fast" in type(m).__name__ for m in twin.modules())
        assert torch.equal(result(model, *args), fast)
        assert len(quick(model).paths("already replaced")) == 6
        revert(model, verbose=False)
        assert torch.equal(result(model, *args), before)

    def test_replicas_use_their_own_parameters(self) -> None:
        model, args = mit_block().mlp, tokens()
        quick(model, MIT_RULES)
        replica = model._replicate_for_data_parallel()  # what nn.DataParallel calls
        replica.fc2 = nn.Identity()
        assert replica(*args).shape[-1] == 24
        assert model(*args).shape[-1] == 16

    @pytest.mark.parametrize("rules", [SEGFORMER_RULES, MIT_RULES])
    def test_compiled_without_graph_breaks(self, rules: Any) -> None:
        torch._dynamo.reset()
        model = segformer() if rules is SEGFORMER_RULES else mit_block()
        args = (images(),) if rules is SEGFORMER_RULES else tokens()
        before, slow = result(model, *args), gradients(model, *args)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        quick(model, rules)
        assert_close(result(compiled, *args), before)
        assert_close(gradients(compiled, *args), slow)

    def test_compiled_before(self) -> None:
        torch._dynamo.reset()
        model, args = mit_block(), tokens()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        before = compiled(*args)
        quick(compiled, MIT_RULES)
        assert_close(compiled(*args), model(*args))
        with pytest.raises(Exception, match="backend 'triton' cannot run"), use_backend("triton"):
            compiled(*args)
        revert(model, verbose=False)
        assert torch.equal(compiled(*args), before)

    @pytest.mark.parametrize(("block", "rules"), BLOCKS)
    def test_recorded_by_fx(self, block: Callable[..., nn.Module], rules: Any) -> None:
        model, args = block(), tokens()
        graph = torch.fx.symbolic_trace(model)
        quick(model, rules)
        fast = torch.fx.symbolic_trace(model)
        assert fast.code == graph.code
        assert torch.equal(fast(*args), graph(*args))

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    @pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
    @pytest.mark.parametrize(("block", "rules"), [(segformer, SEGFORMER_RULES), *BLOCKS])
    def test_recorded_by_jit_trace(self, block: Callable[..., nn.Module], rules: Any) -> None:
        class Traced(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> Tensor:
                return result(self.model, x, *size)

        model = block()
        x, *size = (images(32, 64),) if block is segformer else tokens()
        slow = torch.jit.trace(Traced(), (x,))
        quick(model, rules)
        fast, other = torch.jit.trace(Traced(), (x,)), torch.randn(3, *x.shape[1:]).to(x)
        assert torch.equal(fast(other), slow(other))

    @pytest.mark.parametrize(("block", "rules"), BLOCKS)
    def test_double_backward(self, block: Callable[..., nn.Module], rules: Any) -> None:
        model, (x, *size) = block(), tokens()

        def penalty() -> list[Tensor]:
            inputs = x.clone().requires_grad_()
            out = model(inputs, *size)
            (slope,) = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
            return list(torch.autograd.grad(slope.square().sum(), [inputs, *model.parameters()]))

        slow = penalty()
        quick(model, rules)
        assert_close(penalty(), slow)

    @pytest.mark.parametrize(("block", "rules"), BLOCKS[2:])
    def test_other_spellings_compiled(self, block: Callable[..., nn.Module], rules: Any) -> None:
        torch._dynamo.reset()
        model, args = block(), tokens()
        quick(model, rules)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(compiled(*args), model(*args))
        with pytest.raises(Exception, match="backend 'triton' cannot run"), use_backend("triton"):
            compiled(*args)

    def test_exported(self) -> None:
        model, args = mit_block(), tokens()
        quick(model, MIT_RULES)
        exported = torch.export.export(model, args, strict=False).module()
        assert_close(exported(*args), model(*args))

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, reentrant: bool) -> None:
        model, x = segformer().train(), images().requires_grad_()
        slow = gradients(model, x)
        quick(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        x2 = x.detach().requires_grad_()
        out = result(model, x2)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        out.backward(cotangent)
        assert_close([x2.grad, *(p.grad for p in model.parameters())], slow)

    def test_output_attentions(self) -> None:
        model, x = segformer(attn_implementation="eager"), images()
        before = model(x, output_attentions=True)
        quick(model)
        after = model(x, output_attentions=True)
        assert len(before.attentions) == 3
        for a, b in zip(after.attentions, before.attentions, strict=True):
            torch.testing.assert_close(a, b)
        model.config.output_attentions = True
        assert len(model(x).attentions) == 3
        old, args = block4().attn, tokens()
        weights = old(*args, True)[1]
        quick(old)
        assert torch.equal(old(*args, output_attentions=True)[1], weights)

    def test_arguments_by_keyword(self) -> None:
        x, height, width = tokens()
        for module, size in ((block4(), ("height", "width")), (mit_block(), ("H", "W"))):
            for part in (module.attn, module.mlp):
                keywords = dict(zip(size, (height, width), strict=True))
                before = result(partial(part, **keywords), x)
                quick(part, (*SEGFORMER_RULES, *MIT_RULES))
                assert_close(result(partial(part, **keywords), x), before)
                name = next(iter(signature(part.forward).parameters))
                swapped = {**dict(reversed(keywords.items())), name: x}
                assert_close(result(partial(part, **swapped)), before)
                with pytest.raises(ValueError, match="cannot run"), use_backend("triton"):
                    part(**swapped)

    def test_arguments_that_rules_do_not_know_run_the_own_forward(self) -> None:
        class More(MLPMiT):
            def forward(self, x: Tensor, H: int, W: int, skip: int = 0, *, gain: int = 1) -> Tensor:
                return super().forward(x, H, W) * gain + skip * x

        mlp, args = randomise(More()), tokens()
        before = mlp(*args, 2), mlp(*args, skip=2), mlp(*args, gain=3), mlp(*args)
        assert quick(mlp, MIT_RULES).paths("replaced") == [""]
        after = mlp(*args, 2), mlp(*args, skip=2), mlp(*args, gain=3), mlp(*args)
        assert_close(after, before)

    def test_attention_chosen_later_takes_effect(self) -> None:
        def halved(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return out / 2, None

        attention, args = segformer().get_submodule(ATTENTION), tokens(8, 8)
        quick(attention)
        with mock.patch.dict(transformers.AttentionInterface._global_mapping, halved=halved):
            attention.config._attn_implementation = "halved"
            fast = attention(*args)[0]
            revert(attention, verbose=False)
            assert torch.equal(fast, attention(*args)[0])

    def test_masks_run_the_own_forward(self) -> None:
        attn = segformer().get_submodule(ATTENTION)
        x, mask = tokens(8, 8)[0], torch.randn(2, 1, 64, 4, dtype=torch.float64)
        before = attn(x, 8, 8, mask)[0]
        assert not torch.allclose(before, attn(x, 8, 8)[0])
        quick(attn)
        assert torch.equal(attn(x, 8, 8, mask)[0], before)


class TestDropout:
    def test_of_attention_weights_runs_the_own_forward(self) -> None:
        for model, args in (
            (segformer(attention_probs_dropout_prob=0.4), (images(),)),
            (block4(p=0.4), tokens()),
        ):
            evaluated = result(model, *args)
            torch.manual_seed(1)
            trained = result(model.train(), *args)
            report = quick(model)
            attention = [c for c in report.changes if c.rule.startswith("attention")]
            assert {c.remark for c in attention} == {"its own forward runs in training"}
            torch.manual_seed(1)
            assert_close(result(model, *args), trained)
            assert not torch.allclose(trained, evaluated)
            assert_close(result(model.eval(), *args), evaluated)

    def test_of_mmsegmentation_and_timm(self) -> None:
        for part, remark in (
            (AttentionMM(path=0.5), ""),
            (AttentionMM(p=0.4), "its own forward runs in training"),
            (MixFFNMM(path=0.5), ""),
            (MixFFNMM(p=0.4), "its own forward runs in training"),
            (AttentionPVT(p=0.4), "its own forward runs in training"),
            (MLPPVT(p=0.4), ""),
        ):
            x = tokens()[0]
            randomise(part).train()
            torch.manual_seed(1)
            slow = part(x, (4, 6))
            (change,) = quick(part, ALL_RULES).changes
            assert (change.status, change.remark) == ("replaced", remark)
            torch.manual_seed(1)
            assert_close(part(x, (4, 6)), slow)  # random numbers, too, are drawn where they were

    @pytest.mark.parametrize("kind", ["transformers 4", "transformers 5"])
    def test_of_the_ffn_is_called_where_it_is(self, kind: str) -> None:
        ffn = randomise(MixFFN4(p=0.5))
        if kind == "transformers 5":
            ffn = segformer(hidden_dropout_prob=0.5).get_submodule(FFN)
        args, slow = tokens(), copy.deepcopy(ffn)
        assert quick(ffn).changes[0].remark == ""
        with pytest.raises(ValueError, match="backend 'triton' cannot run"), use_backend("triton"):
            ffn.train()(*args)
        dropped = ffn(*args) == 0
        assert 0.3 < dropped.double().mean() < 0.7
        ffn.dropout = slow.dropout = nn.Tanh()  # shows where it is
        assert_close(ffn(*args), slow(*args))


class TestHooks:
    def test_those_of_users_keep_firing(self) -> None:
        model, x = segformer(), images().requires_grad_()
        calls: list[str] = []

        def note(name: str, *_: Any) -> None:
            calls.append(name)

        for path in (ATTENTION, FFN, f"{ATTENTION}.q_proj", f"{FFN}.fc2"):
            module = model.get_submodule(path)
            module.register_forward_pre_hook(partial(note, f"before {path}"))
            module.register_forward_hook(partial(note, f"after {path}"))
            module.register_full_backward_hook(partial(note, f"back {path}"))
        gradients(model, x)
        expected, calls[:] = sorted(calls), []
        assert not quick(model).paths("skipped")
        assert calls == []  # not to be seen while modules are examined
        gradients(model, x)
        assert sorted(calls) == expected
        assert len(set(expected)) == 12

    @pytest.mark.parametrize(
        "path",
        [
            f"{ATTENTION}.sequence_reduction",
            f"{ATTENTION}.sequence_reduction.sequence_reduction",
            f"{FFN}.dwconv",
            f"{FFN}.dwconv.dwconv",
            f"{FFN}.activation_fn",
        ],
    )
    @pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "instance"])
    def test_of_children_that_rules_go_around(self, path: str, kind: str) -> None:
        model, x = segformer(), images().requires_grad_()
        before = result(model, x)
        calls: list[str] = []
        owner = path[: path.index(".", len(FFN) - 3)] if FFN in path else ATTENTION

        def attach() -> Callable[[], None]:
            child = model.get_submodule(path)
            if kind == "instance":  # as libraries that offload weights do
                own = child.forward

                def forward(*args: Any) -> Tensor:
                    calls.append(path)
                    return own(*args)

                child.forward = forward
                return lambda: delattr(child, "forward")
            register = getattr(child, f"register_{kind}_hook")
            return register(lambda *_: calls.append(path)).remove

        quick(model)
        detach = attach()
        gradients(model, x)
        assert calls == [path]
        assert_close(result(model, x), before)
        detach()
        assert not hooked(model.get_submodule(path))
        revert(model, verbose=False)

        attach()
        skipped = [c for c in quick(model).changes if c.status == "skipped"]
        assert [c.path for c in skipped] == [owner]
        assert f"goes around its {path[len(owner) + 1 :]}, which has hooks" in skipped[0].remark

    # hooks on dropout are how attention maps are collected; its twin in Mix-FFN is called anyway
    @pytest.mark.parametrize(
        ("block", "path", "rules"),
        [
            (block4, "attn.dropout", SEGFORMER_RULES),
            (block4, "mlp.dropout", SEGFORMER_RULES),
            (mit_block, "attn.attn_drop", MIT_RULES),
            (mit_block, "attn.proj_drop", MIT_RULES),
            (mit_block, "attn.softmax", MIT_RULES),
            (mit_block, "attn.norm", MIT_RULES),
            (mm_block, "attn.attn", MMSEG_RULES),
            (mm_block, "attn.proj_drop", MMSEG_RULES),
            (mm_block, "attn.dropout_layer", MMSEG_RULES),
            (mm_block, "attn.sr", MMSEG_RULES),
            (mm_block, "mlp.activate", MMSEG_RULES),
            (mm_block, "mlp.layers", MMSEG_RULES),
            (mm_block, "mlp.layers.0", MMSEG_RULES),
            (mm_block, "mlp.layers.3", MMSEG_RULES),
            (mm_block, "mlp.dropout_layer", MMSEG_RULES),
            (pvt_block, "attn.attn_drop", PVT_RULES),
            (pvt_block, "attn.proj_drop", PVT_RULES),
            (pvt_block, "attn.sr", PVT_RULES),
            (pvt_block, "mlp.relu", PVT_RULES),
            (pvt_block, "mlp.dwconv", PVT_RULES),
            (pvt_block, "mlp.fc1", PVT_RULES),
        ],
    )
    def test_calls_are_those_of_the_own_forward(
        self, block: Callable[..., nn.Module], path: str, rules: Any
    ) -> None:
        model, args = block(), tokens()
        if block is mit_block:
            model.attn = randomise(AttentionModules())
        calls: list[Tensor] = []

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            calls.append(result(lambda: output))

        def hooks() -> list[Any]:
            return [
                model.get_submodule(path).register_forward_hook(note),
                nn.modules.module.register_module_forward_hook(
                    lambda m, i, o: note(m, i, o) if m is model.get_submodule(path) else None
                ),
            ]

        for handle in hooks():
            model(*args)
            handle.remove()
        expected, calls[:] = calls[:], []
        assert len(expected) in (3, 6)  # the dropout of Mix-FFN is there twice
        quick(model, rules)
        for handle in hooks():
            model(*args)
            handle.remove()
        assert_close(calls, expected)
        model(*args)
        assert len(calls) == len(expected)

    def test_examined_with_hooks_it_says_which_child_has_them(self) -> None:
        for block, rules in BLOCKS[:2]:
            model = block()
            model.attn.sr.register_forward_hook(print)
            (change,) = (c for c in quick(model, rules).changes if c.status == "skipped")
            assert (
                change.remark == "the rule goes around its sr, which has hooks or another forward"
            )

    @pytest.mark.parametrize(
        ("block", "path", "rules"),
        [
            (block4, "attn.sr", SEGFORMER_RULES),
            (block4, "attn.dropout", SEGFORMER_RULES),
            (block4, "mlp.dwconv", SEGFORMER_RULES),
            (block4, "mlp.dwconv.dwconv", SEGFORMER_RULES),
            (block4, "mlp.dense1", SEGFORMER_RULES),
            (block4, "mlp.dropout", SEGFORMER_RULES),
            (mit_block, "attn.sr", MIT_RULES),
            (mit_block, "attn.proj_drop", MIT_RULES),
            (mit_block, "attn.softmax", MIT_RULES),
            (mit_block, "mlp.dwconv.dwconv", MIT_RULES),
            (mm_block, "attn.sr", MMSEG_RULES),
            (mm_block, "attn.attn", MMSEG_RULES),
            (mm_block, "mlp.layers.0", MMSEG_RULES),
            (mm_block, "mlp.layers.2", MMSEG_RULES),
            (pvt_block, "attn.sr", PVT_RULES),
            (pvt_block, "attn.attn_drop", PVT_RULES),
            (pvt_block, "mlp.act", PVT_RULES),
            (pvt_block, "mlp.dwconv", PVT_RULES),
            (segformer, f"{ATTENTION}.sequence_reduction", SEGFORMER_RULES),
            (segformer, f"{ATTENTION}.sequence_reduction.sequence_reduction", SEGFORMER_RULES),
            (segformer, f"{FFN}.activation_fn", SEGFORMER_RULES),
        ],
    )
    def test_adapters_put_in_later_take_effect(
        self, block: Callable[..., nn.Module], path: str, rules: Any
    ) -> None:
        model = block()
        args = (images(),) if block is segformer else tokens()
        if block is mit_block:
            model.attn = randomise(AttentionModules())
        quick(model, rules)
        child = model.get_submodule(path)
        model.set_submodule(path, Squashed(child))
        fast = result(model, *args)
        revert(model, verbose=False)
        slow = result(model, *args)
        assert_close(fast, slow)
        model.set_submodule(path, child)
        assert not torch.allclose(result(model, *args), slow)

    def test_old_weight_normalisation_is_not_gone_around(self) -> None:
        model, args = mit_block(), tokens()
        model.mlp.dwconv.dwconv = nn.utils.parametrizations.weight_norm(model.mlp.dwconv.dwconv)
        assert_same_function(model, MIT_RULES, *args)
        model = mit_block()
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model.mlp.dwconv.dwconv)
        report = quick(model, MIT_RULES)
        assert report.paths("skipped") == ["mlp"]
        assert "goes around its dwconv.dwconv, which has hooks" in report.changes[1].remark


ALL_RULES = (*SEGFORMER_RULES, *MIT_RULES[:1], *MMSEG_RULES, *PVT_RULES)
REASONS: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: MixFFN4(nn.ReLU()), r"its activation ReLU\(\) is not the exact GELU"),
    (lambda: MixFFN4(nn.GELU("tanh")), r"activation GELU\(approximate='tanh'\) is not the exact"),
    (lambda: MixFFN4(partial(F.gelu, approximate="tanh")), "is not the exact GELU"),
    (lambda: MixFFN4(nn.PReLU(init=0.0)), r"activation PReLU\(num_parameters=1\) is not the exact"),
    (lambda: MixFFN4(kernel_size=5, padding=2), r"kernel_size=\(5, 5\).* is not a depthwise 3x3"),
    (lambda: MixFFN4(padding=2, dilation=2), r"dilation=\(2, 2\).* is not a depthwise 3x3"),
    (lambda: MixFFN4(groups=1), r"padding=\(1, 1\)\) is not a depthwise 3x3"),
    (lambda: MixFFN4(bias=False), "bias=False.* is not a depthwise 3x3 convolution with padding 1"),
    (lambda: MixFFN4(padding_mode="reflect"), "reflect.* is not a depthwise 3x3"),
    (lambda: with_child(MixFFN4(), dense1=nn.Conv2d(16, 24, 1)), "not linear layers around 24"),
    (lambda: with_child(MixFFN4(), dense2=nn.Linear(12, 16)), "not linear layers around 24"),
    (lambda: with_child(Attention4(), sr=nn.Conv2d(16, 16, 3, 2, 1)), "kernel and stride 2"),
    (lambda: with_child(Attention4(), sr=nn.AvgPool2d(2)), "kernel and stride 2"),
    (lambda: with_child(Attention4(), sr=nn.Identity()), "kernel and stride 2"),
    (lambda: AttentionPVT(linear=True), "it is linear: its keys are pooled"),
    (lambda: MLPPVT(extra_relu=True), r"it applies ReLU\(\) before the convolution"),
    (lambda: MixFFNMM(nn.ReLU), r"its activation ReLU\(\) is not the exact GELU"),
    (lambda: MixFFNMM(kernel=5), r"kernel_size=\(5, 5\).* is not a depthwise 3x3"),
    (lambda: with_child(MixFFNMM(), layers=fewer_biases()), "is not a 1x1 convolution with bias"),
    (lambda: AttentionMM(add_bias_kv=True), "a bias or a token of their own"),
    (lambda: AttentionMM(kdim=8), "have channels"),
    (lambda: with_attribute(AttentionMM(), batch_first=False), "the order of its axes"),
    (lambda: with_child(AttentionMM(), sr=nn.AvgPool2d(2)), "kernel and stride 2"),
    (lambda: with_child(AttentionMiT(), sr=Rescaled(16, 16, 2, 2)), "kernel and stride 2"),
    (lambda: with_attention("mine"), "its config chooses the attention 'mine'"),
    (lambda: with_attention("eager", True), r"its config asks for attention weights \(output_att"),
    (SwappedMiT, "it computes something else .*in training"),
    (TanhMiT, r"it computes something else \(by [1-9]e-0[45]"),
    (OtherForward, "it computes something else"),
    (HiddenDropout, "it computes something else .*in training"),
    (lambda: OneDropout(p=0.1), "it computes something else .*in training"),
    (BareTensor, "it returns Tensor, the rule tuple"),
    (
        lambda: with_attribute(AttentionMiT(), forward=print),
        "has replaced the forward of this inst",
    ),
    (
        lambda: with_attribute(AttentionMiT(), lock=sys.stdout),
        "could not be tried: TypeError: cannot",
    ),
]


def with_child(module: nn.Module, **children: nn.Module) -> nn.Module:
    for name, child in children.items():
        setattr(module, name, child)
    return module


class Rescaled(nn.Conv2d):
    """A convolution that may become another, as adapters may that are switched off."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


def fewer_biases() -> nn.Sequential:
    layers = MixFFNMM().layers
    layers[0] = nn.Conv2d(16, 24, 1, bias=False)
    return layers


def with_attention(name: str, weights: bool = False) -> Any:
    attention = segformer(attn_implementation="eager").get_submodule(ATTENTION)
    attention.config._attn_implementation = name
    attention.config.output_attentions = weights
    return attention


def with_attribute(module: nn.Module, **attributes: Any) -> nn.Module:
    vars(module).update(attributes)
    return module


class TestReports:
    @pytest.mark.parametrize(("make", "reason"), REASONS)
    def test_reasons(self, make: Callable[[], nn.Module], reason: str) -> None:
        model = nn.Sequential(make())
        kind = type(model[0])
        (change,) = quick(model, ALL_RULES).changes
        assert (change.status, change.path, change.module) == ("skipped", "0", kind.__name__)
        assert re.search(reason, change.remark), change.remark
        assert type(model[0]) is kind

    def test_is_printed_and_readable(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = segformer(MODELS[2], attention_probs_dropout_prob=0.1)
        model.segformer.stages[0].blocks[1].mlp.activation_fn = nn.ReLU()
        report = accelerate_segformer(model)
        attention = "attention (q_proj, k_proj, v_proj, o_proj)"
        expected = f"""\
SegformerForSemanticSegmentation: 5 replaced, 1 skipped
  replaced 3 x segformer.stages.*.blocks.*.attention (SegformerAttention): {attention}; \
its own forward runs in training
  replaced segformer.stages.0.blocks.0.mlp (SegformerMixMLP): Mix-FFN
  skipped segformer.stages.0.blocks.1.mlp (SegformerMixMLP): Mix-FFN; \
its activation ReLU() is not the exact GELU
  replaced segformer.stages.1.blocks.0.mlp (SegformerMixMLP): Mix-FFN
"""
        assert capsys.readouterr().out == expected == f"{report}\n"
        assert report.paths("skipped") == ["segformer.stages.0.blocks.1.mlp"]
        revert(model)
        revert(model)
        assert (
            capsys.readouterr().out
            == f"""\
SegformerForSemanticSegmentation: 5 restored
  restored 3 x segformer.stages.*.blocks.*.attention (SegformerAttention): {attention}
  restored 2 x segformer.stages.*.blocks.*.mlp (SegformerMixMLP): Mix-FFN
SegformerForSemanticSegmentation: nothing to revert
"""
        )
        accelerate_module(AttentionMiT(), MIT_RULES)
        assert "replaced the model itself (AttentionMiT)" in capsys.readouterr().out

    def test_nothing_to_accelerate(self) -> None:
        message = r"none of the 2 modules of Sequential is attention \(q_proj.* or Mix-FFN"
        with pytest.raises(ValueError, match=message):
            accelerate_segformer(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match=r"is attention \(q, kv, proj\) or Mix-FFN"):
            accelerate_module(vit(), MIT_RULES)
        for function in (accelerate_segformer, revert):
            with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got dict"):
                function({})

    def test_our_own_layers_are_left_alone(self) -> None:
        with pytest.raises(ValueError, match="must contain a module that a rule matches"):
            accelerate_module(MixTransformer("b0"), MIT_RULES)

    def test_shared_module_is_one_module(self) -> None:
        mlp = MLPMiT()
        model = nn.ModuleList([mlp, mlp, TanhMiT()])
        assert quick(model, MIT_RULES).paths("replaced") == ["0"]
        assert revert(model, verbose=False).paths("restored") == ["0"]
        assert type(mlp) is MLPMiT

    def test_meta_device(self) -> None:
        with torch.device("meta"):
            model = MLPMiT()
            assert quick(model, MIT_RULES).paths("replaced") == [""]
        assert all(p.is_meta for p in model.parameters())

    def test_class_that_changed_since(self) -> None:
        model, args = randomise(MLPMiT()), tokens()
        quick(model, MIT_RULES)
        fast = type(model)
        model.__class__ = type("Sharded", (fast,), {})  # as fully_shard does
        (change,) = revert(model, verbose=False).changes
        assert (change.status, change.module) == ("skipped", "Sharded")
        assert change.remark == "its class was changed to Sharded since; undo that first"
        assert quick(model, MIT_RULES).paths("already replaced") == [""]
        with pytest.raises(ValueError, match="cannot run"), use_backend("triton"):
            model(*args)
        model.__class__ = fast
        assert revert(model, verbose=False).paths("restored") == [""]


class Halving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        return x * self.factor**times


def _rule(**fields: Any) -> Rule:
    parts: dict[str, Any] = {
        "name": "halving",
        "matches": lambda module: hasattr(module, "factor"),
        "forward": lambda module, x, times=1: x * module.factor if times == 1 else NotImplemented,
        "examples": lambda module: [(torch.randn(3, 4),), (torch.arange(3), 1)],
    }
    return Rule(**{**parts, **fields})


class TestRules:
    def test_of_a_user(self) -> None:
        served: list[int] = []

        def forward(module: Any, x: Tensor, times: int = 1) -> Any:
            served.append(times)
            return x * module.factor if times == 1 else NotImplemented

        model = Halving()
        assert quick(model, [_rule(forward=forward)]).paths("replaced") == [""]
        served.clear()
        assert torch.equal(model(torch.ones(2)), torch.full((2,), 0.5))
        assert torch.equal(model(torch.ones(2), times=3), torch.full((2,), 0.125))
        assert served == [1, 3]
        twin = copy.deepcopy(model)
        with pytest.raises((AttributeError, pickle.PicklingError), match=r"[Cc]an't (get|pickle)"):
            pickle.dumps(model)
        assert torch.equal(twin(torch.ones(2)), model(torch.ones(2)))

    def test_first_that_holds_wins(self) -> None:
        never = _rule(name="never", matches=lambda module: False)
        cannot = _rule(name="cannot", matches=lambda module: "cannot\nbe")
        wrong = _rule(name="wrong", forward=lambda module, x, times=1: x)
        shape = _rule(name="shape", forward=lambda module, x, times=1: x[:1] * module.factor)
        unserved = _rule(name="unserved", forward=lambda *args: NotImplemented)
        broken = _rule(name="broken", examples=lambda module: [()])
        model, rules = Halving(), [never, cannot, wrong, shape, unserved, broken]
        found = {change.rule: change.remark for change in quick(model, rules).changes}
        assert re.match(r"it computes something else \(by .* in training\)", found.pop("wrong"))
        assert re.match(r"a copy could not be tried: TypeError: .*'x'", found.pop("broken"))
        assert found == {
            "cannot": "cannot be",
            "shape": "it returns a tensor [3, 4], the rule [1, 4]",
            "unserved": "the rule serves no call of it as it is",
        }
        assert type(model) is Halving
        (change,) = quick(model, [*rules, _rule(), wrong]).changes
        assert (change.rule, change.status) == ("halving", "replaced")


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return randomise(transformers.ViTModel(config, add_pooling_layer=False))


class TestAttentionInterface:
    @pytest.fixture(autouse=True)
    def _unregistered_afterwards(self) -> Iterator[None]:
        interfaces = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
        before = [dict(interface._global_mapping) for interface in interfaces]
        yield
        for interface, mapping in zip(interfaces, before, strict=True):
            interface._global_mapping.clear()
            interface._global_mapping.update(mapping)

    @pytest.mark.parametrize("name", [*MODELS, "ViTModel"])
    def test_same_function(self, name: str) -> None:
        model, x = (segformer(name), images()) if name in MODELS else (vit(), images(16, 16))
        before, slow = result(model, x), gradients(model, x)
        with pytest.raises(ValueError, match="equiseg_fast"):
            model.set_attn_implementation("equiseg_fast")
        register_attention()
        register_attention()
        model.set_attn_implementation("equiseg_fast")
        assert_close(result(model, x), before)
        assert_close(gradients(model, x), slow)
        with pytest.raises(ValueError, match="backend 'triton' cannot run"), use_backend("triton"):
            model(x)

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"attention_mask": torch.ones(1)}, "attention_mask was passed"),
            ({"dropout": 0.1}, r"dropout of attention weights is 0\.1"),
            ({"is_causal": True}, "the attention is causal"),
            ({"output_attentions": True}, "output_attentions asks for weights"),
            ({"position_bias": torch.ones(1)}, "position_bias was passed"),
            ({"sliding_window": 4}, "sliding_window was passed"),
            ({"softcap": 30.0}, "softcap was passed"),
            ({"s_aux": torch.ones(1)}, "s_aux was passed"),
            ({"key": torch.ones(2, 2, 5, 8)}, "4 query heads share 2 key heads"),
            ({"dropout": 0.1, "softcap": 3.0}, "softcap was passed; dropout of"),
        ],
    )
    def test_refuses_with_reasons(self, arguments: dict[str, Any], reason: str) -> None:
        module = nn.Identity()
        module.is_causal = False
        q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 5, 8)
        call = {"query": q, "key": k, "value": k, "attention_mask": None, "scaling": 0.2}
        out, weights = attention_forward(module, **call)
        expected = F.scaled_dot_product_attention(q, k, k, scale=0.2).transpose(1, 2)
        torch.testing.assert_close(out, expected)
        assert weights is None
        with pytest.raises(ValueError, match=f"attention of Identity: .*{reason}.*Choose another"):
            attention_forward(module, **{**call, **arguments})

    def test_causal_like_transformers(self) -> None:
        q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
        with pytest.raises(ValueError, match="the attention is causal"):
            attention_forward(nn.Identity(), q, k, k)
        attention_forward(nn.Identity(), q[:, :, -1:], k, k)

    def test_padded_batches_are_refused(self) -> None:
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            vocab_size=9,
        )  # fmt: skip
        model = randomise(transformers.BertModel(config))
        ids, mask = torch.randint(0, 9, (2, 5)), torch.ones(2, 5, dtype=torch.long)
        before = result(model, ids, mask)
        register_attention()
        model.set_attn_implementation("equiseg_fast")
        assert_close(result(model, ids, mask), before)
        mask[1, 3:] = 0
        with pytest.raises(ValueError, match="attention_mask was passed"):
            model(ids, mask)

    def test_without_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r"needs transformers with AttentionInterface"):
            register_attention()


def test_import_does_not_import_transformers() -> None:
    code = "import sys, equiseg_fast.integrations; assert 'transformers' not in sys.modules"
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)
