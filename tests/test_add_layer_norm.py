"""Residual addition and LayerNorm: the Triton kernels against an fp64 oracle, and the operation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.measure import launches
from equiseg_fast import add_layer_norm, explain, reference
from equiseg_fast.models import MixTransformer
from equiseg_fast.ops import _backend
from equiseg_fast.testing import (
    assert_deterministic,
    assert_parity,
    check_op_parity,
    random_normal,
    same_bits,
)
from tests.operations import DEVICE, DTYPES, HALF, MEAN, Operation, token_shape

OPERATION = Operation(
    add_layer_norm,
    reference.add_layer_norm,
    lambda s: {
        "x": token_shape(s),
        "update": token_shape(s),
        "weight": (s.channels,),
        "bias": (s.channels,),
    },
    kinds={"dweight": "parameter", "dbias": "parameter"},
    contraction=lambda s: 0 if s.channels < 8 else 8,
    centred=("update",),
    composed=True,
)


NAMES = ("x", "update", "weight", "bias")

triton_op = partial(add_layer_norm, backend="triton")
torch_op = partial(add_layer_norm, backend="torch")

Op = Callable[..., tuple[Tensor, Tensor]]


def make(
    *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", eps: float = 1e-5
) -> dict[str, Any]:
    """Features `[..., C]`, by default of two images of 7 x 5 tokens."""
    shape = shape or (2, 35, 33)
    tensors = {
        name: random_normal(
            shape if i < 2 else shape[-1:],
            dtype,
            seed=i,
            mean=MEAN if name == "x" else 0.0,
            layout=layout if i < 2 else "contiguous",
            device=DEVICE,
        )
        for i, name in enumerate(NAMES)
    }
    return {**tensors, "eps": eps}


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in NAMES]


def parity(inputs: dict[str, Any], fn: Op = triton_op, **kwargs: Any) -> None:
    """Both outputs and all gradients under the tolerance policy.

    total is stored in half precision before it is normalised, so the rest is held to eager within
    its bound; `test_rounds_once` holds it to the floor.
    """
    options = {"differentiable": NAMES, "contraction": 8, **kwargs}
    rows = inputs["x"].numel() // inputs["x"].shape[-1]
    check_op_parity(
        fn,
        reference.add_layer_norm,
        inputs,
        output_names=("total", "normed"),
        kinds={f"d{n}": "parameter" for n in ("weight", "bias") if n in options["differentiable"]},
        chain=rows + 8,
        **options,
    )


class TestParity:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "shape",
        [(1, 35, 33), (2, 35, 160), (3, 7, 5, 64), (1, 5, 1), (1, 1, 64), (48,), (1, 3, 1024)],
        ids=str,
    )
    def test_sizes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        parity(make(*shape, dtype=dtype))

    @pytest.mark.parametrize("channels", [2048, 4096])
    def test_wide_rows(self, channels: int) -> None:
        parity(make(2, channels))

    @pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 33), (torch.bfloat16, 64)])
    def test_many_steps_and_partial_sums(
        self, dtype: torch.dtype, channels: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Several blocks of rows per program, a ragged last one, more partials than a block."""
        from equiseg_fast.kernels import add_layer_norm as kernels

        tile = kernels.Tile(block_l=4, block_c=64, num_warps=4)
        monkeypatch.setattr(kernels, "norm_fwd_config", lambda *_: tile)
        monkeypatch.setattr(kernels, "norm_bwd_config", lambda *_: tile)
        monkeypatch.setattr(kernels, "token_chunks", lambda *_: (6, 3))
        monkeypatch.setitem(kernels.SUMS_TILE, "BLOCK_N", 4)
        monkeypatch.setitem(kernels.SUMS_TILE, "BLOCK_C", 16)
        inputs = make(66, channels, dtype=dtype)
        parity(inputs)
        # All with strides of their own.
        wide = [
            random_normal((66, 3 * channels + i), dtype, seed=5 + i, device=DEVICE)
            for i in range(4)
        ]
        x, update, *cotangents = (t[:, i : i + channels] for i, t in enumerate(wide))
        inputs |= {"x": x.detach(), "update": update.detach()}
        parity(inputs)
        tensors = leaves(inputs)
        out = triton_op(**inputs)
        actual = torch.autograd.grad(out, tensors, cotangents, retain_graph=True)
        expected = torch.autograd.grad(out, tensors, [g.contiguous() for g in cotangents])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_tiles_hold_whole_rows(self) -> None:
        from equiseg_fast.kernels import add_layer_norm as kernels

        for channels in (1, 16, 33, 160, 512, 1024, 4095, 4096):
            tiles = (
                kernels.norm_fwd_config(90, channels),
                kernels.norm_bwd_config(90, 2, channels),
            )
            per_thread = []
            for tile in tiles:
                assert channels <= tile.block_c < max(32, 2 * channels)
                assert 512 <= tile.block_l * tile.block_c <= 4096
                per_thread.append(tile.block_l * tile.block_c // (32 * tile.num_warps))
            # The backward of odd widths has an address for each element.
            assert per_thread[0] == 16
            assert per_thread[1] < 16 if channels % 16 else per_thread[1] == 16

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(40, 128), (40, 100)], ids=str)
    def test_rounds_once(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Where total needs no rounding everything else is on the floor, gradients too."""
        inputs = make(*shape, dtype=dtype)
        inputs["update"].zero_()
        parity(inputs, contraction=None)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_normalises_the_rounded_total(self, dtype: torch.dtype) -> None:
        inputs = make(40, 128, dtype=dtype)
        total, normed = triton_op(**inputs)
        assert torch.equal(total, inputs["x"] + inputs["update"])
        rest = total, torch.zeros_like(total), inputs["weight"], inputs["bias"]
        again, expected = triton_op(*rest)
        assert torch.equal(again, total)
        assert torch.equal(normed, expected)

    def test_total_is_rounded_before_it_is_normalised(self) -> None:
        """x is so large that it swallows the update: nothing is left to normalise."""
        x = torch.full((4, 64), 4096.0, dtype=torch.bfloat16, device=DEVICE)
        update = random_normal((4, 64), torch.bfloat16, seed=1, device=DEVICE)
        weight, bias = (make(4, 64, dtype=torch.bfloat16)[name] for name in ("weight", "bias"))
        total, normed = triton_op(x, update, weight, bias)
        assert torch.equal(total, x)
        assert torch.equal(normed, bias.expand(4, 64))

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    @pytest.mark.parametrize("channels", [96, 128])
    def test_large_offset(self, channels: int, fn: Op) -> None:
        """Mean 1000, spread 1: E[x^2] - E[x]^2 would lose 6 of 7 digits of the variance."""
        inputs = make(35, channels)
        inputs["x"] += 1000
        _, normed = fn(**inputs)
        wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in inputs.items()}
        wide["x"], wide["update"] = (inputs["x"] + inputs["update"]).double(), wide["update"] * 0
        _, expected = reference.add_layer_norm(**wide)
        # The mean itself is known to half a unit in the last place of 1000.
        torch.testing.assert_close(normed.double(), expected, rtol=2e-4, atol=2e-4)

    @pytest.mark.parametrize("eps", [1e-12, 1e-6, 10.0])
    def test_eps(self, eps: float) -> None:
        inputs = make(9, 20, eps=eps)
        parity(inputs)
        parity({**inputs, "x": 1e-3 * inputs["x"], "update": 1e-3 * inputs["update"]})

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    def test_constant_rows_normalise_to_the_bias(self, fn: Op) -> None:
        inputs = make(4, 24)
        x, update, *_ = leaves({**inputs, "x": torch.ones_like(inputs["x"])})
        total, normed = fn(x, update * 0, inputs["weight"], inputs["bias"])
        torch.testing.assert_close(normed, inputs["bias"].expand(4, 24), rtol=0, atol=1e-6)
        (dx,) = torch.autograd.grad(total.sum() + normed.square().sum(), x)
        assert bool(dx.isfinite().all())

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_what_is_not_finite_stays_in_its_row(self, value: float) -> None:
        inputs = make(6, 20)
        clean = triton_op(**inputs)
        inputs["x"][2, 3] = value
        total, normed = triton_op(**inputs)
        assert normed[2].isnan().all()
        assert torch.equal(total.isfinite().sum(-1) == 20, torch.arange(6, device=DEVICE) != 2)
        others = [0, 1, 3, 4, 5]
        assert torch.equal(normed[others], clean[1][others])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides_of_features(self, dtype: torch.dtype, layout: str) -> None:
        strange, plain = make(2, 6, 20, dtype=dtype, layout=layout), make(2, 6, 20, dtype=dtype)
        parity({**plain, "x": strange["x"]})
        parity({**plain, "update": strange["update"]})

    def test_unit_stride_of_channels_with_others_strange(self) -> None:
        """They are read where they lie, x and update each with strides of their own."""
        wide = random_normal((12, 2, 40), seed=3, device=DEVICE)
        inputs = make(2, 12, 20)
        strange = (
            wide[..., 7:27].transpose(0, 1),
            wide[:, :1, 20:].transpose(0, 1).expand(2, -1, -1),
            wide.view(24, 40)[:, :20].view(2, 12, 20),
        )
        for x in strange:
            assert x.stride(-1) == 1
            parity({**inputs, "x": x})
            parity({**inputs, "update": x})
        parity({**inputs, "x": strange[0], "update": strange[2]})

    def test_rows_are_viewed_not_copied_where_they_can_be(self) -> None:
        from equiseg_fast.kernels.add_layer_norm import _rows

        x = random_normal((2, 12, 40), seed=3, device=DEVICE)
        for view in (x, x[..., 7:27], x[:, :, :1].expand(-1, -1, 40)[:, ::2, :1]):
            rows, stride = _rows(view)
            assert rows.data_ptr() == view.data_ptr()
            assert stride == view.reshape(-1, view.shape[-1]).stride(0)
        # Offsets within a tile have 32 bits: what lies farther apart is gathered.
        far = torch.empty_strided((4, 8), (2**23, 1), device="meta")
        rows, stride = _rows(far)
        assert (rows.stride(), stride) == ((8, 1), 8)
        near = torch.empty_strided((4, 8), (2**23 - 1, 1), device="meta")
        rows, stride = _rows(near)
        assert (rows.stride(), stride) == (near.stride(), near.stride(0))
        for alone in (x[0, :1], x[:1, :1, ::2], x[0, 0, 3:7]):
            assert _rows(alone)[1] == 0

    def test_strides_of_parameters(self) -> None:
        inputs = make(2, 6, 20)
        weight, bias = random_normal((20, 3), seed=4, device=DEVICE)[:, 1:].unbind(1)
        parity({**inputs, "weight": weight, "bias": bias})

    @pytest.mark.parametrize("cotangent", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides_of_cotangents(self, cotangent: str) -> None:
        parity(make(2, 6, 20), cotangent=cotangent)

    def test_cotangents_with_unit_stride_of_channels(self) -> None:
        """They are read where they lie, with strides that are not those of x."""
        inputs = make(2, 6, 20)
        tensors = leaves(inputs)
        out = triton_op(**inputs)
        wide = random_normal((6, 2, 40), seed=3, device=DEVICE)
        first = wide[..., 7:27].transpose(0, 1)
        second = wide.view(12, 40)[:, 20:].view(2, 6, 20)
        for pair in ((first, second), (second, first)):
            assert {g.stride(-1) for g in pair} == {1}
            actual = torch.autograd.grad(out, tensors, pair, retain_graph=True)
            dense = [g.contiguous() for g in pair]
            expected = torch.autograd.grad(out, tensors, dense, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("used", [0, 1])
    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    def test_only_one_output_is_used(self, fn: Op, used: int, dtype: torch.dtype) -> None:
        inputs = make(2, 7, 20, dtype=dtype)
        g = random_normal((2, 7, 20), dtype, seed=9, device=DEVICE)
        tensors = leaves(inputs)[: 2 + 2 * used]
        actual = torch.autograd.grad(fn(**inputs)[used], tensors, g)
        if used == 0:
            assert all(torch.equal(a, g) for a in actual)
            return
        wide = [inputs[name].detach().double().requires_grad_() for name in NAMES]
        expected = torch.autograd.grad(reference.add_layer_norm(*wide)[1], wide, g.double())
        eager = torch.autograd.grad(reference.add_layer_norm(*tensors)[1], tensors, g)
        for name, a, b, c in zip(NAMES, actual, expected, eager, strict=True):
            kind = "parameter" if a.dim() == 1 else "gradient"
            assert_parity(a, b, c, name=f"d{name}", kind=kind, chain=22, contraction=0)

    @pytest.mark.parametrize("unused", [0, 1])
    def test_a_gradient_of_zeros_is_one_that_is_missing(self, unused: int) -> None:
        inputs = make(2, 7, 20)
        tensors = leaves(inputs)
        pair = [random_normal((2, 7, 20), seed=9, device=DEVICE) for _ in range(2)]
        pair[unused].zero_()
        total, normed = triton_op(**inputs)
        with_zeros = torch.autograd.grad((total, normed), tensors, pair, retain_graph=True)
        without = torch.autograd.grad(
            (total, normed)[1 - unused], tensors, pair[1 - unused],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        torch.testing.assert_close(without, with_zeros, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        "wanted",
        ["x", "update", "weight", "bias", "x update", "update bias", "weight bias", "x weight"],
    )
    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    def test_only_wanted_gradients(self, fn: Op, wanted: str) -> None:
        parity(make(1, 12, 8), fn, differentiable=tuple(wanted.split()))

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    @pytest.mark.parametrize("shape", [(0, 35, 33), (2, 0, 33)], ids=str)
    def test_empty(self, fn: Op, shape: tuple[int, ...]) -> None:
        inputs = make(*shape)
        tensors = leaves(inputs)
        outputs = fn(**inputs)
        assert [x.shape for x in outputs] == [shape, shape]
        grads = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), tensors)
        for x, g in zip(tensors, grads, strict=True):
            assert g.shape == x.shape
            assert not g.any()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_are_bit_identical(self, dtype: torch.dtype) -> None:
        inputs = make(2, 35, 20, dtype=dtype)
        tensors = leaves(inputs)
        cotangents = [random_normal((2, 35, 20), dtype, seed=s, device=DEVICE) for s in (8, 9)]

        def step() -> tuple[Tensor, ...]:
            out = triton_op(**inputs)
            return *out, *torch.autograd.grad(out, tensors, cotangents)

        assert_deterministic(step, repeats=20 if DEVICE == "cuda" else 2)

    def test_results_do_not_depend_on_the_batch(self) -> None:
        inputs = make(3, 9, 33)
        alone = triton_op(**{**inputs, "x": inputs["x"][1:2], "update": inputs["update"][1:2]})
        for many, one in zip(triton_op(**inputs), alone, strict=True):
            assert torch.equal(many[1:2], one)


class TestBackends:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
    def test_torch_backend(self, dtype: torch.dtype, layout: str) -> None:
        inputs = make(dtype=dtype, layout=layout)
        parity(inputs, torch_op, cotangent=layout)
        assert all(x.is_contiguous() for x in torch_op(**inputs))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_torch_backend_is_the_two_operators(self, dtype: torch.dtype) -> None:
        inputs = make(dtype=dtype)
        x, update, weight, bias, eps = inputs.values()
        total, normed = torch_op(**inputs)
        assert same_bits(total, x + update)
        assert same_bits(normed, F.layer_norm(x + update, (33,), weight, bias, eps))

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    @pytest.mark.parametrize("dtype", HALF)
    def test_gradients_of_parameters_over_many_rows(self, fn: Op, dtype: torch.dtype) -> None:
        """Sums of thousands, where half precision would no longer see a one."""
        inputs = make(3000, 8, dtype=dtype)
        tensors = leaves(inputs)[2:]
        _, normed = fn(**inputs)
        dweight, dbias = torch.autograd.grad(normed, tensors, torch.ones_like(normed))
        assert torch.equal(dbias, torch.full_like(dbias, 3000))
        g = torch.ones_like(normed) + normed.detach().sign()
        (dweight,) = torch.autograd.grad(fn(**inputs)[1], tensors[:1], g)
        wide = {n: x.detach().double() if isinstance(x, Tensor) else x for n, x in inputs.items()}
        wide["weight"].requires_grad_()
        normed = reference.add_layer_norm(**wide)[1]
        (expected,) = torch.autograd.grad(normed, wide["weight"], g.double())
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(dweight.double(), expected, rtol=eps, atol=1.0)

    def test_torch_backend_in_float64(self) -> None:
        inputs = make(5, 4, dtype=torch.float64)
        tensors = leaves(inputs)
        torch.testing.assert_close(torch_op(*tensors), reference.add_layer_norm(*tensors))
        assert torch.autograd.gradcheck(torch_op, tensors)
        assert torch.autograd.gradgradcheck(torch_op, tensors)

    def test_reference_is_layer_norm(self) -> None:
        x, update, weight, bias, eps = make(dtype=torch.float64, eps=0.1).values()
        total, normed = reference.add_layer_norm(x, update, weight, bias, eps)
        torch.testing.assert_close(normed, F.layer_norm(x + update, (33,), weight, bias, eps))
        assert torch.equal(total, x + update)

    def test_saves_total_and_two_numbers_per_row(self) -> None:
        inputs = make()
        leaves(inputs)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            total, _ = triton_op(**inputs)
        pointers = {x.data_ptr() for x in saved}
        assert {total.data_ptr(), inputs["weight"].data_ptr()} <= pointers
        assert not {inputs["x"].data_ptr(), inputs["update"].data_ptr()} & pointers
        unique = {x.data_ptr(): x.numel() for x in saved}
        assert sum(unique.values()) == total.numel() + 2 * 33 + 2 * 70

    def test_x_and_update_get_one_gradient(self) -> None:
        inputs = make()
        seen: list[Tensor] = []
        x, update, *_ = leaves(inputs)
        halves = [t * 1 for t in (x, update)]
        for t in halves:
            t.register_hook(seen.append)
        total, normed = triton_op(*halves, inputs["weight"], inputs["bias"])
        (total.square() + normed.square()).sum().backward()
        assert seen[0].data_ptr() == seen[1].data_ptr()
        assert torch.equal(x.grad, update.grad)

    def test_leaves_do_not_share_what_they_accumulate(self) -> None:
        inputs = make()
        x, update, *_ = leaves(inputs)
        triton_op(**inputs)[1].square().sum().backward()
        x.grad.zero_()
        assert update.grad.any()

    def test_adds_up_where_x_is_the_update(self) -> None:
        inputs = make()
        x = inputs["x"].requires_grad_()
        expected = inputs["x"].detach().clone().requires_grad_()
        for fn, t in ((triton_op, x), (reference.add_layer_norm, expected)):
            sum(y.sin().sum() for y in fn(t, t, inputs["weight"], inputs["bias"])).backward()
        torch.testing.assert_close(x.grad, expected.grad, rtol=1e-4, atol=1e-4)

    def test_a_result_changed_in_place_is_noticed(self) -> None:
        inputs = make()
        leaves(inputs)
        total, normed = triton_op(**inputs)
        total.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            normed.sum().backward()

    @pytest.mark.skipif(DEVICE == "cuda", reason="auto takes triton on a GPU")
    def test_auto_on_the_cpu_is_torch(self) -> None:
        text = explain("add_layer_norm", **make())
        assert "runs on backend 'torch'" in text
        assert "triton: usable" in text

    def test_explicit_triton_never_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"add_layer_norm: dtype torch\.float64"):
            triton_op(**make(dtype=torch.float64))
        with pytest.raises(ValueError, match="4097 channels are more than 4096"):
            triton_op(**make(2, 4097))
        assert "4097 channels are more" in explain("add_layer_norm", **make(2, 4097))
        parity(make(2, 4097), partial(add_layer_norm, backend="auto"))
        monkeypatch.setattr(_backend, "INTERPRET", False)
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match="the kernels need 'cuda'"):
                triton_op(**make())


class TestAutograd:
    @pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    def test_double_backward(self, fn: Op, used: tuple[int, ...]) -> None:
        def penalty(fn: Op, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
            tensors = [inputs[name].detach().clone().requires_grad_() for name in NAMES]
            x, update, weight, bias = tensors
            # others also depend on x: only the direct dependence may enter each gradient
            outputs = fn(x.tanh(), update * x, weight + x[0, 0], bias + x[0, 1].square())
            loss = sum((outputs[i] * (outputs[i] + i).cos()).sum() for i in used)
            first = torch.autograd.grad(
                loss, tensors, create_graph=True, allow_unused=True, materialize_grads=True
            )
            loss = sum(g.square().sum() for g in first)
            return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)

        inputs = make(1, 6, 8)
        doubled = {n: x.double() if isinstance(x, Tensor) else x for n, x in inputs.items()}
        expected = penalty(reference.add_layer_norm, doubled)
        for a, b in zip(penalty(fn, inputs), expected, strict=True):
            scale = float(b.abs().max()) + 1e-30
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * scale)

    @pytest.mark.parametrize("wanted", NAMES)
    def test_double_backward_of_one_input(self, wanted: str) -> None:
        def penalty(fn: Op, inputs: dict[str, Any]) -> Tensor:
            inputs = {n: x.detach() if isinstance(x, Tensor) else x for n, x in inputs.items()}
            leaf = inputs[wanted].requires_grad_()
            total, normed = fn(**inputs)
            loss = (total.sin() + normed.square() * normed).sum()
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            return torch.autograd.grad(first.square().sum(), leaf)[0]

        inputs = make(1, 6, 8)
        doubled = {n: x.double() if isinstance(x, Tensor) else x for n, x in inputs.items()}
        expected = penalty(reference.add_layer_norm, doubled)
        actual = penalty(triton_op, inputs).double()
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * scale)

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    def test_inputs_that_need_no_gradient(self, fn: Op) -> None:
        inputs = make(1, 4, 8)
        inputs["bias"].requires_grad_()
        total, normed = fn(**inputs)
        assert not total.requires_grad
        normed.square().sum().backward()
        assert inputs["x"].grad is inputs["weight"].grad is None
        torch.testing.assert_close(inputs["bias"].grad, 2 * normed.detach().sum((0, 1)))

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    def test_no_graph_without_gradients(self, fn: Op) -> None:
        inputs = make(1, 4, 8)
        assert {x.grad_fn for x in fn(**inputs)} == {None}
        inputs["x"].requires_grad_()
        with torch.no_grad():
            assert {x.grad_fn for x in fn(**inputs)} == {None}

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    def test_reverse_mode_transforms(self, fn: Op) -> None:
        x, *rest = make(1, 12, 8).values()

        def loss(fn: Op) -> Callable[[Tensor], Tensor]:
            return lambda x: sum(y.square().sum() for y in fn(x, *rest))

        expected = torch.func.grad(loss(reference.add_layer_norm))(x)
        torch.testing.assert_close(torch.func.grad(loss(fn))(x), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    def test_autocast_keeps_the_dtype_of_x(self, dtype: torch.dtype, backend: str) -> None:
        """The branch is narrow under autocast, the stream and parameters are what they were."""
        inputs = make(1, 12, 8)
        inputs["x"] = inputs["x"].to(dtype)
        inputs["update"] = inputs["update"].bfloat16()
        leaves(inputs)
        with torch.autocast(DEVICE, torch.bfloat16):
            mixed = add_layer_norm(**inputs, backend=backend)
        assert {y.dtype for y in mixed} == {dtype}
        sum(y.float().square().sum() for y in mixed).backward()
        assert [inputs[n].grad.dtype for n in NAMES] == [inputs[n].dtype for n in NAMES]
        cast = {n: inputs[n].detach().to(dtype).requires_grad_() for n in NAMES}
        expected = add_layer_norm(**cast, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(mixed, expected, strict=True))

    def test_backward_under_autocast(self) -> None:
        inputs = make(1, 12, 8, dtype=torch.bfloat16)
        tensors = leaves(inputs)
        g = [torch.ones_like(tensors[0])] * 2
        plain = torch.autograd.grad(triton_op(**inputs), tensors, g)
        with torch.autocast(DEVICE, torch.float16):
            inside = torch.autograd.grad(triton_op(**inputs), tensors, g, create_graph=True)
        for a, b in zip(inside, plain, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


class TestRegistration:
    @pytest.mark.parametrize("interpret", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(
        self, dtype: torch.dtype, interpret: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if DEVICE == "cpu":
            monkeypatch.setattr(_backend, "INTERPRET", interpret)
        ops = torch.ops.equiseg_fast
        x, update, weight, bias, eps = make(1, 6, 4, dtype=dtype).values()
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        turned = weight.repeat_interleave(2)[::2]
        torch.library.opcheck(ops.add_layer_norm_fwd, (x, update, weight, bias, eps))
        torch.library.opcheck(ops.add_layer_norm_fwd, (strided, x, turned, bias, eps))
        torch.library.opcheck(ops.add_layer_norm_fwd, (x[0, 0], x[0, 1], weight, bias, eps))
        _, _, mean, rstd = ops.add_layer_norm_fwd(strided, update, weight, bias, eps)
        for has_total in (True, False):
            for needs in ((True, True, True), (True, False, False), (False, False, True)):
                grad = torch.randn_like(strided)
                args = (grad if has_total else None, grad, strided, turned, mean, rstd, *needs)
                torch.library.opcheck(ops.add_layer_norm_bwd, args)
        row = (update[0, 0], x[0, 0], x[0, 1], weight, mean[0, 0], rstd[0, 0], True, True, True)
        torch.library.opcheck(ops.add_layer_norm_bwd, row)

    @pytest.mark.skipif(DEVICE == "cuda", reason="the CPU formula stands in where no GPU is")
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cpu_implementation_is_the_kernels_twin(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = make(1, 12, 8, dtype=dtype)
        kernels = torch.ops.equiseg_fast.add_layer_norm_fwd(**inputs)
        monkeypatch.setattr(_backend, "INTERPRET", False)
        monkeypatch.setattr(_backend, "triton_reasons", lambda *_: [])
        parity(inputs)
        for wanted in ("x", "bias", "update weight"):
            parity(inputs, differentiable=tuple(wanted.split()))
        twins = torch.ops.equiseg_fast.add_layer_norm_fwd(**inputs)
        assert [t.dtype for t in twins] == [t.dtype for t in kernels]
        torch.testing.assert_close(twins[2:], kernels[2:], rtol=1e-5, atol=1e-6)

    def test_meta(self) -> None:
        inputs = make()
        metas = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in inputs.items()}
        for fn in (torch.ops.equiseg_fast.add_layer_norm_fwd, add_layer_norm):
            outputs = fn(**metas)
            for out in outputs[:2]:
                assert (out.shape, out.stride()) == (inputs["x"].shape, inputs["x"].stride())
        leaves(metas)
        sum(y.sum() for y in add_layer_norm(**metas)).backward()
        assert all(metas[n].grad.shape == metas[n].shape for n in NAMES)

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    @pytest.mark.parametrize(
        ("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
    )
    def test_compile_without_graph_breaks(self, compiler: str, dynamic: bool, fn: Op) -> None:
        torch._dynamo.reset()

        def loss(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            total, normed = fn(x * 2, update, weight, bias, eps)
            return total.sin().sum() + normed.square().sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=compiler)
        for tokens in (12, 10) if dynamic else (12,):
            inputs = make(2, tokens, 8)
            tensors = leaves(inputs)
            actual, expected = compiled(**inputs), loss(**inputs)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors)
            )

    @pytest.mark.parametrize("used", [0, 1])
    @pytest.mark.parametrize("wanted", ["x", "weight", "update bias"])
    def test_compile_with_parts(self, used: int, wanted: str) -> None:
        """One output alone, as at the end of a stage, and inputs that need no gradient."""
        torch._dynamo.reset()
        inputs = make(2, 6, 8)
        tensors = [inputs[name].requires_grad_() for name in wanted.split()]

        def loss(**inputs: Any) -> Tensor:
            return triton_op(**inputs)[used].square().sum()

        expected = loss(**inputs)
        actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(**inputs)
        torch.testing.assert_close(actual, expected)
        assert actual.requires_grad == expected.requires_grad
        if expected.requires_grad:
            unused = {"allow_unused": True, "materialize_grads": True}
            torch.testing.assert_close(
                torch.autograd.grad(actual, tensors, **unused),
                torch.autograd.grad(expected, tensors, **unused),
            )

    def test_dynamic_sizes_compile_once(self) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")

        def fn(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            # A constant: the compiler would first try a float that comes in as a tensor.
            return triton_op(*tensors, eps=1e-6)

        compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=counter)
        for tokens in (12, 10, 28):
            compiled(*(make(2, tokens, 8)[name] for name in NAMES))
        assert counter.frame_count == 1

    def test_export(self) -> None:
        class Layer(torch.nn.Module):
            def forward(
                self, x: Tensor, update: Tensor, weight: Tensor, bias: Tensor
            ) -> tuple[Tensor, Tensor]:
                return triton_op(x, update, weight, bias)

        inputs = tuple(make(1, 12, 8).values())[:4]
        program = torch.export.export(Layer(), inputs)
        assert "equiseg_fast.add_layer_norm_fwd" in str(program.graph)
        torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        tensors = leaves(make(1, 12, 8))

        def fn(*tensors: Tensor) -> Tensor:
            total, normed = triton_op(*tensors)
            return total.square() + normed.square()

        plain = torch.autograd.grad(fn(*tensors).sum(), tensors)
        out = torch.utils.checkpoint.checkpoint(fn, *tensors, use_reentrant=reentrant)
        out.sum().backward()
        for x, g in zip(tensors, plain, strict=True):
            assert torch.equal(x.grad, g)


class TestBadInput:
    def test_errors_name_the_argument(self) -> None:
        x, update, weight, bias, eps = make().values()
        cases = [
            ((x.tolist(), update, weight, bias, eps), TypeError, r"x must be a tensor \[..., C\];"),
            ((x.long(), update, weight, bias, eps), TypeError, "x must have dtype float64, floa"),
            ((x[0, 0, 0], update, weight, bias, eps), ValueError, r"x must have shape \[\.\.\."),
            ((x[..., :0], update, weight, bias, eps), ValueError, "x must have at least one cha"),
            ((x, 1.0, weight, bias, eps), TypeError, r"update must be a tensor \[..., C\]; got fl"),
            ((x, update.int(), weight, bias, eps), TypeError, "update must have dtype"),
            ((x, update[0], weight, bias, eps), ValueError, r"update must have shape of x = \[2, "),
            ((x, update[:, :1], weight, bias, eps), ValueError, "update must have shape of x"),
            ((x, update.half(), weight, bias, eps), TypeError, "update must have the dtype of x"),
            ((x, update, None, bias, eps), TypeError, r"weight must be a tensor \[C\]; got None"),
            ((x, update, weight[:8], bias, eps), ValueError, r"weight must have shape \[C\] = \["),
            ((x, update, weight, bias[None], eps), ValueError, r"bias must have shape \[C\]; got"),
            ((x, update, weight.double(), bias, eps), TypeError, "weight must have the dtype of"),
            ((x, update, weight, bias.to("meta"), eps), ValueError, "bias must be on the device"),
            ((x, update, weight, bias, 0.0), ValueError, r"eps must be positive; got 0\.0"),
            ((x, update, weight, bias, float("nan")), ValueError, "eps must be finite; got nan"),
        ]
        for args, error, message in cases:
            for backend in ("triton", "torch", "reference"):
                with pytest.raises(error, match=message):
                    add_layer_norm(*args, backend=backend)


def random_encoder(**fields: Any) -> MixTransformer:
    """Random norms, so that none is like another."""
    encoder = MixTransformer("b0", **fields).double()
    with torch.no_grad():
        for i, p in enumerate(encoder.parameters()):
            p.add_(random_normal(p.shape, seed=i, scale=0.2))
    return encoder


class TestEncoder:
    """Every residual addition of the Mix Transformer goes through the operation."""

    @pytest.mark.parametrize("training", [False, True])
    def test_stage_is_its_blocks_one_by_one(self, training: bool) -> None:
        """Additions are deferred across blocks; the same random paths are dropped."""
        encoder = random_encoder(drop_path=0.5).train(training)
        x = random_normal((6, 24, 64), torch.float64, seed=1)
        torch.manual_seed(3)
        actual = encoder.encode(1, x, 4, 6)
        torch.manual_seed(3)
        for block in encoder.block2:
            x = x + block.drop_path(block.attn(block.norm1(x), 4, 6))
            x = x + block.drop_path(block.mlp(block.norm2(x), 4, 6))
        torch.testing.assert_close(actual, encoder.norm2(x), rtol=1e-12, atol=1e-12)

    def test_block_alone(self) -> None:
        block = random_encoder().eval().block2[0]
        x, update = (random_normal((2, 24, 64), torch.float64, seed=s) for s in (1, 2))
        y = x + block.attn(block.norm1(x), 4, 6)
        y = y + block.mlp(block.norm2(y), 4, 6)
        torch.testing.assert_close(block(x, 4, 6), y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(block(x - update, 4, 6, update), y, rtol=1e-12, atol=1e-12)
        rest, last = block(x, 4, 6, defer=True)
        assert torch.equal(rest + last, block(x, 4, 6))

    def test_two_launches_per_block(self) -> None:
        encoder = MixTransformer("b0").eval()
        seen = []
        for block in encoder.block1:
            block.register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad(), launches.counting(launches.H100) as calls:
            encoder.encode(0, torch.randn(1, 64, 32), 8, 8)
        assert len(seen) == len(encoder.block1) == 2
        names = [call.name for call in calls]
        assert names.count("add_layer_norm_fwd") == 4
        assert not {"add", "add_"} & {*names}
        # The first norm of the stage, and those of the reduced keys.
        assert names.count("native_layer_norm") == 1 + 2
