"""The training itself: steps, logs, validations and checkpoints, until it is done or stopped."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from equiseg_fast._command import Failed, Interrupted
from equiseg_fast._files import beside
from equiseg_fast._version import __version__
from equiseg_fast.data import Batch
from equiseg_fast.models import EQUISeg

from . import files
from .config import TrainConfig, differences
from .distributed import Place, joined, place
from .log import Log, Screen
from .optimise import lr_ratio
from .plan import Plan, make_plan, show, try_out
from .state import State, build
from .step import contributions, loss_of, validate

VALUES = ("loss", "seg", "sgm", "grad_norm")
"""What every step gives, before the contributions of the modalities."""


@dataclass(frozen=True)
class Outcome:
    """What came of a training. miou: of the weights in `model`, None without labels to validate."""

    model: Path
    steps: int
    miou: float | None
    step: int
    """The step after which the weights in `model` were validated."""


def train(
    config: TrainConfig, *, console: Console | None = None, dry_run: bool = False
) -> Outcome | None:
    """Train as `config` says, or go on where `config.out` was left; a finished training is read.

    What is in `config.out`: `config.yaml`; `checkpoint.pt`, all that is needed to go on;
    `metrics.jsonl`, a line per log and per validation; `tensorboard/`; and `model/`, what
    `EQUISeg.from_pretrained` loads: the weights with the best validation mIoU. console: where
    progress is shown, None for nowhere. dry_run: show the plan, try a step, write nothing, return
    None. The generators of this process are left as they were.

    SIGINT and SIGTERM end the training after the current step, with a checkpoint, by
    `_command.Interrupted`, if this is the main thread. Raises `_command.Failed` when a loss is not
    finite (what it takes to see why is in `failed.pt`); ValueError for fields that do not fit the
    data, and for an `out` that holds another run; OSError for what cannot be read or written.
    """
    with place(config.device) as here, _settings_kept(config, here):
        plan = make_plan(config, here)
        shown = console if here.rank == 0 else None
        if dry_run:
            show(plan, shown)
            try_out(plan, shown)
            return None
        return _Run(plan, shown).run()


class _Run:
    def __init__(self, plan: Plan, console: Console | None) -> None:
        self.plan, self.config, self.here = plan, plan.config, plan.here
        self.out = Path(plan.config.out).expanduser()
        self.console = console
        self.stop = _Stop()

    def run(self) -> Outcome:
        """From where it is to the end."""
        plan, here = self.plan, self.here
        content = self._open()
        model, report = build(plan.model, self.config, backbone=content is None)
        self.state = State(model, self.config, here)
        if content is not None:
            self.state.load(content)
        fresh = content is None
        del content
        show(plan, self.console, self.state.step)
        self.log = Log(self.out, self.state.length, self.state.step) if here.rank == 0 else None
        if fresh and here.rank == 0:  # only now is it sure that no other process is there
            self._write_config()
        self.screen = Screen(self.console, plan.steps, self.state.step)
        if report:
            self.screen.say(report)
        try:
            with self.stop.listening(), contributions(model) as self.gates:
                self._train()
        except RuntimeError as error:
            # Whoever stops all processes of a group stops those that load images, too.
            if not self.stop.signal:
                raise
            message = f"stopped after step {self.state.step}; the same command goes on before it"
            raise Interrupted(self.stop.signal, message) from error
        finally:
            self.screen.close()
            if self.log is not None:
                self.log.close()
        done = self.state.step
        best = self.state.best or {"step": done, "miou": None}
        score = f", mIoU {best['miou']:.4f} after step {best['step']}" if self.state.best else ""
        self.screen.say(f"done after {done} steps: {self.out / files.MODEL}{score}")
        return Outcome(self.out / files.MODEL, done, best["miou"], best["step"])

    def _open(self) -> dict[str, Any] | None:
        """The checkpoint in `out`, if the same training was begun there; makes `out` if not."""
        ours = self.config.to_dict()
        checkpoint, config = self.out / files.CHECKPOINT, self.out / files.CONFIG
        content = files.load(checkpoint) if checkpoint.exists() else None
        theirs = ours
        if content is not None:
            theirs = content["config"]
        elif config.exists():
            if self._logged():
                theirs = TrainConfig.load(config).to_dict()
        # A kill while the first file was written leaves no run, and its beginning.
        elif self.out.is_dir() and {*self.out.iterdir()} - {beside(config)}:
            raise ValueError(f"out must be a new folder, or that of a run; {self.out} is neither")
        if others := differences(ours, theirs):
            raise ValueError(
                f"out holds another run, {self.out}; choose a new one, or go on with its fields: "
                + "; ".join(others)
            )
        images = len(self.plan.train)
        if content is not None and content["images"] != images:
            raise ValueError(
                f"the data have {images} images for training; those of {checkpoint} had "
                f"{content['images']}"
            )
        self.here.gathered(None)  # everybody has looked
        if self.here.rank == 0 and not config.exists():
            self._write_config()
        return content

    def _write_config(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        text = self.config.to_yaml().encode()
        files.replace_file(self.out / files.CONFIG, lambda file: file.write(text))

    def _logged(self) -> bool:
        """Whether a run has written a line. One that stopped before, at a file that cannot be read
        for example, has nothing to lose, and its fields may be mended."""
        log = self.out / files.METRICS
        return log.exists() and log.stat().st_size > 0

    def _train(self) -> None:
        state, plan = self.state, self.plan
        while True:
            if self._due() and state.validated < state.step:
                self._validate()
                self._save()
            if state.step == plan.steps:
                break
            epoch, position = divmod(state.step, plan.steps_per_epoch)
            self.since = time.monotonic(), state.step
            for batch in plan.batches(epoch, position):
                stopped = self._step(batch)
                state.step += 1
                self.screen.advance(state.step)
                if state.step % self.config.log_every == 0 or state.step == plan.steps:
                    self._log()
                if stopped or (state.step % self.config.save_every == 0):
                    self._save()
                if stopped:
                    message = f"stopped after step {state.step}; the same command goes on"
                    raise Interrupted(stopped, self._first(message))
                if state.step == plan.steps:
                    break

    def _due(self) -> bool:
        """Whether this is a step to validate after."""
        every = self.config.validate_every * self.plan.steps_per_epoch
        step = self.state.step
        return step == self.plan.steps or (every > 0 and step > 0 and step % every == 0)

    def _step(self, batch: Batch) -> int:
        """Learn from a batch; returns the signal by which any process was asked to stop, or 0."""
        config, state, here = self.config, self.state, self.here
        ratio = lr_ratio(state.step, self.plan.steps, config)
        for group in state.optimiser.param_groups:
            group["lr"] = config.lr * ratio
        # Running statistics change before it is known whether the step can be taken.
        before = [x.clone() for x in state.model.buffers()]
        state.wrapped.train()
        state.optimiser.zero_grad()
        loss, parts = loss_of(state.wrapped, batch, state.step, config, here)
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(state.optimiser)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        found = [x.detach() for x in (loss, parts["seg"], parts["sgm"], norm)]
        if self.gates:
            shares = torch.stack([x.mean((1, 2)) for x in self.gates.values()])
            found.extend(shares.mean(0))
        values = torch.stack([x.float() for x in found]).tolist()
        stopped = self._check(batch, before, dict(zip(VALUES, values, strict=False)))
        state.scaler.step(state.optimiser)
        state.scaler.update()
        if state.average is not None:
            state.average.update(state.tensors(), state.step)
        state.sums = [a + b for a, b in zip_longest(state.sums, [1.0, *values], fillvalue=0.0)]
        return stopped

    def _check(self, batch: Batch, before: list[Tensor], values: dict[str, float]) -> int:
        """Stop where something is not finite, and keep what it takes to see why; the signal to stop
        comes back from the same exchange between processes, which all wait for."""
        state = self.state
        wrong = not math.isfinite(values["loss"])
        # Scaled gradients overflow now and then: that step is skipped, and the scale halved.
        scaled = state.scaler.is_enabled() and state.scaler.get_scale() > 1.0
        wrong = wrong or not (scaled or math.isfinite(values["grad_norm"]))
        any_wrong, stopped = self.here.maximum(float(wrong), self.stop.signal)
        if not any_wrong:
            return int(stopped)
        for x, old in zip(state.model.buffers(), before, strict=True):
            x.copy_(old)
        everything = joined(self.here.gathered(batch.to("cpu")))
        values = {"rank": self.here.rank, **values} if self.here.world > 1 else values
        every = self.here.gathered(values)
        content = self._content() | {"batch": everything, "values": every}
        path = self.out / files.FAILED
        if self.here.rank == 0:
            files.save(path, content)
        said = "; ".join(
            ", ".join(f"{name} {value:.6g}" for name, value in x.items()) for x in every
        )
        images = ", ".join(everything["names"])
        message = (
            f"step {state.step + 1} is not finite: {said}; images: {images}. "
            f"The state before it and its batch are in {path}: "
            f'torch.load("{path}", weights_only=True)'
        )
        raise Failed(self._first(message))

    def _log(self) -> None:
        state, here = self.state, self.here
        count, *sums = state.sums
        means = here.mean(torch.tensor(sums, dtype=torch.float64) / count).tolist()
        started, first = self.since
        seconds = max(time.monotonic() - started, 1e-9)
        line: dict[str, Any] = {
            "split": "train",
            "step": state.step,
            "epoch": state.step / self.plan.steps_per_epoch,
            **dict(zip(VALUES, means, strict=False)),
            "lr": state.optimiser.param_groups[0]["lr"],
        }
        if shares := means[len(VALUES) :]:
            line["contributions"] = dict(zip(self.plan.model.modalities, shares, strict=True))
        line["images_per_second"] = (state.step - first) * self.config.batch_size / seconds
        self.since = time.monotonic(), state.step
        state.sums = []
        self._write(line)
        self.screen.logged(line)

    def _validate(self) -> None:
        state, plan, here = self.state, self.plan, self.here
        kept = state.kept()
        result: dict[str, Any] | None = None
        if plan.val is not None:
            with torch.device("meta"):
                model = EQUISeg(plan.model)
            model.load_state_dict(kept, assign=True)
            result = validate(model.eval(), plan.val, self.config, here, self._pause)
        best = state.best
        if result is not None and (best is None or result["miou"] > best["miou"]):
            state.best = {"step": state.step, "miou": result["miou"]}
        if here.rank == 0 and (result is None or state.best != best):
            state.model.save_pretrained(self.out / files.MODEL, state_dict=kept)
        state.validated = state.step
        if result is not None:
            line = {
                "split": "val",
                "step": state.step,
                "epoch": state.step / plan.steps_per_epoch,
                **result,
            }
            self._write(line)
            assert state.best is not None
            self.screen.say(
                f"step {state.step}  epoch {line['epoch']:.1f}  mIoU {result['miou']:.4f}  "
                f"best {state.best['miou']:.4f} after step {state.best['step']}"
            )
            if broken := result["not_finite"]:
                self.screen.say(f"validated images whose logits are not finite: {broken}")

    def _pause(self) -> None:
        """Between validated images: stop at once if asked to, with the training as it is."""
        if self.here.world == 1 and self.stop.signal:
            self._save()
            raise Interrupted(
                self.stop.signal,
                f"stopped while validating after step {self.state.step}; the same command goes on",
            )

    def _content(self) -> dict[str, Any]:
        return {
            "format": files.FORMAT,
            "version": __version__,
            "config": self.config.to_dict(),
            "images": len(self.plan.train),
            **self.state.to_dict(),
        }

    def _save(self) -> None:
        if self.log is not None:
            self.state.length = self.log.length()
        content = self._content()
        if self.here.rank == 0:
            files.save(self.out / files.CHECKPOINT, content)

    def _first(self, message: str) -> str:
        """What all processes have to say is said by the first one."""
        return message if self.here.rank == 0 else ""

    def _write(self, line: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(line)


class _Stop:
    """Remembers the first SIGINT or SIGTERM; the second works as ever."""

    signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only the main thread gets signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def remember(number: int, _: object) -> None:
            self.signal = number
            for s, handler in before.items():
                signal.signal(s, handler)

        for s in before:
            signal.signal(s, remember)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


@contextmanager
def _settings_kept(config: TrainConfig, here: Place) -> Iterator[None]:
    """What a training sets for the whole process, and sets back."""
    before = torch.are_deterministic_algorithms_enabled()
    change = config.deterministic and not before  # asking for what is imports the compiler
    if change:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which PyTorch asks for
        torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng([here.device] if here.device.type == "cuda" else []):
            yield
    finally:
        if change:
            torch.use_deterministic_algorithms(False)
