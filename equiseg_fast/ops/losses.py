"""Cross-entropy of upsampled logits, per pixel."""

from torch import Tensor

from equiseg_fast import reference

from . import _backend, _checks


def upsample_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, backend: str | None = None
) -> Tensor:
    """Bilinear upsampling (align_corners=False) to the labels' size, then cross-entropy.

    logits: `[B, K, h, w]`, floating. labels: `[B, H, W]` integer on the device of logits, values
    in 0..K-1 or `ignore_index`.
    backend: "torch", "reference", "auto" or None (the current default).

    Returns the loss of every pixel, `[B, H, W]` in fp32 (fp64 for fp64 logits), 0 where ignored;
    computed in fp32 also under autocast. Raises TypeError or ValueError naming the argument.
    """
    _checks.check_tensor("logits", logits, _checks.FLOATING, "[B, K, h, w]")
    _checks.check_tensor("labels", labels, _checks.INTEGER, "[B, H, W]")
    _checks.check_same_device(logits=logits, labels=labels)
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"labels must have the batch size of logits, {logits.shape[0]}; got {labels.shape[0]}"
        )
    _backend.resolve("upsample_cross_entropy", backend, logits.device, _reasons(logits))
    return reference.upsample_cross_entropy(logits, labels, ignore_index=ignore_index)


def _reasons(logits: Tensor, *_: object, **__: object) -> _backend.Reasons:
    return [*_backend.triton_reasons(logits), _backend.NO_KERNEL]


_backend.register_reasons("upsample_cross_entropy", _reasons)
