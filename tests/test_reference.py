"""The reference held against sources that share no code with it: attention, hub, mixer, block.

The oracle of every other test needs oracles of its own: cases worked out by hand, the formulas of
SegFormer, CMNeXt and EQUISeg written as loops over pixels and modalities, PyTorch's layers,
transformers' SegFormer, and numerical differentiation. The self-guided module, the decode head
and the losses are in `test_reference_sgm.py`.
"""

from collections.abc import Callable, Iterator
from itertools import product
from math import erf, exp, log, sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from equiseg_fast import reference

# Per image (column): all but one modality, another pair, a modality alone, all of them.
PRESENT = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)


def draw(*shape: int) -> Tensor:
    """Normal float64 numbers: continuous, so that a maximum has no ties."""
    return torch.randn(*shape, dtype=torch.float64)


def run(f: Callable, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of f, and the gradients of its inputs for a fixed random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = f(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    return outputs, list(torch.autograd.grad(outputs, leaves, cotangents))


def window(row: int, col: int, size: int, height: int, width: int) -> Iterator[tuple[int, ...]]:
    """Token index and (i, j) in the window, for the window's pixels inside the image."""
    for i, j in product(range(size), repeat=2):
        y, x = row + i - size // 2, col + j - size // 2
        if 0 <= y < height and 0 <= x < width:
            yield y * width + x, i, j


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Depthwise convolution of one image `[L, C]`, weight `[C, k, k]`: a sum over the window."""
    out = bias.repeat(height * width, 1)
    for row, col in product(range(height), range(width)):
        for token, i, j in window(row, col, weight.shape[-1], height, width):
            out[row * width + col] += weight[:, i, j] * x[token]
    return out


def mean_pool(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """Mean of the window's pixels that lie inside the image, `[L, C]`."""
    pixels = product(range(height), range(width))
    windows = ([w[0] for w in window(row, col, size, height, width)] for row, col in pixels)
    return torch.stack([x[tokens].mean(dim=0) for tokens in windows])


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_scaled_dot_product_attention(scale: float | None) -> None:
    q, k, v = draw(2, 7, 3, 4), draw(2, 5, 3, 4), draw(2, 5, 3, 4)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
    )
    assert_close(reference.attention(q, k, v, scale=scale), expected.transpose(1, 2))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_lse_is_the_natural_log_of_the_denominator(scale: float | None) -> None:
    q, k, v = draw(2, 3, 2, 4), draw(2, 5, 2, 4), draw(2, 5, 2, 4)
    out, lse = reference.attention(q, k, v, scale=scale, return_lse=True)
    assert_close(out, reference.attention(q, k, v, scale=scale))
    assert lse.shape == (2, 2, 3)
    for b, h, i in product(range(2), range(2), range(3)):
        scores = [(scale or 0.5) * float(q[b, i, h] @ k[b, j, h]) for j in range(5)]
        assert float(lse[b, h, i]) == pytest.approx(log(sum(map(exp, scores))), rel=1e-12)


def test_spatial_reduction_is_a_matrix_product_on_patches() -> None:
    x, weight, bias = draw(2, 4 * 6, 3), draw(5, 3, 2, 2), draw(5)
    out = reference.spatial_reduction(x, weight, bias, 4, 6)
    assert out.shape == (2, 2 * 3, 5)
    for b, row, col in product(range(2), range(2), range(3)):
        expected = bias.clone()
        for i, j in product(range(2), repeat=2):
            expected += weight[:, :, i, j] @ x[b, (2 * row + i) * 6 + 2 * col + j]
        assert_close(out[b, row * 3 + col], expected)


def test_depthwise_conv_gelu_is_a_sum_over_the_window_and_an_exact_gelu() -> None:
    x, weight, bias = draw(2, 3 * 4, 2), draw(2, 1, 3, 3), draw(2)
    conv = torch.stack([depthwise(image, weight[:, 0], bias, 3, 4) for image in x])
    expected = conv.clone().apply_(lambda y: 0.5 * y * (1 + erf(y / sqrt(2))))
    assert_close(reference.depthwise_conv_gelu(x, weight, bias, 3, 4), expected)


def test_depthwise_conv_gelu_is_the_middle_of_the_mix_ffn_of_transformers() -> None:
    segformer = pytest.importorskip("transformers.models.segformer.modeling_segformer")
    config = pytest.importorskip("transformers").SegformerConfig()
    mlp = segformer.SegformerMixMLP(config, in_features=4, hidden_features=8).double().eval()
    x, conv = draw(2, 3 * 5, 4), mlp.dwconv.dwconv
    hidden = reference.depthwise_conv_gelu(mlp.fc1(x), conv.weight, conv.bias, 3, 5)
    assert_close(mlp.fc2(hidden), mlp(x, 3, 5))


def score_nets(modalities: int, channels: int) -> tuple[Tensor, ...]:
    """dw_weight, dw_bias, pw_weight, pw_bias."""
    return (
        draw(modalities, channels, 3, 3),
        draw(modalities, channels),
        draw(modalities, channels),
        draw(modalities),
    )


def zero_nets(modalities: int, channels: int) -> list[Tensor]:
    """Score nets that give 1/2 everywhere, so that t = 3/2 x."""
    shapes = (modalities, channels, 3, 3), (modalities, channels), (modalities, channels)
    return [torch.zeros(shape, dtype=torch.float64) for shape in (*shapes, (modalities,))]


def test_hub_scores_are_a_convolution_a_dot_product_and_a_sigmoid() -> None:
    x, nets = draw(3, 2, 2 * 3, 4), score_nets(3, 4)
    dw_weight, dw_bias, pw_weight, pw_bias = nets
    out = reference.hub_scores(x, *nets, 2, 3)
    assert out.shape == (3, 2, 6, 1)
    for m, b in product(range(3), range(2)):
        y = depthwise(x[m, b], dw_weight[m], dw_bias[m], 2, 3)
        for token in range(6):
            logit = float(y[token] @ pw_weight[m] + pw_bias[m])
            assert float(out[m, b, token]) == pytest.approx(1 / (1 + exp(-logit)), rel=1e-12)


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ([True, True, True], [6, 3, 6]),
        ([True, True, False], [6, 3, 6]),
        ([True, False, True], [-9, 3, 3]),
        ([False, False, True], [-9, -9, 0]),
    ],
)
def test_query_hub_by_hand(present: list[bool], expected: list[int]) -> None:
    x = torch.tensor([2.0, 4.0, -6.0], dtype=torch.float64).view(3, 1, 1, 1)
    mask = torch.tensor(present)[:, None]
    hub = reference.query_hub(x, *zero_nets(3, 1), 1, 1, present=mask)
    assert hub.flatten().tolist() == expected


def test_query_hub_score_by_hand() -> None:
    # A 3x3 window sees all of a 2x2 map: with weights one its sum is log 3 at every pixel, and
    # sigmoid(log 3) = 3/4.
    x = log(3) * torch.tensor([[1.0, -1, 2, -1], [0, 0, 0, 0]], dtype=torch.float64)
    nets = zero_nets(2, 1)
    nets[0][0], nets[2][0] = 1.0, 1.0
    hub = reference.query_hub(x.view(2, 1, 4, 1), *nets, 2, 2)
    assert_close(hub.view(2, 4), torch.stack([0 * x[0], 1.75 * x[0]]))


def naive_hub(x: Tensor, nets: tuple[Tensor, ...], height: int, width: int, mask: Tensor) -> Tensor:
    hub = torch.zeros_like(x)
    modalities, batch, length, channels = x.shape
    dw_weight, dw_bias, pw_weight, pw_bias = nets
    for b in range(batch):
        t = {}
        for m in range(modalities):
            if mask[m, b]:
                y = depthwise(x[m, b], dw_weight[m], dw_bias[m], height, width)
                t[m] = (1 + 1 / (1 + (-(y @ pw_weight[m] + pw_bias[m])).exp()))[:, None] * x[m, b]
        for i, token, c in product(range(modalities), range(length), range(channels)):
            others = [float(t[m][token, c]) for m in t if m != i]
            hub[i, b, token, c] = max(others, default=0.0)
    return hub


@pytest.mark.parametrize("mask", [None, PRESENT], ids=["all", "masked"])
def test_query_hub_is_the_maximum_over_the_other_present_modalities(mask: Tensor | None) -> None:
    x, nets = draw(3, 4, 2 * 3, 2), score_nets(3, 2)
    expected = naive_hub(x, nets, 2, 3, torch.ones_like(PRESENT) if mask is None else mask)
    assert_close(reference.query_hub(x, *nets, 2, 3, present=mask), expected)


def test_query_hub_of_present_modalities_is_that_of_a_model_without_the_others() -> None:
    x, nets = draw(3, 4, 6, 2), score_nets(3, 2)
    hub = reference.query_hub(x, *nets, 2, 3, present=PRESENT)
    for b in range(PRESENT.shape[1]):
        keep = PRESENT[:, b]
        alone = reference.query_hub(x[keep, b : b + 1], *(t[keep] for t in nets), 2, 3)
        assert_close(hub[keep, b : b + 1], alone)


def test_query_hub_follows_a_permutation_of_the_modalities() -> None:
    x, nets, order = draw(3, 4, 6, 2), score_nets(3, 2), torch.tensor([2, 0, 1])
    hub = reference.query_hub(x, *nets, 2, 3, present=PRESENT)
    permuted = (t[order] for t in nets)
    assert_close(reference.query_hub(x[order], *permuted, 2, 3, present=PRESENT[order]), hub[order])


def test_query_hub_gives_the_gradient_of_a_tie_to_the_lowest_index() -> None:
    x = torch.ones(4, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    hub = reference.query_hub(x, *zero_nets(4, 1), 1, 1)
    # The hubs of modalities 1, 2 and 3 take theirs from 0, the hub of 0 from 1.
    weight = torch.tensor([1.0, 10, 100, 1000], dtype=torch.float64).view(4, 1, 1, 1)
    (grad,) = torch.autograd.grad((hub * weight).sum(), x)
    assert (grad.flatten() / 1.5).tolist() == [1110, 1, 0, 0]


def test_query_hub_of_one_modality_is_zero_and_has_no_gradient() -> None:
    (hub,), grads = run(
        lambda x, *nets: reference.query_hub(x, *nets, 2, 3), draw(1, 2, 6, 4), *score_nets(1, 4)
    )
    assert hub.shape == (1, 2, 6, 4)
    assert not any(t.any() for t in (hub, *grads))


def test_has_others() -> None:
    expected = [[True, True, True, True], [True, True, True, True], [True, True, False, True]]
    assert reference.has_others(PRESENT).tolist() == expected


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (13, 12)])
def test_pooling_mixer_pads_the_convolution_and_counts_the_valid_pixels(
    height: int, width: int
) -> None:
    x, weight, bias = draw(2, height * width, 3), draw(3, 1, 7, 7), draw(3)
    out = reference.pooling_mixer(x, weight, bias, height, width)
    for image, result in zip(x, out, strict=True):
        y = depthwise(image, weight[:, 0], bias, height, width)
        assert_close(result, y + sum(mean_pool(y, k, height, width) for k in (3, 7, 11)))


def test_pooling_mixer_keeps_a_constant_up_to_the_border() -> None:
    x = torch.zeros(1, 4 * 9, 2, dtype=torch.float64)
    bias = torch.tensor([1.0, -0.5], dtype=torch.float64)
    out = reference.pooling_mixer(x, x.new_zeros(2, 1, 7, 7), bias, 4, 9)
    assert_close(out, (4 * bias).expand(1, 36, 2))


def test_batch_norm_is_that_of_torch_in_training() -> None:
    x, layer = draw(3, 2 * 5, 4) + 7, nn.BatchNorm2d(4, eps=0.1).double()
    layer.weight.data, layer.bias.data = draw(4), draw(4)
    maps = x.transpose(1, 2).reshape(3, 4, 2, 5)
    expected = layer(maps).flatten(2).transpose(1, 2)
    assert_close(reference.batch_norm(x, layer.weight, layer.bias, 0.1), expected)


def test_batch_norm_takes_its_statistics_from_the_given_rows_only() -> None:
    x, weight, bias = draw(4, 6, 2), draw(2), draw(2)
    rows = torch.tensor([True, False, True, False])
    chosen = x[rows].flatten(0, 1)
    scale = (chosen.var(dim=0, unbiased=False) + 0.1).rsqrt()
    expected = (x - chosen.mean(dim=0)) * scale * weight + bias
    assert_close(reference.batch_norm(x, weight, bias, 0.1, rows), expected)


def test_batch_norm_without_any_row_is_finite() -> None:
    # A batch in which every modality is alone: the result is not used, but its gradient is taken.
    rows = torch.zeros(2, dtype=torch.bool)
    inputs = torch.zeros(2, 6, 3, dtype=torch.float64), draw(3), draw(3)
    outputs, grads = run(lambda *t: reference.batch_norm(*t, 1e-5, rows), *inputs)
    assert all(torch.isfinite(t).all() for t in outputs + grads)


class MixerBlock(nn.Module):
    """CMNeXt's block on maps, from PyTorch's layers, under CMNeXt's names."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        hidden = channels * ratio
        depthwise_7 = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.attn = nn.ModuleDict({"conv0": depthwise_7, "conv4": nn.Conv2d(channels, channels, 1)})
        self.pools = [nn.AvgPool2d(k, 1, k // 2, count_include_pad=False) for k in (3, 7, 11)]
        self.c_nets = nn.ModuleList([nn.Conv1d(1, 1, 3, padding=1, bias=False)])
        self.layer_scale_1 = nn.Parameter(torch.empty(channels))
        self.layer_scale_2 = nn.Parameter(torch.empty(channels))
        depthwise_3 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Conv2d(channels, hidden, 1),
                "dwconv": nn.ModuleDict({"dwconv": depthwise_3}),
                "fc2": nn.Conv2d(hidden, channels, 1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm1(x)
        a = self.attn["conv0"](u)
        a = a + sum(pool(a) for pool in self.pools)
        y = torch.sigmoid(self.attn["conv4"](a)) * u + u
        x = x + self.layer_scale_1[:, None, None] * y
        gate = torch.sigmoid(self.c_nets[0](x.mean(dim=(2, 3))[:, None]))[:, 0, :, None, None]
        y = self.mlp["dwconv"]["dwconv"](self.mlp["fc1"](self.norm2(x)))
        y = self.mlp["fc2"](F.gelu(y))
        return gate * x + self.layer_scale_2[:, None, None] * y


@pytest.mark.parametrize("rows", [None, [True, False, True]], ids=["all rows", "some rows"])
@pytest.mark.parametrize("kwargs", [{}, {"eps": 0.1}], ids=["default eps", "eps"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_pooling_mixer_block_is_that_of_cmnext(
    training: bool, rows: list[bool] | None, kwargs: dict[str, float]
) -> None:
    block = MixerBlock(channels=4, ratio=3).double().train(training)
    block.norm1.eps = block.norm2.eps = kwargs.get("eps", 1e-5)
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(draw(*tensor.shape).abs() + 0.1 if "var" in name else draw(*tensor.shape))
    p = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    x = 2 * draw(3, 3 * 5, 4) + 1
    chosen = torch.tensor(rows or [True] * 3)
    maps = x[chosen].transpose(1, 2).reshape(-1, 4, 3, 5)
    expected = block(maps).flatten(2).transpose(1, 2)
    mask = None if rows is None else chosen
    out = reference.pooling_mixer_block(x, p, 3, 5, batch_statistics=training, rows=mask, **kwargs)
    assert_close(out[chosen], expected)


def block_parameters(reduction: int) -> tuple[nn.MultiheadAttention, dict[str, Tensor]]:
    """PyTorch's attention over 4 channels and 2 heads, and its tensors under SegFormer's names."""
    layer = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.data = draw(*parameter.shape)
    weight, bias = layer.in_proj_weight.detach(), layer.in_proj_bias.detach()
    p = {"q.weight": weight[:4], "kv.weight": weight[4:], "q.bias": bias[:4], "kv.bias": bias[4:]}
    p |= {f"proj.{name}": t.detach() for name, t in layer.out_proj.named_parameters()}
    if reduction > 1:
        p |= {"sr.weight": draw(4, 4, reduction, reduction), "sr.bias": draw(4)}
        p |= {"norm.weight": draw(4), "norm.bias": draw(4)}
    return layer, p


@pytest.mark.parametrize(("reduction", "kwargs"), [(1, {}), (2, {}), (2, {"eps": 0.1})])
@pytest.mark.parametrize("mask", [None, PRESENT], ids=["all", "masked"])
def test_cross_modal_block_is_multi_head_attention_and_a_residual(
    mask: Tensor | None, reduction: int, kwargs: dict[str, float]
) -> None:
    layer, p = block_parameters(reduction)
    eps = kwargs.get("eps", 1e-5)
    encoded, hub = draw(3, 4, 4 * 6, 4), draw(3, 4, 4 * 6, 4)
    out = reference.cross_modal_block(encoded, hub, p, 4, 6, 2, present=mask, **kwargs)
    for m, b in product(range(3), range(4)):
        query, source = encoded[m, b][None], hub[m, b][None]
        if reduction > 1:
            patches = source.view(2, 2, 3, 2, 4).permute(0, 2, 4, 1, 3).reshape(1, 6, 16)
            source = patches @ p["sr.weight"].flatten(1).T + p["sr.bias"]
            source = source - source.mean(dim=-1, keepdim=True)
            source = source / (source.square().mean(dim=-1, keepdim=True) + eps).sqrt()
            source = source * p["norm.weight"] + p["norm.bias"]
        if mask is not None and not mask[m, b]:
            continue
        if mask is not None and b == 2:  # where it is alone
            assert torch.equal(out[m, b], encoded[m, b])
        else:
            assert_close(out[m, b], encoded[m, b] + layer(query, source, source)[0][0])


MIXER_SHAPES = {name: tuple(p.shape) for name, p in MixerBlock(2, 2).named_parameters()}
BLOCK_SHAPES = {name: tuple(p.shape) for name, p in block_parameters(2)[1].items()}
ROWS = torch.tensor([True, False, True])


def mixer_block(x: Tensor, *values: Tensor) -> Tensor:
    p = dict(zip(MIXER_SHAPES, values, strict=True))
    return reference.pooling_mixer_block(x, p, 2, 2, batch_statistics=True, rows=ROWS)


def cross_block(x: Tensor, hub: Tensor, *values: Tensor) -> Tensor:
    p = dict(zip(BLOCK_SHAPES, values, strict=True))
    return reference.cross_modal_block(x, hub, p, 2, 2, 2, present=PRESENT)


# Function of tensors, and their shapes.
OPERATIONS: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "attention": (
        lambda q, k, v: reference.attention(q, k, v, return_lse=True),
        [(1, 3, 2, 2), (1, 2, 2, 2), (1, 2, 2, 2)],
    ),
    "spatial_reduction": (
        lambda x, w, b: reference.spatial_reduction(x, w, b, 2, 4),
        [(1, 8, 2), (3, 2, 2, 2), (3,)],
    ),
    "depthwise_conv_gelu": (
        lambda x, w, b: reference.depthwise_conv_gelu(x, w, b, 2, 3),
        [(1, 6, 2), (2, 1, 3, 3), (2,)],
    ),
    "query_hub": (
        lambda x, *nets: reference.query_hub(x, *nets, 1, 2, present=PRESENT),
        [(3, 4, 2, 2), (3, 2, 3, 3), (3, 2), (3, 2), (3,)],
    ),
    "pooling_mixer": (
        lambda x, w, b: reference.pooling_mixer(x, w, b, 2, 3),
        [(1, 6, 2), (2, 1, 7, 7), (2,)],
    ),
    "batch_norm": (
        lambda x, w, b: reference.batch_norm(x, w, b, 1e-5, ROWS),
        [(3, 4, 2), (2,), (2,)],
    ),
    "pooling_mixer_block": (mixer_block, [(3, 4, 2), *MIXER_SHAPES.values()]),
    "cross_modal_block": (cross_block, [(3, 4, 4, 4)] * 2 + [*BLOCK_SHAPES.values()]),
}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e300])
@pytest.mark.parametrize("name", ["query_hub", "cross_modal_block"])
def test_absent_modalities_are_never_read(name: str, poison: float) -> None:
    f, shapes = OPERATIONS[name]
    x, *others = (draw(*shape) for shape in shapes)
    clean = run(f, x, *others)
    poisoned = run(f, x.masked_fill(~PRESENT[:, :, None, None], poison), *others)
    for expected, actual in zip(clean[0] + clean[1], poisoned[0] + poisoned[1], strict=True):
        assert torch.isfinite(actual).all()
        assert torch.equal(actual, expected)
    assert not poisoned[1][0][~PRESENT].any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_of_first_and_second_order(name: str) -> None:
    f, shapes = OPERATIONS[name]
    inputs = [draw(*shape).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_dtype_is_that_of_the_input(name: str, dtype: torch.dtype) -> None:
    f, shapes = OPERATIONS[name]
    out = f(*(draw(*shape).to(dtype) for shape in shapes))
    if name == "attention":
        out, lse = out
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.dtype == dtype


def test_batch_norm_of_bfloat16_has_float32_statistics() -> None:
    # 64 +- 1 has a spacing of 1/2 in bfloat16, and a sum over 2048 numbers one of 512 and more.
    x = (64 + draw(4, 512, 2)).bfloat16()
    one, zero = torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)
    exact = reference.batch_norm(x.double(), one.double(), zero.double(), 1e-5)
    assert_close(reference.batch_norm(x, one, zero, 1e-5), exact.bfloat16(), rtol=2**-7, atol=1e-4)
