"""Loading encoder weights: every published layout, what is refused, and that nothing is half done.

The oracle is `transformers`: its own model runs on the weights, and it writes the files of the old
layout itself. NVlabs' names are made here from transformers' by rules of their own.
"""

import pickle
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from equiseg_fast.models import EQUISeg, LoadReport, MixTransformer, load_backbone
from equiseg_fast.models.config import VARIANTS

State = dict[str, Tensor]

TO_NVLABS = (
    (r"^stages\.(\d)\.patch_embeddings\.layer_norm", r"patch_embed\1.norm"),
    (r"^stages\.(\d)\.patch_embeddings", r"patch_embed\1"),
    (r"^stages\.(\d)\.layer_norm", r"norm\1"),
    (r"^stages\.(\d)\.blocks", r"block\1"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.sequence_reduction\.sequence_reduction", "attn.sr"),
    (r"attention\.sequence_reduction\.layer_norm", "attn.norm"),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.q_proj", "attn.q"),
)


def next_stage(match: re.Match[str]) -> str:
    return f"{match[1]}{int(match[2]) + 1}"


def to_nvlabs(theirs: State) -> State:
    """State of a SegFormer of transformers 5 with its encoder under the names of `mit_b*.pth`."""
    state = {}
    for name, value in theirs.items():
        if ".v_proj" in name:
            continue
        if ".k_proj" in name:
            value = torch.cat([value, theirs[name.replace(".k_proj", ".v_proj")]])
            name = name.replace("attention.k_proj", "attn.kv")
        name = name.removeprefix("segformer.")
        for pattern, ours in TO_NVLABS:
            name = re.sub(pattern, ours, name)
        state[re.sub(r"^(patch_embed|block|norm)(\d)", next_stage, name)] = value
    return state


def randomise(model: nn.Module) -> nn.Module:
    """Random weights everywhere, biases and norms too, from the seed of the test."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def segformer(kind: str = "Model", **fields: object) -> nn.Module:
    """A SegFormer of transformers, B0 unless the fields of its configuration say otherwise."""
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    config = transformers.SegformerConfig(**fields)
    return randomise(getattr(transformers, f"Segformer{kind}")(config))


def as_layout(layout: str, theirs: nn.Module, folder: Path) -> Path | State:
    """The weights of a SegFormer of transformers 5 in one of the layouts."""
    state = theirs.state_dict()
    if layout == "Hugging Face v4":
        # transformers 5 saves under the names of version 4, which the hub is full of.
        theirs.save_pretrained(folder)
        return folder / "model.safetensors"
    return state if layout == "Hugging Face v5" else to_nvlabs(state)


@cache
def nvlabs_state(variant: str = "b0") -> State:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(randomise(MixTransformer(variant)).state_dict())


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def same(state: State, expected: State) -> bool:
    return state.keys() == expected.keys() and all(
        torch.equal(state[k], expected[k]) for k in state
    )


def counting(like: State) -> State:
    """States whose elements are 0, 1, 2, .. through all tensors: no two are alike."""
    start, state = 0, {}
    for name, value in like.items():
        numbers = torch.arange(start, start + value.numel(), dtype=torch.float32)
        state[name] = numbers.view(value.shape)
        start += value.numel()
    assert start < 2**24, "fp32 would repeat itself"
    return state


class TestHuggingFace:
    @pytest.mark.parametrize("kind", ["Model", "ForSemanticSegmentation", "ForImageClassification"])
    @pytest.mark.parametrize("layout", ["Hugging Face v4", "Hugging Face v5", "NVlabs"])
    def test_every_stage_agrees(self, kind: str, layout: str, tmp_path: Path) -> None:
        theirs = segformer(kind)
        encoder = getattr(theirs, "segformer", theirs)
        head = {k for k in theirs.state_dict() if not k.startswith(("segformer.", "stages."))}
        ours = MixTransformer("b0", ln_eps_block=1e-5).eval()
        report = load_backbone(ours, as_layout(layout, theirs, tmp_path))
        assert report.layout == layout
        assert set(report.loaded) == {name for name, _ in ours.named_parameters()}
        assert len(report.ignored) == len(head)
        assert report.missing == ()
        x = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            expected = encoder(x, output_hidden_states=True).hidden_states[-4:]
            actual = ours(x)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))

    @pytest.mark.parametrize("layout", ["Hugging Face v4", "Hugging Face v5", "NVlabs"])
    def test_every_number_arrives_once(self, layout: str, tmp_path: Path) -> None:
        theirs = segformer()
        theirs.load_state_dict(counting(theirs.state_dict()))
        expected = to_nvlabs(theirs.state_dict())
        ours = MixTransformer("b0")
        report = load_backbone(ours, as_layout(layout, theirs, tmp_path))
        assert same(ours.state_dict(), expected)
        numbers = torch.cat([p.detach().flatten() for p in ours.parameters()]).sort().values
        assert torch.equal(numbers, torch.arange(len(numbers), dtype=torch.float32))
        assert sorted(report.loaded) == sorted(ours.state_dict())
        assert report.ignored == ()

    @pytest.mark.parametrize("layout", ["Hugging Face v4", "Hugging Face v5", "NVlabs"])
    def test_more_than_ten_blocks(
        self, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = ((8, 16, 40, 64), (1, 2, 12, 1))
        monkeypatch.setitem(VARIANTS, "b3", sizes)
        theirs = segformer(hidden_sizes=sizes[0], depths=sizes[1])
        expected = to_nvlabs(theirs.state_dict())
        ours = MixTransformer("b3")
        load_backbone(ours, as_layout(layout, theirs, tmp_path))
        assert same(ours.state_dict(), expected)

    def test_old_file_has_the_old_names(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch", reason="safetensors not installed")
        segformer("ForSemanticSegmentation").save_pretrained(tmp_path)
        names = safetensors.load_file(tmp_path / "model.safetensors")
        assert "segformer.encoder.block.0.0.attention.self.query.weight" in names


class TestBuiltOnSegFormer:
    """Checkpoints as the published training scripts write them."""

    def _cmnext(self) -> State:
        extra = {
            "extra_downsample_layers.0.proj.module.weight": (32, 3, 7, 7),
            "extra_downsample_layers.0.norm.ln_0.weight": (32,),
            "extra_score_predictor.0.score_nets.1.0.weight": (32, 1, 3, 3),
            "extra_block1.0.norm1.weight": (32,),
            "extra_block1.0.attn.conv0.weight": (32, 1, 7, 7),
            "extra_block1.0.mlp.fc1.weight": (256, 32, 1, 1),
            "extra_norm1.weight": (32,),
            "FRMs.0.channel_weights.mlp.0.weight": (128, 128),
            "FFMs.0.cross.norm1.weight": (32,),
            "FFMs.0.cross.cross_attn.kv1.weight": (64, 32),
        }
        return {name: torch.randn(shape) for name, shape in extra.items()}

    def test_cmnext(self, tmp_path: Path) -> None:
        rgb, extra = nvlabs_state(), prefixed("backbone.", self._cmnext())
        head = {"decode_head.linear_c1.proj.weight": torch.randn(256, 32)}
        content = {
            "epoch": 7,
            "model_state_dict": extra | prefixed("backbone.", rgb) | head,
            "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "best_miou": 66.3,
        }
        torch.save(content, tmp_path / "checkpoint.pth")
        model = EQUISeg.from_name("b0")
        report = load_backbone(model, tmp_path / "checkpoint.pth")
        assert report.layout == "CMNeXt"
        assert set(report.ignored) == {*extra, *head}
        assert set(report.loaded) == {f"encoder.{name}" for name in rgb}
        assert same(model.encoder.state_dict(), rgb)

    def test_stitchfusion_trained_in_parallel(self, tmp_path: Path) -> None:
        shared = nvlabs_state()
        adapters = {
            "block1.0.adap_t_att12.adapter_down.weight": torch.randn(8, 32),
            "feature_cross.mix_ffn.0.fc1.weight": torch.randn(32, 32),
        }
        state = prefixed("module.backbone.", shared | adapters)
        torch.save({"model_state_dict": state}, tmp_path / "checkpoint.pth")
        model = MixTransformer("b0")
        report = load_backbone(model, tmp_path / "checkpoint.pth")
        assert report.layout == "StitchFusion"
        assert set(report.ignored) == set(prefixed("module.backbone.", adapters))
        assert same(model.state_dict(), shared)

    @pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.encoder._orig_mod."])
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "meta": {"epoch": 3}},
            lambda state: {"model": {"state_dict": state}, "optimizer": {"param_groups": []}},
        ],
        ids=["flat", "nested", "nested twice"],
    )
    def test_prefixes_and_nesting(self, prefix: str, wrap: Callable[[State], dict]) -> None:
        state = nvlabs_state()
        head = {"head.weight": torch.randn(1000, 256), "head.bias": torch.randn(1000)}
        model = MixTransformer("b0")
        report = load_backbone(model, wrap(prefixed(prefix, state) | head))
        assert same(model.state_dict(), state)
        assert report == LoadReport("NVlabs", tuple(state), tuple(head), ())


class TestModels:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_file_of_another_dtype(self, suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
        state = {name: value.to(dtype) for name, value in nvlabs_state().items()}
        path = tmp_path / f"mit_b0{suffix}"
        if suffix == ".pth":
            torch.save(state, path)
        else:
            safetensors = pytest.importorskip("safetensors.torch", reason="not installed")
            safetensors.save_file(state, path)
        model = MixTransformer("b0")
        load_backbone(model, str(path))
        assert same(model.state_dict(), {name: value.float() for name, value in state.items()})

    def test_model_keeps_dtype_identity_and_gradients(self) -> None:
        state = nvlabs_state()
        model = MixTransformer("b0").bfloat16()
        model.norm1.requires_grad_(False)
        before = dict(model.named_parameters())
        load_backbone(model, state)
        for name, parameter in model.named_parameters():
            assert parameter is before[name]
            assert parameter.requires_grad == (not name.startswith("norm1."))
            assert parameter.is_leaf
            assert torch.equal(parameter, state[name].bfloat16())

    @pytest.mark.parametrize("share", [True, False])
    def test_only_encoders_change(self, share: bool) -> None:
        state = nvlabs_state()
        model = EQUISeg.from_name("b0", modalities=("rgb", "depth"), share_encoder=share)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = load_backbone(model, state)
        encoders = ["encoder."] if share else ["encoder.0.", "encoder.1."]
        expected = {k: v for prefix in encoders for k, v in prefixed(prefix, state).items()}
        assert same(model.state_dict(), before | expected)
        assert sorted(report.loaded) == sorted(expected)

    @pytest.mark.parametrize("share", [True, False])
    def test_round_trip(self, share: bool, tmp_path: Path) -> None:
        fields = {"modalities": ("rgb", "depth", "event"), "share_encoder": share}
        first, second = (EQUISeg.from_name("b0", **fields) for _ in range(2))
        randomise(first.encoder)
        torch.save(first.state_dict(), tmp_path / "own.pt")
        report = load_backbone(second, tmp_path / "own.pt")
        assert same(second.encoder.state_dict(), first.encoder.state_dict())
        others = {name for name in first.state_dict() if not name.startswith("encoder.")}
        assert set(report.ignored) == others

    def test_encoder_inside_another_module(self) -> None:
        state = nvlabs_state()
        model = nn.ModuleDict({"teacher": MixTransformer("b0"), "head": nn.Linear(2, 2)})
        report = load_backbone(model, state)
        assert same(model["teacher"].state_dict(), state)
        assert report.loaded == tuple(prefixed("teacher.", state))

    def test_not_strict_keeps_what_is_missing(self) -> None:
        theirs = segformer().state_dict()
        del theirs["stages.3.layer_norm.bias"], theirs["stages.1.blocks.1.attention.v_proj.bias"]
        model = MixTransformer("b0")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = load_backbone(model, theirs, strict=False)
        assert set(report.missing) == {"norm4.bias", "block2.1.attn.kv.bias"}
        assert report.ignored == ("stages.1.blocks.1.attention.k_proj.bias",)
        assert set(report.loaded) | set(report.missing) == set(before)
        assert not set(report.loaded) & set(report.missing)
        for name in report.missing:
            assert torch.equal(model.state_dict()[name], before[name])

    def test_report_reads_well(self) -> None:
        report = load_backbone(
            MixTransformer("b0"),
            nvlabs_state()
            | {f"decode_head.linear_c{s}.proj.{k}": torch.zeros(1) for s in "1234" for k in "wb"}
            | {"head.bias": torch.zeros(1)},
        )
        assert str(report).splitlines() == [
            "NVlabs: 176 parameters loaded",
            "  none missing",
            "  9 ignored: decode_head.linear_c*.proj (8), head (1)",
        ]
        few = LoadReport("CMNeXt", ("a",), (), ("norm4.weight", "norm4.bias"))
        assert str(few).splitlines()[1:] == [
            "  2 missing: norm4.weight, norm4.bias",
            "  none ignored",
        ]


def changed(name: str, value: Tensor) -> Callable[[], State]:
    return lambda: nvlabs_state() | {name: value}


def without(*names: str) -> Callable[[], State]:
    return lambda: {k: v for k, v in nvlabs_state().items() if not k.startswith(names)}


def fake(*names: str) -> Callable[[], State]:
    return lambda: {name: torch.zeros(2) for name in names}


def two(first: str, second: str) -> Callable[[], State]:
    return lambda: prefixed(first, nvlabs_state()) | prefixed(second, nvlabs_state())


class TestRefusals:
    CASES = (
        # what it is instead
        (fake("layer1.0.conv1.weight", "fc.bias"), "no Mix Transformer .* like a ResNet; it has l"),
        (fake("layers.0.blocks.0.attn.relative_position_bias_table"), "like a Swin Transformer"),
        (fake("cls_token", "blocks.0.attn.qkv.weight"), "like a plain Vision Transformer"),
        (fake("stages.0.0.dwconv.weight"), "like a ConvNeXt"),
        (fake("backbone.layers.0.0.projection.weight"), r"MMSegmentation 0\.13"),
        (fake("patch_embed1.norm.ln_0.weight"), "LayerNorm per modality, as in GeminiFusion"),
        (fake("decode_head.linear_c1.proj.weight"), "like a decode head only"),
        (fake("linear_c.0.proj.weight"), "like a decode head only"),
        (fake("alpha", "beta"), "no Mix Transformer encoder: it has alpha, beta$"),
        (dict, "it is empty"),
        (lambda: {"state": {0: {}}, "param_groups": []}, "like an optimizer state"),
        (lambda: {"epoch": 1, "optimizer_state_dict": {}}, "like an optimizer state"),
        # another variant
        (lambda: nvlabs_state("b1"), r"different Mix Transformer: b1 .*; the model is b0"),
        (
            changed("block3.2.norm1.bias", torch.zeros(160)),
            r"no known variant .*\(2, 2, 3, 2\)\); the model is b0",
        ),
        (without("block4.1."), r"no known variant .*\(2, 2, 2, 1\)\); the model is b0"),
        (without("norm4.bias"), r"lacks 1 of 176 encoder parameters: norm4\.bias; strict=False"),
        (without("patch_embed3.proj.weight"), r"lacks 1 .*: patch_embed3\.proj\.weight"),
        (
            without("block1.0.attn"),
            r"lacks 10 of .*: block\*\.\*\.attn\.q \(2\), block\*\.\*\.attn\.kv \(2\), .*; strict",
        ),
        # another shape
        (
            changed("norm4.bias", torch.zeros(255)),
            r"norm4\.bias \(for norm4\.bias\) must have shape \[256\]; got \[255\]",
        ),
        (
            changed("block1.0.mlp.fc1.weight", torch.zeros(256, 32)),
            r"block1\.0\.mlp\.fc1\.weight .* must have shape \[128, 32\]; got \[256, 32\]",
        ),
        (changed("norm4.bias", torch.zeros(256, device="meta")), "in the file .* meta device"),
        (changed("patch_embed1.proj.weight", torch.zeros(())), "different Mix Transformer"),
        # several encoders
        (two("student.", "teacher."), "must have one encoder.*has 1; got 'student.', 'teacher.'"),
        (two("encoder.0.", "encoder.1."), "got 'encoder.0.', 'encoder.1.'. Pass a state dict of"),
    )

    @pytest.mark.parametrize(("make", "message"), CASES, ids=[m[:40] for _, m in CASES])
    def test_message_says_what_came_and_nothing_changes(
        self, make: Callable[[], State], message: str
    ) -> None:
        model = MixTransformer("b0")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_backbone(model, make())
        assert same(model.state_dict(), before)

    def test_another_variant_is_refused_without_strict_as_well(self) -> None:
        with pytest.raises(ValueError, match=r"Transformer: b1 .*; the model is b2 "):
            load_backbone(MixTransformer("b2"), nvlabs_state("b1"), strict=False)

    @pytest.mark.parametrize("prefix", [("a.", "b."), ("encoder.0.", "encoder.2.")])
    def test_two_encoders_that_are_not_numbered(self, prefix: tuple[str, str]) -> None:
        model = EQUISeg.from_name("b0", modalities=("rgb", "depth"), share_encoder=False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="numbered ones, as many as the model, which has 2"):
            load_backbone(model, two(*prefix)())
        assert same(model.state_dict(), before)

    def test_shape_of_one_half_of_keys_and_values(self) -> None:
        theirs = segformer().state_dict()
        name = "stages.3.blocks.1.attention.v_proj.weight"
        theirs[name] = theirs[name][:-1]
        model = MixTransformer("b0")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        message = rf"{name} \(for block4\.1\.attn\.kv\.weight\) must have shape \[256, 256\]"
        with pytest.raises(ValueError, match=message):
            load_backbone(model, theirs)
        assert same(model.state_dict(), before)

    def test_other_types(self) -> None:
        model = MixTransformer("b0")
        integers = changed("norm4.bias", torch.zeros(256, dtype=torch.int8))()
        for arguments, message in (
            ((nn.Linear(2, 2), {}), "model must be an EQUISeg or a MixTransformer; got Linear"),
            ((None, {}), "model must be an EQUISeg or a MixTransformer; got NoneType"),
            ((model, model), "mapping from names to tensors; got MixTransformer"),
            ((model, 7), "mapping from names to tensors; got int"),
            ((model, integers), r"norm4\.bias .* must be floating; got int8"),
        ):
            with pytest.raises(TypeError, match=message):
                load_backbone(*arguments)

    def test_model_without_memory(self) -> None:
        with torch.device("meta"):
            model = MixTransformer("b0")
        with pytest.raises(ValueError, match="in the model it is on the meta device"):
            load_backbone(model, nvlabs_state())


class TestFiles:
    @pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
    @pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"version https://git-lfs", b"h"])
    def test_damaged(self, name: str, content: bytes, tmp_path: Path) -> None:
        if name.endswith(".safetensors"):
            pytest.importorskip("safetensors", reason="safetensors not installed")
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} (cannot be read|is no safetensors file)"):
            load_backbone(MixTransformer("b0"), tmp_path / name)

    @pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
    def test_absent(self, name: str, tmp_path: Path) -> None:
        if name.endswith(".safetensors"):
            pytest.importorskip("safetensors", reason="safetensors not installed")
        with pytest.raises(FileNotFoundError, match=name):
            load_backbone(MixTransformer("b0"), tmp_path / name)

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        content = {"patch_embed1.proj.weight": Touch(trace)}
        (tmp_path / "a.pth").write_bytes(pickle.dumps(content, protocol=2))
        torch.save(content, tmp_path / "b.pth")
        for name in ("a.pth", "b.pth"):
            with pytest.raises(ValueError, match=f"{name} cannot be read .*more than tensors"):
                load_backbone(MixTransformer("b0"), tmp_path / name)
        assert not trace.exists()

    def test_no_mapping(self, tmp_path: Path) -> None:
        torch.save([torch.zeros(2)], tmp_path / "a.pth")
        with pytest.raises(TypeError, match=r"a\.pth must hold .* a mapping .*; got list"):
            load_backbone(MixTransformer("b0"), tmp_path / "a.pth")

    def test_without_safetensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match=r"a\.safetensors needs safetensors, .*pip install"):
            load_backbone(MixTransformer("b0"), "a.safetensors")


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)
