"""What type checkers know of the public names: checked by `mypy`, not run."""

from torch import Tensor
from typing_extensions import assert_type

import equiseg_fast


def equiseg(model: equiseg_fast.EQUISeg, images: Tensor, labels: Tensor) -> None:
    assert_type(model(images), Tensor)
    assert_type(model(images, present={"rgb"}), Tensor)
    assert_type(model(images, labels=labels), tuple[Tensor, dict[str, Tensor]])
    assert_type(model.forward(images), Tensor)
    assert_type(model.forward(images, labels=labels), tuple[Tensor, dict[str, Tensor]])
    assert_type(model.loss(images, labels), tuple[Tensor, dict[str, Tensor]])
    assert_type(model.config, equiseg_fast.EQUISegConfig)
    model(images, labels)  # type: ignore[call-overload]


def lazy_names(images: Tensor) -> None:
    assert_type(equiseg_fast.EQUISeg.from_name("b0"), equiseg_fast.EQUISeg)
    assert_type(equiseg_fast.MixTransformer("b0").forward(images), list[Tensor])
    report = equiseg_fast.load_backbone(equiseg_fast.MixTransformer("b0"), {})
    assert_type(report.loaded, tuple[str, ...])
