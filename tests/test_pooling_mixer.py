"""Pooling mixer: the Triton kernels against the fp64 oracle, and the operation within PyTorch."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import explain, pooling_mixer, reference
from equiseg_fast.ops import _backend
from equiseg_fast.testing import (
    assert_deterministic,
    check_op_parity,
    random_normal,
    same_bits,
    with_layout,
)
from tests.operations import DEVICE, DTYPES, HALF, MEAN, Operation, map_size, stencil_shapes

OPERATION = Operation(
    pooling_mixer,
    reference.pooling_mixer,
    stencil_shapes(7),
    map_size,
    kinds={"dweight": "parameter", "dbias": "parameter"},
)


NAMES = ("x", "weight", "bias")

triton_mixer = partial(pooling_mixer, backend="triton")
torch_mixer = partial(pooling_mixer, backend="torch")


def make(
    height: int = 9,
    width: int = 7,
    channels: int = 33,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """All arguments; weights such that the convolution is about as large as x."""
    return {
        "x": random_normal(
            (batch, height * width, channels),
            dtype,
            seed=seed,
            layout=layout,
            device=DEVICE,
            **{"mean": MEAN, **options},
        ),
        "weight": random_normal(
            (channels, 1, 7, 7), dtype, seed=seed + 1, scale=1 / 7, device=DEVICE
        ),
        "bias": random_normal((channels,), dtype, seed=seed + 2, device=DEVICE),
        "height": height,
        "width": width,
    }


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs[name].detach().requires_grad_() for name in NAMES]


def parity(
    inputs: dict[str, Any], fn: Callable[..., Any] = triton_mixer, **options: Any
) -> dict[str, Any]:
    """Forward and gradients under the tolerance policy; the results round once, at their store."""
    return check_op_parity(
        fn,
        reference.pooling_mixer,
        inputs,
        **{"differentiable": NAMES, **options},
        kinds={
            f"d{name}": "parameter"
            for name in NAMES[1:]
            if name in options.get("differentiable", NAMES)
        },
        chain=inputs["height"],
    )


class TestParity:
    @pytest.mark.parametrize(
        ("height", "width", "channels"),
        [(1, 1, 3), (7, 5, 33), (1, 13, 64), (13, 1, 32), (3, 35, 1)],
    )
    def test_sizes(self, height: int, width: int, channels: int) -> None:
        parity(make(height, width, channels))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [(2, 3, 5), (9, 12, 64)])
    def test_dtypes(self, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
        parity(make(*size, dtype=dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_strips_and_blocks(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two strips of rows, two blocks of columns and of channels, the last of each ragged."""
        from equiseg_fast.kernels import pooling_mixer as kernels

        tile = kernels.Tile(block_w=8, block_c=16, num_warps=4)
        for kernel in ("conv", "pool", "dweight"):
            monkeypatch.setattr(kernels, f"pooling_mixer_{kernel}_config", lambda *_: tile)
        monkeypatch.setattr(kernels, "pooling_mixer_rows", lambda *_: 4)
        parity(make(5, 9, 20, dtype=dtype))

    def test_channels_and_batch(self) -> None:
        parity(make(1, 2, 160, batch=2))

    @pytest.mark.parametrize("programs", [1, 3])
    def test_shares_of_the_work(self, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """One program may sum several strips of several images."""
        from equiseg_fast.kernels import pooling_mixer as kernels

        def chunks(strips: int, blocks: int, num_sms: int) -> tuple[int, int]:
            chunk = -(-strips // min(programs, strips))
            return -(-strips // chunk), chunk

        monkeypatch.setattr(kernels, "pooling_mixer_rows", lambda *_: 2)
        monkeypatch.setattr(kernels, "pooling_mixer_chunks", chunks)
        parity(make(3, 4, 8, batch=2), differentiable=("weight", "bias"))

    def test_many_partial_sums(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """More of them than the last kernel adds in one step."""
        from equiseg_fast.kernels import pooling_mixer as kernels

        few = {"BLOCK_P": 2, "BLOCK": 128}
        monkeypatch.setattr(kernels, "pooling_mixer_reduce_tile", lambda _: few)
        monkeypatch.setattr(kernels, "pooling_mixer_rows", lambda *_: 1)
        parity(make(3, 4, 5), differentiable=("weight", "bias"))

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides_of_x(self, layout: str) -> None:
        parity(make(2, 4, 16, batch=2, layout=layout))

    @pytest.mark.parametrize("layout", ["sliced", "transposed"])
    def test_strides_of_x_that_are_used_as_they_are(self, layout: str) -> None:
        parity(make(2, 4, 16, batch=2, layout=layout, unit_last_stride=True, dtype=HALF[1]))

    def test_strides_of_weights(self) -> None:
        inputs = make(2, 4, 16)
        inputs["weight"] = inputs["weight"].mT.contiguous().mT
        inputs["bias"] = inputs["bias"].repeat_interleave(2)[::2]
        parity(inputs)

    @pytest.mark.parametrize("cotangent", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides_of_cotangents(self, cotangent: str) -> None:
        parity(make(3, 4, 16), cotangent=cotangent)

    def test_strides_of_cotangents_that_are_used_as_they_are(self) -> None:
        x, weight, *_ = make(2, 4, 16, batch=2).values()
        plain = random_normal(x.shape, seed=5, device=DEVICE)
        strided = with_layout(plain, "transposed", unit_last_stride=True)
        backward = torch.ops.equiseg_fast.pooling_mixer_bwd
        args = x, weight, 2, 4, True, True, True
        for actual, expected in zip(backward(strided, *args), backward(plain, *args), strict=True):
            assert same_bits(actual, expected)

    @pytest.mark.large_memory
    @pytest.mark.parametrize(("dim", "batch", "height"), [(0, 3, 2), (1, 1, 33)])
    def test_strides_beyond_32_bits(
        self, dim: int, batch: int, height: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Images or strips up to 2^31 elements apart; the last strip reads from row 29 or 27 on."""
        from equiseg_fast.kernels import pooling_mixer as kernels

        monkeypatch.setattr(kernels, "pooling_mixer_rows", lambda *_: 16)
        x, *others = make(height, 1, 2, batch, torch.float16).values()
        strides = list(x.stride())
        strides[dim] = 2**31 // min(x.size(dim) - 1, 27) + x.numel()
        memory = torch.empty(x.size(dim) * strides[dim], dtype=x.dtype, device=DEVICE)
        far = memory.as_strided(x.shape, strides).copy_(x)

        def step(fn: Callable[..., Tensor], t: Tensor) -> tuple[Tensor, ...]:
            leaf = t.detach().requires_grad_()
            out = fn(leaf, *others)
            return out, *torch.autograd.grad(out, leaf, t)

        for actual, expected in zip(step(triton_mixer, far), step(torch_mixer, x), strict=True):
            torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias")])
    def test_only_wanted_gradients(self, wanted: tuple[str, ...]) -> None:
        parity(make(2, 3, 8), differentiable=wanted)

    def test_a_constant_image_is_its_own_pool(self) -> None:
        """Far from all borders and next to them: no count is off, and fp32 sums are exact."""
        inputs = make(13, 14, 4)
        inputs["x"].fill_(0)
        out = triton_mixer(**inputs)
        torch.testing.assert_close(out, 4 * inputs["bias"].expand_as(out), rtol=1e-6, atol=0)

    def test_not_a_number_stays_in_its_windows(self) -> None:
        inputs = make(11, 12, 2)
        inputs["x"][0, 0, 0] = torch.nan
        nan = triton_mixer(**inputs).isnan().view(11, 12, 2)
        assert torch.equal(nan, reference.pooling_mixer(**inputs).isnan().view(11, 12, 2))
        assert nan.any()
        assert not nan.all()

    def test_one_huge_value_spoils_no_other_window(self) -> None:
        """A running sum that subtracts would keep the rounding errors of the huge value."""
        inputs = make(12, 2, 4)
        plain = triton_mixer(**inputs)
        inputs["x"][0, :2] = 1e8
        torch.testing.assert_close(triton_mixer(**inputs)[0, 18:], plain[0, 18:])

    def test_large_half_precision_values(self) -> None:
        """Sums of 121 values would overflow fp16; they are fp32."""
        inputs = make(12, 12, 8, dtype=torch.float16)
        inputs["x"] *= 2000
        parity(inputs, differentiable=())

    @pytest.mark.parametrize(("batch", "needs"), [(0, NAMES), (0, ("weight",))])
    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_empty(self, batch: int, needs: tuple[str, ...], backend: str) -> None:
        inputs = make(3, 4, 5, batch=batch)
        wanted = [inputs[name].requires_grad_() for name in needs]
        out = pooling_mixer(**inputs, backend=backend)
        assert out.shape == (batch, 12, 5)
        for x, g in zip(wanted, torch.autograd.grad(out.sum(), wanted), strict=True):
            assert g.shape == x.shape
            assert not g.any()

    @pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else HALF[1:])
    def test_repeats_are_bit_identical(self, dtype: torch.dtype) -> None:
        inputs = make(2, 6, 8, dtype=dtype)
        wanted = [inputs[name].requires_grad_() for name in NAMES]
        cotangent = random_normal(inputs["x"].shape, dtype, seed=9, device=DEVICE)

        def step() -> tuple[Tensor, ...]:
            out = triton_mixer(**inputs)
            return out, *torch.autograd.grad(out, wanted, cotangent)

        assert_deterministic(step, repeats=20 if DEVICE == "cuda" else 2)

    def test_results_do_not_depend_on_the_batch(self) -> None:
        inputs = make(2, 4, 8, batch=2)
        together = triton_mixer(**inputs)
        inputs["x"] = inputs["x"][1:2]
        assert torch.equal(together[1:2], triton_mixer(**inputs))

    def test_nothing_is_changed_or_shared(self) -> None:
        inputs = make(3, 4, 5)
        before = {name: inputs[name].clone() for name in NAMES}
        for backend in ("triton", "torch"):
            pooling_mixer(**inputs, backend=backend).fill_(0)
        assert all(torch.equal(before[name], inputs[name]) for name in NAMES)


class TestBackends:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("height", "width", "channels", "layout"),
        [
            (1, 1, 33, "contiguous"),
            (7, 5, 1, "contiguous"),
            (33, 20, 33, "contiguous"),
            (9, 16, 64, "transposed"),
            (9, 16, 64, "sliced"),
        ],
    )
    def test_torch_backend(
        self, dtype: torch.dtype, height: int, width: int, channels: int, layout: str
    ) -> None:
        inputs = make(height, width, channels, batch=2, dtype=dtype, layout=layout)
        parity(inputs, torch_mixer, contraction=None if DEVICE == "cpu" else 0)
        parity(inputs, torch_mixer, cotangent="channels_last", contraction=0)

    @pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ()])
    def test_torch_backend_with_some_gradients(self, wanted: tuple[str, ...]) -> None:
        parity(make(4, 5, 8), torch_mixer, differentiable=wanted)

    def test_torch_backend_in_float64(self) -> None:
        inputs = leaves(make(3, 4, 2, dtype=torch.float64))
        mixer = lambda *tensors: torch_mixer(*tensors, 3, 4)  # noqa: E731
        torch.testing.assert_close(mixer(*inputs), reference.pooling_mixer(*inputs, 3, 4))
        assert torch.autograd.gradcheck(mixer, inputs)
        assert torch.autograd.gradgradcheck(mixer, inputs)

    def test_torch_backend_saves_only_inputs(self) -> None:
        saved = []
        inputs = leaves(make(4, 5, 8))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            torch_mixer(*inputs, 4, 5)
        assert {t.data_ptr() for t in saved} <= {x.data_ptr() for x in inputs}

    def test_explain(self) -> None:
        inputs = make()
        assert "  triton: usable" in explain("pooling_mixer", **inputs)
        inputs = make(dtype=torch.float64)
        text = explain("pooling_mixer", **inputs, backend="triton")
        assert "pooling_mixer raises ValueError" in text
        assert "dtype torch.float64 is not one of" in text

    def test_explicit_triton_never_falls_back(self) -> None:
        with pytest.raises(ValueError, match=r"cannot run pooling_mixer: dtype torch\.float64"):
            triton_mixer(**make(dtype=torch.float64))

    def test_reference_backend(self) -> None:
        inputs = make()
        out = pooling_mixer(**inputs, backend="reference")
        assert torch.equal(out, reference.pooling_mixer(**inputs))

    def test_images_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those that the caches hold together, and the rest."""
        inputs = make(batch=5)
        whole = pooling_mixer(**inputs, backend="torch")
        module = importlib.import_module("equiseg_fast.ops.pooling_mixer")
        for images in (1, 2):
            size = images * 4 * inputs["x"][0].numel()
            monkeypatch.setattr(module, "_CACHED_BYTES", size)
            assert torch.equal(pooling_mixer(**inputs, backend="torch"), whole)


class TestAutograd:
    @pytest.mark.skipif(DEVICE == "cuda", reason="there autograd differentiates stock operators")
    def test_backward_inside_autocast_sums_in_fp32(self) -> None:
        inputs = make()
        tensors = [x.requires_grad_() for x in inputs.values() if isinstance(x, Tensor)]
        out = pooling_mixer(**inputs, backend="torch")
        g = torch.randn_like(out)
        expected = torch.autograd.grad(out, tensors, g, retain_graph=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = torch.autograd.grad(out, tensors, g)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_double_backward(self, backend: str) -> None:
        def gradient_penalty(fn: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
            x, weight, bias = wanted = leaves(inputs)
            # bias also depends on x: only the direct dependence may enter each gradient
            out = fn(x, weight, bias + x.mean((0, 1)), inputs["height"], inputs["width"])
            first = torch.autograd.grad((out * out.detach().cos()).sum(), wanted, create_graph=True)
            return list(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))

        inputs = make(4, 3, 5)
        doubled = {n: x.double() if isinstance(x, Tensor) else x for n, x in inputs.items()}
        expected = gradient_penalty(reference.pooling_mixer, doubled)
        actual = gradient_penalty(partial(pooling_mixer, backend=backend), inputs)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))

    def test_inputs_that_need_no_gradient(self) -> None:
        inputs = make(3, 4, 5)
        inputs["bias"].requires_grad_()
        triton_mixer(**inputs).square().sum().backward()
        assert inputs["x"].grad is None
        assert inputs["weight"].grad is None
        assert inputs["bias"].grad is not None

    def test_no_graph_without_gradients(self) -> None:
        inputs = make(1, 2, 3)
        assert triton_mixer(**inputs).grad_fn is None
        inputs["x"].requires_grad_()
        with torch.no_grad():
            assert triton_mixer(**inputs).grad_fn is None

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    def test_autocast(self, dtype: torch.dtype, backend: str) -> None:
        inputs = make(3, 4, 5)
        inputs["bias"] = inputs["bias"].to(dtype)
        inputs["weight"].requires_grad_()
        with torch.autocast(DEVICE, dtype):
            mixed = pooling_mixer(**inputs, backend=backend)
        assert mixed.dtype == dtype
        mixed.float().square().sum().backward()
        assert inputs["weight"].grad.dtype == torch.float32
        rounded = {n: x.detach().to(dtype) for n, x in inputs.items() if n in NAMES}
        expected = pooling_mixer(**{**inputs, **rounded}, backend=backend)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=0)


class TestRegistration:
    @pytest.mark.parametrize(
        ("dtype", "interpret"),
        [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)],
    )
    def test_opcheck(
        self, dtype: torch.dtype, interpret: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if DEVICE == "cpu":
            monkeypatch.setattr(_backend, "INTERPRET", interpret)
        x, weight, bias = (make(1, 2, 3, dtype=dtype)[name] for name in NAMES)
        strided = x.mT.contiguous().mT
        ops = torch.ops.equiseg_fast
        torch.library.opcheck(ops.pooling_mixer_fwd, (strided, weight, bias, 1, 2))
        for needs in ((True, False, True), (False, True, False)):
            args = (torch.randn_like(strided), strided, weight, 1, 2, *needs)
            torch.library.opcheck(ops.pooling_mixer_bwd, args)

    @pytest.mark.skipif(DEVICE == "cuda", reason="stock operators stand in where no GPU is")
    def test_cpu_implementation_is_the_kernels_twin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = make()
        monkeypatch.setattr(_backend, "INTERPRET", False)
        monkeypatch.setattr(_backend, "triton_reasons", lambda *_: [])
        parity(inputs)

    def test_meta(self) -> None:
        inputs = {n: x.to("meta") if n in NAMES else x for n, x in make().items()}
        out = torch.ops.equiseg_fast.pooling_mixer_fwd(*inputs.values())
        assert out.shape == inputs["x"].shape
        wanted = [inputs[name].requires_grad_() for name in NAMES]
        out = pooling_mixer(**inputs)
        for x, g in zip(wanted, torch.autograd.grad(out.sum(), wanted), strict=True):
            assert g.shape == x.shape

    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_compile_without_graph_breaks(self, backend: str, dynamic: bool) -> None:
        torch._dynamo.reset()

        def loss(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
            out = pooling_mixer(x * 2, weight, bias, height, width, backend=backend)
            return (out * out).sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for height, width in ((2, 3), (1, 4)) if dynamic else ((2, 3),):
            inputs = leaves(make(height, width, 4))
            actual = compiled(*inputs, height, width)
            expected = loss(*inputs, height, width)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs)
            )

    def test_inductor(self) -> None:
        torch._dynamo.reset()
        inputs = make(4, 3, 4)
        compiled = torch.compile(triton_mixer, fullgraph=True)
        torch.testing.assert_close(compiled(**inputs), triton_mixer(**inputs))

    def test_dynamic_sizes_compile_once(self) -> None:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(
            lambda **inputs: triton_mixer(**inputs), fullgraph=True, dynamic=True, backend=counter
        )
        for height, width in ((3, 2), (2, 4), (5, 3)):
            compiled(**make(height, width, 4))
        assert counter.frame_count == 1

    def test_export(self) -> None:
        class Layer(torch.nn.Module):
            def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return triton_mixer(x, weight, bias, 3, 2)

        inputs = tuple(x.detach() for x in leaves(make(3, 2, 4)))
        program = torch.export.export(Layer(), inputs)
        assert "equiseg_fast.pooling_mixer_fwd" in str(program.graph)
        torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        inputs = leaves(make(3, 2, 4))
        plain = torch.autograd.grad(triton_mixer(*inputs, 3, 2).square().sum(), inputs)
        out = torch.utils.checkpoint.checkpoint(
            triton_mixer, *inputs, 3, 2, use_reentrant=reentrant
        )
        out.square().sum().backward()
        for x, g in zip(inputs, plain, strict=True):
            assert torch.equal(x.grad, g)


class TestBadInput:
    def test_errors_name_the_argument(self) -> None:
        x, weight, bias = (make(3, 4, 5)[name] for name in NAMES)
        cases = [
            ((x.tolist(), weight, bias, 3, 4), TypeError, r"x must be a tensor \[B, L, C\]; got"),
            ((x.long(), weight, bias, 3, 4), TypeError, "x must have dtype float64, .*; got int64"),
            ((x[0], weight, bias, 3, 4), ValueError, r"x must have shape \[B, L, C\]; got \[12, 5"),
            ((x, None, bias, 3, 4), TypeError, r"weight must be a tensor \[C, 1, 7, 7\]"),
            ((x, weight, 1.0, 3, 4), TypeError, r"bias must be a tensor \[C\]"),
            ((x, weight, bias, 4, 4), ValueError, r"x must have height \* width = 4 \* 4"),
            ((x, weight, bias, 0, 4), ValueError, "height must be at least 1; got 0"),
            ((x, weight, bias, 3, -4), ValueError, "width must be at least 1; got -4"),
            ((x, weight[1:], bias, 3, 4), ValueError, r"weight must have shape \[C, 1, 7, 7\] = "),
            ((x, weight[..., :3], bias, 3, 4), ValueError, "weight must have shape"),
            ((x, weight, bias[1:], 3, 4), ValueError, r"bias must have shape \[C\] = \[5\]"),
            ((x, weight.half(), bias, 3, 4), TypeError, "weight must have the dtype of x"),
            ((x, weight, bias.to("meta"), 3, 4), ValueError, "bias must be on the device of x"),
            ((x[..., :0], weight[:0], bias[:0], 3, 4), ValueError, "at least one channel"),
        ]
        for args, error, message in cases:
            for backend in ("triton", "torch", "reference"):
                with pytest.raises(error, match=message):
                    pooling_mixer(*args, backend=backend)
