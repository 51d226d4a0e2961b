"""The tolerance policy, tested with kernels that are right and kernels that are wrong.

The kernel is a flash-style attention in plain PyTorch: key tiles, a running maximum, fp32
accumulators, P and dS rounded to the dtype of the inputs before they are multiplied.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from equiseg_fast import testing
from equiseg_fast.testing import assert_parity, check_op_parity, random_normal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK = 16
# Sizes of (B, Lq, Lk, H, D): no length is a multiple of the block.
SHAPES = [(2, 70, 77, 2, 32), (1, 65, 200, 1, 64), (1, 7, 33, 2, 16), (2, 3, 7, 1, 8)]


def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v), s.logsumexp(-1)


class TiledAttention(torch.autograd.Function):
    """Heads first inside; `bug` names the one thing that is done wrong."""

    @staticmethod
    def scores(q: Tensor, k: Tensor, bug: str) -> Tensor:
        wrong = {"scale off by 1 %": 1.01, "scale off by 0.3 %": 1.003}.get(bug, 1.0)
        return q @ k.mT * (q.shape[-1] ** -0.5 * wrong)

    @staticmethod
    def tiles(k: Tensor, v: Tensor, bug: str) -> list[tuple[Tensor, Tensor]]:
        if bug == "last key dropped":
            k, v = k[..., :-1, :], v[..., :-1, :]
        if bug == "padding not masked":
            padding = (0, 0, 0, -k.shape[-2] % BLOCK)
            k, v = torch.nn.functional.pad(k, padding), torch.nn.functional.pad(v, padding)
        return list(zip(k.split(BLOCK, -2), v.split(BLOCK, -2), strict=True))

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bug: str) -> tuple[Tensor, Tensor]:
        dtype = q.dtype
        accumulator = {torch.float32: torch.float16}.get(dtype, dtype)
        qf, kf, vf = (x.transpose(1, 2).float() for x in (q, k, v))
        m = torch.full(qf.shape[:-1], -math.inf)
        total, acc = torch.zeros_like(m), torch.zeros_like(qf)
        for k_tile, v_tile in TiledAttention.tiles(kf, vf, bug):
            s = TiledAttention.scores(qf, k_tile, bug)
            m_new = torch.maximum(m, s.amax(-1))
            p, rescale = (s - m_new[..., None]).exp(), (m - m_new).exp()
            total = total * (1.0 if bug == "denominator not rescaled" else rescale) + p.sum(-1)
            acc = acc * rescale[..., None] + p.to(dtype).float() @ v_tile
            if bug == "low-precision accumulator":
                acc = acc.to(accumulator).float()
            m = m_new
        out, lse = (acc / total[..., None]).to(dtype).transpose(1, 2), m + total.log()
        if bug == "one row zero":
            out[:, -1] = 0
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.bug = bug
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dtype, scale = q.dtype, q.shape[-1] ** -0.5
        qf, kf, vf, do, o = (x.transpose(1, 2).float() for x in (q, k, v, dout, out))
        delta = (do * o).sum(-1) - dlse
        dq, dk, dv = torch.zeros_like(qf), [], []
        for k_tile, v_tile in TiledAttention.tiles(kf, vf, ctx.bug):
            p = (TiledAttention.scores(qf, k_tile, ctx.bug) - lse[..., None]).exp()
            ds = (p * (do @ v_tile.mT - delta[..., None])).to(dtype).float()
            dq = dq + ds @ k_tile * scale
            dk.append(ds.mT @ qf * (scale * (1.01 if ctx.bug == "dK off by 1 %" else 1.0)))
            dv.append(p.to(dtype).float().mT @ do)
        # Dropped keys get no gradient, padded ones are cut off.
        dk, dv = (torch.cat(x, -2)[..., : k.shape[1], :] for x in (dk, dv))
        missing = (0, 0, 0, k.shape[1] - dk.shape[-2])
        dk, dv = (torch.nn.functional.pad(x, missing) for x in (dk, dv))
        return *(x.to(dtype).transpose(1, 2) for x in (dq, dk, dv)), None


def attention_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str = "contiguous"
) -> dict[str, Tensor]:
    b, lq, lk, h, d = shape
    make = partial(random_normal, dtype=dtype, layout=layout, unit_last_stride=True)
    return {
        name: make((b, length, h, d), seed=10 * seed + i)
        for i, (name, length) in enumerate((("q", lq), ("k", lk), ("v", lk)))
    }


def check_attention(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, bug: str = "", **options: Any
) -> dict[str, testing.Parity]:
    return check_op_parity(
        lambda q, k, v: TiledAttention.apply(q, k, v, bug),
        reference,
        attention_inputs(shape, dtype, seed, options.pop("layout", "contiguous")),
        differentiable=("q", "k", "v"),
        seed=1000 + seed,
        kinds={"lse": "statistic"},
        output_names=("out", "lse"),
        contraction=min(shape[1:3]),
        **options,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correct_kernel_passes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for seed in range(15 if shape in SHAPES[:2] else 40):
        records = check_attention(shape, dtype, seed)
    assert list(records) == ["out", "lse", "dq", "dk", "dv"]
    assert all(0 < record.budget_used <= 1 for record in records.values())


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "bug",
    [
        "scale off by 1 %",
        "scale off by 0.3 %",
        "last key dropped",
        "padding not masked",
        "one row zero",
        "denominator not rescaled",
        "dK off by 1 %",
        "low-precision accumulator",
    ],
)
def test_wrong_kernel_fails(shape: tuple[int, ...], dtype: torch.dtype, bug: str) -> None:
    wrong = "dk" if bug.startswith("dK") else "out"
    tier = "B eager" if dtype == torch.float32 else "A floor"
    for seed in range(3):
        with pytest.raises(AssertionError, match=f"{wrong}: {tier}, rms error"):
            check_attention(shape, dtype, seed, bug)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_kernel_fails_when_tiny(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="out: C tiny, amax error"):
        check_attention(SHAPES[3], dtype, bug="last key dropped")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_attention_with_strange_strides(layout: str) -> None:
    check_attention(SHAPES[0], torch.float16, layout=layout, cotangent=layout)


def test_what_is_checked_before_numbers() -> None:
    x = random_normal((4, 5), torch.float16, seed=0)
    with pytest.raises(AssertionError, match=r"dq: dtype is torch.float32, expected torch.float16"):
        assert_parity(x.float(), x.double(), x, name="dq")
    with pytest.raises(AssertionError, match=r"shape is torch.Size\(\[5, 4\]\), expected"):
        assert_parity(x.T, x.double(), x)
    with pytest.raises(AssertionError, match="the oracle has"):
        assert_parity(x, x.double().T, x)
    with pytest.raises(AssertionError, match="device is meta, expected cpu"):
        assert_parity(x.to("meta"), x.double(), x)
    with pytest.raises(ValueError, match="kind must be one of"):
        assert_parity(x, x.double(), x, kind="backward")
    with pytest.raises(ValueError, match="tf32 concerns fp32"):
        assert_parity(x, x.double(), x, tf32=True)


def test_values_that_are_not_finite() -> None:
    nan, inf = math.nan, math.inf
    oracle = torch.tensor([1.0, nan, inf, -inf, 1e5], dtype=torch.float64)
    good = oracle.to(torch.float16)
    assert good[4] == inf
    assert_parity(good, oracle, good)
    for index, value, message in (
        (0, nan, "not finite where the oracle is"),
        (0, inf, "not finite where the oracle is"),
        (1, 0.0, "not NaN where the oracle is NaN"),
        (2, -inf, "another value where the oracle is infinite"),
        (2, nan, "another value where the oracle is infinite"),
        (4, 65504.0, "another value where the oracle is infinite"),
    ):
        bad = good.clone()
        bad[index] = value
        with pytest.raises(AssertionError, match=rf"{message}, at 1 of 5 .* first at \({index},\)"):
            assert_parity(bad, oracle, good)


def test_eager_that_overflows_is_no_yardstick() -> None:
    oracle = random_normal((8, 64), torch.float64, seed=0)
    good = oracle.to(torch.float16)
    overflown = good.clone()
    overflown[0] = math.inf
    assert_parity(good, oracle, overflown)
    with pytest.raises(AssertionError, match="B eager"):
        assert_parity(good * 1.01, oracle, overflown)


def test_message_names_the_worst_element() -> None:
    oracle = random_normal((16, 32), torch.float64, seed=0)
    good = oracle.float()
    bad = good.clone()
    bad[3, 7] = 100.0
    with pytest.raises(AssertionError, match="amax error") as failure:
        assert_parity(bad, oracle, good, name="dk", kind="gradient")
    message = str(failure.value)
    assert "dk: B eager" in message
    assert "allowed" in message
    assert f"worst at (3, 7): got 100.0, oracle {oracle[3, 7].item()!r}" in message


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("side", [4, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["forward", "gradient", "parameter", "statistic"])
def test_every_result_meets_a_tier(kind: str, dtype: torch.dtype, side: int, tf32: bool) -> None:
    if dtype != torch.float32 and (tf32 or kind == "statistic"):
        pytest.skip("only fp32 results are statistics or come from TF32")
    oracle = random_normal((side, side), torch.float64, seed=0)
    good = oracle.to(dtype)
    large = {"forward": "B eager", "gradient": "B eager", "parameter": "D sums"}
    small = {"parameter": "D tiny"}
    tier = small.get(kind, "C tiny") if side == 4 else large.get(kind, "G statistics")
    with pytest.raises(AssertionError, match="E tf32" if tf32 else tier):
        assert_parity((oracle * 1.1).to(dtype), oracle, good, kind=kind, tf32=tf32)


def test_exact() -> None:
    oracle = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    x = oracle.to(torch.bfloat16)
    assert_parity(x, oracle, x, kind="exact")
    bad = x.clone()
    bad[2, 3] = 11.0625
    with pytest.raises(AssertionError, match=r"another value, at 1 of 12 .* first at \(2, 3\)"):
        assert_parity(bad, oracle, x, kind="exact")
    counts = torch.tensor([3, 0, 2])

    def count(x: Tensor, shift: int) -> tuple[Tensor, Tensor]:
        return x * 2, counts + shift

    options: dict[str, Any] = {"differentiable": ["x"], "output_names": ("y", "counts")}
    inputs = {"x": x, "shift": 0}
    assert check_op_parity(count, count, inputs, **options)["counts"].kind == "exact"
    with pytest.raises(AssertionError, match="counts: another value"):
        check_op_parity(lambda x, shift: count(x, 1), count, inputs, **options)


def test_one_rounding_sits_on_the_floor() -> None:
    x = random_normal((64, 64), torch.bfloat16, seed=0)
    oracle = torch.nn.functional.gelu(x.double())
    eager = torch.nn.functional.gelu(x)
    once = torch.nn.functional.gelu(x.float())
    (floor,) = [c for c in assert_parity(once.bfloat16(), oracle, eager).checks if "A" in c.tier]
    assert floor.ratio == pytest.approx(1.0, abs=1e-3)
    biased = (once * 1.003).bfloat16()
    with pytest.raises(AssertionError, match="A floor") as failure:
        assert_parity(biased, oracle, eager)
    assert "`contraction`" in str(failure.value)
    with pytest.raises(AssertionError, match="A floor"):
        assert_parity((once * 1.005).bfloat16(), oracle, eager * 1.005, kind="gradient")
    assert_parity(biased, oracle, eager * 1.003, contraction=0)


def test_parameter_sums_may_grow_with_the_chain() -> None:
    oracle = random_normal((32, 32), torch.float64, seed=0)
    good = oracle.float()
    drifted = (oracle * (1 + 3 * 2.0**-23)).float()
    check = partial(assert_parity, drifted, oracle, good, kind="parameter")
    check(chain=1024)
    with pytest.raises(AssertionError, match="D sums"):
        check(chain=1)


@pytest.mark.parametrize("mean", [0.0, 0.7, 3.0])
def test_errors_of_long_sums_walk_at_random(mean: float) -> None:
    """Terms that are added one after the other pass in every column; one lost term does not."""
    terms = mean + random_normal((16560, 128), seed=0)
    oracle, eager = terms.double().sum(0), terms.sum(0)
    total = torch.zeros(128)
    for row in terms:
        total += row
    for columns in (slice(None), slice(64)):
        check = partial(
            assert_parity, oracle=oracle[columns], eager=eager[columns], kind="parameter",
            chain=len(terms),
        )  # fmt: skip
        check(total[columns])
        with pytest.raises(AssertionError, match="D tiny, amax"):
            check((total - terms[0])[columns])


def test_tf32() -> None:
    x, w = (random_normal((64, 64), seed=i) for i in range(2))
    eager, oracle = x @ w, x.double() @ w.double()

    def rounded(t: Tensor, bits: int) -> Tensor:
        half = 1 << (22 - bits)
        return ((t.view(torch.int32) + half) & -(2 * half)).view(torch.float32)

    tf32 = rounded(x, 10) @ rounded(w, 10)
    assert_parity(tf32, oracle, eager, tf32=True)
    with pytest.raises(AssertionError, match="B eager"):
        assert_parity(tf32, oracle, eager)
    with pytest.raises(AssertionError, match="E tf32"):
        assert_parity(rounded(x, 7) @ rounded(w, 7), oracle, eager, tf32=True)


def test_yardsticks_are_computed_without_tf32() -> None:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has no fp32_precision")
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    assert before != "ieee"
    seen = []

    def eager(x: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        seen.append(conv.fp32_precision)
        return x.clone()

    x = random_normal((2, 2), seed=0)
    check_op_parity(lambda x: x + 0, lambda x: x, {"x": x}, differentiable=[], eager_fn=eager)
    assert seen == ["ieee", "ieee"]
    assert conv.fp32_precision == before


def test_statistics_of_half_precision_inputs_are_held_to_fp32() -> None:
    def half_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference(q, k, v)
        return out, lse.float()

    inputs = attention_inputs(SHAPES[1], torch.float16, 0)
    options = {"differentiable": [], "output_names": ("out", "lse"), "contraction": 0}
    kinds = {"lse": "statistic"}
    with pytest.raises(AssertionError, match="lse: dtype is"):
        check_op_parity(reference, reference, inputs, kinds=kinds, **options)
    with pytest.raises(AssertionError, match="lse: C tiny"):
        check_op_parity(half_lse, reference, inputs, kinds=kinds, **options)


def test_fp32_results_of_half_precision_inputs_are_held_to_fp32() -> None:
    def square(x: Tensor) -> Tensor:
        return (x * x).to(torch.promote_types(x.dtype, torch.float32))

    x = random_normal((32, 32), torch.float16, seed=0)
    check = partial(check_op_parity, reference_fn=square, inputs={"x": x}, differentiable=["x"])
    check(lambda x: x.float() * x.float())
    with pytest.raises(AssertionError, match="out: B eager"):
        check(square)


def test_op_that_misbehaves() -> None:
    x = random_normal((3, 4), seed=0)
    check = partial(check_op_parity, inputs={"x": x}, differentiable=["x"])
    with pytest.raises(AssertionError, match="x was changed"):
        check(lambda x: x.detach().mul_(2) + 0 * x, lambda x: 2 * x)
    window = random_normal((3, 4), seed=0, layout="sliced")
    with pytest.raises(AssertionError, match="or the memory around it"):
        check(
            lambda x: x + x.detach().as_strided((1,), (1,), 0).fill_(0.0),
            torch.clone,
            inputs={"x": window},
        )

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            dx = 2 * dy
            dy.mul_(2)
            return dx

    with pytest.raises(AssertionError, match="cotangent of out was changed"):
        check(lambda x: Greedy.apply(x), lambda x: 2 * x)
    with pytest.raises(AssertionError, match="requires_grad is False"):
        check(lambda x: (2 * x).detach(), lambda x: 2 * x)
    with pytest.raises(AssertionError, match="number of outputs"):
        check(lambda x: (2 * x, x), lambda x: 2 * x)
    with pytest.raises(AssertionError, match="dx: C tiny"):
        check(lambda x: x.detach() * 2 + 0 * x, lambda x: 2 * x)
    with pytest.raises(AssertionError, match="dx: C tiny"):
        check(lambda x: 2 * x.detach() + 2 * (x - x.detach()).flip(0), lambda x: 2 * x)
    with pytest.raises(ValueError, match="no oracle"):
        check(lambda x: 2 * x, lambda x: 2 * x.float())
    with pytest.raises(ValueError, match="kinds must name some"):
        check(lambda x: 2 * x, lambda x: 2 * x, kinds={"dy": "parameter"})
    with pytest.raises(ValueError, match="differentiable"):
        check(lambda x: 2 * x, lambda x: 2 * x, differentiable=["y"])


def test_empty_tensors() -> None:
    x = random_normal((0, 5), torch.float16, seed=0)
    records = check_op_parity(lambda x: -x, lambda x: -x, {"x": x}, differentiable=["x"])
    assert records["out"].shape == (0, 5)
    assert records["out"].rms == records["dx"].rms == 0.0
