"""Cross-entropy of upsampled logits, against the fp64 oracle and by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from equiseg_fast import explain, ohem, reference, upsample_cross_entropy
from equiseg_fast.ops import _backend
from equiseg_fast.testing import assert_deterministic, check_op_parity, override, random_normal
from tests.operations import DEVICE, DTYPES, HALF, MEAN, Operation, Sizes, random_labels


def _pixel_labels(s: Sizes, seed: int) -> dict[str, Any]:
    size = s.batch, s.factor * s.height + 1, s.factor * s.width
    return {"labels": random_labels(s.classes, *size, seed=seed)}


OPERATION = Operation(
    upsample_cross_entropy,
    reference.upsample_cross_entropy,
    lambda s: {"logits": (s.batch, s.classes, s.height, s.width)},
    _pixel_labels,
    kinds={"out": "statistic"},
)


IGNORE = 255

triton_loss = partial(upsample_cross_entropy, backend="triton")

RECOMPUTED = (
    "the backward subtracts the saved LSE from logits it interpolates again, so that a probability "
    "is off by eps32 times the logit; eager saves its log-probabilities. Logits reach 100 here"
)
LARGE_LOGITS = (
    override(
        "upsample_cross_entropy",
        "B eager",
        kind="gradient",
        rms_eps=64,
        amax_eps=64,
        reason=RECOMPUTED,
    ),
)


def make(
    batch: int = 2,
    classes: int = 5,
    samples: tuple[int, int] = (3, 4),
    size: tuple[int, int] = (6, 8),
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    label_dtype: torch.dtype = torch.uint8,
) -> dict[str, Any]:
    """Normal random logits, and labels of which a fifth are ignored."""
    logits = random_normal(
        (batch, classes, *samples), dtype, seed=1, mean=MEAN, layout=layout, device=DEVICE
    )
    labels = torch.randint(0, classes, (batch, *size), device=DEVICE)
    labels[torch.rand(batch, *size, device=DEVICE) < 0.2] = 100
    return {"logits": logits, "labels": labels.to(label_dtype), "ignore_index": 100}


def parity(inputs: dict[str, Any], **kwargs: Any) -> None:
    check_op_parity(
        partial(upsample_cross_entropy, backend=kwargs.pop("backend", "triton")),
        reference.upsample_cross_entropy,
        inputs,
        differentiable=("logits",),
        kinds={"out": "statistic"},
        **kwargs,
    )


SIZES = [
    ((1, 1), (1, 1)),
    ((1, 1), (5, 3)),
    ((7, 5), (28, 20)),
    ((5, 6), (5, 6)),
    ((3, 4), (24, 8)),
    ((4, 7), (9, 16)),
    ((6, 5), (17, 13)),
    ((1, 5), (3, 11)),
    ((9, 8), (4, 11)),
    ((2, 2), (17, 5)),
]


class TestParity:
    @pytest.mark.parametrize(("samples", "size"), SIZES)
    def test_sizes(self, samples: tuple[int, int], size: tuple[int, int]) -> None:
        parity(make(samples=samples, size=size))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(("samples", "size"), SIZES[2:7:2])
    def test_sizes_in_half_precision(
        self, dtype: torch.dtype, samples: tuple[int, int], size: tuple[int, int]
    ) -> None:
        parity(make(samples=samples, size=size, dtype=dtype))

    def test_large(self) -> None:
        """More cells and columns than one block of the interpreter has."""
        parity(make(1, 3, (9, 33), (17, 65)))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("classes", [1, 16, 25, 150, 256])
    def test_classes(self, dtype: torch.dtype, classes: int) -> None:
        label_dtype = torch.int16 if classes > 100 else torch.uint8
        inputs = make(1, classes, (4, 5), (8, 11), dtype, label_dtype=label_dtype)
        parity(inputs, contraction=0 if dtype in HALF and classes == 1 else None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
    @pytest.mark.parametrize("classes", [5, 16])
    def test_strides_of_logits(self, dtype: torch.dtype, layout: str, classes: int) -> None:
        parity(make(classes=classes, dtype=dtype, layout=layout))

    @pytest.mark.parametrize("cotangent", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides_of_cotangents(self, cotangent: str) -> None:
        parity(make(), cotangent=cotangent)

    @pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
    def test_labels(self, label_dtype: torch.dtype) -> None:
        inputs = make(label_dtype=label_dtype)
        strided = inputs["labels"].transpose(1, 2).contiguous().transpose(1, 2)
        parity({**inputs, "labels": strided})

    @pytest.mark.parametrize("ignore_index", [-1, 0, 3, 300])
    def test_ignore_index(self, ignore_index: int) -> None:
        inputs = make(label_dtype=torch.int64)
        labels = inputs["labels"].masked_fill(inputs["labels"] == 100, ignore_index)
        parity({**inputs, "labels": labels, "ignore_index": ignore_index})
        parity(
            {
                **inputs,
                "labels": torch.full_like(labels, ignore_index),
                "ignore_index": ignore_index,
            }
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_saturated_softmax(self, dtype: torch.dtype) -> None:
        inputs = make(2, 25, (7, 5), (14, 15), dtype)
        parity({**inputs, "logits": inputs["logits"] * 30}, overrides=LARGE_LOGITS)

    def test_masked_class(self) -> None:
        """A logit of -inf everywhere removes a class, unless a weight of zero meets it."""
        inputs = make(classes=6, samples=(4, 4), size=(16, 16))
        inputs["logits"][:, 5] = -float("inf")
        inputs["labels"][inputs["labels"] == 5] = 0
        kept = {**inputs, "logits": inputs["logits"][:, :5]}
        inner = (..., slice(2, -2), slice(2, -2))
        torch.testing.assert_close(triton_loss(**inputs)[inner], triton_loss(**kept)[inner])

    def test_ignored_pixels_are_zero_whatever_their_cotangent(self) -> None:
        inputs = make()
        logits = inputs["logits"].requires_grad_()
        loss = triton_loss(**inputs)
        ignored = inputs["labels"] == 100
        assert not loss[ignored].any()
        assert (loss[~ignored] > 0).all()
        cotangent = torch.ones_like(loss)
        clean = torch.autograd.grad(loss, logits, cotangent, retain_graph=True)[0]
        cotangent[ignored] = float("nan")
        assert torch.equal(torch.autograd.grad(loss, logits, cotangent)[0], clean)

    def test_factor_one_is_plain_cross_entropy(self) -> None:
        inputs = make(samples=(6, 8))
        labels = inputs["labels"].long()
        expected = F.cross_entropy(inputs["logits"], labels, ignore_index=100, reduction="none")
        torch.testing.assert_close(triton_loss(**inputs), expected)

    def test_a_common_offset_changes_no_bit(self) -> None:
        """The large number cancels before the small logarithm is added."""
        inputs = make(samples=(6, 8))
        inputs["logits"] = inputs["logits"].round()
        expected = triton_loss(**inputs)
        inputs["logits"] += 1000
        assert torch.equal(triton_loss(**inputs), expected)

    def test_label_that_is_no_class_is_seen(self) -> None:
        inputs = make()
        inputs["labels"][0, 3, 4] = 77
        inputs["labels"][0, 3, 5] = 5
        loss = triton_loss(**inputs)
        assert loss[0, 3, 4:6].isnan().all()
        assert int(loss.isnan().sum()) == 2

    def test_repeats_strips_and_parts_are_bit_identical(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from equiseg_fast.kernels import upsample_cross_entropy as kernels

        inputs = make(1, samples=(5, 3), size=(11, 6))
        logits = inputs["logits"].requires_grad_()

        def step() -> tuple[Tensor, ...]:
            loss = triton_loss(**inputs)
            cotangent = random_normal(loss.shape, torch.float32, seed=9, device=DEVICE)
            return loss, *torch.autograd.grad(loss, logits, cotangent)

        assert_deterministic(step, repeats=20 if DEVICE == "cuda" else 2)
        expected = step()
        for lines, strip in ((1, 3), (2, 8)):
            monkeypatch.setattr(kernels, "upsample_cross_entropy_lines", lambda *_, n=lines: n)
            monkeypatch.setattr(kernels, "upsample_cross_entropy_strip", lambda *_, n=strip: n)
            for a, b in zip(step(), expected, strict=True):
                assert torch.equal(a, b)

    def test_blocks_of_the_gpu(self) -> None:
        """Small tiles, so that cells and columns of one block lie in several rows."""
        from equiseg_fast.kernels import _common, _tuned
        from equiseg_fast.kernels._arch import Tile

        arch, _ = _common.device_facts(torch.device(DEVICE))
        tile = Tile(block_m=8, block_k=32, num_warps=2)
        names = ("upsample_cross_entropy_fwd_config", "upsample_cross_entropy_bwd_config")
        with _tuned.use({(name, (arch, 20)): tile for name in names}):
            parity(make(1, 20, (3, 4), (7, 4)))

    def test_images_do_not_depend_on_the_batch(self) -> None:
        inputs = make(batch=3)
        alone = {**inputs, "logits": inputs["logits"][1:2], "labels": inputs["labels"][1:2]}
        assert torch.equal(triton_loss(**inputs)[1:2], triton_loss(**alone))

    def test_empty(self) -> None:
        inputs = make(batch=0)
        for backend in ("triton", "torch", "reference"):
            logits = inputs["logits"].clone().requires_grad_()
            loss = upsample_cross_entropy(**{**inputs, "logits": logits}, backend=backend)
            assert loss.shape == (0, 6, 8)
            assert torch.autograd.grad(loss.sum(), logits)[0].shape == logits.shape

    def test_labels_that_are_no_class_are_seen_in_64_bits(self) -> None:
        """Cut to 32 bits, this one would be class 1."""
        inputs = make(label_dtype=torch.int64)
        inputs["labels"][0, 2, 3] = 2**32 + 1
        loss = upsample_cross_entropy(**inputs, backend="triton")
        assert loss.isnan().nonzero().tolist() == [[0, 2, 3]]


class TestConfigs:
    def test_launches_cover_the_work(self) -> None:
        from equiseg_fast.kernels import upsample_cross_entropy as kernels

        for classes in (1, 16, 17, 25, 150, 256):
            for arch in (0, 80, 90):
                forward = kernels.upsample_cross_entropy_fwd_config(arch, classes)
                assert forward.block_k >= classes
                assert forward.block_m * forward.block_k >= 512
                config = kernels.upsample_cross_entropy_bwd_config(arch, classes)
                for columns, rows in ((1, 1), (32, 16), (512, 256), (20000, 64)):
                    assert (
                        1
                        <= kernels.upsample_cross_entropy_strip(columns, rows, config, 132)
                        <= min(8, rows)
                    )
        assert kernels.upsample_cross_entropy_strip(2 * 1024, 1024, config, 132) > 4
        assert kernels.upsample_cross_entropy_strip(32, 16, config, 132) == 1
        for programs in (1, 100, 10**6):
            for lines in (1, 4, 32):
                n = kernels.upsample_cross_entropy_lines(90, programs, lines, 132)
                assert 1 <= n <= lines
                # No more parts than fill the device, at 12 programs per SM.
                assert programs * -(-lines // n) <= max(programs, 12 * 132)
        assert kernels.upsample_cross_entropy_lines(90, 10**6, 4, 132) == 4
        assert kernels.upsample_cross_entropy_lines(90, 10, 4, 132) == 1


class TestBackends:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("samples", "size"), [*SIZES, ((16, 9), (70, 37))])
    def test_torch_backend(
        self, dtype: torch.dtype, samples: tuple[int, int], size: tuple[int, int]
    ) -> None:
        parity(make(samples=samples, size=size, dtype=dtype), backend="torch")

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
    def test_torch_backend_on_strides(self, layout: str) -> None:
        parity(make(layout=layout), cotangent=layout, backend="torch")

    @pytest.mark.parametrize("ignore_index", [-1, 300])
    def test_torch_backend_ignoring_what_the_labels_cannot_hold(self, ignore_index: int) -> None:
        inputs = make()
        labels = inputs["labels"].clamp(max=4)
        parity({**inputs, "labels": labels, "ignore_index": ignore_index}, backend="torch")
        parity({**inputs, "labels": labels, "ignore_index": ignore_index})

    @pytest.mark.parametrize(
        ("label_dtype", "classes", "label", "ignore_index"),
        [
            (torch.int8, 150, 5, 100),
            (torch.uint8, 256, 40, -1),
            (torch.uint8, 256, 40, 255),
        ],
    )
    def test_labels_whose_dtype_holds_fewer_classes(
        self, label_dtype: torch.dtype, classes: int, label: int, ignore_index: int
    ) -> None:
        logits = random_normal((1, classes, 3, 4), torch.float32, seed=1, device=DEVICE)
        labels = torch.full((1, 3, 4), label, dtype=label_dtype, device=DEVICE)
        labels[0, 0, 0] = 100
        expected = F.cross_entropy(
            logits, labels.long(), ignore_index=ignore_index, reduction="none"
        )
        for backend in ("triton", "torch", "reference"):
            loss = upsample_cross_entropy(
                logits, labels, ignore_index=ignore_index, backend=backend
            )
            torch.testing.assert_close(loss, expected)

    def test_labels_below_zero_are_not_ignored_as_what_they_wrap_to(self) -> None:
        """255 in int8 is -1."""
        logits, labels = torch.zeros(1, 5, 3, 4), torch.full((1, 3, 4), -1, dtype=torch.int8)
        with pytest.raises(
            ValueError, match=r"labels must be 0\.\.4 or 255 \(ignore_index\); got -1"
        ):
            upsample_cross_entropy(logits, labels, ignore_index=255)

    def test_torch_backend_in_float64(self) -> None:
        inputs = make(dtype=torch.float64)
        labels = inputs["labels"]
        loss = lambda x: upsample_cross_entropy(x, labels, ignore_index=100, backend="torch")  # noqa: E731
        logits = inputs["logits"].requires_grad_()
        torch.testing.assert_close(
            loss(logits), reference.upsample_cross_entropy(**inputs), rtol=1e-12, atol=1e-12
        )
        assert torch.autograd.gradcheck(loss, (logits,))

    @pytest.mark.skipif(DEVICE == "cuda", reason="auto takes triton on a GPU")
    def test_auto_on_the_cpu_is_torch(self) -> None:
        assert "runs on backend 'torch'" in explain("upsample_cross_entropy", **make())

    def test_reasons(self) -> None:
        with pytest.raises(ValueError, match="257 classes are more than 256"):
            triton_loss(**make(classes=257, label_dtype=torch.int16))
        with pytest.raises(ValueError, match=r"dtype torch\.float64"):
            triton_loss(**make(dtype=torch.float64))
        for size in ((40000, 1), (1, 40000)):
            logits = torch.empty(1, 1, 1, 1).expand(1, 2, *size)
            labels = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, *size)
            text = explain("upsample_cross_entropy", logits, labels)
            assert "positions of 40000 pixels over 40000 samples exceed 32 bits" in text

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    def test_autocast_changes_nothing(self, dtype: torch.dtype, backend: str) -> None:
        inputs = make()
        loss = partial(upsample_cross_entropy, backend=backend)
        with torch.autocast(DEVICE, dtype):
            assert torch.equal(loss(**inputs), loss(**inputs).float())
            mixed = loss(**inputs)
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed, loss(**inputs), rtol=0, atol=0)


class TestAutograd:
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    def test_backward_inside_autocast_is_the_same(self, backend: str) -> None:
        inputs = make()
        logits = inputs["logits"].requires_grad_()
        fn = partial(upsample_cross_entropy, backend=backend)
        (expected,) = torch.autograd.grad(fn(**inputs).sum(), logits)
        with torch.autocast(DEVICE, torch.bfloat16):
            (actual,) = torch.autograd.grad(fn(**inputs).sum(), logits)
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_double_backward(self, backend: str) -> None:
        def gradient_penalty(fn: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
            logits = inputs["logits"].detach().clone().requires_grad_()
            loss = fn(**{**inputs, "logits": logits}).square().sum()
            first = torch.autograd.grad(loss, logits, create_graph=True)[0]
            return torch.autograd.grad(first.square().sum(), logits)[0]

        inputs = make()
        doubled = {**inputs, "logits": inputs["logits"].double()}
        expected = gradient_penalty(reference.upsample_cross_entropy, doubled)
        actual = gradient_penalty(partial(upsample_cross_entropy, backend=backend), inputs)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_no_graph_without_gradients(self, backend: str) -> None:
        inputs = make()
        assert upsample_cross_entropy(**inputs, backend=backend).grad_fn is None
        inputs["logits"].requires_grad_()
        with torch.no_grad():
            assert upsample_cross_entropy(**inputs, backend=backend).grad_fn is None
        assert upsample_cross_entropy(**inputs, backend=backend).grad_fn is not None

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_func_grad(self, backend: str) -> None:
        inputs = make()
        labels = inputs["labels"]

        def gradient(fn: Callable[..., Tensor]) -> Tensor:
            loss = lambda x: fn(x, labels, ignore_index=100).square().sum()  # noqa: E731
            return torch.func.grad(loss)(inputs["logits"])

        actual = gradient(partial(upsample_cross_entropy, backend=backend))
        torch.testing.assert_close(actual, gradient(reference.upsample_cross_entropy))

    def test_gradient_is_channels_last_memory(self) -> None:
        inputs = make()
        logits = inputs["logits"].requires_grad_()
        grad = torch.autograd.grad(triton_loss(**inputs).sum(), logits)[0]
        assert grad.is_contiguous(memory_format=torch.channels_last)


class TestRegistration:
    @pytest.mark.parametrize("interpret", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(
        self, dtype: torch.dtype, interpret: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if DEVICE == "cpu":
            monkeypatch.setattr(_backend, "INTERPRET", interpret)
        logits, labels, _ = make(samples=(1, 2), size=(2, 3), dtype=dtype).values()
        ops = torch.ops.equiseg_fast
        for x in (logits, logits.contiguous(memory_format=torch.channels_last)):
            torch.library.opcheck(ops.upsample_cross_entropy_fwd, (x, labels, 100))
            loss, lse = ops.upsample_cross_entropy_fwd(x, labels, 100)
            args = (torch.randn_like(loss), x, labels, lse, 100)
            torch.library.opcheck(ops.upsample_cross_entropy_bwd, args)

    @pytest.mark.skipif(DEVICE == "cuda", reason="the CPU formula stands in where no GPU is")
    def test_cpu_implementation_is_the_kernels_twin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backend, "INTERPRET", False)
        monkeypatch.setattr(_backend, "triton_reasons", lambda *_: [])
        parity(make())
        inputs = list(make().values())
        lse = torch.ops.equiseg_fast.upsample_cross_entropy_fwd(*inputs)[1]
        monkeypatch.setattr(_backend, "INTERPRET", True)
        expected = torch.ops.equiseg_fast.upsample_cross_entropy_fwd(*inputs)[1]
        torch.testing.assert_close(lse, expected)

    def test_meta_and_fake(self) -> None:
        inputs = make()
        meta = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in inputs.items()}
        assert upsample_cross_entropy(**meta).shape == (2, 6, 8)
        with FakeTensorMode() as mode:
            fake = {
                n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in inputs.items()
            }
            for backend in ("triton", "torch", "reference"):
                loss = upsample_cross_entropy(**fake, backend=backend)
                assert (loss.shape, loss.dtype) == ((2, 6, 8), torch.float32)
            assert ohem(loss, fake["labels"] != 100).shape == ()

    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_compile_without_graph_breaks(self, backend: str, dynamic: bool) -> None:
        torch._dynamo.reset()

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            pixels = upsample_cross_entropy(logits * 2, labels, ignore_index=100, backend=backend)
            return ohem(pixels, labels != 100, thresh=0.01)

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        sizes = [((3, 4), (6, 8)), ((5, 7), (8, 11))] if dynamic else [((3, 4), (6, 8))]
        for samples, size in sizes:
            logits, labels, _ = make(samples=samples, size=size).values()
            logits.requires_grad_()
            actual, expected = compiled(logits, labels), loss(logits, labels)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits)
            )

    def test_dynamic_sizes_compile_once(self) -> None:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(triton_loss, fullgraph=True, dynamic=True, backend=counter)
        for n in (3, 4, 6):
            logits, labels, _ = make(samples=(n, n + 4), size=(2 * n + 5, 3 * n + 10)).values()
            compiled(logits, labels, ignore_index=100)
        assert counter.frame_count == 1

    def test_export(self) -> None:
        class Layer(torch.nn.Module):
            def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
                return triton_loss(logits, labels, ignore_index=100)

        inputs = tuple(make().values())[:2]
        program = torch.export.export(Layer(), inputs)
        assert "equiseg_fast.upsample_cross_entropy_fwd" in str(program.graph)
        torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))


class TestBadInput:
    def test_errors_name_the_argument(self) -> None:
        logits, labels, _ = make().values()
        cases: list[tuple[Any, type[Exception], str]] = [
            (
                (logits.tolist(), labels),
                TypeError,
                r"logits must be a tensor \[B, K, h, w\]; got list",
            ),
            ((logits.long(), labels), TypeError, "logits must have dtype float64"),
            ((logits[0], labels), ValueError, r"logits must have shape \[B, K, h, w\]"),
            ((logits, labels.float()), TypeError, "labels must have dtype int64"),
            ((logits, labels[0]), ValueError, r"labels must have shape \[B, H, W\]"),
            (
                (logits, labels[:1]),
                ValueError,
                "labels must have the batch size of logits, 2; got 1",
            ),
            ((logits, labels.to("meta")), ValueError, "labels must be on the device of logits"),
            ((logits[:, :0], labels), ValueError, "logits must have at least one class and one"),
            ((logits[..., :0], labels), ValueError, "logits must have at least one class and one"),
            ((logits, labels[..., :0]), ValueError, "labels must have at least one pixel"),
        ]
        for args, error, message in cases:
            for backend in ("triton", "torch", "reference"):
                with pytest.raises(error, match=message):
                    upsample_cross_entropy(*args, backend=backend)
        with pytest.raises(ValueError, match="backend must be one of"):
            upsample_cross_entropy(logits, labels, backend="cuda")

    def test_nothing_is_changed(self) -> None:
        inputs = make(classes=16, layout="channels_last")
        before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
        inputs["logits"].requires_grad_()
        triton_loss(**inputs).square().sum().backward()
        assert all(torch.equal(before[name], inputs[name]) for name in before)
