"""Depthwise convolution and GELU: the Triton kernels against the fp64 oracle, and the operation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import depthwise_conv_gelu, explain, reference
from equiseg_fast.ops import _backend
from equiseg_fast.testing import assert_deterministic, check_op_parity, random_normal
from tests.operations import DEVICE, DTYPES, HALF, MEAN, Operation, map_size, stencil_shapes

OPERATION = Operation(
    depthwise_conv_gelu,
    reference.depthwise_conv_gelu,
    stencil_shapes(3),
    map_size,
    kinds={"dweight": "parameter", "dbias": "parameter"},
    composed=True,
)


NAMES = ("x", "weight", "bias")

triton_op = partial(depthwise_conv_gelu, backend="triton")
torch_op = partial(depthwise_conv_gelu, backend="torch")


def make(
    batch: int = 2,
    height: int = 7,
    width: int = 5,
    channels: int = 33,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    scale: float = 1.0,
) -> dict[str, Any]:
    """Inputs for which u is normal with a standard deviation of about 1.5 scale."""
    shapes = {"x": (batch, height * width, channels), "weight": (channels, 1, 3, 3)}
    sizes = {"x": 1.0, "weight": scale / 3, "bias": scale}
    tensors = {
        name: random_normal(
            shapes.get(name, (channels,)),
            dtype,
            seed=i,
            scale=sizes[name],
            mean=MEAN if name == "x" else 0.0,
            layout=layout if name == "x" else "contiguous",
            device=DEVICE,
        )
        for i, name in enumerate(NAMES)
    }
    return {**tensors, "height": height, "width": width}


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in NAMES]


def parity(inputs: dict[str, Any], fn: Callable[..., Any] = triton_op, **kwargs: Any) -> None:
    """Forward and all gradients under the tolerance policy, the floor included.

    Products of half-precision numbers are exact in fp32, so the operation rounds at its stores
    alone; dx comes from du, which is rounded too, and has a factor of two for that.
    """
    options = {"differentiable": NAMES, "chain": inputs["height"] + 8, **kwargs}
    check_op_parity(
        fn,
        reference.depthwise_conv_gelu,
        inputs,
        kinds={f"d{n}": "parameter" for n in ("weight", "bias") if n in options["differentiable"]},
        **options,
    )


class TestParity:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("batch", "height", "width", "channels"),
        [(1, 7, 5, 33), (1, 1, 1, 64), (2, 1, 6, 32), (1, 6, 1, 1), (1, 3, 9, 160)],
    )
    def test_sizes(
        self, dtype: torch.dtype, batch: int, height: int, width: int, channels: int
    ) -> None:
        parity(make(batch, height, width, channels, dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_several_strips(self, dtype: torch.dtype) -> None:
        parity(make(1, 5, 65, 16, dtype))

    @pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.bfloat16, 3)])
    def test_ragged_tiles_in_all_directions(
        self, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from equiseg_fast.kernels import depthwise_conv_gelu as kernels

        config = kernels.Tile(block_w=4, block_c=16, num_warps=1, ctas_per_sm=1)
        monkeypatch.setattr(kernels, "depthwise_conv_config", lambda *_: config)
        monkeypatch.setattr(kernels, "depthwise_bwd_config", lambda *_: config)
        monkeypatch.setattr(kernels, "strip_rows", lambda *_: rows)
        monkeypatch.setitem(kernels.SUMS_TILE, "BLOCK_N", 4)
        parity(make(1, 4, 5, 17, dtype))

    def test_strip_rows_cover_the_image(self) -> None:
        from equiseg_fast.kernels import depthwise_conv_gelu as kernels

        for height in (1, 7, 8, 33, 256, 1000):
            for strips in (1, 64, 512, 100_000):
                for slots in (8, 396, 792):
                    rows = kernels.strip_rows(strips, height, slots)
                    assert 1 <= rows <= height
                    assert rows >= min(height, 8)
        assert kernels.strip_rows(100_000, 256, 792) == 256
        assert kernels.strip_rows(8, 256, 792) == 8

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides_of_x(self, dtype: torch.dtype, layout: str) -> None:
        parity(make(2, 2, 3, 20, dtype, layout))

    def test_unit_stride_of_channels_with_others_strange(self) -> None:
        wide = random_normal((6, 2, 40), seed=3, device=DEVICE)
        inputs = make(2, 2, 3, 20)
        for x in (
            wide[..., 7:27].transpose(0, 1),
            wide[:, :1, 20:].transpose(0, 1).expand(2, -1, -1),
        ):
            assert x.stride(-1) == 1
            parity({**inputs, "x": x})

    def test_strides_of_parameters(self) -> None:
        inputs = make(1, 3, 4, 20)
        weight = inputs["weight"].flip(0).transpose(2, 3)
        bias = random_normal((20, 2), seed=4, device=DEVICE)[:, 1]
        parity({**inputs, "weight": weight, "bias": bias})

    @pytest.mark.parametrize("cotangent", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides_of_cotangents(self, cotangent: str) -> None:
        parity(make(2, 2, 3, 20), cotangent=cotangent)

    def test_cotangents_with_unit_stride_of_channels(self) -> None:
        """They are read where they lie, with strides that are not those of x."""
        inputs = make(2, 2, 3, 20)
        tensors = leaves(inputs)
        out = triton_op(**inputs)
        wide = random_normal((6, 2, 40), seed=3, device=DEVICE)
        first = wide[:, :1, 20:].transpose(0, 1)
        for g in (wide[..., 7:27].transpose(0, 1), first.expand(2, -1, -1)):
            assert g.stride(-1) == 1
            actual = torch.autograd.grad(out, tensors, g, retain_graph=True)
            expected = torch.autograd.grad(out, tensors, g.contiguous(), retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [0.01, 10.0])
    def test_small_and_saturated(self, dtype: torch.dtype, scale: float) -> None:
        """GELU is then half the identity, or a ramp; the relative error of the fit stays small."""
        parity(make(1, 3, 25, 60, dtype, scale=scale))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gelu_on_a_grid(self, dtype: torch.dtype) -> None:
        """With a middle tap of 1 and no other the operation is GELU itself."""
        x = torch.linspace(-9, 9, 4096, device=DEVICE).to(dtype).view(1, 64, 64).requires_grad_()
        weight = torch.zeros(64, 1, 3, 3, dtype=dtype, device=DEVICE)
        weight[:, :, 1, 1] = 1
        y = triton_op(x, weight, torch.zeros(64, dtype=dtype, device=DEVICE), 1, 64)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        wide = x.detach().double().requires_grad_()
        expected = torch.nn.functional.gelu(wide)
        (slope,) = torch.autograd.grad(expected, wide, torch.ones_like(expected))
        fit, fit_slope = (7.5e-6, 1.9e-5) if dtype in HALF else (5e-7, 5e-7)
        half_ulp = torch.finfo(dtype).eps / 2
        for actual, wanted, allowed in ((y, expected, fit), (dx, slope, fit_slope)):
            error = (actual.double() - wanted).abs()
            assert bool((error <= 1.01 * half_ulp * wanted.abs() + allowed).all())

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_infinities_and_nan(self, dtype: torch.dtype) -> None:
        inputs = make(1, 5, 5, 3, dtype)
        inputs["weight"] = inputs["weight"].abs() + 1
        for channel, value in enumerate((float("inf"), float("-inf"), float("nan"))):
            inputs["x"][0, 12, channel] = value
        actual = triton_op(**inputs).float()
        expected = reference.depthwise_conv_gelu(
            *(inputs[name].float() for name in NAMES), inputs["height"], inputs["width"]
        )
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-5}
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)

    @pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x bias", "weight bias"])
    def test_only_wanted_gradients(self, wanted: str) -> None:
        for fn in (triton_op, torch_op):
            parity(make(1, 3, 4, 8), fn, differentiable=tuple(wanted.split()))

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    def test_empty(self, fn: Callable[..., Tensor]) -> None:
        inputs = make(batch=0)
        tensors = leaves(inputs)
        out = fn(**inputs)
        assert out.shape == (0, 35, 33)
        for x, g in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
            assert g.shape == x.shape
            assert not g.any()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_are_bit_identical(self, dtype: torch.dtype) -> None:
        inputs = make(2, 3, 3, dtype=dtype)
        tensors = leaves(inputs)
        cotangent = random_normal(inputs["x"].shape, dtype, seed=9, device=DEVICE)

        def step() -> tuple[Tensor, ...]:
            out = triton_op(**inputs)
            return out, *torch.autograd.grad(out, tensors, cotangent)

        assert_deterministic(step, repeats=20 if DEVICE == "cuda" else 2)

    def test_results_do_not_depend_on_the_batch(self) -> None:
        inputs = make(3, 3, 3)
        alone = triton_op(**{**inputs, "x": inputs["x"][1:2]})
        assert torch.equal(triton_op(**inputs)[1:2], alone)


class TestBackends:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
    def test_torch_backend(self, dtype: torch.dtype, layout: str) -> None:
        # It stores u in half precision, as eager does: measured against eager alone.
        parity(make(dtype=dtype, layout=layout), torch_op, contraction=0, cotangent=layout)

    def test_torch_backend_in_float64(self) -> None:
        inputs = make(1, 3, 4, 2, torch.float64)
        tensors = leaves(inputs)
        fn = partial(torch_op, height=3, width=4)
        torch.testing.assert_close(fn(*tensors), reference.depthwise_conv_gelu(*tensors, 3, 4))
        assert torch.autograd.gradcheck(fn, tensors)
        assert torch.autograd.gradgradcheck(fn, tensors)

    def test_only_the_inputs_are_saved(self) -> None:
        inputs = make()
        pointers = {x.data_ptr() for x in leaves(inputs)}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            triton_op(**inputs)
        assert {x.data_ptr() for x in saved} == pointers

    @pytest.mark.skipif(DEVICE == "cuda", reason="auto takes triton on a GPU")
    def test_auto_on_the_cpu_is_torch(self) -> None:
        text = explain("depthwise_conv_gelu", **make())
        assert "runs on backend 'torch'" in text
        assert "triton: usable" in text

    def test_explicit_triton_never_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"depthwise_conv_gelu: dtype torch\.float64"):
            triton_op(**make(dtype=torch.float64))
        monkeypatch.setattr(_backend, "INTERPRET", False)
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match="the kernels need 'cuda'"):
                triton_op(**make())


class TestAutograd:
    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    def test_double_backward(self, fn: Callable[..., Tensor]) -> None:
        def penalty(fn: Callable[..., Tensor], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
            tensors = [inputs[name].detach().clone().requires_grad_() for name in NAMES]
            x, weight, bias = tensors
            # bias also depends on x: only the direct dependence may enter each gradient
            out = fn(x, weight, bias + x[0, 0], inputs["height"], inputs["width"])
            loss = (out * out.detach().cos()).sum()
            first = torch.autograd.grad(loss, tensors, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

        inputs = make(1, 3, 4, 8)
        doubled = {n: x.double() if isinstance(x, Tensor) else x for n, x in inputs.items()}
        expected = penalty(reference.depthwise_conv_gelu, doubled)
        for a, b in zip(penalty(fn, inputs), expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))

    def test_inputs_that_need_no_gradient(self) -> None:
        inputs = make(1, 2, 2, 8)
        inputs["bias"].requires_grad_()
        triton_op(**inputs).square().sum().backward()
        assert inputs["x"].grad is None
        assert inputs["weight"].grad is None
        assert inputs["bias"].grad is not None

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    def test_no_graph_without_gradients(self, fn: Callable[..., Tensor]) -> None:
        inputs = make(1, 2, 2, 8)
        assert fn(**inputs).grad_fn is None
        inputs["x"].requires_grad_()
        with torch.no_grad():
            assert fn(**inputs).grad_fn is None

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    def test_autocast(self, dtype: torch.dtype, backend: str) -> None:
        inputs = make(1, 3, 4, 8)
        inputs["x"] = inputs["x"].to(dtype)
        inputs["weight"].requires_grad_()
        with torch.autocast(DEVICE, dtype):
            mixed = depthwise_conv_gelu(**inputs, backend=backend)
        assert mixed.dtype == dtype
        mixed.float().square().sum().backward()
        assert inputs["weight"].grad.dtype == torch.float32
        with torch.no_grad():
            rounded = {n: x.to(dtype) if isinstance(x, Tensor) else x for n, x in inputs.items()}
            expected = depthwise_conv_gelu(**rounded, backend=backend)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


class TestRegistration:
    @pytest.mark.parametrize("interpret", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(
        self, dtype: torch.dtype, interpret: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if DEVICE == "cpu":
            monkeypatch.setattr(_backend, "INTERPRET", interpret)
        ops = torch.ops.equiseg_fast
        x, weight, bias, *size = make(1, 2, 3, 4, dtype).values()
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        turned = weight.transpose(2, 3)
        torch.library.opcheck(ops.depthwise_conv_gelu_fwd, (x, weight, bias, *size))
        torch.library.opcheck(ops.depthwise_conv_gelu_fwd, (strided, turned, bias, *size))
        for needs in ((True, True, True), (True, False, False), (False, False, True)):
            args = (torch.randn_like(strided), strided, turned, bias, *size, *needs)
            torch.library.opcheck(ops.depthwise_conv_gelu_bwd, args)

    @pytest.mark.skipif(DEVICE == "cuda", reason="the CPU formula stands in where no GPU is")
    def test_cpu_implementation_is_the_kernels_twin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backend, "INTERPRET", False)
        monkeypatch.setattr(_backend, "triton_reasons", lambda *_: [])
        parity(make(1, 3, 4, 8))

    def test_meta(self) -> None:
        inputs = make()
        metas = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in inputs.items()}
        for fn in (torch.ops.equiseg_fast.depthwise_conv_gelu_fwd, depthwise_conv_gelu):
            out = fn(**metas)
            assert (out.shape, out.stride()) == (inputs["x"].shape, inputs["x"].stride())
        metas["x"].requires_grad_()
        depthwise_conv_gelu(**metas).sum().backward()
        assert metas["x"].grad.shape == metas["x"].shape

    @pytest.mark.parametrize("fn", [triton_op, torch_op])
    @pytest.mark.parametrize(
        ("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
    )
    def test_compile_without_graph_breaks(
        self, compiler: str, dynamic: bool, fn: Callable[..., Tensor]
    ) -> None:
        torch._dynamo.reset()

        def loss(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
            return fn(x * 2, weight, bias, height, width).square().sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=compiler)
        for height, width in ((3, 4), (5, 2)) if dynamic else ((3, 4),):
            inputs = make(2, height, width, 8)
            tensors = leaves(inputs)
            actual, expected = compiled(**inputs), loss(**inputs)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors)
            )

    def test_dynamic_sizes_compile_once(self) -> None:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(triton_op, fullgraph=True, dynamic=True, backend=counter)
        for height, width in ((3, 4), (5, 2), (4, 7)):
            compiled(**make(2, height, width, 8))
        assert counter.frame_count == 1

    def test_export(self) -> None:
        class Layer(torch.nn.Module):
            def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return triton_op(x, weight, bias, 3, 4)

        inputs = tuple(make(1, 3, 4, 8).values())[:3]
        program = torch.export.export(Layer(), inputs)
        assert "equiseg_fast.depthwise_conv_gelu_fwd" in str(program.graph)
        torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        tensors = leaves(make(1, 3, 4, 8))
        fn = partial(triton_op, height=3, width=4)
        plain = torch.autograd.grad(fn(*tensors).square().sum(), tensors)
        out = torch.utils.checkpoint.checkpoint(fn, *tensors, use_reentrant=reentrant)
        out.square().sum().backward()
        for x, g in zip(tensors, plain, strict=True):
            assert torch.equal(x.grad, g)


class TestBadInput:
    def test_errors_name_the_argument(self) -> None:
        x, weight, bias, *size = make().values()
        cases = [
            ((x.tolist(), weight, bias, *size), TypeError, r"x must be a tensor \[B, L, C\]; got"),
            ((x.long(), weight, bias, *size), TypeError, "x must have dtype float64, float32, .*;"),
            ((x[0], weight, bias, *size), ValueError, r"x must have shape \[B, L, C\]; got"),
            ((x, weight, bias, 5, 5), ValueError, r"x must have height \* width = 5 \* 5 = 25 tok"),
            ((x, weight, bias, 0, 5), ValueError, "height must be at least 1; got 0"),
            ((x[..., :0], weight[:0], bias[:0], *size), ValueError, "x must have at least one cha"),
            ((x, weight[:, 0], bias, *size), ValueError, r"weight must have shape \[C, 1, 3, 3\]"),
            ((x, weight[:8], bias, *size), ValueError, "weight must have shape"),
            ((x, weight, bias[:8], *size), ValueError, r"bias must have shape \[C\] = \[33\]"),
            ((x, weight.half(), bias, *size), TypeError, "weight must have the dtype of x"),
            ((x, weight, bias.to("meta"), *size), ValueError, "bias must be on the device of x"),
        ]
        for args, error, message in cases:
            for backend in ("triton", "torch", "reference"):
                with pytest.raises(error, match=message):
                    depthwise_conv_gelu(*args, backend=backend)
