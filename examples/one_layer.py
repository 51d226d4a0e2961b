"""One layer in a network of your own: attention whose keys are reduced to a quarter.

python examples/one_layer.py [--steps 100]

The task needs a look at the whole image: are the two bright spots of one sign?
"""

import argparse

import torch
from torch import Tensor, nn

from equiseg_fast.nn import EfficientSelfAttention


class Tiny(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, dim, kernel_size=3, stride=2, padding=1)
        self.attention = EfficientSelfAttention(dim, heads=2, sr_ratio=2)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # [B, L, C]: any strides will do
        tokens = tokens + self.attention(tokens, height=height, width=width)
        return self.head(self.norm(tokens).amax(dim=1))


def batch(size: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Noise with two spots of +4 or -4, one in each half, and whether their signs agree."""
    images, signs = 0.1 * torch.randn(size, 1, side, side), torch.randint(2, (size, 2))
    for half in range(2):
        rows = torch.randint(side, (size,))
        columns = torch.randint(side // 2, (size,)) + half * side // 2
        images[torch.arange(size), 0, rows, columns] += 8.0 * signs[:, half] - 4
    return images, (signs[:, 0] == signs[:, 1]).long()


def main(arguments: list[str] | None = None) -> float:
    """Train for a while; returns the accuracy on images that were not seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    model = Tiny()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        images, labels = batch(128)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    with torch.no_grad():
        images, labels = batch(1000)
        accuracy = (model(images).argmax(dim=1) == labels).float().mean().item()
    print(f"right in {accuracy:.1%} of new images")
    return accuracy


if __name__ == "__main__":
    main()
