"""The repairs of Triton's interpreter: what they make right, each against PyTorch."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from equiseg_fast.kernels import _interpreter  # noqa: E402

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

BITS = torch.int16


@triton.jit
def _dot_kernel(p_a, p_b, p_c, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    o_tile = o[:, None] * BLOCK + o[None, :]
    b_a, b_b = tl.load(p_a + o_tile), tl.load(p_b + o_tile)
    b_c = tl.dot(b_a, tl.trans(b_b), tl.load(p_c + o_tile), input_precision="ieee")
    tl.store(p_c + o_tile, b_c)


@triton.jit
def _cast_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o, mask=o < n, other=0.0)
    tl.store(p_y + o, b_x.to(p_y.dtype.element_ty), mask=o < n)


@triton.jit
def _arithmetic_kernel(p_x, p_y, p_sum, p_fma, p_select, p_exp, p_less, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x, b_y = tl.load(p_x + o), tl.load(p_y + o)
    tl.store(p_sum + o, b_x + b_y)
    tl.store(p_fma + o, tl.fma(b_x, b_y, b_x))
    tl.store(p_select + o, tl.where(b_x < b_y, b_x, 1.5))
    tl.store(p_exp + o, tl.exp(b_x.to(tl.float32)).to(tl.bfloat16))
    tl.store(p_less + o, b_x < b_y)


@triton.jit
def _loop_kernel(p_y, p_n, n):
    b = tl.zeros([1], tl.int32)
    for i in range(n):
        b += i
    for i in tl.range(0, tl.cdiv(n, 2), 2):
        b += i
    for i in range(tl.load(p_n)):
        b += i
    tl.store(p_y + tl.arange(0, 1), b)


@triton.jit
def _reduce_kernel(p_x, p_max, p_sum, BLOCK: tl.constexpr):
    b_x = tl.load(p_x + tl.arange(0, BLOCK))
    tl.store(p_max, tl.max(b_x, 0))
    tl.store(p_sum, tl.sum(b_x.to(tl.float32), 0))


@triton.jit
def _full_kernel(p_y, BLOCK: tl.constexpr):
    tl.store(p_y + tl.arange(0, BLOCK), tl.full([BLOCK], 1.0039, p_y.dtype.element_ty))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y


def test_install_twice_changes_nothing() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    _interpreter.install()
    before = dict(vars(InterpreterBuilder))
    _interpreter.install()
    assert dict(vars(InterpreterBuilder)) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_accumulates_in_fp32(dtype: torch.dtype) -> None:
    a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
    start = torch.randn(32, 32)
    c = start.clone()
    _dot_kernel[(1,)](a, b, c, BLOCK=32)
    torch.testing.assert_close(c, start + a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


def test_cast_to_bf16_is_torch_bit_for_bit() -> None:
    """All exponents, subnormals and overflow included, with random and with tying mantissas."""
    bits = torch.arange(2**16, dtype=torch.int64) << 16
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (bits[:, None] + low).flatten().to(torch.int32).view(torch.float32)
    x = torch.cat([x[~x.isnan()], torch.randn(4096)])
    assert torch.equal(cast(x, torch.bfloat16).view(BITS), x.to(torch.bfloat16).view(BITS))


def test_cast_keeps_nan_and_infinity() -> None:
    x = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38])
    y = cast(x, torch.bfloat16)
    assert y[:2].isnan().all()
    assert torch.equal(y[2:], x[2:].to(torch.bfloat16))


def test_nan_with_a_small_payload_does_not_round_to_infinity() -> None:
    x = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    assert cast(x, torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
def test_cast_from_bf16(dtype: torch.dtype) -> None:
    x = (torch.randn(1000) * 100).to(torch.bfloat16)
    assert torch.equal(cast(x, dtype), x.to(dtype))


def test_cast_from_fp16_to_bf16() -> None:
    x = torch.randn(1000).half()
    assert torch.equal(cast(x, torch.bfloat16), x.to(torch.bfloat16))


def test_arithmetic_rounds_once() -> None:
    x, y = (torch.randn(64).bfloat16() for _ in range(2))
    sums, fma, select, exp = (torch.empty(64, dtype=torch.bfloat16) for _ in range(4))
    less = torch.empty(64, dtype=torch.bool)
    _arithmetic_kernel[(1,)](x, y, sums, fma, select, exp, less, BLOCK=64)
    assert torch.equal(sums, x + y)
    assert torch.equal(fma, (x.double() * y.double() + x.double()).float().bfloat16())
    assert torch.equal(select, torch.where(x < y, x, 1.5))
    assert torch.equal(less, x < y)
    torch.testing.assert_close(exp, x.float().exp().bfloat16())


def test_constants_round() -> None:
    y = torch.empty(16, dtype=torch.bfloat16)
    _full_kernel[(1,)](y, BLOCK=16)
    assert torch.equal(y, torch.full((16,), 1.0039, dtype=torch.bfloat16))


def test_reductions() -> None:
    x = torch.randn(128).bfloat16()
    largest, total = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    _reduce_kernel[(1,)](x, largest, total, BLOCK=128)
    assert largest.item() == x.max().item()
    torch.testing.assert_close(total[0], x.float().sum())


@pytest.mark.parametrize("n", [0, 1, 7])
def test_runtime_loop_bounds(n: int) -> None:
    y = torch.empty(1, dtype=torch.int32)
    _loop_kernel[(1,)](y, torch.tensor([n], dtype=torch.int32), n)
    assert y.item() == 2 * sum(range(n)) + sum(range(0, -(-n // 2), 2))


def test_bit_conversions_are_inverse() -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).numpy()
    wide = _interpreter.bfloat16_bits_to_float32(bits)
    back = _interpreter.float32_to_bfloat16_bits(wide)
    finite = ~torch.from_numpy(wide).isnan().numpy()
    assert (back[finite] == bits[finite]).all()
    assert (back[~finite] == 0x7FC0).all()
