"""Attention: the Triton kernels against the fp64 oracle, and the operation within PyTorch."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import attention, explain, reference, use_backend
from equiseg_fast.ops import _backend
from equiseg_fast.testing import (
    assert_deterministic,
    assert_parity,
    check_op_parity,
    override,
    random_normal,
)
from tests.operations import DEVICE, DTYPES, HALF, MEAN, Operation, Shapes, Sizes


def _attention_shapes(s: Sizes) -> Shapes:
    heads = (max(2, s.channels // 64), min(s.channels, 64))
    keys = (s.batch, max(1, s.height * s.width // 4), *heads)
    return {"q": (s.batch, s.height * s.width, *heads), "k": keys, "v": keys}


OPERATION = Operation(
    attention,
    reference.attention,
    _attention_shapes,
    contraction=lambda s: min(s.channels, s.height * s.width // 4),
    # The kernels take dq from differences with the rounded result, which is to have no offset.
    centred=("v",),
    composed=True,
)


triton_attention = partial(attention, backend="triton")

RECOMPUTED = (
    "the backward computes the scores again and subtracts the saved LSE, so that a probability is "
    "off by eps32 times the score; eager saves its probabilities. Scores reach 300 in these tests"
)
LARGE_SCORES = {
    torch.float32: (
        override(
            "attention", "B eager", kind="gradient", rms_eps=256, amax_eps=512, reason=RECOMPUTED
        ),
    ),
    torch.float16: (override("attention", "A floor", kind="gradient", rms=4.0, reason=RECOMPUTED),),
}
LARGE_SCORES[torch.bfloat16] = LARGE_SCORES[torch.float16]
OFFSET = (
    override(
        "attention with a mean", "A floor", kind="gradient", rms=16.0,
        reason="the backward takes the mean of dp from the rounded result: what that is off by "
        "goes into dq with the mean of the keys",
    ),
)  # fmt: skip

attention_module = importlib.import_module("equiseg_fast.ops.attention")


def make(
    batch: int = 2,
    queries: int = 65,
    keys: int = 77,
    heads: int = 2,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    mean: float = 0.0,
) -> dict[str, Tensor]:
    """q, k, v of normal random numbers; mean: of queries and keys."""
    lengths = {"q": queries, "k": keys, "v": keys}
    return {
        name: random_normal(
            (batch, length, heads, dim),
            dtype,
            seed=seed + i,
            mean=0.0 if name == "v" else mean,
            layout=layout,
            unit_last_stride=layout != "channels_last",
            device=DEVICE,
        )
        for i, (name, length) in enumerate(lengths.items())
    }


def parity(inputs: dict[str, Tensor], **kwargs: Any) -> None:
    """Forward, LSE and all gradients of the kernels under the tolerance policy."""
    options = {"return_lse": True, **kwargs}
    cotangent = options.pop("cotangent", "contiguous")
    overrides = options.pop("overrides", ())
    check_op_parity(
        partial(triton_attention, **options),
        partial(reference.attention, **options),
        inputs,
        differentiable=("q", "k", "v"),
        output_names=("out", "lse"),
        kinds={"lse": "statistic"},
        cotangent=cotangent,
        overrides=overrides,
        contraction=min(inputs["q"].shape[1], inputs["k"].shape[1]),
    )


class TestParity:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("queries", "keys"),
        [(1, 33), (3, 7), (64, 64), (65, 77), (130, 200), (197, 256), (300, 65)],
    )
    def test_lengths(self, dtype: torch.dtype, queries: int, keys: int) -> None:
        parity(make(queries=queries, keys=keys, dtype=dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_key(self, dtype: torch.dtype) -> None:
        """The softmax is constant: out is v, and dq and dk vanish up to cancellation."""
        q, k, v = (x.requires_grad_() for x in make(queries=5, keys=1, dtype=dtype).values())
        out = triton_attention(q, k, v)
        assert torch.equal(out, v.expand_as(out))
        cotangent = torch.randn_like(out)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), cotangent)
        torch.testing.assert_close(dv, cotangent.sum(dim=1, keepdim=True))
        terms = float((cotangent.abs() * v.abs()).sum(-1).max())
        assert float(dq.abs().max()) <= torch.finfo(dtype).eps * terms * float(k.abs().max())
        assert float(dk.abs().max()) <= 5 * torch.finfo(dtype).eps * terms * float(q.abs().max())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", [1, 16, 40, 64, 80, 128])
    def test_head_dimensions(self, dtype: torch.dtype, dim: int) -> None:
        parity(make(batch=1, queries=70, keys=66, dim=dim, dtype=dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides_of_inputs(self, dtype: torch.dtype, layout: str) -> None:
        parity(make(dtype=dtype, layout=layout))

    @pytest.mark.parametrize("cotangent", ["transposed", "sliced", "expanded", "channels_last"])
    def test_strides_of_cotangents(self, cotangent: str) -> None:
        parity(make(), cotangent=cotangent)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_views_of_one_projection(self, dtype: torch.dtype) -> None:
        kv = random_normal((2, 77, 2, 2, 32), dtype, seed=1, device=DEVICE)
        q = random_normal((2, 65, 64), dtype, seed=2, device=DEVICE).unflatten(-1, (2, 32))
        parity({"q": q, "k": kv[:, :, 0], "v": kv[:, :, 1]})

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
    def test_scale(self, dtype: torch.dtype, scale: float) -> None:
        parity(make(dtype=dtype), scale=scale)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_saturated_softmax(self, dtype: torch.dtype) -> None:
        inputs = make(queries=130, keys=200, dtype=dtype)
        parity({**inputs, "q": inputs["q"] * 30}, overrides=LARGE_SCORES[dtype])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("position", [0, 100, 199])
    def test_one_key_far_above_the_others(self, dtype: torch.dtype, position: int) -> None:
        """The anchor of the softmax is then far below the maximum, and the tile falls back."""
        inputs = make(queries=130, keys=200, dtype=dtype)
        inputs["q"][:, :70, :, 0] = 20.0
        inputs["k"][:, position, :, 0] = 60.0
        parity(inputs, overrides=LARGE_SCORES[dtype])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scores_with_a_mean(self, dtype: torch.dtype) -> None:
        """The other tests have none: it sharpens the softmax and blunts the floor of dq."""
        inputs = make(dtype=dtype, mean=MEAN)
        parity(inputs, overrides=LARGE_SCORES[dtype] if dtype == torch.float32 else OFFSET)

    @pytest.mark.parametrize("splits", [1, 2, 5])
    def test_query_splits_of_the_backward(
        self, splits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from equiseg_fast.kernels import attention as kernels

        def query_splits(programs: int, blocks: int, num_sms: int) -> tuple[int, int]:
            chunk = -(-blocks // splits)
            return -(-blocks // chunk), chunk

        monkeypatch.setattr(kernels, "query_splits", query_splits)
        for dtype in DTYPES:
            parity(make(queries=300, keys=70, dtype=dtype))

    def test_without_lse(self) -> None:
        check_op_parity(
            triton_attention, reference.attention, make(), differentiable=("q", "k", "v")
        )

    def test_gradient_of_the_lse_alone(self) -> None:
        check_op_parity(
            lambda **x: triton_attention(**x, return_lse=True)[1],
            lambda **x: reference.attention(**x, return_lse=True)[1],
            make(),
            differentiable=("q", "k"),
            kinds={"out": "statistic"},
        )

    @pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
    def test_only_wanted_gradients(self, wanted: str) -> None:
        check_op_parity(triton_attention, reference.attention, make(), differentiable=tuple(wanted))

    @pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
    def test_empty(self, batch: int, queries: int) -> None:
        inputs = make(batch=batch, queries=queries)
        for x in inputs.values():
            x.requires_grad_()
        out, lse = triton_attention(**inputs, return_lse=True)
        assert out.shape == (batch, queries, 2, 32)
        assert lse.shape == (batch, 2, queries)
        for x, g in zip(
            inputs.values(),
            torch.autograd.grad(out.sum() + lse.sum(), list(inputs.values())),
            strict=True,
        ):
            assert g.shape == x.shape
            assert not g.any()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_are_bit_identical(self, dtype: torch.dtype) -> None:
        inputs = make(queries=130, dtype=dtype)
        for x in inputs.values():
            x.requires_grad_()

        def step() -> tuple[Tensor, ...]:
            out = triton_attention(**inputs)
            cotangent = random_normal(out.shape, dtype, seed=9, device=DEVICE)
            return out, *torch.autograd.grad(out, list(inputs.values()), cotangent)

        assert_deterministic(step, repeats=20 if DEVICE == "cuda" else 3)

    def test_row_results_do_not_depend_on_the_batch(self) -> None:
        inputs = make(batch=3)
        together = triton_attention(**inputs)
        alone = triton_attention(**{name: x[1:2] for name, x in inputs.items()})
        assert torch.equal(together[1:2], alone)


class TestBackends:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("return_lse", [False, True])
    def test_torch_backend(self, dtype: torch.dtype, return_lse: bool) -> None:
        inputs = make(dtype=dtype, mean=MEAN)
        check_op_parity(
            partial(attention, backend="torch", return_lse=return_lse),
            partial(reference.attention, return_lse=return_lse),
            inputs,
            differentiable=("q", "k", "v"),
            kinds={"out1": "statistic"} if return_lse else {},
            contraction=64 if DEVICE == "cpu" else 8,
            overrides=LARGE_SCORES[dtype] if dtype == torch.float32 else (),
        )
        plain = attention(**inputs, backend="torch")
        expected = reference.attention(**{name: x.double() for name, x in inputs.items()})
        assert_parity(plain, expected, reference.attention(**inputs), contraction=8)

    @pytest.mark.skipif(DEVICE == "cuda", reason="only the CPU shares out rows alone")
    @pytest.mark.parametrize(
        ("threads", "rows", "heads", "queries", "parts"),
        [
            (6, 1, 1, 12, 6),
            (2, 1, 5, 8, 2),
            (2, 1, 1, 7, 1),
            (2, 2, 1, 8, 1),
            (4, 1, 3, 24, 4),
            (6, 2, 1, 12, 3),
        ],
    )
    def test_queries_are_cut_for_idle_threads(
        self, monkeypatch: pytest.MonkeyPatch,
        threads: int, rows: int, heads: int, queries: int, parts: int,
    ) -> None:  # fmt: skip
        inputs = make(batch=rows, heads=heads, queries=queries)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert attention_module._query_parts(inputs["q"]) == parts
        tensors = [x.requires_grad_() for x in inputs.values()]
        out = attention(*tensors, backend="torch")
        expected = reference.attention(*tensors)
        torch.testing.assert_close(out, expected)
        g = torch.randn_like(out)
        torch.testing.assert_close(
            torch.autograd.grad(out, tensors, g), torch.autograd.grad(expected, tensors, g)
        )

    def test_torch_backend_in_float64(self) -> None:
        q, k, v = (
            x.requires_grad_() for x in make(queries=5, keys=7, dtype=torch.float64).values()
        )
        torch_attention = partial(attention, backend="torch", return_lse=True)
        torch.testing.assert_close(
            torch_attention(q, k, v), reference.attention(q, k, v, return_lse=True)
        )
        assert torch.autograd.gradcheck(torch_attention, (q, k, v))

    @pytest.mark.skipif(DEVICE == "cuda", reason="auto takes triton on a GPU")
    def test_auto_on_the_cpu_is_torch(self) -> None:
        assert "runs on backend 'torch'" in explain("attention", **make())

    def test_explain_gives_every_reason(self) -> None:
        inputs = make(dim=130, dtype=torch.float64)
        text = explain("attention", **inputs, backend="triton")
        assert "attention raises ValueError" in text
        assert "head dimension 130 is larger than 128" in text
        assert "dtype torch.float64 is not one of" in text
        with pytest.raises(ValueError, match="op must be one of add_layer_norm, attention, "):
            explain("attn", **inputs)

    def test_explicit_triton_never_falls_back(self) -> None:
        with pytest.raises(ValueError, match="backend 'triton' cannot run attention: head dim"):
            triton_attention(**make(dim=130))
        with pytest.raises(ValueError, match=r"dtype torch\.float64"):
            triton_attention(**make(dtype=torch.float64))

    def test_without_interpreter_or_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backend, "INTERPRET", False)
        monkeypatch.setattr(_backend, "TRITON_INSTALLED", False)
        inputs = {name: x.cpu() for name, x in make().items()}
        with pytest.raises(ValueError, match=r"triton is not installed; the tensors are on 'cpu'"):
            triton_attention(**inputs)
        torch.testing.assert_close(attention(**inputs), reference.attention(**inputs))

    def test_use_backend(self) -> None:
        inputs = make()
        with use_backend("reference"):
            assert torch.equal(attention(**inputs), reference.attention(**inputs))
            with use_backend("triton"):
                assert torch.equal(attention(**inputs), triton_attention(**inputs))
            assert "backend 'reference'" in explain("attention", **inputs)
        with pytest.raises(ValueError, match="backend must be one of triton, torch, reference"):
            attention(**inputs, backend="cuda")
        with pytest.raises(ValueError, match="got 'cuda'"), use_backend("cuda"):
            pass


class TestAutograd:
    @pytest.mark.parametrize("return_lse", [False, True])
    def test_double_backward(self, return_lse: bool) -> None:
        def gradient_penalty(fn: Callable[..., Any], inputs: dict[str, Tensor]) -> list[Tensor]:
            leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
            q, k, v = leaves
            # k also depends on q: only the direct dependence may enter each gradient
            outputs = fn(q, k + q[:, :1], v, return_lse=return_lse)
            outputs = outputs if return_lse else (outputs,)
            loss = sum((x * x.detach().cos()).sum() for x in outputs)
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

        inputs = make(queries=9, keys=11)
        doubled = {name: x.double() for name, x in inputs.items()}
        expected = gradient_penalty(reference.attention, doubled)
        actual = gradient_penalty(triton_attention, inputs)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))

    def test_inputs_that_need_no_gradient(self) -> None:
        inputs = make()
        inputs["v"].requires_grad_()
        out = triton_attention(**inputs)
        out.square().sum().backward()
        assert inputs["q"].grad is None
        assert inputs["k"].grad is None
        assert inputs["v"].grad is not None

    def test_no_graph_without_gradients(self) -> None:
        inputs = make()
        assert triton_attention(**inputs).grad_fn is None
        inputs["q"].requires_grad_()
        with torch.no_grad():
            assert triton_attention(**inputs).grad_fn is None

    def test_func_grad(self) -> None:
        q, k, v = make().values()
        loss = lambda fn: lambda q: fn(q, k, v).square().sum()  # noqa: E731
        actual = torch.func.grad(loss(triton_attention))(q)
        torch.testing.assert_close(actual, torch.func.grad(loss(reference.attention))(q))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    def test_autocast(self, dtype: torch.dtype, backend: str) -> None:
        inputs = make()
        inputs["k"] = inputs["k"].to(dtype)
        inputs["v"] = inputs["v"].to(dtype)
        inputs["q"].requires_grad_()
        with torch.autocast(DEVICE, dtype):
            mixed = attention(inputs["q"], inputs["k"], inputs["v"].float(), backend=backend)
        assert mixed.dtype == dtype
        mixed.float().square().sum().backward()
        assert inputs["q"].grad.dtype == torch.float32
        rounded = {name: x.detach().to(dtype) for name, x in inputs.items()}
        expected = attention(**rounded, backend=backend)
        # With and without a graph the torch backend takes different, equally good ways.
        torch.testing.assert_close(mixed, expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


class TestRegistration:
    def _saved(self, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v = make(queries=9, keys=11, dtype=dtype).values()
        out, lse = torch.ops.equiseg_fast.attention_fwd(q, k, v, 0.2, False)
        return q, k, v, out, lse

    @pytest.mark.parametrize("interpret", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(
        self, dtype: torch.dtype, interpret: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if DEVICE == "cpu":
            monkeypatch.setattr(_backend, "INTERPRET", interpret)
        q, k, v, out, lse = self._saved(dtype)
        torch.library.opcheck(torch.ops.equiseg_fast.attention_fwd, (q, k, v, 0.2, False))
        strided = q.transpose(1, 2).contiguous().transpose(1, 2)
        torch.library.opcheck(torch.ops.equiseg_fast.attention_fwd, (strided, k, v, 0.2, False))
        for needs in ((True, True, True), (True, False, False), (False, True, False)):
            for grad_lse in (None, torch.randn_like(lse)):
                args = (torch.randn_like(out), grad_lse, q, k, v, out, lse, 0.2, False, *needs)
                torch.library.opcheck(torch.ops.equiseg_fast.attention_bwd, args)

    @pytest.mark.skipif(DEVICE == "cuda", reason="the CPU formula stands in where no GPU is")
    def test_cpu_implementation_is_the_kernels_twin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = make()
        leaves = [x.requires_grad_() for x in inputs.values()]
        monkeypatch.setattr(_backend, "INTERPRET", False)
        monkeypatch.setattr(_backend, "triton_reasons", lambda *_: [])
        out, lse = triton_attention(*leaves, return_lse=True)
        expected, expected_lse = reference.attention(*leaves, return_lse=True)
        torch.testing.assert_close(lse, expected_lse)
        cotangents = (torch.randn_like(out), torch.randn_like(lse))
        actual = torch.autograd.grad((out, lse), leaves, cotangents)
        wanted = torch.autograd.grad((expected, expected_lse), leaves, cotangents)
        torch.testing.assert_close((out, *actual), (expected, *wanted), rtol=1e-4, atol=1e-5)

    def test_meta(self) -> None:
        q, k, v = (x.to("meta").requires_grad_() for x in make().values())
        out, lse = torch.ops.equiseg_fast.attention_fwd(q, k, v, 0.2, False)
        assert (out.shape, lse.shape) == (q.shape, (2, 2, 65))
        assert attention(q, k, v).shape == q.shape

    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile_without_graph_breaks(self, compiler: str, dynamic: bool) -> None:
        torch._dynamo.reset()

        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = triton_attention(q * 2, k, v, return_lse=True)
            return (out * out).sum() + lse.sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=compiler)
        for queries, keys in ((65, 77), (33, 20)) if dynamic else ((65, 77),):
            inputs = [x.requires_grad_() for x in make(queries=queries, keys=keys).values()]
            actual, expected = compiled(*inputs), loss(*inputs)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs)
            )

    def test_dynamic_sizes_compile_once(self) -> None:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(
            lambda q, k, v: triton_attention(q, k, v), fullgraph=True, dynamic=True, backend=counter
        )
        for queries in (64, 33, 47, 200):
            compiled(*make(queries=queries, keys=2 * queries + 1).values())
        assert counter.frame_count == 1

    def test_export(self) -> None:
        class Layer(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return triton_attention(q, k, v)

        inputs = tuple(make().values())
        program = torch.export.export(Layer(), inputs)
        assert "equiseg_fast.attention_fwd" in str(program.graph)
        torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        inputs = [x.requires_grad_() for x in make().values()]
        plain = torch.autograd.grad(triton_attention(*inputs).square().sum(), inputs)
        out = torch.utils.checkpoint.checkpoint(triton_attention, *inputs, use_reentrant=reentrant)
        out.square().sum().backward()
        for x, g in zip(inputs, plain, strict=True):
            assert torch.equal(x.grad, g)


class TestBadInput:
    def test_errors_name_the_argument(self) -> None:
        q, k, v = make().values()
        cases = [
            ((q.tolist(), k, v), TypeError, r"q must be a tensor \[B, Lq, H, D\]; got list"),
            ((q.long(), k, v), TypeError, "q must have dtype float64, float32, .*; got int64"),
            ((q[0], k, v), ValueError, r"q must have shape \[B, Lq, H, D\]; got \[65, 2, 32\]"),
            ((q, k.half(), v), TypeError, "k must have the dtype of q"),
            ((q, k.to("meta"), v.to("meta")), ValueError, "k must be on the device of q"),
            (
                (q, k[:1], v[:1]),
                ValueError,
                r"k must have shape \[B, Lk, H, D\] = \[2, 77, 2, 32\]",
            ),
            ((q, k[..., :16], v), ValueError, "k must have shape"),
            ((q, k, v[:, :5]), ValueError, "v must have shape"),
            ((q, k[:, :0], v[:, :0]), ValueError, "k must have at least one key"),
            ((q[..., :0], k[..., :0], v[..., :0]), ValueError, "at least one head and channel"),
        ]
        for args, error, message in cases:
            for backend in ("triton", "torch", "reference"):
                with pytest.raises(error, match=message):
                    attention(*args, backend=backend)

    @pytest.mark.parametrize("lengths", [(1024, 256), (1, 300), (300, 8)])
    def test_another_layout_that_does_not_fit_has_a_hint(self, lengths: tuple[int, int]) -> None:
        """As scaled_dot_product_attention takes it: [B, H, L, D]."""
        q, k = (torch.randn(2, 8, length, 32) for length in lengths)
        with pytest.raises(ValueError, match=r"k must have .* pass q.transpose\(1, 2\), and so k"):
            attention(q, k, k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        assert attention(q, k, k).shape == q.shape
        # Keys that are shared by heads are another mistake.
        q, k = torch.randn(2, 100, 8, 32), torch.randn(2, 100, 2, 32)
        with pytest.raises(ValueError, match=r"k must have shape .* got \[2, 100, 2, 32\]$"):
            attention(q, k, k)

    @pytest.mark.parametrize(("heads", "length"), [(1, 256), (8, 1024), (64, 256)])
    def test_another_layout_that_fits_is_refused(self, heads: int, length: int) -> None:
        """As the projections of a layer leave it for scaled_dot_product_attention."""
        q, k, v = torch.randn(1, length, 3, heads, 8).permute(2, 0, 3, 1, 4)
        with pytest.raises(ValueError, match=r"q must have .* pass q.transpose\(1, 2\)"):
            attention(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        assert attention(q, k, v).shape == q.shape

    @pytest.mark.parametrize(
        ("queries", "keys", "heads"),
        [
            (1, 1, 128), (1, 300, 128), (4, 4, 255), (64, 64, 128), (65, 65, 256), (1, 2, 512),
            (49, 49, 32), (4096, 64, 8),
        ],
    )  # fmt: skip
    def test_few_queries_and_many_heads_are_served(
        self, queries: int, keys: int, heads: int
    ) -> None:
        """In either memory: of no model's heads are there 256."""
        for layout in ("BLHD", "BHLD"):
            q, k = (
                torch.randn(1, n, heads, 4)
                if layout == "BLHD"
                else torch.randn(1, heads, n, 4).transpose(1, 2)
                for n in (queries, keys)
            )
            assert attention(q, k, k).shape == q.shape

    def test_pixels_for_heads_are_served(self) -> None:
        """Attention over few frames, of every pixel on its own."""
        frames = torch.randn(1, 4, 1024, 8)
        assert attention(frames, frames, frames).shape == frames.shape

    def test_nothing_is_changed(self) -> None:
        inputs = make()
        before = {name: x.clone() for name, x in inputs.items()}
        triton_attention(**inputs)
        assert all(torch.equal(before[name], x) for name, x in inputs.items())
