"""Prototypes: the Triton kernels against the fp64 oracle, and the operation within PyTorch."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import class_prototypes, explain, reference
from equiseg_fast.ops import _backend
from equiseg_fast.testing import (
    assert_deterministic,
    check_op_parity,
    random_normal,
    same_bits,
    with_layout,
)
from tests.operations import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    MEAN,
    Operation,
    Sizes,
    map_size,
    random_labels,
    token_shape,
)


def _class_labels(s: Sizes, seed: int) -> dict[str, Any]:
    size = s.batch, s.factor * s.height, s.factor * s.width
    labels = {"labels": random_labels(s.classes, *size, seed=seed), "num_classes": s.classes}
    return {**labels, **map_size(s, seed)}


OPERATION = Operation(
    class_prototypes,
    reference.class_prototypes,
    lambda s: {"x": (s.modalities, *token_shape(s))},
    _class_labels,
    kinds={"out0": "statistic"},
)


triton_prototypes = partial(class_prototypes, backend="triton")


def make(
    modalities: int = 2,
    batch: int = 2,
    height: int = 7,
    width: int = 5,
    channels: int = 33,
    num_classes: int = 6,
    stride: int = 2,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
) -> dict[str, Any]:
    """Features, and labels with ignored pixels, unknown classes and an absent class."""
    size = (modalities, batch, height * width, channels)
    generator = torch.Generator().manual_seed(seed + 7)
    pixels = (batch, stride * height, stride * width)
    labels = torch.randint(-1, num_classes + 1, pixels, generator=generator)
    labels[labels == num_classes // 2] = 255
    return {
        "x": random_normal(size, dtype, seed=seed, mean=MEAN, layout=layout, device=DEVICE),
        "labels": labels.to(DEVICE),
        "num_classes": num_classes,
        "height": height,
        "width": width,
    }


def parity(inputs: dict[str, Any], backend: str = "triton", **kwargs: Any) -> None:
    """Prototypes, counts and the gradient of a backend under the tolerance policy."""
    options = kwargs.pop("options", {})
    check_op_parity(
        partial(class_prototypes, backend=backend, **options),
        partial(reference.class_prototypes, **options),
        inputs,
        differentiable=("x",),
        output_names=("prototypes", "counts"),
        kinds={"prototypes": "parameter"},
        # The kernel adds up a few tiles, stock operators one token after the other.
        chain=1 if backend == "triton" else inputs["x"].shape[2],
        **kwargs,
    )


class TestParity:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("height", "width", "stride", "channels", "num_classes"),
        [
            (1, 1, 1, 1, 1),
            (7, 5, 4, 33, 25),
            (9, 15, 2, 160, 17),
            (12, 11, 1, 32, 64),
            (16, 16, 3, 64, 5),
        ],
    )
    def test_sizes(
        self,
        dtype: torch.dtype,
        height: int,
        width: int,
        stride: int,
        channels: int,
        num_classes: int,
    ) -> None:
        parity(make(2, 2, height, width, channels, num_classes, stride, dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("num_classes", [2, 128, 200, 256])
    def test_numbers_of_classes(self, dtype: torch.dtype, num_classes: int) -> None:
        parity(make(1, 1, 20, 15, 16, num_classes, 1, dtype), options={"ignore_index": -100})

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides_of_features(self, dtype: torch.dtype, layout: str) -> None:
        parity(make(dtype=dtype, layout=layout))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides_of_labels(self, layout: str) -> None:
        inputs = make()
        inputs["labels"] = with_layout(inputs["labels"], layout)
        parity(inputs)

    @pytest.mark.parametrize("cotangent", LAYOUTS)
    def test_strides_of_cotangents(self, cotangent: str) -> None:
        parity(make(), cotangent=cotangent)

    def test_strides_of_cotangents_that_are_used_as_they_are(self) -> None:
        inputs = make(stride=1)
        prototypes, counts = triton_prototypes(**inputs)
        plain = random_normal(prototypes.shape, seed=5, device=DEVICE)
        strided = with_layout(plain, "transposed", unit_last_stride=True)
        backward = torch.ops.equiseg_fast.class_prototypes_bwd
        args = inputs["labels"], counts, 255, torch.float32
        assert same_bits(backward(strided, *args), backward(plain, *args))

    def test_view_of_batch_major_features(self) -> None:
        x = random_normal((2, 3, 35, 32), seed=4, device=DEVICE).transpose(0, 1)
        parity({**make(3, 2, channels=32), "x": x})

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize(
        "dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8]
    )
    def test_types_of_labels(self, dtype: torch.dtype, backend: str) -> None:
        inputs = make(num_classes=100)
        inputs["labels"] = inputs["labels"].to(dtype)
        parity(inputs, backend)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("ignore_index", [255, 0, 4, -1])
    def test_ignored_class(self, ignore_index: int, backend: str) -> None:
        parity(make(), backend, options={"ignore_index": ignore_index})

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_labels_beyond_32_bits(self, backend: str) -> None:
        inputs = make()
        inputs["labels"] += 2**32 * (inputs["labels"] == 1) - 2**32 * (inputs["labels"] == 2)
        assert not class_prototypes(**inputs, backend=backend)[1][:, 1:3].any()
        parity(inputs, backend)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("label", [255, 3])
    def test_all_ignored_or_all_of_one_class(self, label: int, backend: str) -> None:
        inputs = make()
        inputs["labels"].fill_(label)
        prototypes, counts = class_prototypes(**inputs, backend=backend)
        assert counts.sum() == (0 if label == 255 else 2 * 35)
        absent = torch.arange(6) != label
        assert not prototypes[:, :, absent].any()
        parity(inputs, backend)

    def test_sums_are_as_good_as_fp32(self) -> None:
        """No bit of an fp32 feature is lost: a large mean makes a lost bit stand out."""
        inputs = make(height=40, width=33, channels=16, num_classes=3)
        inputs["x"] = inputs["x"] + 1000
        prototypes, _ = triton_prototypes(**inputs)
        exact, _ = reference.class_prototypes(**{**inputs, "x": inputs["x"].double()})
        assert float((prototypes - exact).abs().max()) < 4 * 1000 * 2.0**-24

    def test_one_token_per_class_is_copied(self) -> None:
        """Three bf16 parts hold all 24 bits of an fp32 number, from subnormal to huge."""
        x = random_normal((1, 1, 60, 16), seed=1, device=DEVICE)
        x *= 2.0 ** torch.arange(-100, 20, 2, device=DEVICE)[:, None]
        labels = torch.arange(60, device=DEVICE).view(1, 6, 10)
        prototypes, counts = triton_prototypes(x, labels, 60, 6, 10)
        assert torch.equal(prototypes, x)
        assert (counts == 1).all()

    @pytest.mark.parametrize("chunks", [1, 2, 40])
    def test_chunks_of_the_sum_over_tokens(
        self, chunks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from equiseg_fast.kernels import class_prototypes as kernels

        def token_chunks(programs: int, blocks: int, num_sms: int) -> tuple[int, int]:
            chunk = -(-blocks // min(chunks, blocks))
            return -(-blocks // chunk), chunk

        monkeypatch.setattr(kernels, "token_chunks", token_chunks)
        tile = kernels.Tile(block_l=16, block_c=32, num_warps=4)
        monkeypatch.setattr(kernels, "class_sums_config", lambda *_: tile)
        monkeypatch.setitem(kernels.CLASS_MEANS_TILE, "BLOCK_S", 4)
        for dtype in (torch.float32, torch.bfloat16):
            parity(make(1, 2, 13, 11, 20, dtype=dtype))

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_not_a_number_stays_in_its_channel(self, backend: str) -> None:
        inputs = make()
        expected, _ = class_prototypes(**inputs, backend=backend)
        inputs["x"][0, 1, :, 3] = float("nan")
        prototypes, _ = class_prototypes(**inputs, backend=backend)
        assert prototypes[0, 1, :, 3].isnan().any()
        prototypes[0, 1, :, 3] = expected[0, 1, :, 3]
        assert torch.equal(prototypes, expected)

    @pytest.mark.large_memory
    def test_strides_beyond_32_bits(self) -> None:
        """Modalities, images, chunks of tokens or rows of labels up to 2^31 elements apart."""
        sizes = {"modalities": 3, "batch": 3, "height": 13, "width": 5, "channels": 2, "stride": 1}
        inputs = make(**sizes, dtype=torch.float16)
        expected = triton_prototypes(**inputs)
        for name, dim in (("x", 0), ("x", 1), ("x", 2), ("labels", 1)):
            t = inputs[name].to(torch.float16 if name == "x" else torch.uint8)
            strides = list(t.stride())
            strides[dim] = 2**31 // (t.size(dim) - 1) + t.numel()
            memory = torch.empty(2**31 + 2**18, dtype=t.dtype, device=DEVICE)
            far = {**inputs, name: memory.as_strided(t.shape, strides).copy_(t)}
            for a, b in zip(triton_prototypes(**far), expected, strict=True):
                assert same_bits(a, b)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_empty_batch(self, backend: str) -> None:
        inputs = make(batch=0)
        x = inputs["x"].requires_grad_()
        prototypes, counts = class_prototypes(**inputs, backend=backend)
        assert prototypes.shape == (2, 0, 6, 33)
        assert counts.shape == (0, 6)
        assert torch.autograd.grad(prototypes.sum(), x)[0].shape == x.shape

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_are_bit_identical(self, dtype: torch.dtype, backend: str) -> None:
        inputs = make(height=20, width=15, dtype=dtype)
        inputs["x"].requires_grad_()

        def step() -> tuple[Tensor, ...]:
            prototypes, counts = class_prototypes(**inputs, backend=backend)
            cotangent = random_normal(prototypes.shape, seed=9, device=DEVICE)
            return prototypes, counts, *torch.autograd.grad(prototypes, inputs["x"], cotangent)

        assert_deterministic(step, repeats=20 if DEVICE == "cuda" else 3)


class TestBackends:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last"])
    def test_torch_backend(self, dtype: torch.dtype, layout: str) -> None:
        parity(make(dtype=dtype, layout=layout), "torch", cotangent=layout)

    def test_torch_backend_in_float64(self) -> None:
        inputs = make(height=2, width=3, channels=2, dtype=torch.float64)
        x = inputs.pop("x").requires_grad_()
        fn = partial(class_prototypes, backend="torch", **inputs)
        torch.testing.assert_close(fn(x), reference.class_prototypes(x, **inputs))
        assert torch.autograd.gradcheck(lambda x: fn(x)[0], (x,))
        assert torch.autograd.gradgradcheck(lambda x: fn(x)[0], (x,))

    def test_more_classes_than_the_kernel_takes(self) -> None:
        inputs = make(num_classes=257)
        with pytest.raises(ValueError, match="cannot run class_prototypes: 257 classes are more"):
            triton_prototypes(**inputs)
        assert "257 classes" in explain("class_prototypes", **inputs)
        parity(inputs, "torch")

    def test_explicit_triton_never_falls_back(self) -> None:
        with pytest.raises(ValueError, match=r"dtype torch\.float64"):
            triton_prototypes(**make(dtype=torch.float64))


class TestAutograd:
    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_double_backward(self, backend: str, autocast: bool) -> None:
        def gradient_penalty(fn: Any, dtype: torch.dtype) -> Tensor:
            inputs = make(dtype=dtype)
            leaf = inputs["x"].requires_grad_()
            inputs["x"] = leaf.sin()
            loss = fn(**inputs)[0].pow(3).sum()
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            return torch.autograd.grad(first.square().sum(), leaf)[0]

        expected = gradient_penalty(reference.class_prototypes, torch.float64)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            actual = gradient_penalty(partial(class_prototypes, backend=backend), torch.float32)
        torch.testing.assert_close(
            actual.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_counts_have_no_gradient(self, backend: str) -> None:
        inputs = make()
        inputs["x"].requires_grad_()
        prototypes, counts = class_prototypes(**inputs, backend=backend)
        assert prototypes.requires_grad
        assert not counts.requires_grad

    def test_no_graph_without_gradients(self) -> None:
        inputs = make()
        assert triton_prototypes(**inputs)[0].grad_fn is None
        inputs["x"].requires_grad_()
        with torch.no_grad():
            assert triton_prototypes(**inputs)[0].grad_fn is None

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_saves_labels_and_counts_only(self, backend: str) -> None:
        saved: list[Tensor] = []
        inputs = make(stride=1)
        inputs["x"].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            class_prototypes(**inputs, backend=backend)
        assert sorted(t.numel() for t in saved) == [2 * 6, 2 * 35]
        assert inputs["labels"].data_ptr() in {t.data_ptr() for t in saved}

    def test_func_grad(self) -> None:
        inputs = make()
        x = inputs.pop("x")
        loss = lambda fn: lambda x: fn(x, **inputs)[0].square().sum()  # noqa: E731
        actual = torch.func.grad(loss(triton_prototypes))(x)
        torch.testing.assert_close(actual, torch.func.grad(loss(reference.class_prototypes))(x))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    def test_autocast_changes_nothing(self, dtype: torch.dtype, backend: str) -> None:
        inputs = make(dtype=dtype)
        plain = class_prototypes(**inputs, backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16):
            mixed = class_prototypes(**inputs, backend=backend)
        assert all(same_bits(a, b) for a, b in zip(plain, mixed, strict=True))


class TestRegistration:
    @pytest.mark.parametrize("interpret", [True, False])
    def test_opcheck(self, interpret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if DEVICE == "cpu":
            monkeypatch.setattr(_backend, "INTERPRET", interpret)
        inputs = make(dtype=torch.bfloat16)
        x, small = inputs["x"], inputs["labels"][:, ::2, ::2]
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        forward, backward = (
            getattr(torch.ops.equiseg_fast, f"class_prototypes_{name}") for name in ("fwd", "bwd")
        )
        torch.library.opcheck(forward, (x, small, 6, 255))
        torch.library.opcheck(forward, (strided, small.to(torch.uint8), 6, 255))
        prototypes, counts = forward(x, small, 6, 255)
        grad = torch.randn_like(prototypes)
        torch.library.opcheck(backward, (grad, small, counts, 255, torch.bfloat16))
        grad = with_layout(grad, "transposed")
        torch.library.opcheck(backward, (grad, small, counts, 255, torch.float32))

    @pytest.mark.skipif(DEVICE == "cuda", reason="the CPU formula stands in where no GPU is")
    def test_cpu_implementation_is_the_kernels_twin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backend, "INTERPRET", False)
        monkeypatch.setattr(_backend, "triton_reasons", lambda *_: [])
        parity(make())

    def test_meta(self) -> None:
        inputs = make()
        x, labels = inputs.pop("x").to("meta"), inputs.pop("labels").to("meta")
        prototypes, counts = class_prototypes(x.requires_grad_(), labels, **inputs)
        assert (prototypes.shape, counts.shape) == ((2, 2, 6, 33), (2, 6))
        assert torch.autograd.grad(prototypes.sum(), x)[0].shape == x.shape

    @pytest.mark.parametrize(
        ("backend", "compiler", "dynamic"),
        [
            ("triton", "aot_eager", False),
            ("triton", "inductor", True),
            ("torch", "aot_eager", False),
            ("torch", "aot_eager", True),
        ],
    )
    def test_compile_without_graph_breaks(self, compiler: str, dynamic: bool, backend: str) -> None:
        torch._dynamo.reset()

        def loss(x: Tensor, labels: Tensor, height: int, width: int) -> Tensor:
            prototypes, counts = class_prototypes(x * 2, labels, 6, height, width, backend=backend)
            return prototypes.square().sum() + counts.sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=compiler)
        for height, width in ((7, 5), (6, 9)) if dynamic else ((7, 5),):
            inputs = make(height=height, width=width)
            x, labels = inputs["x"].requires_grad_(), inputs["labels"]
            actual, expected = (f(x, labels, height, width) for f in (compiled, loss))
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, x),
                torch.autograd.grad(expected, x),
                rtol=1e-4,
                atol=1e-5,
            )

    def test_compiled_torch_backend_under_autocast(self) -> None:
        """The compiler, like a GPU, gets another formula than the CPU: a product."""
        torch._dynamo.reset()
        inputs = make()
        fn = partial(class_prototypes, backend="torch")
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = compiled(**inputs)
        torch.testing.assert_close(actual, fn(**inputs))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        inputs = make()
        x = inputs.pop("x").requires_grad_()
        plain = torch.autograd.grad(triton_prototypes(x, **inputs)[0].square().sum(), x)
        fn = partial(triton_prototypes, **inputs)
        prototypes, _ = torch.utils.checkpoint.checkpoint(fn, x, use_reentrant=reentrant)
        prototypes.square().sum().backward()
        assert torch.equal(x.grad, plain[0])


class TestBadInput:
    def test_errors_name_the_argument(self) -> None:
        inputs = make()
        x, labels = inputs["x"], inputs["labels"]
        cases = [
            ({"x": x.tolist()}, TypeError, r"x must be a tensor \[M, B, L, C\]; got list"),
            ({"x": x.long()}, TypeError, "x must have dtype float64, float32, .*; got int64"),
            ({"x": x[0]}, ValueError, r"x must have shape \[M, B, L, C\]; got \[2, 35, 33\]"),
            ({"x": x[:0]}, ValueError, "at least one modality and channel"),
            ({"x": x[..., :0]}, ValueError, "at least one modality and channel"),
            ({"height": 8}, ValueError, r"height \* width = 8 \* 5 = 40 tokens"),
            ({"width": 0}, ValueError, "width must be at least 1"),
            ({"labels": labels.float()}, TypeError, "labels must have dtype int64, .*; got float"),
            ({"labels": labels[:1]}, ValueError, r"shape \[B, s\*height, s\*width\] with B = 2"),
            ({"labels": labels[:, :13]}, ValueError, "labels must have shape"),
            ({"labels": labels[..., :4]}, ValueError, "labels must have shape"),
            ({"labels": labels[0]}, ValueError, "labels must have shape"),
            ({"labels": labels.to("meta")}, ValueError, "labels must be on the device of x"),
            ({"num_classes": 0}, ValueError, "num_classes must be at least 1; got 0"),
        ]
        for changed, error, message in cases:
            for backend in ("triton", "torch", "reference"):
                with pytest.raises(error, match=message):
                    class_prototypes(**{**inputs, **changed}, backend=backend)
