"""The reference held against independent sources: self-guided module, decode head and losses.

See `test_reference.py` for what counts as independent.
"""

from collections.abc import Callable
from itertools import permutations, product
from math import log

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from equiseg_fast import reference

# Per image (column): all but one modality, another pair, a modality alone, all of them.
PRESENT = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)
TEACHER = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]], dtype=torch.bool)
# Per image: three classes, two, one, none; class 1 is nowhere.
COUNTS = torch.tensor([[3, 0, 1, 2], [0, 0, 4, 1], [7, 0, 0, 0], [0, 0, 0, 0]])


def draw(*shape: int) -> Tensor:
    """Normal float64 numbers."""
    return torch.randn(*shape, dtype=torch.float64)


def run(f: Callable, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of f, and the gradients of its inputs for a fixed random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = f(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    return outputs, list(torch.autograd.grad(outputs, leaves, cotangents))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_statistics_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
    x = torch.ones(2, 1, 4, 3, dtype=dtype)
    labels = torch.zeros(1, 2, 2, dtype=torch.long)
    assert reference.statistics_dtype(x) == expected
    assert reference.gate_descriptors(x).dtype == expected
    assert reference.class_prototypes(x, labels, 2, 2, 2)[0].dtype == expected
    assert reference.upsample_cross_entropy(x, labels.expand(2, 2, 2)).dtype == expected


def test_gate_descriptors_are_own_mean_and_mean_of_the_other_present_means() -> None:
    x = draw(3, 4, 5, 2)
    out = reference.gate_descriptors(x, present=PRESENT)
    assert out.shape == (3, 4, 4)
    for m, b in product(range(3), range(4)):
        means = {n: x[n, b].mean(dim=0) for n in range(3) if PRESENT[n, b]}
        own = means.pop(m, torch.zeros(2, dtype=x.dtype))
        others = sum(means.values()) / len(means) if means else torch.zeros_like(own)
        assert_close(out[m, b], torch.cat([own, others]))
    assert_close(
        reference.gate_descriptors(x), reference.gate_descriptors(x, present=PRESENT | True)
    )


def test_gate_logits_are_a_perceptron_with_exact_gelu_over_a_temperature() -> None:
    net = nn.Sequential(nn.Linear(8, 3), nn.GELU(), nn.Linear(3, 4)).double()
    x, parameters = draw(2, 5, 8), list(net.parameters())
    assert_close(reference.gate_logits(x, *parameters), net(x))
    assert_close(reference.gate_logits(x, *parameters, tau=4.0), net(x) / 4)


def test_guided_gate_by_formula() -> None:
    x, logits = draw(3, 4, 5, 2), draw(3, 4, 2)
    weights = reference.gate_weights(logits, present=PRESENT)
    branches, fused = reference.guided_gate(x, logits, present=PRESENT, rho=0.3)
    for b in range(4):
        here = [m for m in range(3) if PRESENT[m, b]]
        total = sum(logits[m, b].exp() for m in here)
        g = {m: logits[m, b].exp() / total if m in here else 0 * total for m in range(3)}
        for m in range(3):
            assert_close(weights[m, b], g[m])
            factor = 1 + 0.3 * (len(here) * g[m] - 1) if m in here else 0 * total
            assert_close(branches[m, b], factor * x[m, b])
        assert_close(fused[b], sum(g[m] * x[m, b] for m in here))


def test_guided_gate_by_hand() -> None:
    # Weights 3/4 and 1/4, so that the factors are 1 +- 1/2 * 1/2.
    x = torch.tensor([8.0, -4.0], dtype=torch.float64).view(2, 1, 1, 1)
    logits = torch.tensor([log(3), 0.0], dtype=torch.float64).view(2, 1, 1)
    branches, fused = reference.guided_gate(x, logits)
    assert_close(branches.flatten(), torch.tensor([10.0, -3.0], dtype=torch.float64))
    assert fused.item() == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modalities", range(1, 8))
def test_guided_gate_at_initialisation_is_the_identity_and_the_mean(
    modalities: int, dtype: torch.dtype
) -> None:
    x = draw(modalities, 2, 3, 4).to(dtype)
    branches, fused = reference.guided_gate(x, torch.zeros(modalities, 2, 4))
    assert torch.equal(branches, x)
    assert_close(fused, x.double().mean(dim=0).to(dtype))


def nearest(labels: Tensor, height: int, width: int) -> list[list[int]]:
    small = F.interpolate(labels[:, None].double(), (height, width), mode="nearest")
    return small.flatten(1).long().tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("ignore_index", [255, 1])
def test_class_prototypes_are_class_means(
    ignore_index: int, stride: int, dtype: torch.dtype
) -> None:
    x = draw(2, 3, 2 * 5, 4)
    labels = torch.randint(0, 4, (3, 2 * stride, 5 * stride)).to(dtype)
    labels[:, 0, ::2], labels[2] = ignore_index, ignore_index
    out, counts = reference.class_prototypes(x, labels, 6, 2, 5, ignore_index=ignore_index)
    assert out.shape == (2, 3, 6, 4)
    assert counts.dtype == torch.int64
    small = nearest(labels, 2, 5)
    for b, k in product(range(3), range(6)):
        tokens = [j for j in range(10) if small[b][j] == k and k != ignore_index]
        assert counts[b, k] == len(tokens)
        for m in range(2):
            mean = sum((x[m, b, j] for j in tokens), x.new_zeros(4)) / max(len(tokens), 1)
            assert_close(out[m, b, k], mean)


def test_class_prototypes_by_hand() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 255, 1, 1], [2, 2, 255, 255], [2, 2, 255, 0]])
    x = torch.arange(1.0, 17.0).view(1, 1, 16, 1)
    out, counts = reference.class_prototypes(x, labels[None], 4, 4, 4)
    assert out.flatten().tolist() == [6.0, 5.5, 11.5, 0.0]
    assert counts.tolist() == [[4, 4, 4, 0]]


def test_class_prototypes_of_bfloat16_are_summed_in_float32() -> None:
    # Neither a count of 1001 nor a sum of as many ones is a bfloat16 number.
    x = torch.ones(1, 1, 1001, 2, dtype=torch.bfloat16)
    out, counts = reference.class_prototypes(x, torch.zeros(1, 13, 77).byte(), 1, 13, 77)
    assert out.flatten().tolist() == [1.0, 1.0]
    assert counts.item() == 1001


def test_split_teachers_takes_the_first_half_of_the_present_modalities() -> None:
    # Every mask of up to four modalities but the empty one, and every order.
    present = torch.tensor(list(product([False, True], repeat=4))[1:]).T
    for order in permutations(range(4)):
        teacher = reference.split_teachers(present, torch.tensor(order))
        for b in range(present.shape[1]):
            here = [m for m in order if present[m, b]]
            expected = here[: max(1, len(here) // 2)]
            assert teacher[:, b].nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("absent_classes", [0, 3])
def test_prototype_kl_by_hand(absent_classes: int) -> None:
    # Teacher (1/4, 3/4), student (1/2, 1/2): log(1/2) / 4 + 3 log(3/2) / 4.
    prototypes = torch.zeros(2, 1, 2 + absent_classes, 1, dtype=torch.float64)
    prototypes[0, 0, 1] = log(3)
    counts = torch.tensor([[5, 1] + [0] * absent_classes])
    loss = reference.prototype_kl(prototypes, counts, torch.tensor([[True], [False]]))
    assert loss.item() == pytest.approx(0.130812, abs=5e-7)


def naive_kl(prototypes: Tensor, counts: Tensor, tau: float, present: Tensor) -> Tensor:
    """The loss from PyTorch's KLDivLoss, image by image and channel by channel."""
    modalities, batch, _, channels = prototypes.shape
    loss = prototypes.new_zeros(())
    for b in range(batch):
        classes = counts[b].nonzero().flatten()
        here = [m for m in range(modalities) if present[m, b]]
        teachers = [m for m in here if TEACHER[m, b]]
        students = [m for m in here if not TEACHER[m, b]]
        if len(classes) < 2 or len(here) < 2:
            continue
        target = torch.stack([prototypes[m, b, classes] for m in teachers]).mean(dim=0).detach()
        for m, c in product(students, range(channels)):
            student = prototypes[m, b, classes, c] / tau
            divergence = nn.KLDivLoss(reduction="sum")(
                student.log_softmax(dim=0), (target[:, c] / tau).softmax(dim=0)
            )
            loss = loss + divergence / (len(students) * channels)
    return tau**2 * loss / batch


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("present", [PRESENT, PRESENT | True], ids=["masked", "all"])
def test_prototype_kl_is_that_of_torch_in_every_image_and_channel(
    present: Tensor, tau: float, shift: int
) -> None:
    # Rolled, so that every mask meets three, two, one and no class.
    counts, prototypes = COUNTS.roll(shift, dims=0), draw(3, 4, 4, 2)

    def loss(p: Tensor) -> Tensor:
        return reference.prototype_kl(p, counts, TEACHER, present=present, tau=tau)

    actual = run(loss, prototypes)
    assert_close(actual, run(lambda p: naive_kl(p, counts, tau, present), prototypes))
    (grad,) = actual[1]
    assert not grad[TEACHER | ~present].any()
    assert not grad[:, (counts > 0).sum(dim=1) < 2].any()


def test_prototype_kl_pulls_every_student_towards_the_teacher() -> None:
    # The derivative of a KL divergence in the logits of its second argument is p_student - p.
    prototypes, counts = draw(3, 1, 4, 2).requires_grad_(), torch.ones(1, 4)
    teacher = torch.tensor([[False], [True], [False]])
    reference.prototype_kl(prototypes, counts, teacher, tau=2.0).backward()
    p = (prototypes / 2.0).softmax(dim=2)
    # tau^2 / tau, over two students and two channels.
    assert_close(prototypes.grad, (2.0 / 4 * (p - p[1])).detach())


def test_prototype_kl_is_zero_for_equal_modalities_and_without_labels() -> None:
    prototypes = draw(1, 4, 4, 2).expand(3, 4, 4, 2)
    assert reference.prototype_kl(prototypes, COUNTS, TEACHER).abs() < 1e-15
    for teaches in (True, False):
        alone = torch.full((1, 4), teaches)
        assert reference.prototype_kl(draw(1, 4, 4, 2), COUNTS, alone) == 0
    nothing = torch.zeros(4, 4, dtype=torch.long)
    (loss,), (grad,) = run(
        lambda p: reference.prototype_kl(p, nothing, TEACHER, present=PRESENT), draw(3, 4, 4, 2)
    )
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_all_ignored_labels_give_no_loss_and_no_gradient() -> None:
    def loss(x: Tensor) -> Tensor:
        labels = torch.full((4, 4, 6), 255, dtype=torch.uint8)
        return reference.prototype_kl(*reference.class_prototypes(x, labels, 5, 2, 3), TEACHER)

    (value,), (grad,) = run(loss, draw(3, 4, 6, 2))
    assert value == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_permuting_the_modalities_changes_nothing() -> None:
    order, x, logits = torch.tensor([2, 0, 1]), draw(3, 4, 5, 2), draw(3, 4, 2)
    branches, fused = reference.guided_gate(x, logits, present=PRESENT)
    permuted = reference.guided_gate(x[order], logits[order], present=PRESENT[order])
    assert_close(permuted, (branches[order], fused))
    descriptors = reference.gate_descriptors(x, present=PRESENT)
    actual = reference.gate_descriptors(x[order], present=PRESENT[order])
    assert_close(actual, descriptors[order])
    p = draw(3, 4, 4, 2)
    actual = reference.prototype_kl(p[order], COUNTS, TEACHER[order], present=PRESENT[order])
    assert_close(actual, reference.prototype_kl(p, COUNTS, TEACHER, present=PRESENT))


def training_loss(x: Tensor) -> Tensor:
    labels = torch.tensor([0, 1, 2, 255, 1, 0]).view(1, 2, 3).expand(4, 2, 3)
    prototypes, counts = reference.class_prototypes(x, labels, 4, 2, 3)
    return reference.prototype_kl(prototypes, counts, TEACHER, present=PRESENT)


# Functions of x [M, B, L, C] and logits [M, B, C] that take PRESENT.
MASKED: dict[str, Callable] = {
    "gate_descriptors": lambda x: reference.gate_descriptors(x, present=PRESENT),
    "gate_weights": lambda x: reference.gate_weights(x[:, :, 0], present=PRESENT),
    "guided_gate": lambda x: reference.guided_gate(x, x[:, :, 0], present=PRESENT),
    "prototype_kl": training_loss,
}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e300])
@pytest.mark.parametrize("name", MASKED)
def test_absent_modalities_are_never_read(name: str, poison: float) -> None:
    x = draw(3, 4, 6, 2)
    clean = run(MASKED[name], x)
    poisoned = run(MASKED[name], x.masked_fill(~PRESENT[:, :, None, None], poison))
    for expected, actual in zip(clean[0] + clean[1], poisoned[0] + poisoned[1], strict=True):
        assert torch.isfinite(actual).all()
        assert torch.equal(actual, expected)
    assert not poisoned[1][0][~PRESENT].any()


def test_segmentation_head_is_that_of_transformers() -> None:
    segformer = pytest.importorskip("transformers.models.segformer.modeling_segformer")
    channels, sizes = (3, 4, 5, 6), [(8, 12), (4, 6), (2, 3), (1, 2)]
    config = pytest.importorskip("transformers").SegformerConfig(
        hidden_sizes=channels, decoder_hidden_size=7, num_labels=5
    )
    head = segformer.SegformerDecodeHead(config).double().eval()
    for name, tensor in head.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(draw(*tensor.shape).abs() + 0.1 if "var" in name else draw(*tensor.shape))
    names = {"linear_fuse.": "linear_fuse.conv.", "batch_norm.": "linear_fuse.bn."}
    names |= {f"linear_projections.{s}.": f"linear_c{s + 1}." for s in range(4)}
    names |= {"classifier.": "linear_pred."}
    p = {}
    for name, tensor in head.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        p[name.replace(prefix, names[prefix])] = tensor
    features = [draw(2, h * w, c) for (h, w), c in zip(sizes, channels, strict=True)]
    maps = [
        x.transpose(1, 2).reshape(2, -1, h, w) for x, (h, w) in zip(features, sizes, strict=True)
    ]
    assert_close(reference.segmentation_head(features, sizes, p), head(maps))
    head.batch_norm.eps = 0.1
    assert_close(reference.segmentation_head(features, sizes, p, eps=0.1), head(maps))


def bilinear(logits: Tensor, row: int, col: int, height: int, width: int) -> Tensor:
    """One pixel of `[K, h, w]` resized to height x width, pixel centres at halves."""
    out = logits.new_zeros(logits.shape[0])
    positions = []
    for index, size, target in ((row, logits.shape[1], height), (col, logits.shape[2], width)):
        position = min(max((index + 0.5) * size / target - 0.5, 0.0), size - 1.0)
        low = int(position)
        high = min(low + 1, size - 1)
        positions.append([(low, 1 - position + low), (high, position - low)])
    for (y, wy), (x, wx) in product(*positions):
        out += wy * wx * logits[:, y, x]
    return out


@pytest.mark.parametrize(("height", "width"), [(8, 12), (5, 7), (2, 3)])
def test_upsample_cross_entropy_by_formula(height: int, width: int) -> None:
    logits, labels = 3 * draw(2, 4, 2, 3), torch.randint(0, 4, (2, height, width))
    labels[0, 0, 1::2], labels[1, :, 0] = 255, 255
    out = reference.upsample_cross_entropy(logits, labels.byte())
    assert out.shape == labels.shape
    for b, row, col in product(range(2), range(height), range(width)):
        label = labels[b, row, col]
        if label == 255:
            assert out[b, row, col] == 0
        else:
            z = bilinear(logits[b], row, col, height, width)
            assert_close(out[b, row, col], z.exp().sum().log() - z[label])


def test_upsample_cross_entropy_of_bfloat16_is_that_of_float32() -> None:
    logits, labels = draw(1, 3, 2, 2).bfloat16(), torch.randint(0, 3, (1, 7, 5))
    out = reference.upsample_cross_entropy(logits, labels)
    assert torch.equal(out, reference.upsample_cross_entropy(logits.float(), labels))


def test_upsample_cross_entropy_without_anything_to_learn() -> None:
    logits = draw(1, 3, 2, 2)
    ignored = torch.full((1, 4, 4), 7)
    results = [run(lambda z: reference.upsample_cross_entropy(z, ignored, ignore_index=7), logits)]
    one_class = torch.zeros(1, 4, 4, dtype=torch.long)
    results += [run(lambda z: reference.upsample_cross_entropy(z, one_class), logits[:, :1])]
    for (loss,), (grad,) in results:
        assert not loss.any()
        assert not grad.any()


# Two losses are above -log(0.7) = 0.357; six pixels are valid.
@pytest.mark.parametrize(("ratio", "least_kept"), [(16, 0.5), (3, 0.5), (2, 0.35), (1, 0.1)])
def test_ohem_by_hand(ratio: int, least_kept: float) -> None:
    loss = torch.tensor([[0.1, 0.5, 9.0, 0.2], [1.0, 0.3, 0.35, float("nan")]]).double()
    loss.requires_grad_()
    valid = torch.tensor([[True, True, False, True], [True, True, True, False]])
    kept = valid & (loss >= torch.tensor(least_kept))
    value = reference.ohem(loss, valid, min_kept_ratio=ratio)
    value.backward()
    assert_close(value, loss[kept].mean())
    assert_close(loss.grad, kept.double() / kept.sum())


def test_ohem_without_a_hard_or_a_valid_pixel_is_zero() -> None:
    loss = torch.full((3, 5), 0.2, dtype=torch.float64)
    for valid in (loss > 0, loss > 1):
        (value,), (grad,) = run(lambda y, v=valid: reference.ohem(y, v), loss)
        assert value == 0
        assert not grad.any()


PIXELS = st.lists(st.tuples(st.floats(0, 2), st.booleans()), min_size=1, max_size=40)


@settings(deadline=None, derandomize=True)
@given(pixels=PIXELS, thresh=st.sampled_from([0.3, 0.7]), ratio=st.integers(1, 16))
def test_ohem_by_sorting(pixels: list[tuple[float, bool]], thresh: float, ratio: int) -> None:
    loss = torch.tensor([y for y, _ in pixels], dtype=torch.float64)
    valid = torch.tensor([v for _, v in pixels])
    candidates = sorted((y for y, v in pixels if v), reverse=True)
    least = len(candidates) // ratio
    hard = [y for y in candidates if y > -log(thresh)]
    kept = hard if len(hard) >= least else candidates[:least]
    expected = sum(kept) / max(len(kept), 1)
    actual = reference.ohem(loss, valid, thresh=thresh, min_kept_ratio=ratio)
    assert actual.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def distilled(p: Tensor) -> Tensor:
    # Teachers held fixed: a numerical derivative does not know that they get no gradient.
    p = torch.where(TEACHER[:, :, None, None], torch.linspace(-1, 1, p.shape[-1]).to(p), p)
    return reference.prototype_kl(p, COUNTS, TEACHER, present=PRESENT, tau=1.5)


LABELS = torch.tensor([0, 1, 255, 1, 3, 0]).view(1, 2, 3)
DIFFERENTIABLE: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "gate_descriptors": (MASKED["gate_descriptors"], [(3, 4, 2, 2)]),
    "gate_logits": (reference.gate_logits, [(2, 1, 4), (3, 4), (3,), (2, 3), (2,)]),
    "guided_gate": (
        lambda x, logits: reference.guided_gate(x, logits, present=PRESENT),
        [(3, 4, 2, 2), (3, 4, 2)],
    ),
    "class_prototypes": (
        lambda x: reference.class_prototypes(x, LABELS, 4, 2, 3)[0],
        [(2, 1, 6, 2)],
    ),
    "prototype_kl": (distilled, [(3, 4, 4, 2)]),
    "upsample_cross_entropy": (
        lambda z: reference.upsample_cross_entropy(z, LABELS),
        [(1, 4, 1, 2)],
    ),
    "ohem": (lambda y: reference.ohem(y, y > -1.0), [(30,)]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_first_and_second_order(name: str) -> None:
    f, shapes = DIFFERENTIABLE[name]
    inputs = [draw(*shape).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(f, inputs)
    if name != "ohem":  # linear between the pixels that enter and leave
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_labels_and_masks_choose_no_shape() -> None:
    # On tensors without data whatever waits for a value raises.
    with torch.device("meta"):
        present, labels = torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 4, 4).byte()
        x, order, logits = torch.ones(3, 2, 16, 5), torch.arange(3), torch.ones(2, 4, 2, 2)
        prototypes, counts = reference.class_prototypes(x, labels, 4, 4, 4)
        teacher = reference.split_teachers(present, order)
        loss = reference.prototype_kl(prototypes, counts, teacher, present=present)
        pixels = reference.upsample_cross_entropy(logits, labels)
        loss = loss + reference.ohem(pixels, labels != 255)
    assert loss.shape == ()


def test_guided_gate_rounds_bfloat16_once() -> None:
    x, logits = draw(3, 2, 5, 4).bfloat16(), draw(3, 2, 4).float()
    expected = reference.guided_gate(x.float(), logits)
    assert_close(
        reference.guided_gate(x, logits), tuple(y.bfloat16() for y in expected), rtol=0, atol=0
    )
