"""A SegFormer of transformers, as it is and accelerated: the same output, and how long it takes.

python examples/accelerate_segformer.py [--size 512]      (needs pip install -e ".[hf]")
"""

import argparse

import torch
from torch.utils.benchmark import Timer
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from equiseg_fast.integrations import accelerate_segformer, revert


def milliseconds(model: torch.nn.Module, images: torch.Tensor, seconds: float) -> float:
    names = {"model": model, "images": images}
    timer = Timer("model(images)", globals=names, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def main(arguments: list[str] | None = None) -> float:
    """Returns the largest difference of logits, relative to the largest logit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="of the images, pixels")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, each")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # For weights of the hub: SegformerForSemanticSegmentation.from_pretrained(name)
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=19)).eval().to(device)
    images = torch.randn(1, 3, args.size, args.size, device=device)
    with torch.no_grad():
        before, slow = model(images).logits, milliseconds(model, images, args.seconds)
        report = accelerate_segformer(model)  # prints what was replaced, what was skipped, and why
        after, fast = model(images).logits, milliseconds(model, images, args.seconds)
    revert(model)
    difference = ((after - before).abs().max() / before.abs().max()).item()
    print(
        f"{len(report.paths('replaced'))} modules; logits differ by {difference:.1e} of the largest"
    )
    print(
        f"{slow:.1f} ms as it was, {fast:.1f} ms accelerated ({slow / fast:.2f}x) on {device}, "
        f"{torch.get_num_threads()} threads"
    )
    return difference


if __name__ == "__main__":
    main()
