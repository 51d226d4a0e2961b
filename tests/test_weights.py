"""Loading encoder weights: every published layout, what is refused, and that nothing is half done.

The oracle is `transformers`: its own model runs on the weights, and it writes the files of the old
layout itself. NVlabs' names are made here from transformers' by rules of their own, and those of
MMSegmentation and timm from NVlabs' likewise.
"""

import argparse
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

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


@cache
def other_state() -> State:
    """Weights other than those of `nvlabs_state`, of the same names."""
    return {name: value + 1.0 for name, value in nvlabs_state().items()}


def to_mmseg(state: State) -> State:
    """NVlabs' state in MMSegmentation's layout: joined projections, linears as convolutions."""
    result = {}
    for name, value in state.items():
        match = re.fullmatch(r"(patch_embed|block|norm)(\d)(\.\d+)?\.(.+)", name)
        assert match is not None
        module, stage, block, rest = match.groups(default="")
        if rest.startswith("attn.kv."):
            continue
        if rest.startswith("attn.q."):
            value = torch.cat([value, state[name.replace(".q.", ".kv.")]])
        if re.match(r"mlp\.fc\d\.weight", rest):
            value = value[:, :, None, None]
        for ours, theirs in (
            ("attn.q.", "attn.attn.in_proj_"),
            ("attn.proj.", "attn.attn.out_proj."),
            ("mlp.fc1.", "ffn.layers.0."),
            ("mlp.dwconv.dwconv.", "ffn.layers.1."),
            ("mlp.fc2.", "ffn.layers.4."),
        ):
            rest = rest.replace(ours, theirs)
        if module == "patch_embed":
            rest = rest.replace("proj.", "projection.")
        place = ("patch_embed", "block", "norm").index(module)
        result[f"layers.{int(stage) - 1}.{place}{block}.{rest}"] = value
    return result


def to_timm(state: State) -> State:
    """NVlabs' state under the names of PVTv2 in timm."""
    result = {}
    for name, value in state.items():
        name = re.sub(r"^(patch_embed|block|norm)(\d)", r"stages.\2.\1", name)
        name = re.sub(r"^stages\.(\d)", lambda m: f"stages.{int(m[1]) - 1}", name)
        name = name.replace("stages.0.patch_embed", "patch_embed")
        name = name.replace(".patch_embed.", ".downsample.").replace(".block.", ".blocks.")
        result[name.replace("dwconv.dwconv", "dwconv")] = value
    return result


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


class TestOtherLayouts:
    """MMSegmentation and timm."""

    LAYOUTS = (("MMSegmentation", to_mmseg), ("timm PVTv2", to_timm))

    @pytest.mark.parametrize(("layout", "convert"), LAYOUTS)
    def test_every_number_arrives_once(
        self, layout: str, convert: Callable[[State], State]
    ) -> None:
        expected = counting(nvlabs_state())
        head = {"decode_head.conv_seg.weight": torch.zeros(19, 256, 1, 1)}
        model = MixTransformer("b0")
        file = {"meta": {"epoch": 1}, "state_dict": prefixed("backbone.", convert(expected)) | head}
        report = load_backbone(model, file)
        assert report.layout == layout
        assert same(model.state_dict(), expected)
        assert report.ignored == tuple(head)

    @pytest.mark.parametrize("convert", [to_mmseg, to_timm, dict])
    def test_wide_pvt_is_refused(self, convert: Callable[[State], State]) -> None:
        state = dict(nvlabs_state())
        for name, value in state.items():
            if ".mlp." in name and re.match("block[12]", name):
                axis = 1 if name.endswith("fc2.weight") else 0
                if not name.endswith("fc2.bias"):
                    state[name] = torch.cat([value, value], dim=axis)
        with pytest.raises(ValueError, match=r"PVTv2 of b0 to b4, whose .* 8, 8, 4 and 4 times"):
            load_backbone(MixTransformer("b0"), convert(state))

    def test_shape_of_joined_projections(self) -> None:
        state = to_mmseg(nvlabs_state())
        state["layers.0.1.0.attn.attn.in_proj_bias"] = torch.zeros(64)
        message = (
            r"in_proj_bias \(for block1\.0\.attn\.q\.bias\) must have shape \[96\]; got \[64\]"
        )
        with pytest.raises(ValueError, match=message):
            load_backbone(MixTransformer("b0"), state)

    def test_attention_is_that_of_pytorch(self) -> None:
        """The order of queries, keys and values in `nn.MultiheadAttention`, which they wrap."""
        theirs = nn.MultiheadAttention(256, 8, batch_first=True)
        state = to_mmseg(nvlabs_state())
        for name, value in theirs.state_dict().items():
            state[f"layers.3.1.0.attn.attn.{name}"] = value
        model = MixTransformer("b0")
        load_backbone(model, state)
        x = torch.randn(2, 6, 256)
        with torch.no_grad():
            expected = theirs(x, x, x)[0]
            torch.testing.assert_close(
                model.block4[0].attn(x, 2, 3), expected, rtol=1e-4, atol=1e-5
            )


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
        assert report == LoadReport("NVlabs", tuple(state), tuple(head), (), (prefix,))


class TestSeveralEncoders:
    """Files with more than one: what is taken, what may be chosen, and that the report says so."""

    @staticmethod
    def _cmx() -> tuple[State, State, State]:
        rgb, other = nvlabs_state(), other_state()
        fusion = {"backbone.FRMs.0.channel_weights.mlp.0.weight": torch.randn(128, 128)}
        return prefixed("backbone.", rgb) | prefixed("backbone.extra_", other) | fusion, rgb, other

    def test_cmx_gives_each_its_own(self) -> None:
        file, rgb, other = self._cmx()
        model = EQUISeg.from_name("b0", modalities=("rgb", "depth"), share_encoder=False)
        report = load_backbone(model, {"model": file})
        assert report.layout == "CMX"
        assert same(model.encoder[0].state_dict(), rgb)
        assert same(model.encoder[1].state_dict(), other)
        assert report.prefixes == ("backbone.", "backbone.extra_")
        assert report.ignored == ("backbone.FRMs.0.channel_weights.mlp.0.weight",)
        assert "  from 'backbone.', 'backbone.extra_'" in str(report).splitlines()

    def test_cmx_into_one(self) -> None:
        file, rgb, other = self._cmx()
        model = MixTransformer("b0")
        report = load_backbone(model, file)
        assert same(model.state_dict(), rgb)
        assert report.layout == "CMX"
        assert report.not_taken == ("backbone.extra_",)
        assert len(report.ignored) == len(other) + 1
        assert "  from 'backbone.'; not from 'backbone.extra_'" in str(report).splitlines()
        report = load_backbone(model, file, prefix="backbone.extra_")
        assert same(model.state_dict(), other)
        assert (report.prefixes, report.not_taken) == (("backbone.extra_",), ("backbone.",))

    def test_cmx_into_three_is_said(self) -> None:
        file, rgb, other = self._cmx()
        model = EQUISeg.from_name("b0", modalities=("d", "rgb", "e"), share_encoder=False)
        with pytest.raises(
            ValueError, match=r"has 3; got 'backbone\.', 'backbone\.extra_'\. Choose"
        ):
            load_backbone(model, file)
        prefixes = ("backbone.extra_", "backbone.", "backbone.extra_")
        assert load_backbone(model, file, prefix=prefixes).prefixes == prefixes
        for encoder, expected in zip(model.encoder, (other, rgb, other), strict=True):
            assert same(encoder.state_dict(), expected)

    @pytest.mark.parametrize("key", ["teacher", "state_dict_ema", "model_ema", "ema", "params"])
    def test_nested_under_any_key(self, key: str) -> None:
        state, other = nvlabs_state(), other_state()
        model = MixTransformer("b0")
        report = load_backbone(model, {"epoch": 1, key: {"module": state}})
        assert same(model.state_dict(), state)
        assert report.prefixes == (f"{key}.module.",)
        # Beside the weights themselves it is a copy of them, and there for those who ask.
        file = {"model": state, key: other, "optimizer": {"state": {0: {"exp_avg": state}}}}
        report = load_backbone(model, file)
        assert same(model.state_dict(), state)
        assert report.not_taken == (f"{key}.",)
        assert set(report.ignored) == set(prefixed(f"{key}.", other))
        assert load_backbone(model, file, prefix=f"{key}.").not_taken == ("",)
        assert same(model.state_dict(), other)

    @pytest.mark.parametrize(
        ("prefix", "message"),
        [
            ("teacher", r"prefix must be one of 'student\.', 'teacher\.'; got 'teacher'"),
            ((), "prefix must be one, or as many as the encoders of the model, which has 1; got 0"),
            ((7,), r"prefix must be one of .*; got 7"),
            (7, "prefix must be a string or a sequence of strings; got int"),
        ],
    )
    def test_prefix_of_none(self, prefix: object, message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            load_backbone(MixTransformer("b0"), nested("student", "teacher"), prefix=prefix)

    @pytest.mark.parametrize("name", ["strict", "adapt_channels"])
    def test_flags_are_bool(self, name: str) -> None:
        with pytest.raises(TypeError, match=f"{name} must be True or False; got None"):
            load_backbone(MixTransformer("b0"), nvlabs_state(), **{name: None})

    def test_own_encoders_of_another_order(self) -> None:
        """Encoders go by their numbers, and so the numbers must be those of the same sensors."""
        first = EQUISeg.from_name("b0", modalities=("rgb", "depth"), share_encoder=False)
        model = EQUISeg.from_name("b0", modalities=("depth", "rgb"), share_encoder=False)
        state = prefixed("module.", first.state_dict())
        message = r"modalities \('depth', 'rgb'\), in this order; got \('rgb', 'depth'\)"
        with pytest.raises(ValueError, match=message):
            load_backbone(model, state)
        prefixes = ("module.encoder.1.", "module.encoder.0.")
        load_backbone(model, state, prefix=prefixes)
        assert same(model.encoder[0].state_dict(), first.encoder[1].state_dict())

    def test_own_encoders_of_other_channels(self) -> None:
        """Names decide here, too, and first convolutions are adapted."""
        fields = {"modalities": ("rgb", "depth"), "share_encoder": False}
        first = EQUISeg.from_name("b0", in_channels=(3, 1), **fields)
        report = load_backbone(EQUISeg.from_name("b0", **fields), first.state_dict())
        assert report.adapted == ("encoder.1.patch_embed1.proj.weight",)
        model = EQUISeg.from_name("b0", **{**fields, "modalities": ("depth", "rgb")})
        with pytest.raises(ValueError, match=r"in this order; got \('rgb', 'depth'\)"):
            load_backbone(model, first.state_dict())

    def test_encoders_of_the_model_itself_can_be_swapped(self) -> None:
        model = EQUISeg.from_name("b0", modalities=("rgb", "depth"), share_encoder=False)
        first, second = ({k: v.clone() for k, v in e.state_dict().items()} for e in model.encoder)
        load_backbone(model, model.state_dict(), prefix=("encoder.1.", "encoder.0."))
        assert same(model.encoder[0].state_dict(), second)
        assert same(model.encoder[1].state_dict(), first)


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
        much = LoadReport("CMX", ("a",), (), (), ("x.",), ("x.extra_",), ("b",), ("c", "d"), ("e",))
        assert str(much).splitlines()[1:] == [
            "  from 'x.'; not from 'x.extra_'",
            "  none missing",
            "  none ignored",
            "  1 with input channels summed or repeated: b",
            "  2 with NaN or infinity in the file: c, d",
            "  1 with values beyond the dtype of the model: e",
        ]


class TestInputChannels:
    @pytest.mark.parametrize(("theirs", "ours"), [(3, 1), (3, 4), (3, 2), (1, 3), (4, 3), (3, 7)])
    def test_same_function_of_channels_in_turn(self, theirs: int, ours: int) -> None:
        """What it computes is what the original computes of images with channels in turn."""
        original, model = (MixTransformer("b0", in_channels=n).double() for n in (theirs, ours))
        report = load_backbone(model, original.state_dict())
        assert report.adapted == ("patch_embed1.proj.weight",)
        assert "1 with input channels summed or repeated: patch_embed1.proj.w" in str(report)
        assert len(report.loaded) == 176
        x = torch.randn(1, min(theirs, ours), 32, 32, dtype=torch.float64)
        few = [torch.arange(n) % x.shape[1] for n in (theirs, ours)]
        with torch.no_grad():
            expected = original.embed(0, x[:, few[0]])[0]
            actual = model.embed(0, x[:, few[1]])[0]
        torch.testing.assert_close(actual, expected)

    def test_equal_channels_are_left_alone(self) -> None:
        model = MixTransformer("b0")
        report = load_backbone(model, nvlabs_state())
        assert report.adapted == ()
        assert same(model.state_dict(), nvlabs_state())

    @pytest.mark.parametrize("convert", [dict, to_mmseg, to_timm])
    def test_every_first_convolution(self, convert: Callable[[State], State]) -> None:
        """A file with one serves all, in any layout."""
        model = MixTransformer("b0", in_channels=(1, 2, 3))
        report = load_backbone(model, convert(nvlabs_state()))
        others = [f"patch_embed1.others.{c}.weight" for c in (1, 2)]
        assert report.adapted == tuple(others)
        assert len(report.loaded) == 176 + 4
        assert report.ignored == report.missing == ()
        state, weight = model.state_dict(), nvlabs_state()["patch_embed1.proj.weight"]
        assert torch.equal(state["patch_embed1.proj.weight"], weight)
        torch.testing.assert_close(state[others[0]], weight.sum(1, keepdim=True))
        for c in (1, 2):
            bias = state[f"patch_embed1.others.{c}.bias"]
            assert torch.equal(bias, nvlabs_state()["patch_embed1.proj.bias"])

    def test_each_goes_to_as_many_channels(self) -> None:
        """Of a file with several each is taken where it fits, under whatever name."""
        file = counting(MixTransformer("b0", in_channels=(1, 3, 4)).state_dict())
        model = EQUISeg.from_name("b0", modalities=("a", "b"), in_channels=(4, 1))
        report = load_backbone(model, prefixed("encoder.", file))
        assert report.adapted == ()
        assert set(report.ignored) == {f"encoder.patch_embed1.proj.{x}" for x in ("weight", "bias")}
        state = model.encoder.state_dict()
        for ours, theirs in (("proj", "others.1"), ("others.4", "others.4")):
            for kind in ("weight", "bias"):
                expected = file[f"patch_embed1.{theirs}.{kind}"]
                assert torch.equal(state[f"patch_embed1.{ours}.{kind}"], expected)

    def test_can_be_refused(self) -> None:
        model = MixTransformer("b0", in_channels=1)
        message = (
            r"patch_embed1\.proj\.weight .* must have shape \[32, 1, 7, 7\]; got \[32, 3, 7, 7\]; "
            "adapt_channels=True sums or repeats input channels"
        )
        with pytest.raises(ValueError, match=message):
            load_backbone(model, nvlabs_state(), adapt_channels=False)

    @pytest.mark.parametrize("shape", [(32, 3, 3, 3), (32, 0, 7, 7), (32, 3, 49)])
    def test_other_shapes_stay_refused(self, shape: tuple[int, ...]) -> None:
        state = changed("patch_embed1.proj.weight", torch.zeros(shape))()
        with pytest.raises(ValueError, match=r"must have shape \[32, 3, 7, 7\]; got"):
            load_backbone(MixTransformer("b0"), state)


class TestValues:
    """What is odd about the numbers is in the report, and views arrive as their values."""

    def test_not_finite_and_overflow(self) -> None:
        state = nvlabs_state() | {
            "norm1.bias": torch.full((32,), torch.nan),
            "norm2.bias": torch.full((64,), torch.inf),
            "norm3.bias": torch.full((160,), -1e6),
        }
        model = MixTransformer("b0")
        report = load_backbone(model, state)
        assert (report.not_finite, report.overflowed) == (("norm1.bias", "norm2.bias"), ())
        report = load_backbone(model.half(), state)
        assert report.not_finite == ("norm1.bias", "norm2.bias")
        assert report.overflowed == ("norm3.bias",)
        assert bool(model.norm3.bias.isinf().all())

    def test_negative_and_conjugate_views(self) -> None:
        value = torch.arange(256.0)
        negative = torch._neg_view(value)
        imaginary = torch.complex(value, value).conj().imag
        assert negative.is_neg()
        assert imaginary.is_neg()
        for view in (negative, imaginary):
            model = MixTransformer("b0")
            load_backbone(model, changed("norm4.bias", view)())
            assert torch.equal(model.norm4.bias, -value)

    def test_float8(self) -> None:
        value = torch.arange(256.0).to(torch.float8_e4m3fn)
        model = MixTransformer("b0")
        load_backbone(model, changed("norm4.bias", value)())
        assert torch.equal(model.norm4.bias, value.float())


def changed(name: str, value: Tensor) -> Callable[[], State]:
    return lambda: nvlabs_state() | {name: value}


def without(*names: str) -> Callable[[], State]:
    return lambda: {k: v for k, v in nvlabs_state().items() if not k.startswith(names)}


def fake(*names: str) -> Callable[[], State]:
    return lambda: {name: torch.zeros(2) for name in names}


def nested(*keys: str) -> dict[str, State]:
    return {key: nvlabs_state() for key in keys}


def endless() -> dict[str, object]:
    state: dict[str, object] = {}
    state["model"] = state
    return state


def two(first: str, second: str) -> Callable[[], State]:
    return lambda: prefixed(first, nvlabs_state()) | prefixed(second, nvlabs_state())


class TestRefusals:
    def test_numbers_of_blocks_that_no_variant_has(self) -> None:
        model, other = MixTransformer("b0"), MixTransformer("b0")
        for encoder in (model, other):
            del encoder.block3[1]
        assert not load_backbone(model, other.state_dict()).missing
        assert torch.equal(model.block3[0].mlp.fc1.weight, other.block3[0].mlp.fc1.weight)

    def test_parameters_that_the_model_has_no_more(self) -> None:
        model, state = MixTransformer("b0"), MixTransformer("b0").state_dict()
        fc1 = model.block1[0].mlp.fc1
        weight = fc1.weight.detach()
        del fc1.weight
        fc1.register_buffer("weight", weight)
        for strict in (True, False):
            with pytest.raises(TypeError, match=r"mlp\.fc1\.weight of the model must be"):
                load_backbone(model, state, strict=strict)

    CASES = (
        # what it is instead
        (fake("layer1.0.conv1.weight", "fc.bias"), "no Mix Transformer .* like a ResNet; it has l"),
        (fake("layers.0.blocks.0.attn.relative_position_bias_table"), "like a Swin Transformer"),
        (fake("cls_token", "blocks.0.attn.qkv.weight"), "like a plain Vision Transformer"),
        (fake("stages.0.0.dwconv.weight"), "like a ConvNeXt"),
        (fake("patch_embed1.norm.ln_0.weight"), "LayerNorm per modality, as in GeminiFusion"),
        (fake("decode_head.linear_c1.proj.weight"), "like a decode head only"),
        (fake("linear_c.0.proj.weight"), "like a decode head only"),
        (fake("alpha", "beta"), "no Mix Transformer encoder: it has alpha, beta$"),
        (lambda: {k: v.numpy() for k, v in nvlabs_state().items()}, "none of which is a tensor$"),
        (lambda: {"net": MixTransformer("b0")}, "it has net, none of which is a tensor$"),
        (endless, "it has model, none of which is a tensor$"),
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
        (two("encoder.0.", "encoder.1."), "got 'encoder.0.', 'encoder.1.'. Choose with pref"),
        (lambda: nested("student", "teacher"), "'student.', 'teacher.'. Choose with prefix='teach"),
        (two("rgb_", "depth_"), "got 'depth_', 'rgb_'. Choose with prefix"),
        # no values to copy
        (
            changed("norm4.bias", torch.zeros(256).to_sparse()),
            r"norm4\.bias must be dense; got a sparse_coo tensor",
        ),
        (
            changed("norm4.bias", torch.nested.nested_tensor([torch.zeros(256)])),
            r"norm4\.bias must be dense; got a nested tensor",
        ),
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
        before = {name: value.clone() for name, value in model.state_dict().items()}
        integers = changed("norm4.bias", torch.zeros(256, dtype=torch.int8))()
        complex_ = torch.zeros(256, dtype=torch.complex64)
        quantised = torch.quantize_per_tensor(torch.zeros(256), 1.0, 0, torch.qint8)
        fake_tensor = FakeTensorMode().from_tensor(torch.zeros(256))
        lazy = nn.UninitializedParameter()
        for arguments, message in (
            ((nn.Linear(2, 2), {}), "model must be an EQUISeg or a MixTransformer; got Linear"),
            ((None, {}), "model must be an EQUISeg or a MixTransformer; got NoneType"),
            ((model, model), "mapping from names to tensors; got MixTransformer"),
            ((model, 7), "mapping from names to tensors; got int"),
            ((model, integers), r"norm4\.bias must be floating; got int8"),
            (
                (model, changed("norm4.bias", complex_)()),
                "floating; got complex64",
            ),
            ((model, changed("norm4.bias", quantised)()), "must be floating; got qint8"),
            ((model, changed("norm4.bias", fake_tensor)()), "plain tensor; got FakeTensor"),
            ((model, changed("norm4.bias", lazy)()), "plain tensor; got UninitializedParameter"),
        ):
            with pytest.raises(TypeError, match=message):
                load_backbone(*arguments)
        assert same(model.state_dict(), before)

    def test_model_without_memory(self) -> None:
        with torch.device("meta"):
            model = MixTransformer("b0")
        with pytest.raises(ValueError, match="in the model it is on the meta device"):
            load_backbone(model, nvlabs_state())

    @pytest.mark.parametrize("kind", ["fake", "inference", "expanded", "parametrised"])
    def test_parameter_that_cannot_be_written(self, kind: str) -> None:
        """It is the last one, and yet the first is not written either."""
        model = MixTransformer("b0")
        if kind == "fake":
            value = FakeTensorMode().from_tensor(model.norm4.bias.detach())
            model.norm4.bias = nn.Parameter(value)
        elif kind == "inference":
            with torch.inference_mode():
                model.norm4.bias = nn.Parameter(torch.zeros(256))
        elif kind == "expanded":
            model.norm4.bias = nn.Parameter(torch.zeros(1).expand(256))
        else:
            nn.utils.parametrize.register_parametrization(model.norm4, "bias", nn.Identity())
        before = model.patch_embed1.proj.weight.detach().clone()
        with pytest.raises((TypeError, ValueError), match=r"norm4\.(bias|parametrizations)"):
            load_backbone(model, nvlabs_state())
        assert torch.equal(model.patch_embed1.proj.weight, before)


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

    @pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
    @pytest.mark.parametrize("new_format", [True, False])
    def test_plain_values_beside_the_weights(
        self, core: str, new_format: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scalars = [np.dtype(code).type(1) for code in "?bhilqBHILQefdgFDG"]
        content = {
            "state_dict": nvlabs_state(),
            "best": scalars,
            "confusion": np.arange(6).reshape(2, 3).astype(np.float32),
            "name": np.str_("b0"),
            "args": argparse.Namespace(lr=np.float64(1e-4), seed=np.int64(1), betas=(0.9, 0.99)),
        }
        path = tmp_path / "a.pth"
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
        # NumPy 1 and 2 write the same but for this name.
        if core not in pickle.dumps(np.float64(1.0), protocol=2).decode("latin1"):
            path = renamed(path, core)
        before = torch.serialization.get_safe_globals()
        model = MixTransformer("b0")
        with monkeypatch.context() as patch:
            # The list of the process is not touched, even for a moment.
            patch.setattr(torch.serialization, "add_safe_globals", None)
            patch.setattr(torch.serialization, "safe_globals", None)
            load_backbone(model, path)
        assert same(model.state_dict(), nvlabs_state())
        assert torch.serialization.get_safe_globals() == before

    def test_training_checkpoint_of_mmengine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = types.ModuleType("mmengine.logging.history_buffer")
        module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
        for name in ("mmengine", "mmengine.logging", module.__name__):
            monkeypatch.setitem(sys.modules, name, module)
        buffer = module.HistoryBuffer()
        buffer.log_history = np.ones(3)
        state = to_mmseg(nvlabs_state())
        torch.save({"state_dict": state, "message_hub": {"loss": buffer}}, tmp_path / "a.pth")
        report = load_backbone(MixTransformer("b0"), tmp_path / "a.pth")
        assert report.layout == "MMSegmentation"

    @pytest.mark.parametrize("name", ["Thing", "float32", "FloatStorage"])
    def test_no_module_of_a_file_is_imported(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Behind a value of NumPy's, where PyTorch's own reader of old files stops."""
        (tmp_path / "imported_by_a_file.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        data = pickle.dumps([np.float64(1.0)], protocol=2).removesuffix(b"e.").removesuffix(b"a.")
        evil = data + f"cimported_by_a_file\n{name}\n".encode() + b"0]."
        torch.save({}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        old = (tmp_path / "a.pth").read_bytes()
        (tmp_path / "a.pth").write_bytes(old.replace(pickle.dumps({}, protocol=2), evil))
        with pytest.raises((TypeError, ValueError)):
            load_backbone(MixTransformer("b0"), tmp_path / "a.pth")
        assert "imported_by_a_file" not in sys.modules

    def test_other_types_are_refused_by_name(self, tmp_path: Path) -> None:
        content = {"state_dict": nvlabs_state(), "when": Path("x"), "odd": Touch(tmp_path / "t")}
        for new_format in (True, False):
            torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
            with pytest.raises(ValueError, match=r"plain values: .*(pathlib\S*Path|getattr)"):
                load_backbone(MixTransformer("b0"), tmp_path / "a.pth")
        objects = np.array([Touch(tmp_path / "t")], dtype=object)
        torch.save({"state_dict": nvlabs_state(), "objects": objects}, tmp_path / "b.pth")
        with pytest.raises(ValueError, match="more than tensors and plain values"):
            load_backbone(MixTransformer("b0"), tmp_path / "b.pth")
        assert not (tmp_path / "t").exists()

    def test_no_mapping(self, tmp_path: Path) -> None:
        torch.save([torch.zeros(2)], tmp_path / "a.pth")
        with pytest.raises(TypeError, match=r"a\.pth must hold .* a mapping .*; got list"):
            load_backbone(MixTransformer("b0"), tmp_path / "a.pth")

    def test_without_safetensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match=r"a\.safetensors needs safetensors, .*pip install"):
            load_backbone(MixTransformer("b0"), "a.safetensors")


def renamed(path: Path, core: str) -> Path:
    """The file with NumPy's core under another name."""
    other = "numpy.core" if core == "numpy._core" else "numpy._core"
    result = path.with_name(f"renamed_{path.name}")
    if not zipfile.is_zipfile(path):
        result.write_bytes(path.read_bytes().replace(other.encode(), core.encode()))
        return result
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(other.encode(), core.encode())
            new.writestr(name, data)
    return result


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)
