"""The whole model in the ways PyTorch offers: compiled, exported, mixed, sharded, captured."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from equiseg_fast import EQUISeg, attention, depthwise_conv_gelu, guided_gate, query_hub
from equiseg_fast.nn import MixFFN
from equiseg_fast.testing import assert_deterministic, random_normal

NAMES = ("rgb", "depth")
ROOT = Path(__file__).parent.parent


def build(dtype: torch.dtype = torch.float32, device: str = "cpu", **fields: object) -> EQUISeg:
    model = EQUISeg.from_name("nano", modalities=NAMES, num_classes=5, drop_path=0.0, **fields)
    for gate in model.gates:
        nn.init.normal_(gate.fc2.weight, std=0.1)
    return model.to(device, dtype)


def batch(
    height: int = 32, width: int = 64, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    images = torch.randn(len(NAMES), 2, 3, height, width, dtype=dtype, device=device)
    labels = torch.randint(0, 5, (2, height, width), device=device)
    labels[:, :3] = 255
    return images, labels


def loss_of(model: Callable[..., object], images: Tensor, labels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    total, _ = model(images, labels=labels, generator=generator)
    return total


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm()
    for name, g in expected.items():
        assert (actual[name].double() - g.double()).norm() <= tolerance * norm, name


class TestCompile:
    def test_inference_is_one_graph(self) -> None:
        """For every subset of four sensors, as a mask."""
        torch._dynamo.reset()
        model = EQUISeg.from_name("nano", num_classes=5).eval()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
        images = torch.randn(4, 1, 3, 32, 32)
        for subset in range(1, 16):
            mask = torch.tensor([[bool(subset >> i & 1)] for i in range(4)])
            with torch.no_grad():
                actual, expected = (m(images, present=mask) for m in (compiled, model))
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        assert counter.frame_count == 1

    def test_training_is_one_graph(self) -> None:
        """Loss, prototypes and hard example mining included, and all gradients."""
        torch._dynamo.reset()
        model = build(torch.float64, head_dropout=0.0)
        order = torch.tensor([1, 0])

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            # Given, because the compiler and eager draw the teachers differently.
            return model(images, labels=labels, order=order)[0]

        compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
        images, labels = batch(dtype=torch.float64)
        expected = gradients(model, loss(images, labels))
        assert_same(gradients(model, compiled(images, labels)), expected, 1e-9)

    @pytest.mark.parametrize("part", ["encoder", "query hub", "mixer", "attention"])
    def test_sizes_may_change(self, part: str) -> None:
        """One graph for all sizes, forward and backward; what is made of these parts compiles for
        minutes."""
        torch._dynamo.reset()
        model = build(torch.float64)
        block = model.fusion[0]
        module, *shape = {
            "encoder": (model.encoder.block1[0], 1, 3),
            "query hub": (block.query_hub, 1, 2, 3),
            "mixer": (block.mixer[0].eval(), 1, 6),
            "attention": (block.attn, 2, 6),
        }[part]
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        counts = []
        for height, width in ((24, 48), (40, 56), (16, 72)):
            tensors = torch.randn(*shape, height * width, 16, dtype=torch.float64)
            expected = gradients(module, module(*tensors, height, width).square().mean())
            actual = gradients(module, compiled(*tensors, height, width).square().mean())
            assert_same(actual, expected, 1e-9)
            counts.append(counter.frame_count)
        assert counts[0] == counts[-1]


class TestExport:
    def test_serves_other_batches_in_a_fresh_process(self, tmp_path: Path) -> None:
        model = build().eval()
        images, _ = batch()
        sizes = ({1: torch.export.Dim("batch", min=1, max=64)},)
        program = torch.export.export(model, (images,), dynamic_shapes=sizes)
        images = torch.cat([images, images[:, :1].flip(-1)], dim=1)
        with torch.no_grad():
            expected = model(images)
        torch.export.save(program, tmp_path / "model.pt2")
        torch.save((images, expected), tmp_path / "case.pt")
        code = (
            "import sys, torch, equiseg_fast\n"
            "images, expected = torch.load(sys.argv[2])\n"
            "model = torch.export.load(sys.argv[1]).module()\n"
            "torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "model.pt2", tmp_path / "case.pt"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_keeps_parameters_and_statistics_in_fp32(self, dtype: torch.dtype) -> None:
        model = build()
        images, labels = batch()
        seen = {}
        model.fusion[0].attn.q.register_forward_hook(lambda m, a, out: seen.update(q=out.dtype))
        with torch.autocast("cpu", dtype):
            total, parts = model(images, labels=labels)
            stages = model.stages(images)
        assert seen["q"] == dtype
        assert {x.dtype for x in (total, *parts.values())} == {torch.float32}
        assert {s.contributions.dtype for s in stages} == {torch.float32}
        total.backward()
        for name, p in model.named_parameters():
            assert p.grad.dtype == torch.float32, name
            assert torch.isfinite(p.grad).all(), name

    def test_autocast_is_near_fp32(self) -> None:
        model = build().eval()
        images, _ = batch()
        with torch.no_grad():
            expected = model(images)
            with torch.autocast("cpu", torch.bfloat16):
                mixed = model(images)
        assert (mixed.float() - expected).norm() < 0.05 * expected.norm()

    def test_grad_scaler_trains(self) -> None:
        """Scaled fp16 gradients are unscaled, an overflow skips the step, the loss falls."""
        model = build()
        images, labels = batch()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        losses = []
        for step in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, images, labels)
            scaler.scale(loss).backward()
            if step == 1:
                model.head.linear_pred.bias.grad.fill_(torch.inf)
                before = copy.deepcopy(model.state_dict())
            scaler.step(optimizer)
            scaler.update()
            if step == 1:
                for name, p in model.named_parameters():
                    assert torch.equal(p, before[name]), name
                assert scaler.get_scale() == 2.0**9
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]


class TestCheckpointing:
    """Stages computed again in the backward give the gradients of stages that are kept."""

    @pytest.mark.parametrize("kind", ["reentrant", "non-reentrant", "selective"])
    def test_gradients_are_the_same(self, kind: str) -> None:
        model = build(torch.float64).eval()
        images, _ = batch(dtype=torch.float64)
        expected = gradients(model, model(images).square().mean())

        def policy(context: object, op: object, *args: object, **kwargs: object) -> object:
            keep = op is torch.ops.aten.convolution.default
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        options: dict[str, object] = {"use_reentrant": kind == "reentrant"}
        if kind == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
        calls: list[int] = []
        for block in model.fusion:
            block.attn.register_forward_pre_hook(lambda *_: calls.append(1))
            block.forward = partial(checkpointed, block.forward, options)
        actual = gradients_of_backward(model, images)
        assert_same(actual, expected, 1e-12)
        assert len(calls) == 8  # once forward, once again in the backward


def checkpointed(
    forward: Callable[..., Tensor], options: dict[str, object], *args: object, **kwargs: object
) -> Tensor:
    return checkpoint(partial(forward, **kwargs), *args, **options)


def gradients_of_backward(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """By `backward`, the only one that reentrant checkpointing knows."""
    model.zero_grad()
    model(images).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gradients_of_loss(
    model: EQUISeg, images: Tensor, labels: Tensor, present: Tensor | set[str]
) -> dict[str, Tensor | None]:
    model.zero_grad()
    order = torch.arange(len(present))
    model.loss(images, labels, present=present, order=order)[0].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def distributed(*args: str) -> str:
    """What `distributed_worker.py` prints in two processes of PyTorch's own launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    run = subprocess.run(
        [*launcher, "--nproc-per-node", "2", worker, *args],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
class TestDistributed:
    @pytest.mark.parametrize("how", ["mask", "find_unused_parameters"])
    def test_sensors_may_be_absent(self, how: str, one_process: None) -> None:
        """DDP wants a gradient of every parameter, which a set of one name does not give."""
        model = build(head_dropout=0.0)
        images, labels = batch(32, 32)
        names, mask = {"rgb"}, torch.tensor([[True, True], [False, False]])
        wrapped = DistributedDataParallel(model, find_unused_parameters=how != "mask")
        for _ in range(2):
            present = mask if how == "mask" else names
            wrapped(images, labels=labels, present=present)[0].backward()
        with_names = gradients_of_loss(model, images, labels, names)
        with_mask = gradients_of_loss(model, images, labels, mask)
        assert 0 < sum(g is None for g in with_names.values()) < len(with_names)
        assert all(g is not None for g in with_mask.values())
        if how == "mask":
            wrapped(images, labels=labels, present=names)[0].backward()
            with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
                wrapped(images, labels=labels, present=names)

    def test_a_sharded_child_is_called(self, one_process: None) -> None:
        from torch.distributed.fsdp import fully_shard

        layer, x = MixFFN(16, 24), torch.randn(2, 24, 16)
        expected = layer(x, 6, 4)
        fully_shard(layer.fc1)
        actual = layer(x, 6, 4)
        torch.testing.assert_close(actual, expected)
        actual.square().mean().backward()
        assert layer.fc1.weight.grad.full_tensor().abs().sum() > 0

    @pytest.mark.long
    def test_training_equals_a_single_process(self) -> None:
        """DDP, FSDP2 and FSDP2 in bf16, and a block compiled."""
        printed = distributed()
        for label in ("DDP", "FSDP2", "FSDP2 in bf16"):
            assert f"{label}: gradients of 257 parameters differ by" in printed
        assert "FSDP2 compiled: gradients of 33 parameters differ by" in printed

    def test_synchronised_batch_norm_sees_all_processes(self) -> None:
        printed = distributed("--statistics")
        for label in ("all rows", "some"):
            assert f"statistics of {label}: gradients of" in printed


class TestSynchronisedBatchNorm:
    """`nn.SyncBatchNorm.convert_sync_batchnorm`, in a single process."""

    @pytest.mark.parametrize("training", [True, False])
    def test_changes_nothing(self, training: bool) -> None:
        model = build(torch.float64, head_dropout=0.0).train(training)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
        assert list(converted.state_dict()) == list(model.state_dict())
        images, _ = batch(dtype=torch.float64)
        present = torch.tensor([[True, False], [True, True]])
        for mask in (None, present):
            torch.testing.assert_close(converted(images, present=mask), model(images, present=mask))
        for a, b in zip(converted.buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(a, b)

    def test_folds(self) -> None:
        model = build(torch.float64).eval()
        images, _ = batch(dtype=torch.float64)
        expected = model(images)
        folded = nn.SyncBatchNorm.convert_sync_batchnorm(model).fold_()
        torch.testing.assert_close(folded(images), expected)


class TestDeterminism:
    def test_training_steps_repeat_bit_by_bit(self) -> None:
        model = build(head_dropout=0.0).eval()
        images, labels = batch()

        def step() -> tuple[Tensor, ...]:
            loss = loss_of(model, images, labels)
            return loss.detach(), *gradients(model, loss).values()

        assert_deterministic(step, repeats=20)

    def test_global_settings_stay(self) -> None:
        def settings() -> tuple[object, ...]:
            return (
                torch.get_num_threads(),
                torch.get_default_dtype(),
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.cuda.matmul.allow_tf32,
                torch.backends.cudnn.benchmark,
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
            )

        before, state = settings(), torch.random.get_rng_state()
        model = build().eval()
        torch.random.set_rng_state(state)
        images = torch.ones(len(NAMES), 1, 3, 32, 32)
        model(images).sum().backward()
        assert settings() == before
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_drawing_teachers_needs_no_global_generator(self) -> None:
        model = build().eval()
        images, labels = batch()
        state = torch.random.get_rng_state()
        first = loss_of(model, images, labels)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(loss_of(model, images, labels), first)


# ---- CUDA graphs --------------------------------------------------------------------------------


def graph_cases() -> dict[str, Callable[[], tuple[list[Tensor], Callable[..., Tensor]]]]:
    """Operation -> inputs, and a call whose results and gradients must survive capture."""

    def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [
            random_normal(s, torch.bfloat16, seed=i, device="cuda").requires_grad_()
            for i, s in enumerate(shapes)
        ]

    m, b, h, w, c = 4, 2, 16, 24, 64
    tokens = (m, b, h * w, c)
    return {
        "attention": lambda: (tensors((8, 384, 2, 32), *[(8, 64, 2, 32)] * 2), attention),
        "depthwise_conv_gelu": lambda: (
            tensors((8, h * w, c), (c, 1, 3, 3), (c,)),
            partial(depthwise_conv_gelu, height=h, width=w),
        ),
        "query_hub": lambda: (
            tensors(tokens, (m, c, 3, 3), (m, c), (m, c), (m,)),
            partial(query_hub, height=h, width=w),
        ),
        "guided_gate": lambda: (
            [*tensors(tokens), torch.randn(m, b, c, device="cuda", requires_grad=True)],
            lambda x, logits: guided_gate(x, logits)[1],
        ),
    }


@pytest.mark.gpu
class TestCudaGraphs:
    @pytest.mark.parametrize("name", list(graph_cases()))
    def test_step_replays_with_new_data(self, name: str) -> None:
        inputs, call = graph_cases()[name]()

        def step() -> tuple[Tensor, ...]:
            out = call(*inputs)
            return out, *torch.autograd.grad(out.float().square().sum(), inputs)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for x in inputs:
                x.normal_()
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)

    def test_inference_of_the_model_replays(self) -> None:
        model = build(device="cuda").eval()
        images, _ = batch(64, 96, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            for _ in range(3):
                model(images)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = model(images)
            images.normal_()
            graph.replay()
            assert torch.equal(captured, model(images))

    def test_reduce_overhead(self) -> None:
        model = build(device="cuda").eval()
        compiled = torch.compile(model, mode="reduce-overhead")
        with torch.no_grad():
            for _ in range(4):
                images, _ = batch(64, 96, device="cuda")
                torch.testing.assert_close(compiled(images), model(images), rtol=1e-2, atol=1e-3)

    def test_results_do_not_depend_on_other_streams(self) -> None:
        inputs, call = graph_cases()["attention"]()
        alone = call(*inputs)
        busy = torch.randn(4096, 4096, device="cuda")
        stream = torch.cuda.Stream()
        for _ in range(20):
            with torch.cuda.stream(stream):
                busy = busy @ busy / 64
            assert torch.equal(call(*inputs), alone)
