"""What EQUISeg accepts, checked once at the door."""

from collections.abc import Collection, Mapping, Sequence, Set

import torch
import torch.nn.functional as F
from torch import Tensor

from equiseg_fast.nn._forms import will_have
from equiseg_fast.ops import _checks

Images = Mapping[str, Tensor] | Tensor
Present = Tensor | Collection[str] | None


def stack_images(
    images: Images,
    names: Sequence[str],
    channels: Sequence[int],
    needed: Sequence[int],
    like: Tensor,
) -> Tensor:
    """The needed modalities as one tensor `[len(needed), B, C, H, W]`; C is that of the one with
    the most channels, and the others have zeros behind theirs.

    images: mapping name -> `[B, C, H, W]` with the channels of that name, or, if all have as many,
    a tensor `[M, B, C, H, W]` in the order of names. like: a parameter of the model, whose device
    the images must have, and whose dtype unless autocast is on. Raises TypeError or ValueError
    naming what is wrong.
    """
    if isinstance(images, Tensor):
        if len(set(channels)) > 1:
            each = ", ".join(f"{name} {c}" for name, c in zip(names, channels, strict=True))
            raise TypeError(
                "images must be a mapping from names to tensors, because modalities differ in "
                f"their channels ({each}); got a tensor"
            )
        _checks.check_tensor("images", images, _checks.FLOATING, f"[M, B, {channels[0]}, H, W]")
        if images.shape[0] != len(names):
            raise ValueError(
                f"images must have M = {len(names)} modalities ({', '.join(names)}); "
                f"got shape {list(images.shape)}"
            )
        _check_image("images", images, channels[0], like)
        return images if len(needed) == len(names) else images[list(needed)]
    if not isinstance(images, Mapping):
        raise TypeError(f"images must be a mapping or a tensor; got {type(images).__name__}")
    if unknown := [name for name in images if name not in names]:
        raise ValueError(f"images has unknown modality {unknown[0]!r}; allowed: {', '.join(names)}")
    if missing := [names[i] for i in needed if names[i] not in images]:
        raise ValueError(
            f"images lacks modality {missing[0]!r}; give it, or name the present ones in `present`"
        )
    chosen = [images[names[i]] for i in needed]
    first = chosen[0]
    for i, x in zip(needed, chosen, strict=True):
        label, count = f"images[{names[i]!r}]", channels[i]
        _checks.check_tensor(label, x, _checks.FLOATING, f"[B, {count}, H, W]")
        _check_image(label, x, count, like)
        batch, _, height, width = first.shape
        shape = f"[B, {count}, H, W] (B, H, W of images[{names[needed[0]]!r}])"
        _checks.check_shape(label, x, (batch, count, height, width), shape)
    most = max(channels[i] for i in needed)
    padded = [x if x.shape[1] == most else _pad_channels(x, most) for x in chosen]
    return torch.stack(padded)


def _pad_channels(x: Tensor, channels: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


def _check_image(label: str, x: Tensor, channels: int, like: Tensor) -> None:
    if x.shape[-3] != channels:
        many = "channel" if channels == 1 else "channels"
        raise ValueError(f"{label} must have {channels} {many}; got shape {list(x.shape)}")
    if min(x.shape[-2:]) < 1:
        raise ValueError(f"{label} must not be empty; got shape {list(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{label} must be on the model's device {like.device}; got {x.device}")
    if not will_have(x, like.dtype):
        raise TypeError(f"{label} must have the model's dtype {like.dtype}; got {x.dtype}")


def present_names(present: Present, names: Sequence[str]) -> list[int] | None:
    """Indices of the modalities named in `present`, in order; None if it is no set of names."""
    if present is None or isinstance(present, Tensor):
        return None
    kinds = (Set, Sequence, Mapping)
    if isinstance(present, (str, bytes)) or not isinstance(present, kinds):
        raise TypeError(
            f"present must be a bool mask [M, B] or a set of names; got {type(present).__name__}"
        )
    if others := [name for name in present if not isinstance(name, str)]:
        raise TypeError(f"present must hold names; got {others[0]!r}")
    if unknown := [name for name in present if name not in names]:
        raise ValueError(
            f"present has unknown modality {unknown[0]!r}; allowed: {', '.join(names)}"
        )
    if not present:
        raise ValueError("present must name at least one modality; all are absent")
    return [i for i, name in enumerate(names) if name in present]


def check_mask(present: Tensor, x: Tensor) -> None:
    """present is a bool mask `[M, B]` with at least one modality per image of x `[M, B, ...]`, on
    its device or the CPU.

    The values are looked at only where that waits for nothing: on the CPU, outside the compiler.
    """
    _checks.check_tensor("present", present, (torch.bool,), "[M, B]")
    _checks.check_shape("present", present, tuple(x.shape[:2]), "[M, B]")
    if present.device.type != "cpu":
        _checks.check_same_device(images=x, present=present)
    if _checks.has_values(present):
        absent = (~present.any(dim=0)).nonzero().flatten().tolist()
        if absent:
            raise ValueError(
                f"present must keep a modality of every image; image {absent[0]} has none"
            )


def check_labels(labels: Tensor, images: Tensor, num_classes: int, ignore_index: int) -> None:
    """labels is integer `[B, H, W]`, as large as the images `[M, B, C, H, W]`, and in range.

    The values are looked at only where that waits for nothing: on the CPU, outside the compiler.
    """
    _checks.check_tensor("labels", labels, _checks.INTEGER, "[B, H, W]")
    shape = (images.shape[1], *images.shape[-2:])
    _checks.check_shape("labels", labels, shape, "[B, H, W] (that of the images)")
    _checks.check_same_device(images=images, labels=labels)
    _checks.check_label_values(labels, num_classes, ignore_index)


def holding(labels: Tensor, ignore_index: int) -> Tensor:
    """labels in a dtype that holds ignore_index: a narrower one cannot be padded with it, and would
    wrap it in comparisons, 259 to class 3 in uint8."""
    limits = torch.iinfo(labels.dtype)
    return labels if limits.min <= ignore_index <= limits.max else labels.long()


def check_generator(generator: torch.Generator | None) -> None:
    """generator draws random numbers, or is None."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")


def check_teachers(order: Tensor | None, x: Tensor) -> None:
    """order is a permutation of the modalities of the images x, or is None."""
    if order is not None:
        _checks.check_order(order, "images", x)


def teacher_order(order: Tensor | None, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Which modalities of the images x `[M, ...]` are teachers first: the given permutation `[M]`,
    or a random one."""
    if order is None:
        source = x.device if generator is None else generator.device
        order = torch.randperm(x.shape[0], generator=generator, device=source)
        return order.to(x.device, non_blocking=True)
    return order


def dropout_draws(
    batch: int, generator: torch.Generator | None, device: torch.device | str = "cpu"
) -> Tensor:
    """The two numbers `[B, 2]` that every image takes, image after image."""
    return torch.rand(batch, 2, generator=generator, device=device, dtype=torch.float32)


def left_modalities(
    rate: float, x: Tensor, present: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """What modality dropout leaves of images x `[M, B, ...]`: bool `[M, B]`, some of present.

    With probability `rate` an image keeps a random non-empty subset of the modalities, or all that
    it has if it has nothing of that. Images draw on their own: batch norms would otherwise end with
    the statistics of the last few subsets. Waits for nothing.
    """
    modalities, batch = x.shape[:2]
    draws = dropout_draws(batch, generator, x.device if generator is None else generator.device)
    chance, which = draws.to(x.device, non_blocking=True).unbind(dim=1)
    subset = (which * (2**modalities - 1)).long() + 1
    bits = subset >> torch.arange(modalities, device=x.device)[:, None] & 1
    keep = (bits == 1) | (chance >= rate)
    if present is None:
        return keep
    keep = keep & present
    return torch.where(keep.any(dim=0), keep, present)
