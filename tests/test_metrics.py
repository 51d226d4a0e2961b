"""Metrics of segmentation against numbers by hand, plain NumPy, and torchmetrics' own matrix."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from equiseg_fast.metrics import SegmentationMetrics

K, IGNORE = 4, 255


def hand_made() -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and labels of one 2x4 image; class 3 is predicted and never labelled."""
    labels = torch.tensor([[[0, 0, 0, 1], [1, 1, 255, 255]]])
    prediction = torch.tensor([[[0, 0, 1, 1], [1, 3, 0, 2]]])
    return prediction, labels


def test_by_hand() -> None:
    metrics = SegmentationMetrics(K, IGNORE)
    metrics.update(*hand_made())
    result = metrics.compute()
    # Class 0: 2 of 3 and none too many; class 1: 2 right, 1 missed, 1 too many; class 2 was
    # predicted at an ignored pixel alone, and does not occur; class 3: 1 too many.
    assert result["iou"][:2] == [2 / 3, 2 / 4]
    assert math.isnan(result["iou"][2])
    assert result["iou"][3] == 0.0
    assert result["miou"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert result["miou_absent_as_zero"] == pytest.approx((2 / 3 + 1 / 2 + 0 + 0) / 4)
    assert result["pixel_accuracy"] == pytest.approx(4 / 6)


def random_batch(seed: int, size: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size[0], K, *size[1:], generator=generator)
    labels = torch.randint(0, K + 1, size, generator=generator)
    return logits, labels.masked_fill(labels == K, IGNORE)


def test_against_numpy_and_torchmetrics() -> None:
    metrics = SegmentationMetrics(K, IGNORE)
    theirs = MulticlassConfusionMatrix(K, ignore_index=IGNORE)
    matrix = np.zeros((K, K), dtype=np.int64)
    for seed, size in enumerate([(2, 5, 7), (1, 3, 3), (3, 8, 1)]):
        logits, labels = random_batch(seed, size)
        metrics.update(logits, labels)
        theirs.update(logits, labels)
        truth, guess = labels.numpy(), logits.numpy().argmax(axis=1)
        for row, column in zip(truth[truth != IGNORE], guess[truth != IGNORE], strict=True):
            matrix[row, column] += 1
    assert np.array_equal(metrics.confusion[:-1].numpy(), matrix)
    assert np.array_equal(theirs.compute().numpy(), matrix)
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    result = metrics.compute()
    np.testing.assert_allclose(result["iou"], iou)
    assert result["miou"] == pytest.approx(iou.mean())
    assert result["pixel_accuracy"] == pytest.approx(np.diag(matrix).sum() / matrix.sum())


def test_predictions_count_as_their_logits() -> None:
    logits, labels = random_batch(0, (2, 6, 5))
    from_logits, from_classes = SegmentationMetrics(K, IGNORE), SegmentationMetrics(K, IGNORE)
    from_logits.update(logits.half(), labels)
    from_classes.update(logits.half().argmax(dim=1).to(torch.uint8), labels.to(torch.uint8))
    assert torch.equal(from_logits.confusion, from_classes.confusion)


def test_ignored_index_inside_the_classes_and_of_int8() -> None:
    prediction, labels = hand_made()
    metrics = SegmentationMetrics(K, 0)
    metrics.update(prediction, labels.masked_fill(labels == IGNORE, 0))
    result = metrics.compute()
    assert result["pixel_accuracy"] == pytest.approx(2 / 3)
    # What is predicted as class 0 is wrong; class 0 itself has no score. Class 1: 2 of 4,
    # class 3: 1 too many.
    metrics.update(torch.tensor([[[0]]]), torch.tensor([[[1]]]))
    result = metrics.compute()
    assert math.isnan(result["iou"][0])
    assert result["miou"] == pytest.approx((2 / 4 + 0) / 2)
    wrapped = SegmentationMetrics(K, -1)
    wrapped.update(prediction, labels.masked_fill(labels == IGNORE, -1).to(torch.int8))
    assert wrapped.compute()["pixel_accuracy"] == pytest.approx(4 / 6)


def test_nothing_labelled_is_nan_and_reset_forgets() -> None:
    metrics = SegmentationMetrics(K, IGNORE)
    metrics.update(*hand_made())
    metrics.reset()
    metrics.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), IGNORE))
    result = metrics.compute()
    assert all(math.isnan(x) for x in (*result["iou"], result["miou"], result["pixel_accuracy"]))


def test_counts_images_whose_logits_are_not_finite() -> None:
    logits, labels = random_batch(0, (3, 4, 4))
    logits[1, 0, 0, 0] = math.nan
    logits[1, 2, 3, 3] = math.inf
    metrics = SegmentationMetrics(K, IGNORE)
    metrics.update(logits, labels)
    metrics.update(logits[:1], labels[:1])
    result = metrics.compute()
    assert (result["images"], result["not_finite"]) == (4, 1)


def test_updates_read_nothing_back() -> None:
    """On the meta device every read of a value raises."""
    metrics = SegmentationMetrics(K, IGNORE).to("meta")
    logits, labels = random_batch(0, (2, 4, 4))
    metrics.update(logits.to("meta"), labels.to("meta"))


@pytest.mark.parametrize(
    ("prediction", "labels", "says"),
    [
        (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long(), "logits must have shape"),
        (torch.zeros(1, K, 2, 3), torch.zeros(1, 2, 2).long(), "logits must have shape"),
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).long(), "prediction must have dtype"),
        (torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 2).long(), "prediction must have shape"),
        (torch.full((1, 2, 2), K), torch.zeros(1, 2, 2).long(), "prediction must be 0..3; got 4"),
        (torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2), "labels must have dtype"),
        (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), 7), "labels must be 0..3 or 255"),
        ("a", torch.zeros(1, 2, 2).long(), "prediction must be a tensor"),
    ],
)
def test_says_what_is_wrong(prediction: torch.Tensor, labels: torch.Tensor, says: str) -> None:
    metrics = SegmentationMetrics(K, IGNORE)
    with pytest.raises((TypeError, ValueError), match=says):
        metrics.update(prediction, labels)
    assert not metrics.confusion.any()


def test_sums_over_ranks() -> None:
    other = SegmentationMetrics(K, IGNORE)
    other.update(*random_batch(1, (1, 4, 4)))

    def gather(state: torch.Tensor, group: object) -> list[torch.Tensor]:
        return [state, next(theirs)]

    theirs = iter(getattr(other, name) for name in ("confusion", "images", "not_finite"))
    metrics = SegmentationMetrics(
        K, IGNORE, dist_sync_fn=gather, distributed_available_fn=lambda: True
    )
    alone = SegmentationMetrics(K, IGNORE)
    for batch in (random_batch(0, (1, 4, 4)), random_batch(2, (1, 4, 4))):
        metrics.update(*batch)
        alone.update(*batch)
    alone.update(*random_batch(1, (1, 4, 4)))
    result = metrics.compute()
    assert result == alone.compute()
    assert result["images"] == 3
