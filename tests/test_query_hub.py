"""Query hub: the Triton kernels against the fp64 oracle, and the operation within PyTorch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import explain, query_hub, reference
from equiseg_fast.ops import _backend
from equiseg_fast.testing import assert_deterministic, check_op_parity, random_normal, same_bits
from tests.operations import (
    DEVICE,
    DTYPES,
    HALF,
    MEAN,
    Operation,
    Shapes,
    Sizes,
    map_size,
    random_present,
    token_shape,
)


def _hub_shapes(s: Sizes) -> Shapes:
    m, c = s.modalities, s.channels
    nets = {"dw_weight": (m, c, 3, 3), "dw_bias": (m, c), "pw_weight": (m, c), "pw_bias": (m,)}
    return {"x": (m, *token_shape(s)), **nets}


OPERATION = Operation(
    query_hub,
    reference.query_hub,
    _hub_shapes,
    lambda s, seed: {**map_size(s, seed), **random_present(s, seed)},
    kinds=dict.fromkeys(("ddw_weight", "ddw_bias", "dpw_weight", "dpw_bias"), "parameter"),
)


NETS = ("dw_weight", "dw_bias", "pw_weight", "pw_bias")

triton_hub = partial(query_hub, backend="triton")


def make(
    modalities: int = 3,
    batch: int = 2,
    height: int = 3,
    width: int = 5,
    channels: int = 33,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    unit_last_stride: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """x in the given layout, score nets with logits of order 1, and the size of the map."""
    m, c = modalities, channels
    x = random_normal(
        (m, batch, height * width, c),
        dtype,
        seed=seed,
        mean=MEAN,
        layout=layout,
        unit_last_stride=unit_last_stride,
        device=DEVICE,
    )
    sizes = {
        "dw_weight": ((m, c, 3, 3), 1 / 3),
        "dw_bias": ((m, c), 1.0),
        "pw_weight": ((m, c), c**-0.5),
        "pw_bias": ((m,), 1.0),
    }
    nets = {
        name: random_normal(shape, dtype, seed=seed + i, scale=scale, device=DEVICE)
        for i, (name, (shape, scale)) in enumerate(sizes.items(), start=1)
    }
    return {"x": x, **nets, "height": height, "width": width}


def mask(*rows: str) -> Tensor:
    """present `[M, B]` from one string of 0 and 1 per modality."""
    return torch.tensor([[flag == "1" for flag in row] for row in rows], device=DEVICE)


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in ("x", *NETS)]


def parity(inputs: dict[str, Any], backend: str = "triton", **kwargs: Any) -> None:
    """The hubs and all gradients under the tolerance policy."""
    options = {"differentiable": ("x", *NETS), **kwargs}
    _, batch, tokens, channels = inputs["x"].shape
    check_op_parity(
        partial(query_hub, backend=backend),
        reference.query_hub,
        inputs,
        kinds={f"d{name}": "parameter" for name in options["differentiable"] if name != "x"},
        chain=batch * tokens + channels,
        # Whoever routes by rounded values is no yardstick, and the kernel rounds once: the floor.
        contraction=64,
        **options,
    )


class TestParity:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("modalities", "batch", "height", "width", "channels"),
        [(3, 2, 7, 5, 33), (2, 1, 9, 20, 32), (4, 1, 1, 1, 64), (2, 1, 4, 3, 160)],
    )
    def test_sizes(
        self,
        dtype: torch.dtype,
        modalities: int,
        batch: int,
        height: int,
        width: int,
        channels: int,
    ) -> None:
        parity(make(modalities, batch, height, width, channels, dtype))

    @pytest.mark.parametrize("modalities", [1, 2, 5, 8])
    def test_modalities(self, modalities: int) -> None:
        parity(make(modalities, batch=1, channels=32))

    @pytest.mark.parametrize(
        ("dtype", "channels"), [(torch.float32, 160), (torch.float16, 8), (torch.bfloat16, 33)]
    )
    def test_absent_modalities(self, dtype: torch.dtype, channels: int) -> None:
        """All, one, two and none present."""
        present = mask("1110", "1000", "1010")
        inputs = make(batch=4, height=2, width=3, channels=channels, dtype=dtype)
        parity(inputs | {"present": present})

    @pytest.mark.parametrize("channels", [8, 160])
    def test_absent_modalities_are_never_read(self, channels: int) -> None:
        present = mask("1", "0", "1")
        clean = make(batch=1, height=2, width=3, channels=channels) | {"present": present}
        poisoned = clean["x"].masked_fill(~present[:, :, None, None], float("nan"))
        results = []
        for x in (clean["x"], poisoned):
            inputs = clean | {"x": x.detach().clone()}
            wanted = leaves(inputs)
            out = triton_hub(**inputs)
            cotangent = random_normal(out.shape, seed=9, device=DEVICE)
            results.append((out, *torch.autograd.grad(out, wanted, cotangent)))
        for a, b in zip(*results, strict=True):
            assert same_bits(a, b)
        assert not results[0][1][~present].any()

    @pytest.mark.parametrize("channels", [32, 160])
    def test_nan_is_handed_on(self, channels: int) -> None:
        inputs = make(batch=1, height=4, width=6, channels=channels)
        inputs["x"][0, 0, 0, 3] = inputs["x"][2, 0, 9, 4] = inputs["x"][1, 0, 23, 0] = float("nan")
        actual, expected = triton_hub(**inputs), reference.query_hub(**inputs)
        torch.testing.assert_close(actual, expected, equal_nan=True)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("value", [None, 0.0])
    def test_a_tie_belongs_to_the_lowest_modality(self, backend: str, value: float | None) -> None:
        inputs = make(modalities=4, batch=1, height=2, width=3, channels=32)
        for name in ("x", *NETS):
            inputs[name] = inputs[name][:1].expand_as(inputs[name]).clone()
        if value is not None:
            inputs["x"].fill_(value)
        parity(inputs, backend)

    @pytest.mark.parametrize(
        ("layout", "unit_last_stride"),
        [
            ("transposed", True),
            ("sliced", True),
            ("expanded", True),
            ("channels_last", False),
            ("sliced", False),
        ],
    )
    def test_strides_of_x(self, layout: str, unit_last_stride: bool) -> None:
        inputs = make(2, channels=32, layout=layout, unit_last_stride=unit_last_stride)
        parity(inputs, differentiable=("x", "pw_bias"))

    @pytest.mark.parametrize("dtype", HALF)
    def test_batch_major_storage(self, dtype: torch.dtype) -> None:
        """What a batch of images with M modalities each looks like."""
        inputs = make(2, channels=32, dtype=dtype)
        inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
        parity(inputs)

    def test_strides_of_the_nets(self) -> None:
        inputs = make(2, batch=1, channels=32)
        for name in NETS[:3]:
            inputs[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)
        parity(inputs)

    @pytest.mark.parametrize("cotangent", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides_of_cotangents(self, cotangent: str) -> None:
        parity(make(2, channels=32), cotangent=cotangent, differentiable=("x", "pw_bias"))

    def test_saturated_scores(self) -> None:
        inputs = make(batch=1, channels=32)
        inputs["pw_bias"] = torch.tensor([90.0, -90.0, 0.0], device=DEVICE)
        parity(inputs)

    @pytest.mark.parametrize("chunks", [1, 2, 5])
    def test_chunks_of_the_weight_gradient(
        self, chunks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from equiseg_fast.kernels import query_hub as kernels

        def token_chunks(programs: int, blocks: int, num_sms: int) -> tuple[int, int]:
            chunk = -(-blocks // chunks)
            return -(-blocks // chunk), chunk

        monkeypatch.setattr(kernels, "token_chunks", token_chunks)
        parity(make(1 + 1, batch=3, height=5, width=15, channels=32), differentiable=NETS)

    @pytest.mark.parametrize("wanted", [("x",), ("dw_weight",), ("pw_bias",), NETS])
    def test_only_wanted_gradients(self, wanted: tuple[str, ...]) -> None:
        parity(make(2, batch=1, channels=32), differentiable=wanted)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_empty(self, backend: str) -> None:
        inputs = make(batch=0)
        wanted = leaves(inputs)
        out = query_hub(**inputs, backend=backend)
        assert out.shape == (3, 0, 15, 33)
        for x, g in zip(wanted, torch.autograd.grad(out.sum(), wanted), strict=True):
            assert g.shape == x.shape
            assert not g.any()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_are_bit_identical(self, dtype: torch.dtype) -> None:
        inputs = make(2, batch=1, height=5, width=15, channels=32, dtype=dtype)
        wanted = leaves(inputs)

        def step() -> tuple[Tensor, ...]:
            out = triton_hub(**inputs)
            cotangent = random_normal(out.shape, dtype, seed=9, device=DEVICE)
            return out, *torch.autograd.grad(out, wanted, cotangent)

        assert_deterministic(step, repeats=20 if DEVICE == "cuda" else 2)

    def test_results_do_not_depend_on_the_batch(self) -> None:
        inputs = make(2, batch=2, channels=32)
        together = triton_hub(**inputs)
        alone = triton_hub(**inputs | {"x": inputs["x"][:, 1:2]})
        assert torch.equal(together[:, 1:2], alone)


class TestBackends:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("modalities", [1, 2, 3, 4, 8])
    def test_torch_backend(self, dtype: torch.dtype, modalities: int) -> None:
        parity(make(modalities, height=4, width=6, dtype=dtype), "torch")
        present = torch.arange(2 * modalities, device=DEVICE).view(modalities, 2) % 3 != 1
        parity(make(modalities, height=6, width=4, dtype=dtype) | {"present": present}, "torch")

    def test_torch_backend_in_one_row_and_one_column(self) -> None:
        parity(make(height=1, width=7), "torch")
        parity(make(height=7, width=1), "torch")

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
    def test_torch_backend_with_strides(self, layout: str) -> None:
        parity(make(layout=layout), "torch", cotangent=layout)

    def test_torch_backend_in_float64(self) -> None:
        inputs = make(batch=1, height=2, width=3, channels=2, dtype=torch.float64)
        arguments = leaves(inputs)
        torch_hub = partial(query_hub, height=2, width=3, backend="torch")
        torch.testing.assert_close(torch_hub(*arguments), reference.query_hub(**inputs))
        assert torch.autograd.gradcheck(torch_hub, arguments)
        assert torch.autograd.gradgradcheck(torch_hub, arguments)

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    def test_absent_values_change_nothing(self, backend: str) -> None:
        present = mask("10", "01", "11")
        clean = make() | {"present": present}
        poisoned = clean["x"].masked_fill(~present[:, :, None, None], float("nan"))
        results = []
        for x in (clean["x"], poisoned):
            inputs = clean | {"x": x.detach().clone()}
            wanted = leaves(inputs)
            out = query_hub(**inputs, backend=backend)
            cotangent = random_normal(out.shape, seed=9, device=DEVICE)
            results.append((out, *torch.autograd.grad(out, wanted, cotangent)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert not results[0][1][~present].any()

    def test_the_torch_backend_keeps_little(self) -> None:
        """x itself, a number per token and modality, and the merged nets."""
        inputs = make(4, height=8, width=8, channels=64)
        wanted = leaves(inputs)
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            query_hub(**inputs, backend="torch")
        nets = sum(x.nbytes for x in wanted[1:])
        assert sum(kept.values()) <= (1 + 1 / 64) * wanted[0].nbytes + 5 * nets

    @pytest.mark.skipif(DEVICE == "cuda", reason="auto takes triton on a GPU")
    def test_auto_on_the_cpu_is_torch(self) -> None:
        assert "query_hub runs on backend 'torch'" in explain("query_hub", **make())

    def test_explicit_triton_never_falls_back(self) -> None:
        inputs = make(dtype=torch.float64)
        assert "dtype torch.float64 is not one of" in explain("query_hub", **inputs)
        with pytest.raises(ValueError, match=r"cannot run query_hub: dtype torch.float64"):
            triton_hub(**inputs)


class TestAutograd:
    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_double_backward(self, backend: str) -> None:
        def penalty(fn: Callable[..., Tensor], inputs: dict[str, Any]) -> list[Tensor]:
            inputs = {
                name: v.detach().clone() if name in ("x", *NETS) else v
                for name, v in inputs.items()
            }
            wanted = leaves(inputs)
            # a net that depends on x: only the direct dependence may enter its gradient
            bias = inputs["pw_bias"] + inputs["x"].mean((1, 2, 3))
            out = fn(**inputs | {"pw_bias": bias})
            first = torch.autograd.grad((out * out.detach().cos()).sum(), wanted, create_graph=True)
            return list(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))

        inputs = make(channels=8) | {"present": mask("10", "11", "11")}
        doubled = {n: v.double() if n in ("x", *NETS) else v for n, v in inputs.items()}
        expected = penalty(reference.query_hub, doubled)
        actual = penalty(partial(query_hub, backend=backend), inputs)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_no_graph_without_gradients(self, backend: str) -> None:
        inputs = make(2, batch=1, channels=8)
        fn = partial(query_hub, backend=backend)
        plain = fn(**inputs)
        assert plain.grad_fn is None
        leaves(inputs)
        with torch.no_grad():
            assert fn(**inputs).grad_fn is None
        recorded = fn(**inputs)
        assert recorded.grad_fn is not None
        assert torch.equal(plain, recorded)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_func_grad(self, backend: str) -> None:
        inputs = make(2, batch=1, channels=8)
        x = inputs.pop("x")

        def loss(x: Tensor, fn: Callable[..., Tensor]) -> Tensor:
            return fn(x, **inputs).square().sum()

        actual = torch.func.grad(loss)(x, partial(query_hub, backend=backend))
        torch.testing.assert_close(actual, torch.func.grad(loss)(x, reference.query_hub))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    def test_autocast(self, dtype: torch.dtype, backend: str) -> None:
        inputs = make(2, batch=1, channels=8)
        inputs["dw_bias"] = inputs["dw_bias"].to(dtype)
        wanted = leaves(inputs)
        with torch.autocast(DEVICE, dtype):
            mixed = query_hub(**inputs, backend=backend)
        assert mixed.dtype == dtype
        mixed.float().square().sum().backward()
        assert all(x.grad is not None and x.grad.dtype == x.dtype for x in wanted)
        rounded = {
            name: v.detach().to(dtype) if name in ("x", *NETS) else v for name, v in inputs.items()
        }
        assert torch.equal(mixed, query_hub(**rounded, backend=backend))


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
        forward = torch.ops.equiseg_fast.query_hub_fwd
        backward = torch.ops.equiseg_fast.query_hub_bwd
        x = make(2, batch=1, channels=8, dtype=dtype)["x"]
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        weight = random_normal((2, 9, 8), seed=1, device=DEVICE)
        bias = random_normal((2,), seed=2, device=DEVICE)
        args = (x, weight, bias, mask("1", "0"), 3, 5)
        torch.library.opcheck(forward, (*args, False), test_utils="test_faketensor")
        torch.library.opcheck(forward, (*args, True))
        out, score, winner = forward(x, weight, bias, None, 3, 5, True)
        args = (torch.randn_like(out), x, weight, None, score, winner, 3, 5)
        torch.library.opcheck(backward, (*args, True, True))
        for needs in ((True, False), (False, True)):
            torch.library.opcheck(backward, (*args, *needs), test_utils="test_faketensor")

    @pytest.mark.skipif(DEVICE == "cuda", reason="the CPU formula stands in where no GPU is")
    @pytest.mark.parametrize("present", [None, mask("110", "100", "101")])
    def test_cpu_implementation_is_the_kernels_twin(
        self, present: Tensor | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = make(batch=3, channels=8)["x"]
        weight, bias = random_normal((3, 9, 8), seed=1), random_normal((3,), seed=2)
        cotangent = random_normal(x.shape, seed=3)
        results = []
        for interpret in (True, False):
            monkeypatch.setattr(_backend, "INTERPRET", interpret)
            saved = torch.ops.equiseg_fast.query_hub_fwd(x, weight, bias, present, 3, 5, True)
            args = (cotangent, x, weight, present, *saved[1:], 3, 5, True, True)
            results.append((*saved, *torch.ops.equiseg_fast.query_hub_bwd(*args)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_meta(self) -> None:
        inputs = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in make().items()}
        wanted = leaves(inputs)
        weight, bias = torch.empty(3, 9, 33, device="meta"), torch.empty(3, device="meta")
        shapes = [
            [tuple(y.shape) for y in torch.ops.equiseg_fast.query_hub_fwd(*args)]
            for args in ((wanted[0], weight, bias, None, 3, 5, save) for save in (True, False))
        ]
        assert shapes == [[(3, 2, 15, 33), (3, 2, 15), (2, 15, 33)], [(3, 2, 15, 33), (0,), (0,)]]
        assert query_hub(**inputs).shape == (3, 2, 15, 33)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile_without_graph_breaks(self, backend: str, dynamic: bool) -> None:
        torch._dynamo.reset()

        def loss(x: Tensor, *nets: Any, present: Tensor) -> Tensor:
            out = query_hub(x * 2, *nets, present=present, backend=backend)
            return (out * out).sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for height, width in ((3, 5), (4, 2)) if dynamic else ((3, 5),):
            inputs = make(2, batch=1, height=height, width=width, channels=8)
            wanted = leaves(inputs)
            present = mask("1", "1")
            actual = compiled(*inputs.values(), present=present)
            expected = loss(*inputs.values(), present=present)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, wanted), torch.autograd.grad(expected, wanted)
            )

    def test_inductor(self) -> None:
        torch._dynamo.reset()
        inputs = make(2, batch=1, channels=8)
        compiled = torch.compile(triton_hub, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs), triton_hub(**inputs))

    def test_dynamic_sizes_compile_once(self) -> None:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(triton_hub, fullgraph=True, dynamic=True, backend=counter)
        for height, width in ((4, 6), (3, 5), (2, 9)):
            compiled(**make(2, batch=1, height=height, width=width, channels=8))
        assert counter.frame_count == 1

    def test_export(self) -> None:
        class Layer(torch.nn.Module):
            def forward(self, *inputs: Tensor) -> Tensor:
                return triton_hub(*inputs, height=3, width=5)

        inputs = make(2, batch=1, channels=8)
        tensors = tuple(inputs[name] for name in ("x", *NETS))
        program = torch.export.export(Layer(), tensors)
        assert "equiseg_fast.query_hub_fwd" in str(program.graph)
        torch.testing.assert_close(program.module()(*tensors), Layer()(*tensors))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        inputs = make(2, batch=1, channels=8)
        wanted = leaves(inputs)
        plain = torch.autograd.grad(triton_hub(**inputs).square().sum(), wanted)
        out = torch.utils.checkpoint.checkpoint(
            triton_hub, *inputs.values(), use_reentrant=reentrant
        )
        out.square().sum().backward()
        for x, g in zip(wanted, plain, strict=True):
            assert torch.equal(x.grad, g)


class TestBadInput:
    def test_errors_name_the_argument(self) -> None:
        inputs = make()
        x, present = inputs["x"], torch.ones(3, 2, dtype=torch.bool, device=DEVICE)
        nine = x.new_zeros(9, 1, 15, 33)
        cases = [
            ({"x": x.tolist()}, TypeError, r"x must be a tensor \[M, B, L, C\]; got list"),
            ({"x": x.long()}, TypeError, "x must have dtype float64, float32, .*; got int64"),
            ({"x": x[0]}, ValueError, r"x must have shape \[M, B, L, C\]"),
            ({"x": x[:, :, :14]}, ValueError, r"x must have height \* width = 3 \* 5 = 15 tokens"),
            ({"x": nine}, ValueError, "x must have 1 to 8 modalities"),
            ({"x": x[..., :0]}, ValueError, "x must have at least one channel"),
            ({"height": 0}, ValueError, "height must be at least 1; got 0"),
            (
                {"dw_weight": inputs["dw_weight"].flatten(2)},
                ValueError,
                "dw_weight must have shape",
            ),
            ({"dw_bias": inputs["dw_bias"][:2]}, ValueError, "dw_bias must have shape"),
            ({"pw_weight": inputs["dw_weight"]}, ValueError, "pw_weight must have shape"),
            ({"pw_bias": inputs["pw_weight"]}, ValueError, "pw_bias must have shape"),
            ({"pw_bias": inputs["pw_bias"].half()}, TypeError, "pw_bias must have the dtype of x"),
            (
                {"dw_bias": inputs["dw_bias"].to("meta")},
                ValueError,
                "dw_bias must be on the device",
            ),
            ({"present": present.int()}, TypeError, "present must have dtype bool"),
            ({"present": present.T}, ValueError, "present must have shape"),
        ]
        for change, error, message in cases:
            for backend in ("triton", "torch", "reference"):
                with pytest.raises(error, match=message):
                    query_hub(**inputs | change, backend=backend)

    def test_nothing_is_changed(self) -> None:
        inputs = make(2, batch=1, channels=8) | {"present": mask("1", "1")}
        before = {n: v.clone() for n, v in inputs.items() if isinstance(v, Tensor)}
        for backend in ("triton", "torch"):
            query_hub(**inputs, backend=backend)
        assert all(torch.equal(before[n], inputs[n]) for n in before)
