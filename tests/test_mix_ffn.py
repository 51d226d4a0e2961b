"""Mix-FFN in bands of the image: parity, what it saves, and how it behaves in PyTorch."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from equiseg_fast import explain, mix_ffn, reference
from equiseg_fast.ops import _backend
from equiseg_fast.testing import assert_deterministic, check_op_parity, random_normal
from tests.operations import (
    DEVICE,
    DTYPES,
    HALF,
    MEAN,
    Operation,
    Shapes,
    Sizes,
    map_size,
    token_shape,
)


def _mix_ffn_shapes(s: Sizes) -> Shapes:
    c, hidden, out = s.channels, 2 * s.channels + 1, s.channels + 1
    return {
        "x": token_shape(s), "fc1_weight": (hidden, c), "fc1_bias": (hidden,),
        "dw_weight": (hidden, 1, 3, 3), "dw_bias": (hidden,), "fc2_weight": (out, hidden),
        "fc2_bias": (out,),
    }  # fmt: skip


OPERATION = Operation(
    mix_ffn,
    reference.mix_ffn,
    _mix_ffn_shapes,
    map_size,
    kinds=dict.fromkeys(
        ("dfc1_weight", "dfc1_bias", "ddw_weight", "ddw_bias", "dfc2_weight", "dfc2_bias"),
        "parameter",
    ),
    contraction=lambda s: s.channels,
    composed=True,
)


NAMES = ("x", "fc1_weight", "fc1_bias", "dw_weight", "dw_bias", "fc2_weight", "fc2_bias")
BANDS = importlib.import_module("equiseg_fast.ops.mix_ffn")

torch_op = partial(mix_ffn, backend="torch")
triton_op = partial(mix_ffn, backend="triton")


def make(
    batch: int = 2,
    height: int = 7,
    width: int = 5,
    channels: tuple[int, int, int] = (12, 20, 9),
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> dict[str, Any]:
    """Channels in, hidden and out; all stages of the computation have a spread of about 1."""
    c, e, d = channels
    shapes = {
        "x": ((batch, height * width, c), 1.0),
        "fc1_weight": ((e, c), c**-0.5),
        "fc1_bias": ((e,), 1.0),
        "dw_weight": ((e, 1, 3, 3), 1 / 3),
        "dw_bias": ((e,), 1.0),
        "fc2_weight": ((d, e), e**-0.5),
        "fc2_bias": ((d,), 1.0),
    }
    tensors = {
        name: random_normal(
            shape, dtype, seed=i, scale=scale, device=DEVICE,
            mean=MEAN if name == "x" else 0.0, layout=layout if name == "x" else "contiguous",
        )
        for i, (name, (shape, scale)) in enumerate(shapes.items())
    }  # fmt: skip
    return {**tensors, "height": height, "width": width}


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in NAMES]


def parity(inputs: dict[str, Any], fn: Callable[..., Any] = torch_op, **kwargs: Any) -> None:
    """Measured against eager within its bound: two matrix products round their results."""
    wanted = kwargs.pop("differentiable", NAMES)
    tokens = inputs["x"].shape[0] * inputs["x"].shape[1]
    check_op_parity(
        fn,
        reference.mix_ffn,
        inputs,
        differentiable=wanted,
        kinds={f"d{name}": "parameter" for name in wanted if name != "x"},
        contraction=8,
        chain=tokens + 8,
        **kwargs,
    )


@pytest.fixture
def narrow_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of a few rows instead of whole images, however small they are."""
    monkeypatch.setattr(BANDS, "_WHOLE_BYTES", -1)
    monkeypatch.setattr(BANDS, "_HIDDEN_BYTES", 1)
    monkeypatch.setattr(BANDS, "_MIN_ROWS", 2)


class TestParity:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("batch", "height", "width", "channels"),
        [
            (2, 7, 5, (12, 20, 9)),
            (1, 1, 1, (1, 1, 1)),
            (3, 1, 6, (8, 16, 8)),
            (1, 9, 1, (33, 40, 33)),
        ],
    )
    @pytest.mark.parametrize("whole_bytes", [-1, 2**30], ids=["in bands", "whole"])
    def test_sizes(
        self,
        dtype: torch.dtype,
        batch: int,
        height: int,
        width: int,
        channels: tuple,
        whole_bytes: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(BANDS, "_WHOLE_BYTES", whole_bytes)
        parity(make(batch, height, width, channels, dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("height", [2, 3, 4, 5, 9])
    def test_bands(self, dtype: torch.dtype, height: int, narrow_bands: None) -> None:
        """The first, the last and bands between, next to one another."""
        parity(make(2, height, 5, dtype=dtype))

    @pytest.mark.parametrize("dtype", HALF)
    def test_sums_over_many_bands_are_wide(self, dtype: torch.dtype, narrow_bands: None) -> None:
        """Added up in half precision, a hundred parts of about the same size would lose digits."""
        inputs = {n: x.abs() if isinstance(x, Tensor) else x for n, x in make(1, 200, 4).items()}
        inputs = {n: x.to(dtype) if isinstance(x, Tensor) else x for n, x in inputs.items()}
        tensors = leaves(inputs)
        (whole,) = torch.autograd.grad(reference.mix_ffn(**inputs).sum(), [inputs["dw_bias"]])
        (banded,) = torch.autograd.grad(torch_op(**inputs).sum(), [tensors[4]])
        error = (banded.float() - whole.float()).abs() / whole.float().abs()
        assert error.max() < 4 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_composition_around_the_kernel(self, backend: str) -> None:
        """What a GPU runs, and what a compiler sees."""
        fn = partial(mix_ffn, backend=backend)
        parity(make(1, 3, 4, (8, 16, 8)), fn)

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides(self, layout: str, narrow_bands: None) -> None:
        parity(make(2, 5, 3, layout=layout), cotangent=layout)

    @pytest.mark.parametrize("wanted", [*NAMES, "x dw_weight", "fc1_bias fc2_bias"])
    def test_only_wanted_gradients(self, wanted: str, narrow_bands: None) -> None:
        parity(make(1, 5, 4), differentiable=tuple(wanted.split()))

    @pytest.mark.parametrize("fn", [torch_op, triton_op])
    def test_empty_batch(self, fn: Callable[..., Tensor]) -> None:
        inputs = make(batch=0)
        tensors = leaves(inputs)
        out = fn(**inputs)
        assert out.shape == (0, 35, 9)
        for x, g in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
            assert g.shape == x.shape
            assert not g.any()

    def test_agrees_with_layers_of_torch(self, narrow_bands: None) -> None:
        inputs = make(2, 7, 5, dtype=torch.float64)
        x, w1, b1, dw, db, w2, b2, height, width = inputs.values()
        hidden = F.linear(x, w1, b1).mT.unflatten(-1, (height, width))
        hidden = F.gelu(F.conv2d(hidden, dw, db, padding=1, groups=20))
        expected = F.linear(hidden.flatten(2).mT, w2, b2)
        torch.testing.assert_close(torch_op(**inputs), expected, rtol=1e-12, atol=1e-12)


class TestBands:
    def test_cover_every_row_of_every_image_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(BANDS, "_HIDDEN_BYTES", 1000)
        for batch in (0, 1, 2, 5):
            for height in (1, 2, 8, 9, 33, 64):
                for row_bytes in (1, 10, 60, 125, 5000):
                    seen = []
                    for images, rows in BANDS._bands(batch, height, row_bytes):
                        assert len(rows) == height or images.stop - images.start == 1
                        if (images.stop - images.start) * len(rows) > 8:
                            assert (images.stop - images.start) * len(rows) * row_bytes <= 1000
                        seen += [(i, r) for i in range(images.start, images.stop) for r in rows]
                    assert sorted(seen) == [(i, r) for i in range(batch) for r in range(height)]

    def test_bands_of_an_image_are_alike(self) -> None:
        """One small band at the end would cost nearly as much as the others."""
        rows = [len(r) for _, r in BANDS._bands(1, 130, BANDS._HIDDEN_BYTES // 32)]
        assert rows == [26, 26, 26, 26, 26]

    @pytest.mark.parametrize(
        ("rows", "training", "expected"),
        [
            (12288, False, False), (12289, False, True),
            (12289, True, False), (65535, True, False), (65536, True, True),
        ],
    )  # fmt: skip
    def test_only_where_they_are_faster(self, rows: int, training: bool, expected: bool) -> None:
        """With 128 hidden channels: from 6 MiB on forward, in a step from 32 MiB."""
        assert BANDS._is_large(torch.empty(1, rows, 32), 128, training) is expected

    @pytest.mark.parametrize(("batch", "height", "sizes"), [(4, 8, [2, 2]), (7, 9, [3, 3, 1])])
    def test_images_share_bands_evenly(
        self, batch: int, height: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(BANDS, "_HIDDEN_BYTES", 3 * height)
        assert [i.stop - i.start for i, _ in BANDS._bands(batch, height, 1)] == sizes

    @pytest.mark.skipif(DEVICE == "cuda", reason="there the vendor's products save their inputs")
    @pytest.mark.parametrize("kept", [False, True])
    def test_only_the_inputs_are_saved_unless_hidden_features_are_small(
        self, kept: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = make()
        hidden_bytes = 2 * 7 * 5 * 20 * 4
        monkeypatch.setattr(BANDS, "_WHOLE_BYTES", hidden_bytes if kept else hidden_bytes - 1)
        pointers = {x.data_ptr() for x in leaves(inputs)}
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            torch_op(**inputs)
        assert ({x.data_ptr() for x in saved} == pointers) != kept

    @pytest.mark.skipif(DEVICE == "cuda", reason="memory of the CPU")
    def test_wide_tensors_never_exist(self) -> None:
        """A step needs about two thirds of one of them beside features; eager needs six."""
        from benchmarks.measure.timing import peak_bytes

        inputs = make(1, 512, 256, (16, 128, 16))
        tensors = leaves(inputs)
        hidden = 512 * 256 * 128 * 4

        def step() -> tuple[Tensor, ...]:
            out = torch_op(**inputs)
            return torch.autograd.grad(out, tensors, torch.ones_like(out))

        step()
        peak, _ = peak_bytes(step, torch.device("cpu"))
        features = 3 * inputs["x"].numel() * 4  # out, its gradient, dx
        assert peak - features < 0.75 * hidden
        with torch.no_grad():
            peak, _ = peak_bytes(lambda: torch_op(**inputs), torch.device("cpu"))
        assert peak < 0.5 * hidden


class TestBehaviour:
    def test_bands_change_no_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(BANDS, "_WHOLE_BYTES", -1)
        inputs = make(2, 12, 5, dtype=torch.float64)
        tensors = leaves(inputs)

        def step() -> list[Tensor]:
            out = torch_op(**inputs)
            return [out, *torch.autograd.grad(out.square().sum(), tensors)]

        whole = step()
        monkeypatch.setattr(BANDS, "_HIDDEN_BYTES", 1)
        monkeypatch.setattr(BANDS, "_MIN_ROWS", 5)
        for a, b in zip(step(), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_repeats_are_bit_identical(self, narrow_bands: None) -> None:
        inputs = make(2, 6, 5)
        tensors = leaves(inputs)

        def step() -> tuple[Tensor, ...]:
            out = torch_op(**inputs)
            return out, *torch.autograd.grad(out.square().sum(), tensors)

        assert_deterministic(step, repeats=5)

    def test_gradcheck(self, narrow_bands: None) -> None:
        inputs = make(1, 3, 3, (2, 3, 2), torch.float64)
        fn = partial(torch_op, height=3, width=3)
        assert torch.autograd.gradcheck(fn, leaves(inputs))
        assert torch.autograd.gradgradcheck(fn, leaves(inputs))

    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
    def test_functional_transforms(self, narrow_bands: None) -> None:
        """They see stock operators instead of bands."""
        inputs = make(1, 3, 4)
        x = inputs.pop("x")
        loss = lambda f: lambda x: f(x, **inputs).square().sum()  # noqa: E731
        expected = torch.func.grad(loss(reference.mix_ffn))(x)
        actual = torch.func.grad(loss(torch_op))(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        several = torch.stack((x, 2 * x))
        expected = torch.stack([reference.mix_ffn(one, **inputs) for one in several])
        torch.testing.assert_close(
            torch.func.vmap(lambda x: torch_op(x, **inputs))(several), expected
        )

    def test_batched_cotangents(self, narrow_bands: None) -> None:
        inputs = make(1, 4, 3)
        tensors = leaves(inputs)
        out = torch_op(**inputs)
        g = torch.randn(3, *out.shape)
        batched = torch.autograd.grad(out, tensors, g, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            alone = torch.autograd.grad(out, tensors, g[i], retain_graph=True)
            for a, b in zip(batched, alone, strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    def test_autocast(self, dtype: torch.dtype, backend: str) -> None:
        inputs = make(1, 3, 4)
        inputs["x"] = inputs["x"].to(dtype)
        inputs["fc1_weight"].requires_grad_()
        with torch.autocast(DEVICE, dtype):
            mixed = mix_ffn(**inputs, backend=backend)
        assert mixed.dtype == dtype
        mixed.float().square().sum().backward()
        assert inputs["fc1_weight"].grad.dtype == torch.float32
        with torch.no_grad():
            rounded = {n: x.to(dtype) if isinstance(x, Tensor) else x for n, x in inputs.items()}
            expected = mix_ffn(**rounded, backend=backend)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        tensors = leaves(make(1, 3, 4))
        fn = partial(torch_op, height=3, width=4)
        plain = torch.autograd.grad(fn(*tensors).square().sum(), tensors)
        out = torch.utils.checkpoint.checkpoint(fn, *tensors, use_reentrant=reentrant)
        out.square().sum().backward()
        for x, g in zip(tensors, plain, strict=True):
            assert torch.equal(x.grad, g)

    @pytest.mark.parametrize("fn", [torch_op, triton_op])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile_without_graph_breaks(self, dynamic: bool, fn: Callable[..., Tensor]) -> None:
        torch._dynamo.reset()

        def loss(*args: Any) -> Tensor:
            return fn(*args).square().sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for height, width in ((3, 4), (5, 2)) if dynamic else ((3, 4),):
            inputs = make(2, height, width)
            tensors = leaves(inputs)
            actual, expected = compiled(*inputs.values()), loss(*inputs.values())
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors)
            )

    def test_compiled_code_knows_no_bands(self, narrow_bands: None) -> None:
        """Other sizes have other bands, but the same graph."""
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(torch_op, fullgraph=True, dynamic=True, backend=counter)
        for height, width in ((3, 5), (7, 2), (20, 6)):
            compiled(**make(2, height, width))
        assert counter.frame_count == 1

    def test_explicit_triton_never_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"mix_ffn: dtype torch\.float64"):
            triton_op(**make(dtype=torch.float64))
        monkeypatch.setattr(_backend, "INTERPRET", False)
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match="the kernels need 'cuda'"):
                triton_op(**make())
        assert "mix_ffn runs on backend 'torch'" in explain("mix_ffn", **make(), backend="torch")

    def test_meta(self) -> None:
        metas = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in make().items()}
        assert mix_ffn(**metas).shape == (2, 35, 9)

    def test_errors_name_the_argument(self) -> None:
        good = make()
        bad: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"x": [1.0]}, TypeError, r"x must be a tensor \[B, L, C\]; got list"),
            ({"x": good["x"].int()}, TypeError, "x must have dtype float64"),
            ({"height": 6}, ValueError, r"x must have height \* width = 6 \* 5 = 30 tokens"),
            ({"width": 0}, ValueError, "width must be at least 1; got 0"),
            ({"fc1_weight": torch.ones(20, 11)}, ValueError, r"fc1_weight must have shape \[E, C"),
            ({"fc1_weight": torch.ones(20)}, ValueError, r"fc1_weight must have shape \[E, C\]"),
            ({"fc1_bias": torch.ones(12)}, ValueError, r"fc1_bias must have shape \[E\] = \[20\]"),
            ({"dw_weight": torch.ones(20, 3, 3)}, ValueError, "dw_weight must have shape"),
            ({"dw_bias": torch.ones(1)}, ValueError, "dw_bias must have shape"),
            ({"fc2_weight": torch.ones(9, 12)}, ValueError, "fc2_weight must have shape"),
            ({"fc2_weight": torch.ones(0, 20)}, ValueError, "fc2_weight must have D >= 1"),
            ({"fc2_bias": torch.ones(20)}, ValueError, r"fc2_bias must have shape \[D\] = \[9\]"),
            ({"dw_bias": torch.ones(20).half()}, TypeError, "dw_bias must have the dtype of x"),
            ({"fc2_bias": torch.ones(9, device="meta")}, ValueError, "on the device of x"),
        ]
        for changes, error, message in bad:
            for backend in ("triton", "torch", "reference"):
                with pytest.raises(error, match=message):
                    mix_ffn(**{**good, **changes}, backend=backend)
