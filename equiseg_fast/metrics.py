"""Metrics of semantic segmentation, from one confusion matrix over a whole split."""

import math
from typing import Any

import torch
from torch import Tensor

from equiseg_fast.ops._checks import (
    FLOATING,
    INTEGER,
    check_ignore_index,
    check_label_values,
    check_same_device,
    check_shape,
    check_sizes,
    check_tensor,
    has_values,
)

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        'equiseg_fast.metrics needs torchmetrics; pip install "equiseg-fast[train]"'
    ) from error


class SegmentationMetrics(Metric):
    """IoU of every class, their mean, and pixel accuracy; a metric of torchmetrics.

    The confusion matrix lives and grows on the device of the metric, where `to(device)` puts it,
    and no update waits for that device. `compute` sums it over all ranks when distributed, and
    needs all of them to call it.

    num_classes: K, classes of the logits. ignore_index: label of the pixels that do not count.
    """

    full_state_update = False
    higher_is_better = True
    confusion: Tensor
    images: Tensor
    not_finite: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, **of_torchmetrics: Any) -> None:
        super().__init__(**of_torchmetrics)
        check_sizes(num_classes=num_classes)
        check_ignore_index(ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        # The last row takes the ignored pixels: to leave them out of an update, their number would
        # have to be known, and the device waited for.
        zeros = torch.zeros(num_classes + 1, num_classes, dtype=torch.int64)
        self.add_state("confusion", zeros, dist_reduce_fx="sum")
        for name in ("images", "not_finite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits_or_prediction: Tensor, labels: Tensor) -> None:
        """Count B images: logits `[B, K, H, W]` or predicted classes `[B, H, W]`, which are an
        integer dtype, against labels `[B, H, W]` of an integer dtype.

        Raises TypeError or ValueError naming what is wrong; values are looked at on the CPU only.
        """
        x, classes = logits_or_prediction, self.num_classes
        check_tensor("labels", labels, INTEGER, "[B, H, W]")
        batch, height, width = labels.shape
        logits = x if isinstance(x, Tensor) and x.dim() == 4 else None
        if logits is not None:
            check_tensor("logits", x, FLOATING, "[B, K, H, W]")
            shape = "[B, K, H, W] (B, H, W of labels)"
            check_shape("logits", x, (batch, classes, height, width), shape)
            x = logits.argmax(dim=1)
        else:
            check_tensor("prediction", x, INTEGER, "[B, H, W]")
            check_shape("prediction", x, (batch, height, width), "[B, H, W] (that of labels)")
            if has_values(x) and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < classes:
                raise ValueError(
                    f"prediction must be 0..{classes - 1}; got {int(x.min())} to {int(x.max())}"
                )
        check_same_device(labels=labels, prediction=x)
        check_label_values(labels, classes, self.ignore_index)
        # Narrow dtypes wrap what they cannot hold: 255 would be -1 in int8.
        rows = labels.long()
        rows = rows.masked_fill(rows == self.ignore_index, classes)
        places = (rows * classes + x).flatten()
        # What `bincount` does, but that reads its largest value back from the device.
        self.confusion.view(-1).scatter_add_(0, places, torch.ones_like(places))
        self.images += batch
        if logits is not None:
            self.not_finite += (~logits.isfinite()).flatten(1).any(dim=1).sum()

    def compute(self) -> dict[str, Any]:
        """Fractions in [0, 1], and NaN where there is nothing to divide by.

        "miou": mean IoU of the classes that occur, in labels or predictions. "iou": list of K, NaN
        for a class that occurs in neither, and for that of `ignore_index`, if it is one: no pixel
        can be right. "pixel_accuracy": right among all labelled pixels.
        "miou_absent_as_zero": the mean over all K with 0 for classes that do not occur, which is
        how DeLiVER's authors count (github.com/jamycheung/DELIVER, `semseg/metrics.py`). "images":
        how many were counted; "not_finite": how many of them had logits that are not finite, whose
        classes mean nothing.
        """
        matrix = self.confusion[:-1].cpu().double()
        right = matrix.diagonal()
        iou = right / (matrix.sum(dim=0) + matrix.sum(dim=1) - right)
        if 0 <= self.ignore_index < self.num_classes:
            iou[self.ignore_index] = math.nan
        return {
            "miou": iou.nanmean().item(),
            "miou_absent_as_zero": iou.nan_to_num(nan=0.0).mean().item(),
            "pixel_accuracy": (right.sum() / matrix.sum()).item(),
            "iou": iou.tolist(),
            "images": int(self.images),
            "not_finite": int(self.not_finite),
        }
