"""EQUISeg as a whole: published sizes, agreement with SegFormer, and the invariants of fusion."""

import copy
import re
from collections.abc import Iterator
from functools import cache
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from equiseg_fast import reference, use_backend
from equiseg_fast.models import EQUISeg, EQUISegConfig, MixTransformer, load_backbone
from equiseg_fast.models.inputs import left_modalities
from equiseg_fast.nn import SelfGuidedGate
from equiseg_fast.ops import _layout
from equiseg_fast.ops._layout import linear

NAMES = ("rgb", "depth", "event", "lidar")


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values everywhere, so that nothing hides behind zeros, ones or equal weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                if name.endswith("running_var"):
                    tensor.copy_(1 + 0.2 * noise.abs())
                else:
                    tensor.add_(0.1 * noise)
    return model


@cache
def small_model(modalities: tuple[str, ...] = NAMES, **fields: object) -> EQUISeg:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EQUISeg.from_name("b0", modalities=modalities, num_classes=7, **fields)
    return randomise(model).double().eval()


def nano(**fields: Any) -> EQUISeg:
    """A small model, the caller's own."""
    return copy.deepcopy(_nano(**fields))


@cache
def _nano(**fields: Any) -> EQUISeg:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EQUISeg.from_name("nano", **{"modalities": NAMES, "num_classes": 7, **fields})
    return randomise(model).double().eval()


def without_names(model: EQUISeg) -> dict[str, Tensor]:
    """The state dict without the names of the modalities: for those who move weights on purpose."""
    state = model.state_dict()
    del state["_extra_state"]
    return state


def images(batch: int = 2, height: int = 64, width: int = 96, modalities: int = 4) -> Tensor:
    return torch.randn(modalities, batch, 3, height, width, dtype=torch.float64)


class TestSizes:
    @pytest.mark.parametrize(
        ("variant", "total", "stages"),
        [
            ("b0", 3_319_392, (164_096, 255_296, 930_080, 1_969_920)),
            ("b1", 13_151_424, (639_488, 1_006_208, 3_682_880, 7_822_848)),
            ("b2", 24_196_288, (954_368, 1_938_048, 10_308_160, 10_995_712)),
            ("b3", 44_072_128, (954_368, 1_938_048, 30_184_000, 10_995_712)),
            ("b4", 60_842_688, (954_368, 3_801_728, 45_090_880, 10_995_712)),
            ("b5", 81_443_008, (954_368, 2_869_888, 66_623_040, 10_995_712)),
        ],
    )
    def test_encoder_parameters(self, variant: str, total: int, stages: tuple[int, ...]) -> None:
        with torch.device("meta"):
            encoder = MixTransformer(variant)
        assert parameters(encoder) == total
        parts = ("patch_embed", "block", "norm")
        assert stages == tuple(
            sum(parameters(getattr(encoder, f"{part}{s}")) for part in parts) for s in (1, 2, 3, 4)
        )

    @pytest.mark.parametrize(
        ("variant", "modalities", "classes", "total"),
        [
            ("b0", 1, 25, 3_720_569),
            ("b0", 2, 25, 5_390_733),
            ("b0", 3, 25, 5_396_369),
            ("b0", 4, 25, 5_402_005),
            ("b0", 3, 19, 5_394_827),
            ("b2", 1, 25, 25_785_049),
            ("b2", 2, 25, 32_321_261),
            ("b2", 3, 25, 32_332_529),
            ("b2", 4, 25, 32_343_797),
            ("b2", 3, 19, 32_329_451),
        ],
    )
    def test_model_parameters(
        self, variant: str, modalities: int, classes: int, total: int
    ) -> None:
        with torch.device("meta"):
            model = EQUISeg.from_name(variant, modalities=NAMES[:modalities], num_classes=classes)
        assert parameters(model) == total

    @pytest.mark.parametrize(
        ("variant", "classes", "width", "total"),
        [
            ("b0", 25, None, 401_177),
            ("b0", 150, None, 433_302),
            ("b0", 19, None, 399_635),
            ("b2", 25, None, 1_588_761),
            ("b2", 25, 768, 3_169_561),
            ("b2", 150, 768, 3_265_686),
        ],
    )
    def test_head_parameters(
        self, variant: str, classes: int, width: int | None, total: int
    ) -> None:
        with torch.device("meta"):
            model = EQUISeg.from_name(variant, num_classes=classes, decoder_dim=width)
        assert parameters(model.head) == total

    @pytest.mark.parametrize(
        ("variant", "rows"),
        [
            (
                "b0",
                [
                    (1_412, 22_083, 64, 69_856, 808),
                    (2_820, 78_979, 128, 82_368, 3_152),
                    (7_044, 246_723, 320, 205_920, 19_400),
                    (11_268, 615_939, 512, 263_168, 49_472),
                ],
            ),
            (
                "b2",
                [
                    (2_820, 78_979, 128, 278_976, 3_152),
                    (5_636, 297_219, 256, 328_576, 12_448),
                    (14_084, 954_243, 640, 821_440, 77_200),
                    (22_532, 2_411_523, 1_024, 1_050_624, 197_248),
                ],
            ),
        ],
    )
    def test_fusion_parameters(self, variant: str, rows: list[tuple[int, ...]]) -> None:
        with torch.device("meta"):
            model = EQUISeg.from_name(variant)
        for block, gate, row in zip(model.fusion, model.gates, rows, strict=True):
            parts = (block.query_hub, block.mixer, block.mixer_norm, block.attn, gate)
            assert tuple(map(parameters, parts)) == row

    @pytest.mark.parametrize(
        ("variant", "size", "modalities", "classes", "gmac"),
        [
            ("b0", 512, 4, 25, 24.932),
            ("b0", 1024, 4, 25, 174.622),
            ("b0", 1024, 3, 19, 135.526),
            ("b2", 512, 4, 25, 124.044),
            ("b2", 1024, 4, 25, 732.932),
            ("b2", 1024, 3, 19, 567.926),
        ],
    )
    def test_multiply_adds(
        self, variant: str, size: int, modalities: int, classes: int, gmac: float
    ) -> None:
        assert self._gmac(variant, size, modalities, classes) == pytest.approx(gmac, abs=2e-3)

    @pytest.mark.parametrize(("variant", "saved"), [("b0", 17.18), ("b2", 68.72)])
    def test_folded_head_saves(self, variant: str, saved: float) -> None:
        folded = self._gmac(variant, 1024, 4, 25, fold_head=True)
        assert self._gmac(variant, 1024, 4, 25) - folded == pytest.approx(saved, rel=2e-2)

    @staticmethod
    def _gmac(
        variant: str, size: int, modalities: int, classes: int, fold_head: bool = False
    ) -> float:
        with torch.device("meta"), torch.no_grad():
            model = EQUISeg.from_name(
                variant, modalities=NAMES[:modalities], num_classes=classes, fold_head=fold_head
            ).eval()
            # The reference has the convolutions as published; faster backends merge some.
            with FlopCounterMode(display=False) as counter, use_backend("reference"):
                model(torch.empty(modalities, 1, 3, size, size))
        return counter.get_total_flops() / 2e9


class TestSegformer:
    """The encoder against `transformers`, with the same random weights in both."""

    RENAMES = (
        ("patch_embed{s}.proj", "patch_embeddings.proj"),
        ("patch_embed{s}.norm", "patch_embeddings.layer_norm"),
        ("norm{s}", "layer_norm"),
    )
    BLOCK_RENAMES = (
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.q", "attention.q_proj"),
        ("attn.proj", "attention.o_proj"),
        ("attn.sr", "attention.sequence_reduction.sequence_reduction"),
        ("attn.norm", "attention.sequence_reduction.layer_norm"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.dwconv.dwconv", "mlp.dwconv.dwconv"),
        ("mlp.fc2", "mlp.fc2"),
    )

    def _load(self, ours: MixTransformer, theirs: dict[str, Tensor]) -> None:
        state = {}
        for kind in ("weight", "bias"):
            for s in range(4):
                for a, b in self.RENAMES:
                    state[f"{a.format(s=s + 1)}.{kind}"] = theirs[f"stages.{s}.{b}.{kind}"]
                for j in range(len(getattr(ours, f"block{s + 1}"))):
                    here, there = f"block{s + 1}.{j}.", f"stages.{s}.blocks.{j}."
                    for a, b in self.BLOCK_RENAMES:
                        if f"{there}{b}.{kind}" in theirs:
                            state[f"{here}{a}.{kind}"] = theirs[f"{there}{b}.{kind}"]
                    pair = [theirs[f"{there}attention.{x}_proj.{kind}"] for x in "kv"]
                    state[f"{here}attn.kv.{kind}"] = torch.cat(pair)
        ours.load_state_dict(state, strict=True)

    @pytest.mark.parametrize("variant", ["b0", "b2"])
    def test_every_stage_agrees(self, variant: str) -> None:
        transformers = pytest.importorskip("transformers", reason="transformers not installed")
        dims = EQUISegConfig(variant=variant).dims
        depths = EQUISegConfig(variant=variant).depths
        config = transformers.SegformerConfig(hidden_sizes=list(dims), depths=list(depths))
        theirs = randomise(transformers.SegformerModel(config)).eval()
        # transformers builds every LayerNorm with eps 1e-5
        ours = MixTransformer(variant, ln_eps_embed=1e-5, ln_eps_block=1e-5).eval()
        self._load(ours, theirs.state_dict())
        x = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            expected = theirs(x, output_hidden_states=True).hidden_states
            actual = ours(x)
        for a, b in zip(actual, expected[-4:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_every_parameter_learns_whatever_fuses() -> None:
    """The gate of the last stage weighs branches that nobody reads if the mean is the fused map."""
    model = EQUISeg.from_name("b0", modalities=("a", "b"), num_classes=3, fuse="mean")
    images, labels = torch.randn(2, 1, 3, 32, 32), torch.randint(0, 3, (1, 32, 32))
    model.loss(images, labels)[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert [type(gate) for gate in model.gates] == [SelfGuidedGate] * 3 + [torch.nn.Identity]


class TestStateDict:
    """Weights know the modalities they belong to."""

    @pytest.mark.parametrize("names", [("depth", "rgb"), ("rgb", "event"), ("rgb", "depth", "d")])
    @pytest.mark.parametrize(("strict", "wrapped"), [(True, False), (False, True)])
    def test_other_modalities_are_refused(
        self, names: tuple[str, ...], strict: bool, wrapped: bool
    ) -> None:
        model = EQUISeg.from_name("b0", modalities=names)
        state = EQUISeg.from_name("b0", modalities=("rgb", "depth")).state_dict()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        target: torch.nn.Module = model
        if wrapped:
            target = torch.nn.Sequential(model)
            state = {f"0.{name}": x for name, x in state.items()}
        message = rf"modalities {re.escape(repr(names))}.* got \('rgb', 'depth'\)\. .*_extra_state"
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(state, strict=strict)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    @pytest.mark.parametrize("kind", ["new", "without names", "meta", "sharded without names"])
    def test_the_rest_loads(self, kind: str) -> None:
        """The same modalities, and state dicts that do not say; nothing is missing then."""
        first, second = (EQUISeg.from_name("b0", modalities=("rgb", "é\n")) for _ in range(2))
        state = dict(first.state_dict())
        if kind == "without names":
            state = without_names(first)
        elif kind == "meta":
            state["_extra_state"] = state["_extra_state"].to("meta")
        elif kind == "sharded without names":
            state["_extra_state"] = object()
        loaded = torch.nn.Sequential(second).load_state_dict(
            {f"0.{k}": x for k, x in state.items()}
        )
        assert not loaded.missing_keys
        assert not loaded.unexpected_keys
        assert torch.equal(second.head.linear_pred.weight, first.head.linear_pred.weight)

    def test_survives_files_copies_and_devices(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch", reason="safetensors not installed")
        first = EQUISeg.from_name("b0", modalities=("rgb", "depth"))
        torch.save(first.state_dict(), tmp_path / "a.pt")
        safetensors.save_model(first, tmp_path / "a.safetensors")
        states = [
            torch.load(tmp_path / "a.pt", weights_only=True),
            safetensors.load_file(tmp_path / "a.safetensors"),
            copy.deepcopy(first).half().state_dict(),
        ]
        with torch.device("meta"):
            empty = EQUISeg.from_name("b0", modalities=("depth", "rgb"))
        for state in states:
            assert state["_extra_state"].shape == (256,)  # sharded checkpoints need equal sizes
            empty = copy.deepcopy(empty.to_empty(device="cpu"))
            with pytest.raises(RuntimeError, match="in this order"):
                empty.load_state_dict(state)

    def test_other_extra_state(self) -> None:
        model = EQUISeg.from_name("b0", modalities=("rgb", "depth"))
        for state in (torch.zeros(3), torch.zeros(3, dtype=torch.uint8), torch.tensor(1)):
            with pytest.raises(RuntimeError, match='"_extra_state" must hold the names'):
                model.load_state_dict({"_extra_state": state}, strict=False)


class TestFusion:
    def test_order_of_modalities_does_not_matter(self) -> None:
        model, x = small_model(), images()
        order = [2, 0, 3, 1]
        permuted = EQUISeg(EQUISegConfig(modalities=[NAMES[i] for i in order], num_classes=7))
        state = without_names(model)
        for name in state:
            if ".query_hub." in name:
                state[name] = state[name][order]
        permuted.double().eval().load_state_dict(state)
        torch.testing.assert_close(permuted(x[order]), model(x), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
    def test_values_of_absent_images_do_not_matter(self, value: float) -> None:
        model, x = small_model(), images()
        mask = torch.tensor([[True, True], [False, True], [True, False], [False, True]])
        poisoned = x.masked_fill(~mask[:, :, None, None, None], value)
        assert torch.equal(model(poisoned, present=mask), model(x, present=mask))

    def test_absent_images_get_no_gradient_and_spoil_none(self) -> None:
        model, x = small_model(), images(height=32, width=32)
        mask = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
        x = x.masked_fill(~mask[:, :, None, None, None], float("nan")).requires_grad_()
        labels = torch.randint(0, 7, (2, 32, 32))
        total, _ = model.loss(x, labels, present=mask)
        grads = torch.autograd.grad(total, [x, *model.parameters()], allow_unused=True)
        assert all(g is None or bool(g.isfinite().all()) for g in grads)
        assert not grads[0][~mask].any()
        assert grads[0][mask].abs().sum() > 0

    @pytest.mark.parametrize("keep", [(0, 1, 2), (1, 3), (2,), (0, 1, 2, 3)])
    def test_masked_model_is_the_model_of_the_subset(self, keep: tuple[int, ...]) -> None:
        model, x = small_model(), images()
        names = tuple(NAMES[i] for i in keep)
        subset = EQUISeg(EQUISegConfig(modalities=names, num_classes=7)).double().eval()
        state = {k: v for k, v in without_names(model).items() if k in subset.state_dict()}
        for name in state:
            if ".query_hub." in name:
                state[name] = state[name][list(keep)]
        subset.load_state_dict(state)
        expected = subset(x[list(keep)])
        mask = torch.zeros(4, 2, dtype=torch.bool)
        mask[list(keep)] = True
        torch.testing.assert_close(model(x, present=mask), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(x, present=set(names)), expected, rtol=1e-10, atol=1e-10)

    def test_every_image_has_its_own_mask(self) -> None:
        model, x = small_model(), images()
        mask = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
        together = model(x, present=mask)
        for b in range(2):
            alone = model(x[:, b : b + 1], present=mask[:, b : b + 1])
            torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-10, atol=1e-10)

    def test_one_modality_alone_is_finite_and_differentiable(self) -> None:
        model, x = small_model(), images(height=32, width=32)
        mask = torch.zeros(4, 2, dtype=torch.bool)
        mask[1] = True
        total, parts = model.loss(x, torch.randint(0, 7, (2, 32, 32)), present=mask)
        assert total.isfinite()
        assert parts["sgm"] == 0
        grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        assert all(g is None or bool(g.isfinite().all()) for g in grads)

    def test_gate_starts_as_the_mean(self) -> None:
        model = EQUISeg(EQUISegConfig(num_classes=7)).double().eval()
        for stage in model.stages(images()):
            torch.testing.assert_close(stage.fused, stage.features.mean(dim=0))
            torch.testing.assert_close(
                stage.contributions, torch.full_like(stage.contributions, 0.25)
            )

    def test_zeroed_images_are_present(self) -> None:
        zero, mask = small_model(missing="zero"), small_model()
        x = images()
        blank = x.clone()
        blank[1] = 0
        torch.testing.assert_close(zero(x, present={"rgb", "event", "lidar"}), mask(blank))

    def test_encoded_source_and_separate_encoders_and_mean_fusion(self) -> None:
        x = images(height=32, width=32)
        base = small_model()(x)
        for fields in ({"aux_source": "encoded"}, {"fuse": "mean"}, {"gate": False}):
            assert not torch.allclose(small_model(**fields)(x), base)
        separate = small_model(share_encoder=False)
        assert parameters(separate.encoder) == 4 * parameters(small_model().encoder)
        for encoder in separate.encoder:
            encoder.load_state_dict(small_model().encoder.state_dict())
        state = small_model().state_dict()
        for part in (separate.fusion, separate.gates, separate.head):
            prefix = next(n for n, m in separate.named_children() if m is part) + "."
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
        torch.testing.assert_close(separate(x), base, rtol=1e-10, atol=1e-10)


class TestHead:
    def test_folded_equals_published(self) -> None:
        model, x = small_model(), images()
        stages = model.stages(x)
        features, sizes = [s.fused for s in stages], [s.size for s in stages]
        expected = reference.segmentation_head(features, sizes, model.head.state_dict())
        torch.testing.assert_close(model.head(features, sizes), expected, rtol=0, atol=1e-12)
        model.head.fold = False
        try:
            published = model.head(features, sizes)
        finally:
            model.head.fold = True
        torch.testing.assert_close(published, expected, rtol=0, atol=1e-12)

    def test_folded_trains_like_published(self) -> None:
        x, labels = images(height=32, width=32), torch.randint(0, 7, (2, 32, 32))
        fields = {"drop_path": 0.0, "head_dropout": 0.0}
        grads = []
        for fold in (True, False):
            model = small_model(fold_head=fold, **fields).train()
            order = torch.Generator().manual_seed(0)
            total, _ = model.loss(x, labels, generator=order)
            grads.append(torch.autograd.grad(total, list(model.parameters())))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class TestTraining:
    @pytest.mark.parametrize("classes", [2, 25])
    def test_a_new_model_is_not_sure_of_anything(self, classes: int) -> None:
        x, labels = torch.randn(4, 2, 3, 32, 64), torch.randint(0, classes, (2, 32, 64))
        model = EQUISeg.from_name("nano", num_classes=classes)
        _, parts = model.loss(x, labels)
        assert parts["seg"].item() == pytest.approx(log(classes), rel=0.05)

    @pytest.mark.parametrize("in_channels", [3, (3, 1)])
    def test_where_a_sensor_sees_nothing_gradients_stay_small(self, in_channels: Any) -> None:
        """Tokens of zeros would go through LayerNorm after LayerNorm."""
        model = EQUISeg.from_name(
            "nano", modalities=("rgb", "lidar"), in_channels=in_channels, num_classes=5
        )
        lidar = torch.randn(2, model.config.in_channels[1], 64, 64)
        lidar[:, :, :40] = 0
        total, _ = model.loss(
            {"rgb": torch.randn(2, 3, 64, 64), "lidar": lidar}, torch.randint(0, 5, (2, 64, 64))
        )
        total.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert torch.stack([g.norm() for g in gradients]).norm() < 100

    def test_order_of_the_teachers(self) -> None:
        """Given it is used, drawn it comes from the generator, and a wrong one is refused."""
        x, labels = images(height=32, width=32), torch.randint(0, 7, (2, 32, 32))
        model = small_model(drop_path=0.0, head_dropout=0.0).eval()
        drawn = torch.randperm(4, generator=torch.Generator().manual_seed(5))
        _, by_seed = model.loss(x, labels, generator=torch.Generator().manual_seed(5))
        _, given = model.loss(x, labels, order=drawn)
        _, other = model.loss(x, labels, order=drawn.flip(0))
        assert given["sgm"] == by_seed["sgm"]
        assert given["sgm"] != other["sgm"]
        with pytest.raises(TypeError, match=r"order must have dtype int64; got float32"):
            model.loss(x, labels, order=torch.rand(4))
        with pytest.raises(ValueError, match=r"order must have shape \[M\] = \[4\]; got \[3\]"):
            model.loss(x, labels, order=torch.arange(3))

    def test_mixer_statistics_leave_absent_rows_out(self) -> None:
        fields = {"drop_path": 0.0, "head_dropout": 0.0}
        x, labels = images(height=32, width=32), torch.randint(0, 7, (2, 32, 32))
        mask = torch.ones(4, 2, dtype=torch.bool)
        mask[3] = False
        full = randomise(EQUISeg(EQUISegConfig(num_classes=7, **fields))).double().train()
        names = NAMES[:3]
        subset = EQUISeg(EQUISegConfig(modalities=names, num_classes=7, **fields)).double().train()
        state = {
            k: v[:3] if ".query_hub." in k else v
            for k, v in without_names(full).items()
            if k in subset.state_dict()
        }
        subset.load_state_dict(state)
        # An order without the absent modality splits the present ones alike.
        full.loss(x, labels, present=mask)
        subset.loss(x[:3], labels)
        for name, value in subset.state_dict().items():
            if "running" in name:
                torch.testing.assert_close(full.state_dict()[name], value, rtol=1e-9, atol=1e-12)

    def test_teachers_get_exactly_no_gradient(self) -> None:
        prototypes = torch.randn(4, 2, 7, 8, dtype=torch.float64, requires_grad=True)
        counts = torch.ones(2, 7, dtype=torch.long)
        present = torch.ones(4, 2, dtype=torch.bool)
        teacher = reference.split_teachers(present, torch.tensor([2, 0, 1, 3]))
        reference.prototype_kl(prototypes, counts, teacher).backward()
        assert teacher[:, 0].tolist() == [True, False, True, False]
        assert not prototypes.grad[teacher].any()
        assert prototypes.grad[~teacher].abs().min() > 0

    def test_modality_dropout_leaves_every_image_something(self) -> None:
        x = torch.empty(4, 2000, 3, 1, 1)
        generator = torch.Generator().manual_seed(0)
        kept = left_modalities(0.8, x, None, generator)
        patterns, counts = kept.unique(dim=1, return_counts=True)
        assert len(counts) == 15
        shares = counts / 2000
        whole = patterns.all(dim=0)
        assert shares[whole].item() == pytest.approx(0.2 + 0.8 / 15, abs=0.03)
        torch.testing.assert_close(shares[~whole], torch.full((14,), 0.8 / 15), rtol=0, atol=0.02)
        mask = left_modalities(0.9, x, None, generator)
        some = left_modalities(0.8, x, mask, generator)
        assert some.any(dim=0).all()
        assert not (some & ~mask).any()

    def test_images_draw_one_after_the_other(self) -> None:
        """So that a process that has only the last of a batch can skip the first."""
        x = torch.empty(3, 40, 3, 1, 1)
        one, two = (torch.Generator().manual_seed(0) for _ in range(2))
        whole = left_modalities(0.9, x, None, one)
        parts = [left_modalities(0.9, x[:, a:b], None, two) for a, b in ((0, 7), (7, 8), (8, 40))]
        assert torch.equal(torch.cat(parts, dim=1), whole)

    def test_loss_falls_on_one_batch(self) -> None:
        torch.manual_seed(1)
        model = EQUISeg(EQUISegConfig(num_classes=4, drop_path=0.0, head_dropout=0.0)).train()
        x = torch.randn(4, 2, 3, 64, 64)
        labels = (x[0, :, 0] > 0).long() + 2 * (torch.arange(64) > 31)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            total, _ = model.loss(x, labels)
            total.backward()
            optimizer.step()
            losses.append(total.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_labels_of_the_padding_are_ignored(self) -> None:
        model = small_model()
        x, labels = images(height=40, width=50), torch.randint(0, 7, (2, 40, 50))
        padded = torch.nn.functional.pad(x, (0, 14, 0, 24))
        padded_labels = torch.nn.functional.pad(labels, (0, 14, 0, 24), value=255)
        first, _ = model.loss(x, labels, generator=torch.Generator().manual_seed(3))
        second, _ = model.loss(padded, padded_labels, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(first, second)


class TestChannels:
    """Sensors with other than three channels."""

    NAMES = ("rgb", "thermal", "lidar")

    def mixed(self, **fields: Any) -> EQUISeg:
        return nano(modalities=self.NAMES, in_channels=(3, 1, 1), **fields)

    def images(self, batch: int = 2) -> dict[str, Tensor]:
        channels = zip(self.NAMES, (3, 1, 1), strict=True)
        return {k: torch.randn(batch, c, 32, 32, dtype=torch.float64) for k, c in channels}

    def test_a_first_convolution_for_each_number(self) -> None:
        usual, mixed = nano(modalities=self.NAMES), self.mixed()
        more = {"encoder.patch_embed1.others.1.weight", "encoder.patch_embed1.others.1.bias"}
        assert mixed.state_dict().keys() == usual.state_dict().keys() | more
        assert parameters(mixed) - parameters(usual) == 16 * 49 + 16
        depth = nano(modalities=("depth", "lidar"), in_channels=1).state_dict()
        assert depth["encoder.patch_embed1.proj.weight"].shape == (16, 1, 7, 7)
        assert depth.keys() == nano(modalities=("a", "b")).state_dict().keys()
        separate = self.mixed(share_encoder=False).state_dict()
        found = [separate[f"encoder.{i}.patch_embed1.proj.weight"].shape[1] for i in range(3)]
        assert found == [3, 1, 1]

    @pytest.mark.parametrize("share", [True, False])
    def test_grey_is_colour_whose_channels_are_alike(self, share: bool) -> None:
        """With the weights of three channels, summed, one is as good as three that are the same."""
        usual = nano(modalities=self.NAMES, share_encoder=share)
        mixed = self.mixed(share_encoder=share)
        rest = {k: x for k, x in without_names(usual).items() if not k.startswith("encoder.")}
        mixed.load_state_dict(rest, strict=False)
        report = load_backbone(mixed, without_names(usual))
        where = ["encoder."] if share else ["encoder.1.", "encoder.2."]
        names = [f"{x}patch_embed1.{'others.1' if share else 'proj'}.weight" for x in where]
        assert report.adapted == tuple(names)
        x = self.images()
        wide = {k: v.expand(-1, 3, -1, -1) for k, v in x.items()}
        mask = torch.tensor([[True, False], [True, True], [False, True]])
        with torch.no_grad():
            for present in (None, {"thermal", "lidar"}, {"lidar"}, mask):
                expected = usual(wide, present=present)
                torch.testing.assert_close(mixed(x, present=present), expected)
            folded = copy.deepcopy(mixed).fold_()
            torch.testing.assert_close(folded(x), usual(wide), rtol=1e-10, atol=1e-10)

    def test_every_parameter_learns_from_any_mask(self) -> None:
        model = self.mixed().train()
        mask = torch.tensor([[True, True], [True, False], [False, False]])
        x = self.images()
        x["lidar"].fill_(float("nan"))
        total, _ = model.loss(x, torch.randint(0, 7, (2, 32, 32)), present=mask)
        total.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name

    def test_one_graph(self) -> None:
        """Inputs, embeddings by channels, and modality dropout."""
        model, x = self.mixed(), self.images()

        def first_tokens(x: dict[str, Tensor]) -> Tensor:
            maps, _, _ = model._inputs(x, None)
            kept = left_modalities(0.5, maps, None, None)
            return model._encode(0, model._masked(maps, kept)[0].flatten(0, 1), (0, 1, 2))[0]

        torch.manual_seed(0)
        expected = first_tokens(x)
        torch.manual_seed(0)
        actual = torch.compile(first_tokens, backend="eager", fullgraph=True)(x)
        assert torch.equal(actual, expected)

    def test_errors_name_the_modality(self) -> None:
        model, x = self.mixed(), self.images()
        cases: list[tuple[Any, type[Exception], str]] = [
            ({**x, "thermal": x["rgb"]}, ValueError,
             r"images\['thermal'\] must have 1 channel; got shape \[2, 3, 32, 32\]"),
            ({**x, "rgb": x["lidar"]}, ValueError, r"images\['rgb'\] must have 3 channels"),
            ({**x, "lidar": x["lidar"][:1]}, ValueError,
             r"images\['lidar'\] must have shape \[B, 1, H, W\] \(B, H, W of images\['rgb'\]\)"),
            (torch.stack([x["rgb"]] * 3), TypeError,
             r"images must be a mapping .* channels \(rgb 3, thermal 1, lidar 1\); got a tensor"),
        ]  # fmt: skip
        for images, error, message in cases:
            with pytest.raises(error, match=message):
                model(images)
        one = nano(modalities=("depth", "lidar"), in_channels=1)
        assert one(torch.randn(2, 1, 1, 32, 32, dtype=torch.float64)).shape == (1, 7, 32, 32)
        with pytest.raises(
            ValueError, match=r"images must have 1 channel; got shape \[2, 1, 3, 32"
        ):
            one(torch.randn(2, 1, 3, 32, 32, dtype=torch.float64))

    def test_states_know_their_channels(self) -> None:
        """All parameters fit, but each convolution would see the images of the other sensor."""
        state = nano(modalities=("a", "b"), in_channels=(3, 1)).state_dict()
        model = nano(modalities=("a", "b"), in_channels=(1, 3))
        message = r"must be of images with in_channels=\(1, 3\); got \(3, 1\)"
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
        del state["_extra_state"]
        model.load_state_dict(state)


class TestParts:
    """Fields that leave a part of the model out, or put it elsewhere."""

    LABELS = torch.randint(0, 7, (2, 32, 32), generator=torch.Generator().manual_seed(0))

    def test_without_the_cross_modal_block_is_the_mean_of_encodings(self) -> None:
        with torch.device("meta"):
            model = EQUISeg.from_name("b0", cross_modal=False, gate=False)
        assert parameters(model) == 3_720_569  # that of SegFormer, whatever the sensors
        model = nano(cross_modal=False, gate=False, fuse="mean")
        x = images(height=32, width=32)
        with torch.no_grad():
            maps = [model.encoder(y) for y in x]
            logits = model.head([torch.stack(stage).mean(0) for stage in zip(*maps, strict=True)])
            expected = F.interpolate(logits, scale_factor=4, mode="bilinear")
            torch.testing.assert_close(model(x), expected)
            kept = model(x, present={"depth", "event"})
            mask = torch.tensor([[False], [True], [True], [False]]).expand(4, 2)
            poisoned = x.masked_fill(~mask[:, :, None, None, None], float("nan"))
            torch.testing.assert_close(model(poisoned, present=mask), kept)

    def test_without_the_cross_modal_block_gates_still_weigh(self) -> None:
        model = nano(cross_modal=False)
        assert len(model.fusion) == 0
        stages = model.stages(images(height=32, width=32))
        assert all(stage.contributions.std(dim=0).min() > 0 for stage in stages)

    def test_gates_in_some_stages(self) -> None:
        with torch.device("meta"):
            model = EQUISeg.from_name("b0", gate_stages=(4, 2))
        assert parameters(model) == 5_402_005 - 808 - 19_400
        assert {name.split(".")[1] for name in model.state_dict() if "gates" in name} == {"1", "3"}
        model = nano(gate_stages=(2, 4))
        stages = model.stages(images(height=32, width=32))
        equal = [bool((stage.contributions == 0.25).all()) for stage in stages]
        assert equal == [True, False, True, False]
        full = nano()
        missing = full.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert {name.split(".")[1] for name in missing} == {"0", "2"}

    def test_where_prototypes_are_taken_from(self) -> None:
        x, order = images(height=32, width=32), torch.tensor([2, 0, 3, 1])
        reached, losses = {}, {}
        for source in ("encoded", "cross_modal", "gated"):
            model = nano(sgm_source=source, sgm_stages=(1,), drop_path=0.0, head_dropout=0.0)
            _, parts = model.loss(x, self.LABELS, order=order)
            parts["sgm"].backward()
            losses[source] = parts["sgm"].item()
            places = {"encoder": model.encoder.block1, "fusion": model.fusion[0].attn,
                      "gate": model.gates[0]}  # fmt: skip
            reached[source] = {
                name for name, part in places.items() if any(p.grad is not None and p.grad.any()
                for p in part.parameters())
            }  # fmt: skip
        assert reached == {
            "encoded": {"encoder"},
            "cross_modal": {"encoder", "fusion"},
            "gated": {"encoder", "fusion", "gate"},
        }
        assert len(set(losses.values())) == 3
        # Gates begin with equal weights, which change no branch.
        for p in model.gates[0].fc2.parameters():
            torch.nn.init.zeros_(p)
        _, parts = model.loss(x, self.LABELS, order=order)
        assert parts["sgm"].item() == pytest.approx(losses["cross_modal"])


class TestModalityDropout:
    LABELS = TestParts.LABELS
    STEPS = 4

    def test_drops_by_mask_as_inference_does(self) -> None:
        """Every step is that of the mask which is drawn, whatever the values of what is dropped."""
        model = nano(modality_dropout=0.9, drop_path=0.0, head_dropout=0.0)
        plain = nano(drop_path=0.0, head_dropout=0.0).train()
        model.train()
        given = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
        for seed in range(self.STEPS):
            present = given if seed % 2 else None
            x = images(height=32, width=32)
            generator, again = (torch.Generator().manual_seed(seed) for _ in range(2))
            kept = left_modalities(0.9, x, present, again)
            x = x.masked_fill(~kept[:, :, None, None, None], float("nan"))
            ours = model.loss(x, self.LABELS, present=present, generator=generator)
            theirs = plain.loss(x, self.LABELS, present=kept, generator=again)
            assert ours[0].isfinite()
            assert (ours[0], ours[1]["sgm"]) == (theirs[0], theirs[1]["sgm"])
        whole = images(height=32, width=32)
        ours = model.eval().loss(whole, self.LABELS, generator=generator)
        assert torch.equal(ours[0], plain.eval().loss(whole, self.LABELS, generator=again)[0])

    def test_zeroes_where_absent_is_zero(self) -> None:
        """And never the last sensor of an image, which is told from the mask alone."""
        fields = {"drop_path": 0.0, "head_dropout": 0.0, "missing": "zero"}
        model = nano(modality_dropout=0.9, **fields).train()
        plain = nano(**fields).train()
        given = torch.tensor([[True, False], [False, True], [False, False], [False, False]])
        for seed in range(self.STEPS):
            present = given if seed % 2 else None
            x = images(height=32, width=32)
            generator, again = (torch.Generator().manual_seed(seed) for _ in range(2))
            kept = given if seed % 2 else left_modalities(0.9, x, None, again)
            if seed % 2:
                left_modalities(0.9, x, given, again)
            zeroed = x.masked_fill(~kept[:, :, None, None, None], 0.0)
            ours = model.loss(x, self.LABELS, present=present, generator=generator)
            assert ours[0] == plain.loss(zeroed, self.LABELS, generator=again)[0]

    def test_of_named_sensors(self) -> None:
        model = nano(modality_dropout=0.9, drop_path=0.0, head_dropout=0.0).train()
        plain = nano(drop_path=0.0, head_dropout=0.0).train()
        for seed in range(2):
            x = images(height=32, width=32)
            generator, again = (torch.Generator().manual_seed(seed) for _ in range(2))
            ours = model.loss(x, self.LABELS, present={"lidar", "depth"}, generator=generator)
            kept = torch.zeros(4, 2, dtype=torch.bool)
            kept[[1, 3]] = left_modalities(0.9, x[[1, 3]], None, again)
            order = torch.randperm(2, generator=again)
            order = torch.cat([torch.tensor([1, 3])[order], torch.tensor([0, 2])])
            theirs = plain.loss(x, self.LABELS, present=kept, order=order)
            torch.testing.assert_close(ours[0], theirs[0])


class TestInputs:
    @pytest.mark.parametrize(("height", "width"), [(64, 96), (40, 50), (33, 65), (7, 5), (1, 1)])
    def test_any_size_is_padded_and_cropped(self, height: int, width: int) -> None:
        model, x = small_model(), images(height=height, width=width)
        logits = model(x)
        assert logits.shape == (2, 7, height, width)
        pad = (0, -width % 32, 0, -height % 32)
        full = model(torch.nn.functional.pad(x, pad))
        assert torch.equal(logits, full[..., :height, :width])

    def test_mapping_and_tensor_agree(self) -> None:
        model, x = small_model(), images()
        mapping = dict(reversed(list(zip(NAMES, x, strict=True))))
        assert torch.equal(model(mapping), model(x))
        del mapping["depth"]
        present = {"rgb", "event", "lidar"}
        assert torch.equal(model(mapping, present=present), model(x, present=present))

    def test_bad_inputs_are_refused_by_name(self) -> None:
        model, x = small_model(), images()
        labels = torch.zeros(2, 64, 96, dtype=torch.long)
        mapping = dict(zip(NAMES, x, strict=True))
        none = torch.zeros(4, 2, dtype=torch.bool)
        cases = [
            (lambda: model(x[:3]), ValueError, r"images must have M = 4 .*got shape \[3, 2"),
            (lambda: model(x[0]), ValueError, r"images must have shape \[M, B, 3, H, W\]"),
            (lambda: model(x[:, :, :2]), ValueError, "images must have 3 channels"),
            (lambda: model(x[..., :0]), ValueError, "images must not be empty"),
            (lambda: model(x.float()), TypeError, "images must have the model's dtype"),
            (lambda: model(x.long()), TypeError, "images must have dtype float64"),
            (lambda: model(x.to("meta")), ValueError, "images must be on the model's device cpu"),
            (lambda: model(7), TypeError, "images must be a mapping or a tensor; got int"),
            (lambda: model({**mapping, "radar": x[0]}), ValueError, "unknown modality 'radar'"),
            (lambda: model({"rgb": x[0]}), ValueError, "images lacks modality 'depth'"),
            (
                lambda: model({**mapping, "depth": x[0, :, :, :32]}),
                ValueError,
                r"images\['depth'\] must have shape",
            ),
            (lambda: model(x, present=set()), ValueError, "all are absent"),
            (
                lambda: model(x, present={"radar"}),
                ValueError,
                "present has unknown modality 'radar'",
            ),
            (lambda: model(x, present="rgb"), TypeError, "present must be a bool mask"),
            (lambda: model(x, present=none), ValueError, "image 0 has none"),
            (lambda: model(x, present=none.float()), TypeError, "present must have dtype bool"),
            (lambda: model(x, present=none[:3]), ValueError, r"present must have shape \[M, B\]"),
            (lambda: model(x, labels), TypeError, r"write model\(images, labels=labels\)"),
            (lambda: model.loss(x, labels[:1]), ValueError, "labels must have shape"),
            (lambda: model.loss(x, labels.float()), TypeError, "labels must have dtype int64"),
            (lambda: model.loss(x, labels + 7), ValueError, r"labels must be 0\.\.6 or 255.*got 7"),
            (lambda: model.loss(x, labels - 1), ValueError, "got -1"),
        ]
        for call, error, message in cases:
            with pytest.raises(error, match=message):
                call()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"variant": "b9"}, "variant must be one of nano, b0"),
            ({"modalities": ()}, "modalities must be 1 to 8 names"),
            ({"modalities": ("a", "a")}, "modalities must be unique"),
            ({"num_classes": 0}, "num_classes must be 1 to 256; got 0"),
            ({"cross_sr": (8, 4, 2)}, "cross_sr must be four positive numbers"),
            ({"fuse": "sum"}, "fuse must be one of gate, mean; got 'sum'"),
            ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
            ({"sgm_stages": (0,)}, "sgm_stages must be stages 1 to 4"),
        ],
    )
    def test_bad_configurations_are_refused(self, fields: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EQUISegConfig(**fields)

    def test_config_is_frozen(self) -> None:
        with pytest.raises(AttributeError):
            EQUISegConfig().variant = "b1"  # type: ignore[misc]


class TestFolded:
    """`fold_` for inference: other weights, the same function."""

    def test_model_computes_the_same(self) -> None:
        model = small_model()
        folded = copy.deepcopy(model).fold_()
        x = images()
        mask = torch.tensor([[True, True], [False, True], [True, True], [True, False]])
        with torch.no_grad():
            for present in (None, {"rgb", "event"}, mask):
                expected = model(x, present=present)
                actual = folded(x, present=present)
                torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)

    def test_mixer_and_head_to_the_rounding(self) -> None:
        model = small_model()
        folded = copy.deepcopy(model).fold_()
        x = torch.randn(3, 35, 32, dtype=torch.float64)
        with torch.no_grad():
            expected = model.fusion[0].mixer[0](x, 7, 5)
            actual = folded.fusion[0].mixer[0](x, 7, 5)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
            sizes = [(8, 12), (4, 6), (2, 3), (1, 2)]
            features = [
                torch.randn(2, h * w, c, dtype=torch.float64)
                for (h, w), c in zip(sizes, model.config.dims, strict=True)
            ]
            expected = model.head(features, sizes)
            torch.testing.assert_close(
                folded.head(features, sizes), expected, rtol=1e-12, atol=1e-12
            )

    def test_published_head_can_be_folded(self) -> None:
        model = small_model(("rgb", "depth"), fold_head=False)
        x = images(modalities=2)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(copy.deepcopy(model).fold_()(x), expected)

    def test_norms_are_gone_and_twice_is_once(self) -> None:
        folded = copy.deepcopy(small_model()).fold_()
        once = {name: x.clone() for name, x in folded.state_dict().items()}
        assert not any(name.endswith("norm2.weight") and "mixer" in name for name in once)
        assert not any("bn" in name for name in once)
        assert sum("norm1.running_mean" in name for name in once) == 4
        for name, x in folded.fold_().state_dict().items():
            assert torch.equal(x, once[name])

    def test_training_is_refused(self) -> None:
        folded = copy.deepcopy(small_model()).fold_()
        assert not folded.training
        for module in (folded, folded.head, folded.fusion[0].mixer[0]):
            with pytest.raises(RuntimeError, match="folded for inference"):
                module.train()
        folded.eval()


class TestLinear:
    """`nn.Linear` on tokens is a convolution on the CPU, where those are faster."""

    @pytest.fixture
    def convolved(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
        """The calls that became convolutions, on a processor on which those are faster."""
        calls, convolve, threads = [], _layout.pointwise_conv, torch.get_num_threads()
        monkeypatch.setattr(_layout, "_WIDE_CONVOLUTIONS", True)
        monkeypatch.setattr(
            _layout, "pointwise_conv", lambda *args: calls.append(args) or convolve(*args)
        )
        torch.set_num_threads(2)
        yield calls
        torch.set_num_threads(threads)

    def test_only_where_that_is_faster(
        self, convolved: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By size, half of it without gradients; never where matrices are multiplied as well."""
        small, large = torch.ones(2, 8192, 32), torch.ones(2, 16384, 32)
        weight = torch.ones(32, 32)
        for x, trained, expected in (
            (small[:, :8184], False, 0), (small, False, 1), (small, True, 0), (large, True, 1),
            (large[:, ::2], False, 0), (large.double(), False, 0),
        ):  # fmt: skip
            convolved.clear()
            linear(x, weight.to(x.dtype).requires_grad_(trained), None)
            assert len(convolved) == expected
        convolved.clear()
        monkeypatch.setattr(_layout, "_WIDE_CONVOLUTIONS", False)
        linear(large, weight, None)
        torch.set_num_threads(1)
        monkeypatch.setattr(_layout, "_WIDE_CONVOLUTIONS", True)
        linear(large, weight, None)
        assert not convolved

    @pytest.mark.parametrize("tokens", [1, 8, 12, 35, 64])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_agrees_with_torch(
        self,
        tokens: int,
        bias: bool,
        dtype: torch.dtype,
        convolved: list[Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(_layout, "_MIN_PRODUCTS_WITH_GRADIENTS", 1)
        x = torch.randn(2, tokens, 12, dtype=dtype, requires_grad=True)
        weight = torch.randn(7, 12, dtype=dtype, requires_grad=True)
        leaves = [x, weight]
        if bias:
            leaves.append(torch.randn(7, dtype=dtype, requires_grad=True))
        arguments = leaves if bias else [*leaves, None]
        expected, actual = F.linear(*arguments), linear(*arguments)
        assert actual.shape == expected.shape
        assert len(convolved) == (tokens % 8 == 0 and dtype == torch.float32)
        tolerance = {torch.bfloat16: 0.05, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        g = torch.randn_like(expected)
        for a, b in zip(
            torch.autograd.grad(actual, leaves, g),
            torch.autograd.grad(expected, leaves, g),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=20 * tolerance)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_result_is_contiguous(
        self, transposed: bool, convolved: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_layout, "_MIN_PRODUCTS", 1)
        x = torch.randn(2, 12, 16).mT if transposed else torch.randn(2, 16, 12)
        assert linear(x, torch.randn(7, 12), None).is_contiguous()
