"""Formulas that operations and layers share, in PyTorch operators.

`equiseg_fast.reference` defines the same on its own: the tests hold one against the other.
"""

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Of sums and statistics of x: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def all_present(x: Tensor) -> Tensor:
    """The mask `[M, B]` that says that all modalities of x `[M, B, ...]` are there."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def has_others(present: Tensor) -> Tensor:
    """Whether a modality other than this one is present: `[M, B]` bool -> `[M, B]` bool."""
    return _others(present) > 0


def _others(present: Tensor) -> Tensor:
    """How many modalities other than this one are present, `[M, B]` int64."""
    return present.sum(dim=0) - present.long()


# ---- self-guided module -------------------------------------------------------------------------


def gate_descriptors(x: Tensor, *, present: Tensor | None = None) -> Tensor:
    """What the gate of each modality sees: `[M, B, L, C]` -> `[M, B, 2C]` in fp32 (fp64 for fp64).

    The mean of the modality over the image, and the mean of that over the *other* present
    modalities (zero where there is none).
    """
    if present is None:
        present = all_present(x)
    else:
        x = x.masked_fill(~present[:, :, None, None], 0.0)
    own = x.mean(dim=2, dtype=statistics_dtype(x))
    return torch.cat([own, (own.sum(dim=0) - own) / _others(present).clamp(min=1)[..., None]], -1)


def gate_weights(logits: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Contribution of each modality per channel: softmax over the present ones, `[M, B, C]`."""
    if present is not None:
        logits = logits.masked_fill(~present[:, :, None], float("-inf"))
    return logits.softmax(dim=0)


def split_teachers(present: Tensor, order: Tensor) -> Tensor:
    """Which modalities teach: present `[M, B]` bool, order `[M]` a permutation -> `[M, B]` bool.

    Per image the first `max(1, K // 2)` of its K present modalities, in the given order.
    """
    ranked = present[order]
    teachers = (present.sum(dim=0) // 2).clamp(min=1)
    first = ranked & (ranked.cumsum(dim=0) <= teachers)
    return torch.zeros_like(present).index_copy(0, order, first)


def prototype_kl(
    prototypes: Tensor,
    counts: Tensor,
    teacher: Tensor,
    *,
    present: Tensor | None = None,
    tau: float = 1.0,
) -> Tensor:
    """Self-distillation between prototypes, teacher first: the SGM loss of one stage.

    prototypes `[M, B, K, C]`, counts `[B, K]`, teacher and present `[M, B]` bool -> scalar. For
    every image the class distribution of the mean teacher prototype (softmax over the classes in
    the image, one per channel, no gradient) is the target of every student:
    `tau^2 mean_b mean_students mean_channels KL(teacher || student)`. Images with fewer than two
    classes or two modalities count as zero.
    """
    if present is None:
        present = all_present(prototypes)
    else:
        prototypes = prototypes.masked_fill(~present[:, :, None, None], 0.0)
    classes = counts > 0
    valid = (classes.sum(dim=-1) >= 2) & (present.sum(dim=0) >= 2)
    # In an image that counts as zero nothing is masked, so that the softmax stays finite.
    absent = (~classes & valid[:, None])[..., None]
    weight = (teacher & present).to(prototypes.dtype)[:, :, None, None]
    target = (prototypes * weight).sum(dim=0) / weight.sum(dim=0).clamp(min=1)

    def log_distribution(p: Tensor) -> Tensor:
        return (p / tau).masked_fill(absent, float("-inf")).log_softmax(dim=-2)

    log_target, log_student = log_distribution(target.detach()), log_distribution(prototypes)
    used = (classes & valid[:, None])[..., None]
    difference = torch.where(used, log_target - log_student, 0.0)
    divergence = (log_target.exp() * difference).sum(dim=-2).mean(dim=-1, keepdim=True)
    student = (present & ~teacher & valid)[..., None]
    per_image = (divergence * student).sum(dim=0) / student.sum(dim=0).clamp(min=1)
    return tau**2 * per_image.sum() / max(per_image.shape[0], 1)
