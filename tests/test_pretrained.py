"""Models in folders: what comes back, what a killed save leaves, and what is refused."""

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from equiseg_fast import __version__, _files
from equiseg_fast.data import Sensor, camera
from equiseg_fast.models import EQUISeg, EQUISegConfig

pytest.importorskip("safetensors", reason="safetensors not installed")

SENSORS = (camera(), Sensor("thermal", "thermal", 1 / 65535, (0.4,), (0.1,)))
FIELDS: dict[str, Any] = {
    "variant": "nano",
    "modalities": ("rgb", "thermal"),
    "in_channels": (3, 1),
    "num_classes": 3,
    "ignore_index": -1,
    "class_names": ("road", "sky", "é"),
    "palette": ((128, 64, 128), (70, 130, 180), (0, 0, 142)),
    "sensors": SENSORS,
    "drop_path": 0.25,
}


def model(seed: int = 0, **fields: Any) -> EQUISeg:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = EQUISeg(EQUISegConfig(**{**FIELDS, **fields}))
        for p in built.parameters():
            nn.init.normal_(p, std=0.1)
    return built.eval()


def images(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {s.name: torch.randn(1, s.channels, 32, 64, dtype=dtype) for s in SENSORS}


def same(a: nn.Module, b: nn.Module) -> bool:
    """The same names, dtypes and bits."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **fields}))


class TestConfig:
    def test_survives_json(self) -> None:
        for config in (
            EQUISegConfig(),
            EQUISegConfig(**FIELDS),
            EQUISegConfig(
                num_classes=np.int64(5), drop_path=np.float32(0.5), ppx_ratio=[np.int64(4)] * 4,
                in_channels=np.int32(2), decoder_dim=np.int64(64), gate_stages=[np.int64(2)],
            ),
        ):  # fmt: skip
            content = json.loads(json.dumps(config.to_dict()))
            assert content == config.to_dict()
            again = EQUISegConfig.from_dict(content)
            assert again == config
            assert hash(again) == hash(config)
        assert EQUISegConfig.from_dict({}) == EQUISegConfig()

    def test_channels_are_one_for_each(self) -> None:
        assert EQUISegConfig().in_channels == (3, 3, 3, 3)
        assert EQUISegConfig(modalities=("a", "b"), in_channels=1).in_channels == (1, 1)
        assert EQUISegConfig(modalities=("a", "b"), in_channels=[4, 2]).in_channels == (4, 2)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"modalities": "rgb"}, r"got 'rgb'\. Write modalities=\('rgb',\) for one"),
            ({"in_channels": (3, 1, 1)}, r"in_channels must be one number, or one for each"),
            ({"in_channels": (3, 0)}, r"in_channels\[1\] must be at least 1; got 0"),
            ({"in_channels": "3"}, "in_channels must be a sequence of integers; got '3'"),
            ({"in_channels": 1.5}, r"in_channels must be an integer; got 1\.5"),
            ({"in_channels": 3}, r"sensors must be those of in_channels, \(3, 3\); got \(3, 1\)"),
            (
                {"modalities": ("thermal", "rgb")},
                r"sensors must be those of modalities, \('thermal', 'rgb'\); got \('rgb', 'th",
            ),
            (
                {"sensors": ("rgb", "thermal")},
                "sensors must be a sequence of equiseg_fast.data.Sen",
            ),
            ({"class_names": ("a", "b")}, "class_names must be num_classes = 3 unique names; got"),
            ({"class_names": ("a", "b", "b")}, "class_names must be num_classes = 3 unique names"),
            ({"class_names": "abc"}, "class_names must be a sequence of names; got 'abc'"),
            ({"palette": ((0, 0, 0),)}, "palette must have 3 colours, one per class; got 1"),
            ({"palette": ((0, 0, 256),) * 3}, "palette must have colours of three 0 to 255; got"),
            (
                {"gate_stages": (1, 1)},
                r"gate_stages must be stages 1 to 4, each once; got \(1, 1\)",
            ),
            ({"gate_stages": (0,)}, r"gate_stages must be stages 1 to 4, each once; got \(0,\)"),
            ({"sgm_source": "fused"}, "sgm_source must be one of encoded, cross_modal, gated; got"),
            ({"cross_modal": 1}, "cross_modal must be True or False; got 1"),
        ],
    )
    def test_wrong_fields(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            EQUISegConfig(**{**FIELDS, **fields})

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"depth": 3, "x": 1}, "EQUISegConfig has no field depth, x; it has variant, modal"),
            (
                {"depth": 3, "equiseg_fast_version": "7.1"},
                r"no field depth, which version 7\.1 of the package wrote; it has",
            ),
            (
                {"sensors": [{"name": "rgb"}]},
                r"sensors\[0\] must have the fields name, kind, scale",
            ),
            (
                {
                    "sensors": [
                        {**EQUISegConfig(**FIELDS).to_dict()["sensors"][0], "std": [0, 1, 1]}
                    ]
                },
                r"sensors\[0\]\.std\[0\] must be positive; got 0",
            ),
            ([1], "content must be a mapping; got list"),
        ],
    )
    def test_wrong_dictionaries(self, content: Any, message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            EQUISegConfig.from_dict(content)

    def test_names_of_variants_belong_elsewhere(self) -> None:
        with pytest.raises(TypeError, match=r"got str; EQUISeg\.from_name\('b0'\) takes the name"):
            EQUISeg("b0")  # type: ignore[arg-type]


class TestRoundTrip:
    def test_the_same_model(self, tmp_path: Path) -> None:
        first = model()
        folder = tmp_path / "deep" / "er"
        first.save_pretrained(folder)
        assert sorted(x.name for x in folder.iterdir()) == ["config.json", "model.safetensors"]
        content = config_of(folder)
        assert content["equiseg_fast_version"] == __version__
        assert content["modalities"] == ["rgb", "thermal"]
        assert content["sensors"][1]["mean"] == [0.4]
        assert (content["class_names"][2], content["ignore_index"]) == ("é", -1)
        state = torch.get_rng_state()
        second = EQUISeg.from_pretrained(str(folder))
        assert torch.equal(torch.get_rng_state(), state)
        assert not second.training
        assert second.config == first.config
        assert same(first, second)
        assert all(p.requires_grad for p in second.parameters())
        x = images()
        with torch.no_grad():
            assert torch.equal(first(x), second(x))

    def test_the_same_bytes(self, tmp_path: Path) -> None:
        for name in "ab":
            model().save_pretrained(tmp_path / name)
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_dtypes_layouts_and_shared_memory(self, tmp_path: Path) -> None:
        first = model().bfloat16().to(memory_format=torch.channels_last)
        for module in first.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
        block = first.encoder.block1[0]
        block.norm2.weight = block.norm1.weight
        block.norm2.bias.data = torch.zeros(1, dtype=torch.bfloat16).expand(16)
        first.save_pretrained(tmp_path)
        second = EQUISeg.from_pretrained(tmp_path)
        assert same(first, second)
        assert second.head.linear_pred.weight.dtype == torch.bfloat16
        block = second.encoder.block1[0]
        with torch.no_grad():
            block.norm2.weight.zero_()
            block.norm2.bias[0] = 1
        assert block.norm1.weight.any()
        assert block.norm2.bias.sum() == 1

    def test_compiled(self, tmp_path: Path) -> None:
        first = model()
        first.encoder = torch.compile(first.encoder)  # type: ignore[assignment]
        torch.compile(first).save_pretrained(tmp_path)
        assert same(model(), EQUISeg.from_pretrained(tmp_path))

    def test_no_compiler_is_loaded(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which random normal values of the meta device do; and no values are drawn for nothing."""
        monkeypatch.setattr(nn.init, "normal_", lambda *_, **__: pytest.fail("values are drawn"))
        EQUISeg.from_pretrained(saved)

    def test_edited_fields_count(self, tmp_path: Path) -> None:
        model().save_pretrained(tmp_path)
        rewrite(tmp_path, missing="zero", class_names=None)
        loaded = EQUISeg.from_pretrained(tmp_path)
        assert (loaded.config.missing, loaded.config.class_names) == ("zero", None)

    def test_other_weights_of_the_same_model(self, tmp_path: Path) -> None:
        first, average = model(), model(1)
        state = {k: x for k, x in average.state_dict().items() if k != "_extra_state"}
        first.save_pretrained(tmp_path, state_dict=state)
        assert same(average, EQUISeg.from_pretrained(tmp_path))

    def test_folded(self, tmp_path: Path) -> None:
        folded = model().fold_()
        with pytest.raises(RuntimeError, match="folded for inference; save a copy of before"):
            folded.save_pretrained(tmp_path)
        assert not [*tmp_path.iterdir()]
        folded.save_pretrained(tmp_path, state_dict=model().state_dict())
        assert same(EQUISeg.from_pretrained(tmp_path).fold_(), folded)


class TestRefusedSaves:
    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("head.linear_pred.bias", None, "state dict lacks head.linear_pred.bias"),
            ("adapter", torch.ones(1), "state dict has no place in the model for adapter"),
            ("head.linear_pred.bias", torch.ones(4), r"must have shape \[3\]; got \[4\]"),
            ("head.linear_pred.bias", torch.ones(3).long(), "must be floating; got torch.int64"),
            ("head.linear_pred.bias", [1, 2, 3], "must be a tensor; got list"),
            ("head.linear_pred.bias", torch.ones(3, device="meta"), "must hold values; got"),
            (
                "head.linear_pred.bias", torch.ones(3).as_subclass(type("Shard", (Tensor,), {})),
                "must be a plain tensor; got Shard. Of a sharded model give what all",
            ),
            (
                "_extra_state", model(modalities=("thermal", "rgb"), in_channels=3, sensors=None)
                .get_extra_state(), r"must be of the modalities \('rgb', 'thermal'\), in this",
            ),
        ],
    )  # fmt: skip
    def test_state_dicts(self, name: str, value: Any, message: str, tmp_path: Path) -> None:
        first = model()
        state = {**first.state_dict(), name: value}
        if value is None:
            del state[name]
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            first.save_pretrained(tmp_path, state_dict=state)
        assert not [*tmp_path.iterdir()]

    def test_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError, match="file"):
            model().save_pretrained(tmp_path / "file")
        with pytest.raises(TypeError, match="folder must be a path; got int"):
            model().save_pretrained(7)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="state_dict must be a mapping; got list"):
            model().save_pretrained(tmp_path, state_dict=[])  # type: ignore[arg-type]


class TestKilled:
    """Killed at any moment, a save leaves the old model or the new one."""

    @pytest.mark.parametrize("first_time", [True, False])
    @pytest.mark.parametrize("moment", ["write 1", "replace 1", "write 2", "replace 2", "end"])
    def test_at_every_moment(
        self, moment: str, first_time: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, new = model(1, num_classes=3), model(2, num_classes=4, class_names=None, palette=None)
        if not first_time:
            old.save_pretrained(tmp_path)
        reached = {"write": 0, "replace": 0}

        class Killed(BaseException):
            pass

        def at(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                reached[kind] += 1
                if f"{kind} {reached[kind]}" == moment:
                    if kind == "write":  # half of it
                        os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                    raise Killed
                return function(*args)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(_files.os, "fsync", at("write", os.fsync))
            patch.setattr(_files.os, "replace", at("replace", os.replace))
            if moment == "end":
                new.save_pretrained(tmp_path)
            else:
                with pytest.raises(Killed):
                    new.save_pretrained(tmp_path)
        between = moment in ("write 2", "replace 2")
        if first_time and not between and moment != "end":
            with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
                EQUISeg.from_pretrained(tmp_path)
        elif between:
            with pytest.warns(UserWarning, match=r"config\.json is of other weights than model"):
                found = EQUISeg.from_pretrained(tmp_path)
            assert found.config == new.config
            assert same(found, new)
        else:
            found, expected = EQUISeg.from_pretrained(tmp_path), new if moment == "end" else old
            assert found.config == expected.config
            assert same(found, expected)
        new.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(EQUISeg.from_pretrained(tmp_path), new)
        assert sorted(x.name for x in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def spoil_weights(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = bytearray((folder / "model.safetensors").read_bytes())
        changed = change(content)
        (folder / "model.safetensors").write_bytes(content if changed is None else changed)

    return spoil


def flip_last_bit(content: bytearray) -> None:
    content[-1] ^= 1


def without_configuration(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was executed",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "model"
    model().save_pretrained(folder)
    return folder


class TestRefusedFolders:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (shutil.rmtree, r"there is no .*model \(models are not downloaded\)"),
            (lambda x: [y.unlink() for y in x.iterdir()], r"has no config\.json, so no model was"),
            (lambda x: (x / "model.safetensors").unlink(), r"model lacks model\.safetensors$"),
            (only_pickle, r"lacks model\.safetensors; pytorch_model\.bin may run code when it is"),
            (spoil_weights(lambda x: x[:-1]), "safetensors is cut off or no safetensors file"),
            (spoil_weights(lambda x: x[: len(x) // 2]), "is cut off or no safetensors file"),
            (spoil_weights(lambda x: x[:5]), "is cut off or no safetensors file"),
            (spoil_weights(lambda x: b""), "is cut off or no safetensors file"),
            (spoil_weights(lambda x: pickle.dumps(Bomb())), "cut off or no safetensors file"),
            (spoil_weights(flip_last_bit), "is damaged: its values are not those that were writ"),
            (without_configuration, "was not written by save_pretrained: it has no configuration"),
            (lambda x: (x / "config.json").write_text("{"), r"config\.json holds no JSON: Expect"),
            (lambda x: (x / "config.json").write_text("[" * 9999), "holds no JSON: max"),
            (lambda x: (x / "config.json").write_text("[]"), "must be of the architecture EQUISeg"),
            (
                lambda x: rewrite(x, architectures=["SegformerForSemanticSegmentation"]),
                r"architecture EQUISeg; got \['SegformerForS.*\. load_backbone takes the encoder",
            ),
            (
                lambda x: rewrite(x, format=2, equiseg_fast_version="9.9"),
                rf"format 1, which version {re.escape(__version__)} of .*; got 2 of version 9\.9",
            ),
            (
                lambda x: rewrite(x, fancy=2, equiseg_fast_version="9.9"),
                r"config\.json: EQUISegConfig has no field fancy, which version 9\.9 of the",
            ),
            (lambda x: rewrite(x, num_classes=0), r"config\.json: num_classes must be 1 to 256"),
            (lambda x: rewrite(x, ppx_depth=10**9), r"config\.json: ppx_depth must be that of the"),
            (lambda x: rewrite(x, decoder_dim=2**31 - 1), r"json: Storage size calcula"),
            (
                lambda x: rewrite(x, num_classes=5, class_names=None, palette=None),
                r"linear_pred\.weight of .*safetensors must have shape \[5, 128, 1, 1\]; got",
            ),
            (lambda x: rewrite(x, share_encoder=False), r"lacks encoder\.0\..* and \d+ more"),
            (lambda x: rewrite(x, cross_modal=False), "has no place in the model for fusion.0"),
            (
                lambda x: rewrite(x, modalities=["a", "b"], sensors=None),
                r"safetensors: the state dict must be of the modalities \('a', 'b'\)",
            ),
            (
                lambda x: rewrite(x, in_channels=[1, 3], sensors=None),
                r"safetensors: the state dict must be of images with in_channels=\(1, 3\); got \(3",
            ),
        ],
    )  # fmt: skip
    def test_what_it_is(
        self, spoil: Callable[[Path], Any], message: str, tmp_path: Path, saved: Path
    ) -> None:
        folder = Path(shutil.copytree(saved, tmp_path / "model"))
        spoil(folder)
        with pytest.raises((ValueError, OSError), match=message):
            EQUISeg.from_pretrained(folder)

    def test_what_was_meant(self, saved: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"has no config\.json.*; .*model has one"):
            EQUISeg.from_pretrained(saved.parent)
        with pytest.raises(NotADirectoryError, match=r"model\.safetensors is a file"):
            EQUISeg.from_pretrained(saved / "model.safetensors")
        with pytest.raises(TypeError, match="folder must be a path; got int"):
            EQUISeg.from_pretrained(7)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="device must be one that PyTorch knows; got 'gpu'"):
            EQUISeg.from_pretrained(saved, device="gpu")
