"""EQUISeg with a failing sensor: train a small one on rendered streets, then take depth away.

python examples/failing_sensor.py [--steps 300] [--out failing_sensor.png]    (needs ".[train]")

Three states of the sensor: fine, blank without the model being told, and known to be absent.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from equiseg_fast import EQUISeg
from equiseg_fast.data import Augment, SyntheticScenes, batches, colour_labels
from equiseg_fast.data.pictures import panels, sheet
from equiseg_fast.robustness import CLEAN, Condition, Conditioned, evaluate_dataset

CONDITIONS = {
    "all sensors": CLEAN,
    "depth is blank": Condition("emm", ("depth",)),
    "depth is absent": Condition("masked", ("depth",)),
}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Returns mIoU under the three conditions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="default 300, some three minutes")
    parser.add_argument("--images", type=int, default=40, help="to evaluate on")
    parser.add_argument("--out", type=Path, default=Path("failing_sensor.png"))
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    scenes, held_out = SyntheticScenes(length=4 * args.steps), SyntheticScenes(seed=1)
    sensors = tuple(sensor.name for sensor in scenes.sensors)
    model = EQUISeg.from_name(
        "nano", modalities=sensors, num_classes=len(scenes.classes),
        in_channels=tuple(sensor.channels for sensor in scenes.sensors),
    )  # fmt: skip

    optimiser = AdamW(model.parameters(), weight_decay=0.01)
    schedule = OneCycleLR(optimiser, max_lr=2e-3, total_steps=args.steps)
    model.train()
    loader = batches(scenes, batch_size=4, seed=0, epoch=0, augment=Augment(crop=(96, 128)))
    for step, batch in enumerate(loader):
        # Sometimes a sensor is missing, so that the model knows what that is like.
        present = torch.rand(len(sensors), 4) < 0.8
        present[step % len(sensors)] = True
        loss, _ = model.loss(batch.images, batch.labels, present=present)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    found, rows = {}, []
    for name, condition in CONDITIONS.items():
        result = evaluate_dataset(model, held_out, condition=condition, limit=args.images)
        found[name] = result["miou"]
        print(f"{name}: mIoU {found[name]:.1%}")
        sample = Conditioned(held_out, condition)[0]
        images = {key: image[None] for key, image in sample.images.items()}
        with torch.no_grad():
            prediction = model(images, present=sample.present[:, None]).argmax(dim=1)[0]
        seen = {s.name: s.denormalise(sample.images[s.name]) for s in scenes.sensors}
        row = panels(held_out, replace(sample, images=seen))
        rows.append((name, [*row, ("prediction", colour_labels(prediction, scenes.palette))]))
    sheet(rows, args.out, classes=scenes.classes, palette=scenes.palette)
    print(f"written to {args.out}")
    return found


if __name__ == "__main__":
    main()
