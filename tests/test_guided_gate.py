"""The gate: the Triton kernels against the fp64 oracle, and the operation within PyTorch."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import explain, guided_gate, reference
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
    random_present,
    token_shape,
)

OPERATION = Operation(
    guided_gate,
    reference.guided_gate,
    lambda s: {"x": (s.modalities, *token_shape(s)), "logits": (s.modalities, s.batch, s.channels)},
    random_present,
    fp32=("logits",),
    kinds={"dlogits": "parameter"},
)


triton_gate = partial(guided_gate, backend="triton")


def make(
    modalities: int = 3,
    batch: int = 2,
    tokens: int = 35,
    channels: int = 33,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
) -> dict[str, Tensor]:
    """x and logits of normal random numbers."""
    size = (modalities, batch, tokens, channels)
    logits = (modalities, batch, channels)
    return {
        "x": random_normal(size, dtype, seed=seed, mean=MEAN, layout=layout, device=DEVICE),
        "logits": random_normal(logits, seed=seed + 1, mean=MEAN, device=DEVICE, layout=layout),
    }


def some_absent(modalities: int, batch: int) -> Tensor:
    """`[M, B]` bool: image b has lost b + 1 modalities from b on; a single one is never lost."""
    m, b = torch.arange(modalities)[:, None], torch.arange(batch)
    return (((m - b) % modalities > b) | (modalities == 1)).to(DEVICE)


def parity(inputs: dict[str, Any], backend: str = "triton", **kwargs: Any) -> None:
    """Both outputs and both gradients of a backend under the tolerance policy."""
    options = {"rho": kwargs.pop("rho", 0.5)}
    check_op_parity(
        partial(guided_gate, backend=backend, **options),
        partial(reference.guided_gate, **options),
        inputs,
        differentiable=kwargs.pop("differentiable", ("x", "logits")),
        output_names=("branches", "fused"),
        kinds=kwargs.pop("kinds", {"dlogits": "parameter"}),
        chain=inputs["x"].shape[2],
        **kwargs,
    )


class TestParity:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("modalities", "batch", "tokens", "channels"),
        [
            (1, 1, 1, 1),
            (1, 2, 35, 32),
            (2, 1, 130, 64),
            (3, 2, 35, 33),
            (4, 1, 70, 160),
            (8, 1, 9, 5),
        ],
    )
    @pytest.mark.parametrize("masked", [False, True])
    def test_sizes(
        self,
        dtype: torch.dtype,
        modalities: int,
        batch: int,
        tokens: int,
        channels: int,
        masked: bool,
    ) -> None:
        inputs: dict[str, Any] = make(modalities, batch, tokens, channels, dtype)
        if masked:
            inputs["present"] = some_absent(modalities, batch)
        parity(inputs)

    @pytest.mark.parametrize("modalities", [5, 6, 7])
    def test_modalities_that_are_no_power_of_two(self, modalities: int) -> None:
        parity({**make(modalities, 2, 20, 16), "present": some_absent(modalities, 2)})

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides_of_inputs(self, dtype: torch.dtype, layout: str) -> None:
        present = some_absent(3, 2).t().contiguous().t()
        parity({**make(dtype=dtype, layout=layout), "present": present})

    @pytest.mark.parametrize("cotangent", LAYOUTS)
    def test_strides_of_cotangents(self, cotangent: str) -> None:
        parity(make(), cotangent=cotangent)

    def test_strides_of_cotangents_that_are_used_as_they_are(self) -> None:
        x, logits = make(tokens=70).values()
        plain = [random_normal(t.shape, seed=5, device=DEVICE) for t in (x, x[0])]
        strided = (
            with_layout(plain[0], "transposed", unit_last_stride=True),
            with_layout(plain[1], "sliced", unit_last_stride=True),
        )

        def step(*cotangents: Tensor) -> tuple[Tensor, ...]:
            backward = torch.ops.equiseg_fast.guided_gate_bwd
            return backward(*cotangents, x, logits, None, 0.5, True, True)

        for actual, expected in zip(step(*strided), step(*plain), strict=True):
            assert same_bits(actual, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_view_of_batch_major_features(self, dtype: torch.dtype) -> None:
        x = random_normal((2, 3, 35, 32), dtype, seed=4, device=DEVICE).transpose(0, 1)
        parity({"x": x, "logits": make(channels=32)["logits"]})

    @pytest.mark.parametrize("rho", [0.0, 0.3, 1.0, -2.0])
    def test_rho(self, rho: float) -> None:
        parity({**make(), "present": some_absent(3, 2)}, rho=rho)

    def test_equal_logits_leave_the_branches_as_they_are(self) -> None:
        inputs = make(modalities=3)
        inputs["logits"].zero_()
        branches, fused = triton_gate(**inputs, rho=0.3)
        assert torch.equal(branches, inputs["x"])
        torch.testing.assert_close(fused, inputs["x"].mean(dim=0))

    def test_saturated_softmax(self) -> None:
        inputs = make()
        inputs["logits"] *= 100
        # Weights are 0 and 1: the gradients of most logits vanish, and what is left cancels.
        parity(inputs, kinds={"dlogits": "gradient"})

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_absent_modalities_are_never_read(self, backend: str) -> None:
        inputs = make()
        present = some_absent(3, 2)
        inputs["x"][~present] = float("nan")
        inputs["logits"][~present] = float("nan")
        leaves = [t.requires_grad_() for t in inputs.values()]
        branches, fused = guided_gate(*leaves, present=present, backend=backend)
        cotangents = torch.randn_like(branches), torch.randn_like(fused)
        cotangents[0][~present] = float("nan")
        dx, dlogits = torch.autograd.grad((branches, fused), leaves, cotangents)
        for result in (branches, dx, dlogits):
            assert not result[~present].any()
            assert result.isfinite().all()
        assert fused.isfinite().all()

    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_image_without_any_modality(self, backend: str) -> None:
        inputs = make()
        present = torch.ones(3, 2, dtype=torch.bool, device=DEVICE)
        present[:, 1] = False
        leaves = [t.requires_grad_() for t in inputs.values()]
        branches, fused = guided_gate(*leaves, present=present, backend=backend)
        assert branches[:, 1].isnan().all()
        assert fused[1].isnan().all()
        assert fused[0].isfinite().all()
        for grad in torch.autograd.grad(branches[:, 0].sum() + fused.sum(), leaves):
            assert grad.isfinite().all()
            assert not grad[:, 1].any()

    @pytest.mark.parametrize("chunks", [1, 2, 40])
    def test_chunks_of_the_sum_over_tokens(
        self, chunks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from equiseg_fast.kernels import guided_gate as kernels

        def token_chunks(programs: int, blocks: int, num_sms: int) -> tuple[int, int]:
            chunk = -(-blocks // min(chunks, blocks))
            return -(-blocks // chunk), chunk

        tile = kernels.Tile(block_l=4, block_c=32, num_warps=4)
        monkeypatch.setattr(kernels, "token_chunks", token_chunks)
        monkeypatch.setattr(kernels, "guided_gate_fwd_config", lambda *_: tile)
        monkeypatch.setattr(kernels, "guided_gate_bwd_config", lambda *_: tile)
        parity({**make(batch=1, tokens=157, channels=20), "present": some_absent(3, 1)})

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("output", [0, 1])
    @pytest.mark.parametrize("wanted", ["x", "logits"])
    def test_one_output_or_one_gradient(self, backend: str, output: int, wanted: str) -> None:
        check_op_parity(
            lambda **k: guided_gate(**k, backend=backend)[output],
            lambda **k: reference.guided_gate(**k)[output],
            {**make(), "present": some_absent(3, 2)},
            differentiable=(wanted,),
            kinds={"dlogits": "parameter"} if wanted == "logits" else {},
            chain=35,
        )

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
    def test_empty(self, batch: int, tokens: int, backend: str) -> None:
        leaves = [t.requires_grad_() for t in make(batch=batch, tokens=tokens).values()]
        branches, fused = guided_gate(*leaves, backend=backend)
        assert branches.shape == (3, batch, tokens, 33)
        assert fused.shape == (batch, tokens, 33)
        grads = torch.autograd.grad(branches.sum() + fused.sum(), leaves)
        for t, g in zip(leaves, grads, strict=True):
            assert g.shape == t.shape
            assert not g.any()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_are_bit_identical(self, dtype: torch.dtype) -> None:
        leaves = [t.requires_grad_() for t in make(tokens=200, dtype=dtype).values()]

        def step() -> tuple[Tensor, ...]:
            outputs = triton_gate(*leaves)
            cotangents = [random_normal(y.shape, dtype, seed=9, device=DEVICE) for y in outputs]
            return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

        assert_deterministic(step, repeats=20 if DEVICE == "cuda" else 3)

    @pytest.mark.large_memory
    @pytest.mark.parametrize("dim", [0, 1, 2])
    def test_strides_beyond_32_bits(self, dim: int) -> None:
        """Modalities, images or chunks of tokens up to 2^31 elements apart."""
        x, logits = make(3, 3, 65, 2, torch.float16).values()
        strides = list(x.stride())
        strides[dim] = 2**31 // (x.size(dim) - 1) + x.numel()
        memory = torch.empty(2**31 + 2**18, dtype=x.dtype, device=DEVICE)
        far = memory.as_strided(x.shape, strides).copy_(x)

        def step(t: Tensor) -> tuple[Tensor, ...]:
            ops = torch.ops.equiseg_fast
            grads = ops.guided_gate_bwd(t, t[0], t, logits, None, 0.5, True, True)
            return *triton_gate(t, logits), *grads

        for actual, expected in zip(step(far), step(x), strict=True):
            assert same_bits(actual, expected)

    def test_results_of_an_image_do_not_depend_on_the_batch(self) -> None:
        inputs = make(batch=3)
        together = triton_gate(**inputs)[0]
        alone = triton_gate(**{name: t[:, 1:2] for name, t in inputs.items()})[0]
        assert same_bits(together[:, 1:2], alone)


class TestBackends:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("layout", ["contiguous", "transposed"])
    def test_torch_backend(self, dtype: torch.dtype, masked: bool, layout: str) -> None:
        inputs: dict[str, Any] = make(dtype=dtype, layout=layout)
        if masked:
            inputs["present"] = some_absent(3, 2)
        parity(inputs, backend="torch", cotangent=layout)

    def test_torch_backend_in_float64(self) -> None:
        x, logits = (t.double().requires_grad_() for t in make(2, 1, 5, 3).values())
        fn = partial(guided_gate, backend="torch", rho=0.3)
        torch.testing.assert_close(fn(x, logits), reference.guided_gate(x, logits, rho=0.3))
        assert torch.autograd.gradcheck(fn, (x, logits))
        assert torch.autograd.gradgradcheck(fn, (x, logits))

    def test_more_modalities_than_the_kernel_takes(self) -> None:
        inputs = make(modalities=9, tokens=3)
        with pytest.raises(ValueError, match="guided_gate: 9 modalities are more than 8"):
            triton_gate(**inputs)
        assert "9 modalities" in explain("guided_gate", **inputs)
        parity(inputs, backend="torch")

    def test_explicit_triton_never_falls_back(self) -> None:
        inputs = {name: t.double() for name, t in make().items()}
        with pytest.raises(ValueError, match=r"dtype torch\.float64"):
            triton_gate(**inputs)


class TestAutograd:
    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_double_backward(self, backend: str) -> None:
        def gradient_penalty(fn: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
            leaves = [t.detach().clone().requires_grad_() for t in inputs.values()]
            x, logits = leaves
            outputs = fn(x, logits + x.mean(dim=2), present=present, rho=0.3)
            loss = sum((y * y.detach().cos()).sum() for y in outputs)
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

        present = some_absent(3, 2)
        inputs = make(tokens=9)
        doubled = {name: t.double() for name, t in inputs.items()}
        expected = gradient_penalty(reference.guided_gate, doubled)
        actual = gradient_penalty(partial(guided_gate, backend=backend), inputs)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))

    def test_inputs_that_need_no_gradient(self) -> None:
        inputs = make()
        inputs["logits"].requires_grad_()
        triton_gate(**inputs)[1].square().sum().backward()
        assert inputs["x"].grad is None
        assert inputs["logits"].grad is not None

    def test_no_graph_without_gradients(self) -> None:
        inputs = make()
        assert triton_gate(**inputs)[0].grad_fn is None
        inputs["x"].requires_grad_()
        with torch.no_grad():
            assert triton_gate(**inputs)[0].grad_fn is None

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_saves_its_inputs_only(self, backend: str) -> None:
        saved: list[Tensor] = []
        inputs = make()
        leaves = [t.requires_grad_() for t in inputs.values()]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            guided_gate(*leaves, backend=backend)
        known = {t.data_ptr() for t in leaves}
        assert {t.data_ptr() for t in saved} <= known

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
    def test_autocast_changes_nothing(self, dtype: torch.dtype, backend: str) -> None:
        inputs = make(dtype=dtype)
        plain = guided_gate(**inputs, backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16):
            mixed = guided_gate(**inputs, backend=backend)
        assert all(same_bits(a, b) for a, b in zip(plain, mixed, strict=True))


class TestRegistration:
    @pytest.mark.parametrize("interpret", [True, False])
    def test_opcheck(self, interpret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if DEVICE == "cpu":
            monkeypatch.setattr(_backend, "INTERPRET", interpret)
        x, logits = make(tokens=9, dtype=torch.bfloat16).values()
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        forward, backward = (
            getattr(torch.ops.equiseg_fast, f"guided_gate_{name}") for name in ("fwd", "bwd")
        )
        torch.library.opcheck(forward, (x, logits, None, 0.5))
        torch.library.opcheck(forward, (strided, logits, some_absent(3, 2), 0.5))
        a, b = torch.randn_like(strided), torch.randn_like(x[0])
        torch.library.opcheck(backward, (a, b, strided, logits, None, 0.5, True, True))
        torch.library.opcheck(backward, (None, b, x, logits, some_absent(3, 2), 0.5, True, False))
        torch.library.opcheck(backward, (a, None, x, logits, None, 0.5, False, True))
        for needs in ((True, True), (False, False)):
            args = (None, None, x, logits, None, 0.5, *needs)
            torch.library.opcheck(backward, args, test_utils="test_faketensor")

    @pytest.mark.skipif(DEVICE == "cuda", reason="the CPU formula stands in where no GPU is")
    def test_cpu_implementation_is_the_kernels_twin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backend, "INTERPRET", False)
        monkeypatch.setattr(_backend, "triton_reasons", lambda *_: [])
        parity({**make(), "present": some_absent(3, 2)})

    def test_meta(self) -> None:
        x, logits = (t.to("meta").requires_grad_() for t in make().values())
        branches, fused = torch.ops.equiseg_fast.guided_gate_fwd(x, logits, None, 0.5)
        assert (branches.shape, fused.shape) == (x.shape, x.shape[1:])
        branches, fused = guided_gate(x, logits)
        grads = torch.autograd.grad((branches.sum() + fused.sum()), (x, logits))
        assert [g.shape for g in grads] == [x.shape, logits.shape]

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

        def loss(x: Tensor, logits: Tensor, present: Tensor) -> Tensor:
            branches, fused = guided_gate(x * 2, logits, present=present, backend=backend)
            return branches.square().sum() + fused.sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=compiler)
        for tokens in (35, 20) if dynamic else (35,):
            leaves = [t.requires_grad_() for t in make(tokens=tokens).values()]
            present = some_absent(3, 2)
            actual, expected = compiled(*leaves, present), loss(*leaves, present)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, leaves),
                torch.autograd.grad(expected, leaves),
                rtol=1e-4,
                atol=1e-4,
            )

    def test_dynamic_sizes_compile_once(self) -> None:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(
            lambda x, z: triton_gate(x, z), fullgraph=True, dynamic=True, backend=counter
        )
        compiled(*make().values())
        # What counts is that no later size compiles again.
        compilations = counter.frame_count
        for tokens in (20, 64):
            compiled(*make(tokens=tokens).values())
        assert counter.frame_count == compilations

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant: bool) -> None:
        leaves = [t.requires_grad_() for t in make().values()]
        plain = torch.autograd.grad(triton_gate(*leaves)[1].square().sum(), leaves)
        fused = torch.utils.checkpoint.checkpoint(triton_gate, *leaves, use_reentrant=reentrant)[1]
        fused.square().sum().backward()
        for t, g in zip(leaves, plain, strict=True):
            assert torch.equal(t.grad, g)


class TestBadInput:
    def test_errors_name_the_argument(self) -> None:
        x, z = make().values()
        mask = some_absent(3, 2)
        cases = [
            ((x.tolist(), z, mask), TypeError, r"x must be a tensor \[M, B, L, C\]; got list"),
            ((x.long(), z, mask), TypeError, "x must have dtype float64, float32, .*; got int64"),
            ((x[0], z, mask), ValueError, r"x must have shape \[M, B, L, C\]; got \[2, 35, 33\]"),
            ((x[:0], z[:0], mask[:0]), ValueError, "at least one modality and channel"),
            ((x[..., :0], z[..., :0], mask), ValueError, "at least one modality and channel"),
            ((x, z.half(), mask), TypeError, "logits must have dtype float32; got float16"),
            ((x.double(), z, mask), TypeError, "logits must have dtype float64; got float32"),
            ((x, z[:, :1], mask), ValueError, r"logits must have shape \[M, B, C\] = \[3, 2, 33\]"),
            ((x, z.to("meta"), mask), ValueError, "logits must be on the device of x"),
            ((x, z, mask.long()), TypeError, "present must have dtype bool; got int64"),
            ((x, z, mask[:2]), ValueError, r"present must have shape \[M, B\] = \[3, 2\]"),
        ]
        for (features, logits, present), error, message in cases:
            for backend in ("triton", "torch", "reference"):
                with pytest.raises(error, match=message):
                    guided_gate(features, logits, present=present, backend=backend)
