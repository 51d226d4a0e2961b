"""Layers: two forms of features, parameters taken over from others, what `print` shows."""

import copy
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from equiseg_fast import use_backend
from equiseg_fast.nn import (
    CrossModalAttention,
    CrossModalBlock,
    DepthwiseConv,
    EfficientSelfAttention,
    MixFFN,
    ParallelPoolingMixer,
    PrototypeLoss,
    SegmentationHead,
    SelfGuidedGate,
    SelfQueryHub,
)
from equiseg_fast.nn._forms import as_tokens, like
from equiseg_fast.nn.norm import BatchNorm2d, batch_norm_tokens
from equiseg_fast.ops import _backend
from tests.foreign import (
    Attention4,
    AttentionMiT,
    DecodeHead,
    MixFFN4,
    MLPMiT,
    MSPABlock,
    PredictorConv,
    SegformerAttention4,
)

M, B, C, H, W = 3, 2, 16, 6, 4


def randomise(module: nn.Module) -> Any:
    """Random values everywhere, so that nothing hides behind zeros, ones or equal weights."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
        for b in module.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5)
    return module.double().eval()


def images(*lead: int, memory: str = "channels last") -> Tensor:
    """A map `[*lead, C, H, W]`."""
    x = torch.randn(*lead, H, W, C, dtype=torch.float64).movedim(-1, -3)
    return x.contiguous() if memory == "NCHW" else x


def head_maps(memory: str = "channels last") -> list[Tensor]:
    shapes = [(B, 16 >> s, 12 >> s, 4 * (s + 1)) for s in range(4)]
    maps = [torch.randn(shape, dtype=torch.float64).movedim(-1, 1) for shape in shapes]
    return [x.contiguous() for x in maps] if memory == "NCHW" else maps


LABELS = torch.randint(0, 5, (B, 2 * H, 2 * W), generator=torch.Generator().manual_seed(0))

# Layer -> how to build it, the leading dimensions and the number of its features, and its call.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "EfficientSelfAttention": (lambda: EfficientSelfAttention(C, 2, 2), (B,), 1),
    "EfficientSelfAttention, no reduction": (lambda: EfficientSelfAttention(C, 2, 1), (B,), 1),
    "CrossModalAttention": (lambda: CrossModalAttention(C, 2, 2), (B,), 2),
    "MixFFN": (lambda: MixFFN(C, 24), (B,), 1),
    "DepthwiseConv": (lambda: DepthwiseConv(C), (B,), 1),
    "ParallelPoolingMixer": (lambda: ParallelPoolingMixer(C, 2), (B,), 1),
    "SelfQueryHub": (lambda: SelfQueryHub(C, M), (M, B), 1),
    "SelfGuidedGate": (lambda: SelfGuidedGate(C), (M, B), 1),
    "CrossModalBlock": (lambda: CrossModalBlock(C, M, 2, 2), (M, B), 2),
    "PrototypeLoss": (lambda: PrototypeLoss(5), (M, B), 1),
}


def call(name: str, layer: nn.Module, features: list[Tensor], *size: int) -> tuple[Tensor, ...]:
    if name == "SelfGuidedGate":
        return layer(*features)
    if name == "PrototypeLoss":
        return (layer(*features, LABELS, torch.tensor([1, 0, 2]), *size),)
    return (layer(*features, *size),)


def tokens_of(x: Tensor) -> Tensor:
    return x.movedim(-3, -1).flatten(-3, -2)


class Copies(TorchDispatchMode):
    """Counts the operations that move memory without computing anything."""

    NAMES = ("clone", "copy_", "_to_copy", "contiguous", "cat", "stack")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class TestForms:
    @pytest.mark.parametrize("memory", ["channels last", "NCHW", "cropped"])
    @pytest.mark.parametrize("name", LAYERS)
    def test_a_map_gives_what_its_tokens_give(self, name: str, memory: str) -> None:
        build, lead, number = LAYERS[name]
        layer = randomise(build())
        maps = [images(*lead, memory=memory) for _ in range(number)]
        if memory == "cropped":  # a window of a larger map
            maps = [nn.functional.pad(x, (1, 2, 3, 0))[..., 3:, 1:-2] for x in maps]
        maps = [x.requires_grad_() for x in maps]
        tokens = [tokens_of(x.detach()).requires_grad_() for x in maps]
        actual, expected = call(name, layer, maps), call(name, layer, tokens, H, W)
        cotangents = [torch.randn(y.shape, dtype=y.dtype) for y in expected]
        for y, z, g in zip(actual, expected, cotangents, strict=True):
            if z.dim():
                assert y.shape == (*z.shape[:-2], C, H, W)
                torch.testing.assert_close(tokens_of(y), z)
                # what comes back is a view of tokens: channels last
                assert tokens_of(y).data_ptr() == y.data_ptr()
            else:
                torch.testing.assert_close(y, z)
            assert g.shape == z.shape
        back = [like(g, maps[0], H, W) if g.dim() == 4 or (g.dim() == 3 and lead == (B,)) else g
                for g in cotangents]  # fmt: skip
        if name == "SelfGuidedGate":
            back[1] = like(cotangents[1], maps[0][0], H, W)
        inputs = [*maps, *layer.parameters()], [*tokens, *layer.parameters()]
        ours = torch.autograd.grad(actual, inputs[0], back, allow_unused=True)
        wanted = torch.autograd.grad(expected, inputs[1], cotangents, allow_unused=True)
        for i, (y, z) in enumerate(zip(ours, wanted, strict=True)):
            if z is not None:
                torch.testing.assert_close(tokens_of(y) if i < number else y, z)

    @pytest.mark.parametrize("name", LAYERS)
    def test_only_other_maps_are_copied(self, name: str) -> None:
        build, lead, number = LAYERS[name]
        layer = randomise(build())

        def copies(features: list[Tensor], *size: int) -> int:
            with torch.no_grad(), Copies() as mode:
                call(name, layer, features, *size)
            return mode.counts.total()

        maps = [images(*lead) for _ in range(number)]
        without = copies([tokens_of(x) for x in maps], H, W)
        assert copies(maps) == without
        assert copies([x.contiguous() for x in maps]) == without + number

    @pytest.mark.parametrize("lead", [(B,), (M, B)])
    def test_the_way_there_and_back_is_a_view(self, lead: tuple[int, ...]) -> None:
        x, letters = images(*lead), "M, B" if len(lead) == 2 else "B"
        with Copies() as mode:
            y, height, width = as_tokens("x", x, None, None, letters)
            back = like(y, x, height, width)
        assert y.is_contiguous()
        assert mode.counts == {}
        assert x.data_ptr() == y.data_ptr() == back.data_ptr()
        assert back.stride() == x.stride()
        assert (height, width) == (H, W)
        y, _, _ = as_tokens("x", x.contiguous(), None, None, letters)
        assert y.data_ptr() != x.data_ptr()

    @pytest.mark.parametrize("memory", ["channels last", "NCHW"])
    @pytest.mark.parametrize("fold", [True, False])
    def test_head(self, fold: bool, memory: str) -> None:
        head = randomise(SegmentationHead([4, 8, 12, 16], 8, 3, fold=fold))
        maps = head_maps(memory)
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        expected = head([tokens_of(x) for x in maps], sizes)
        torch.testing.assert_close(head(maps), expected)
        assert expected.shape == (B, 3, *sizes[0])

    def test_compiles_for_maps_too(self) -> None:
        layer = randomise(EfficientSelfAttention(C, 2, 2))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = images(B)
        torch.testing.assert_close(compiled(x), layer(x))


class Pair:
    """A layer of somebody else's, what it computes on tokens, and our class for it."""

    def __init__(self, theirs: nn.Module, ours: Any, call: Callable[..., Tensor]) -> None:
        self.theirs, self.ours, self.call = randomise(theirs), ours, call


def hugging_face(part: str) -> Pair:
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    config = transformers.SegformerConfig(
        num_encoder_blocks=4, depths=[1] * 4, sr_ratios=[2, 1, 1, 1], hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[2] * 4, mlp_ratios=[2] * 4, decoder_hidden_size=8, num_labels=3,
        drop_path_rate=0.0,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config)
    if part == "head":
        return Pair(model.decode_head, SegmentationHead, lambda m, x: m(x))
    stages = model.segformer.stages
    block = stages[1 if part == "attention without reduction" else 0].blocks[0]
    if part == "ffn":
        return Pair(block.mlp, MixFFN, lambda m, x: m(x, H, W))
    return Pair(block.attention, EfficientSelfAttention, lambda m, x: m(x, H, W)[0])


def plain(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x, H, W)
    return y if isinstance(y, Tensor) else y[0]


PAIRS: dict[str, Callable[[], Pair]] = {
    "SegFormer": lambda: Pair(AttentionMiT(), EfficientSelfAttention, plain),
    "SegFormer, sr 1": lambda: Pair(AttentionMiT(sr_ratio=1), EfficientSelfAttention, plain),
    "transformers 4": lambda: Pair(SegformerAttention4(), EfficientSelfAttention, plain),
    "transformers 4, sr 1": lambda: Pair(SegformerAttention4(1), EfficientSelfAttention, plain),
    "transformers 4, inner": lambda: Pair(Attention4(), EfficientSelfAttention, plain),
    "transformers 5": lambda: hugging_face("attention"),
    "transformers 5, sr 1": lambda: hugging_face("attention without reduction"),
    "MLP of SegFormer": lambda: Pair(MLPMiT(), MixFFN, plain),
    "MLP of transformers 4": lambda: Pair(MixFFN4(), MixFFN, plain),
    "MLP of transformers 5": lambda: hugging_face("ffn"),
}  # fmt: skip


def pair_of(name: str) -> tuple[Pair, Tensor]:
    pair = PAIRS[name]()
    dim = next(p.shape[1] for p in pair.theirs.parameters() if p.dim() == 2)
    return pair, torch.randn(B, H * W, dim, dtype=torch.float64)


def same_objects(ours: nn.Module, theirs: nn.Module) -> None:
    assert {id(p) for p in ours.parameters()} == {id(p) for p in theirs.parameters()}


class TestFromTorch:
    @pytest.mark.parametrize("name", PAIRS)
    def test_same_function_on_the_same_parameters(self, name: str) -> None:
        pair, x = pair_of(name)
        before = {n: id(p) for n, p in pair.theirs.named_parameters()}
        layer = pair.ours.from_torch(pair.theirs)
        same_objects(layer, pair.theirs)
        assert {n: id(p) for n, p in pair.theirs.named_parameters()} == before
        x.requires_grad_()
        expected, actual = pair.call(pair.theirs, x), layer(x, H, W)
        torch.testing.assert_close(actual, expected)
        g = torch.randn_like(expected)
        inputs = [x, *pair.theirs.parameters()]
        for a, b in zip(
            torch.autograd.grad(actual, inputs, g),
            torch.autograd.grad(expected, inputs, g),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("name", ["SegFormer", "transformers 4", "MLP of transformers 4"])
    def test_an_optimiser_of_the_original_moves_ours(self, name: str) -> None:
        pair, x = pair_of(name)
        layer = pair.ours.from_torch(pair.theirs)
        before = layer(x, H, W).detach()
        optimiser = torch.optim.SGD(pair.theirs.parameters(), lr=0.1)
        layer(x, H, W).square().mean().backward()
        optimiser.step()
        after = layer(x, H, W)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, pair.call(pair.theirs, x))

    @pytest.mark.parametrize("name", [n for n in PAIRS if n != "transformers 4, inner"])
    def test_state_dict_has_our_names(self, name: str) -> None:
        """And a layer of ours that was never anybody else's takes it, and gives it back."""
        pair, x = pair_of(name)
        layer = pair.ours.from_torch(pair.theirs)
        dim = x.shape[-1]
        if pair.ours is MixFFN:
            native: nn.Module = MixFFN(dim, layer.fc1.out_features)
        else:
            native = EfficientSelfAttention(dim, layer.heads, layer.sr_ratio)
        state = layer.state_dict()
        assert list(state) == list(native.state_dict())
        native = native.double().eval()
        native.load_state_dict(state)
        expected = native(x, H, W)
        torch.testing.assert_close(layer(x, H, W), expected)
        for p in pair.theirs.parameters():
            p.data.zero_()
        layer.load_state_dict(native.state_dict())
        torch.testing.assert_close(pair.call(pair.theirs, x), expected)

    def test_copies_and_pickles(self) -> None:
        pair, x = pair_of("transformers 4")
        layer = pair.ours.from_torch(pair.theirs)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(x, H, W), layer(x, H, W))
            assert list(other.state_dict()) == list(layer.state_dict())
            for p in other.parameters():
                p.data.zero_()
            other.load_state_dict(layer.state_dict())
            torch.testing.assert_close(other(x, H, W), layer(x, H, W))

    def test_wrong_state_is_refused(self) -> None:
        layer = EfficientSelfAttention.from_torch(SegformerAttention4())
        state = layer.state_dict()
        with pytest.raises(RuntimeError, match=r"kv\.weight"):
            layer.load_state_dict({**state, "kv.weight": torch.zeros(3, 16)})
        del state["kv.bias"]
        with pytest.raises(RuntimeError, match=r"Missing key.*kv\.bias"):
            layer.load_state_dict(state)

    def test_query_hub(self) -> None:
        theirs = randomise(PredictorConv(C, M))
        layer = SelfQueryHub.from_torch(theirs)
        same_objects(layer, theirs)
        x = images(M, B)
        gated = theirs(x)
        others = [torch.stack([gated[j] for j in range(M) if j != i]).amax(0) for i in range(M)]
        torch.testing.assert_close(layer(x), torch.stack(others))
        torch.testing.assert_close(layer(x[[2, 0]], subset=(2, 0)), gated[[0, 2]])
        native = SelfQueryHub(C, M).double()
        native.load_state_dict(layer.state_dict())
        torch.testing.assert_close(native(x), layer(x))
        torch.testing.assert_close(SelfQueryHub.from_torch(theirs.score_nets)(x), layer(x))
        layer(x).square().mean().backward()
        assert all(p.grad is not None for p in theirs.parameters())

    def test_pooling_mixer_with_its_statistics(self) -> None:
        theirs = randomise(MSPABlock(C, 2))
        layer, x = ParallelPoolingMixer.from_torch(theirs), images(B)
        same_objects(layer, theirs)
        assert list(layer.state_dict()) == list(ParallelPoolingMixer(C, 2).state_dict())
        torch.testing.assert_close(layer(x), theirs(x))
        twin = copy.deepcopy(theirs).train()
        layer.train()
        torch.testing.assert_close(layer(x), twin(x))
        for ours, buffer in zip(theirs.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(ours, buffer)  # of theirs, which ours has moved

    @pytest.mark.parametrize("origin", ["SegFormer", "transformers 4", "transformers 5"])
    @pytest.mark.parametrize("fold", [True, False])
    def test_head(self, origin: str, fold: bool) -> None:
        channels = [4, 8, 12, 16]
        if origin == "transformers 5":
            theirs = hugging_face("head").theirs
            maps = [torch.randn(B, 16 * (s + 1), 16 >> s, 12 >> s).double() for s in range(4)]
        else:
            theirs = randomise(DecodeHead(channels, 8, 3, own=origin == "SegFormer"))
            maps = head_maps()
        head = SegmentationHead.from_torch(theirs, fold=fold)
        torch.testing.assert_close(head(maps), theirs(maps))
        unused = {id(p) for n, p in theirs.named_parameters() if n.startswith("conv_seg")}
        assert {id(p) for p in head.parameters()} == {id(p) for p in theirs.parameters()} - unused
        assert type(head.dropout) is type(theirs.dropout)
        assert head.dropout.p == theirs.dropout.p
        native = SegmentationHead([p.in_features for p in head._projections()], 8, 3)
        assert list(head.state_dict()) == list(native.state_dict())

    def test_folding_leaves_the_original_as_it_is(self) -> None:
        theirs, x = randomise(MSPABlock(C, 2)), images(B)
        state, expected = copy.deepcopy(theirs.state_dict()), theirs(x)
        layer = ParallelPoolingMixer.from_torch(theirs).fold_()
        torch.testing.assert_close(layer(x), expected)
        assert torch.equal(theirs(x), expected)
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, state[name]), name

    @pytest.mark.parametrize(
        ("ours", "build"),
        [
            (ParallelPoolingMixer, lambda: MSPABlock(C, 2)),
            (SegmentationHead, lambda: DecodeHead([4, 8, 12, 16], 8, 3, own=True)),
        ],
        ids=["mixer", "head"],
    )
    def test_synchronised_norms_stay_synchronised(self, ours: Any, build: Callable) -> None:
        group = object()
        theirs = nn.SyncBatchNorm.convert_sync_batchnorm(randomise(build()), group)
        layer = ours.from_torch(theirs)
        norms = [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        originals = [m for m in theirs.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert len(norms) == len(originals) > 0
        for norm, original in zip(norms, originals, strict=True):
            assert type(norm) is nn.SyncBatchNorm
            assert norm.process_group is group
            assert (norm.eps, norm.momentum) == (original.eps, original.momentum)
            for name, tensor in original.state_dict(keep_vars=True).items():
                assert getattr(norm, name) is tensor, name
        x = images(B) if ours is ParallelPoolingMixer else head_maps()
        torch.testing.assert_close(layer(x), theirs(x))

    def test_score_nets_may_end_with_a_sigmoid(self) -> None:
        theirs, x = randomise(PredictorConv(C, M)), images(M, B)
        expected = SelfQueryHub.from_torch(theirs)(x)
        for net in theirs.score_nets:
            net.append(nn.Sigmoid())
        torch.testing.assert_close(SelfQueryHub.from_torch(theirs)(x), expected)

    def test_mode_is_that_of_the_original(self) -> None:
        for training in (True, False):
            layer = MixFFN.from_torch(MLPMiT().train(training))
            assert {m.training for m in layer.modules()} == {training}


def changed(module: nn.Module, **attributes: Any) -> nn.Module:
    for path, value in attributes.items():
        *owners, name = path.split("__")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return module


WRONG: list[tuple[Any, Callable[[], Any], str]] = [
    (EfficientSelfAttention, lambda: {}, r"module must be a torch\.nn\.Module; got dict"),
    (EfficientSelfAttention, lambda: nn.Linear(4, 4), "Linear lacks q, kv, proj"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), kv=None), "lacks kv"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), kv=nn.Linear(16, 16)),
     r"kv\.weight must have shape \[32, 16\]; got \[16, 16\]"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), q=nn.Identity()), "q must be"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), head=None), "number of heads"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), head=3), "got 16 in 3 heads"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), scale=1.0), "its scale is 1.0"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), attn_drop=nn.Dropout(0.5)),
     "must not drop anything; its attn_drop is Dropout"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), norm=None), "norm must be an nn"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), norm=nn.RMSNorm(16)), "got RMSNorm"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), sr=nn.Conv2d(16, 16, 3, 2, 1)),
     "is not a convolution of kernel and stride 2"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(), extra=nn.Linear(2, 2)),
     r"no place for extra\.weight, extra\.bias of AttentionMiT"),
    (EfficientSelfAttention, lambda: changed(AttentionMiT(sr_ratio=1), sr=nn.Conv2d(16, 16, 1)),
     r"no place for sr\.weight"),
    (EfficientSelfAttention, lambda: Attention4(p=0.1), "its dropout is Dropout"),
    (EfficientSelfAttention, lambda: SegformerAttention4(p=0.1), "its dropout is Dropout"),
    (EfficientSelfAttention, lambda: changed(SegformerAttention4(), self__key=None),
     r"transformers 4 name them; SegformerAttention4 lacks self\.key"),
    (MixFFN, lambda: nn.Linear(4, 4), r"Linear lacks fc1, dwconv\.dwconv, fc2"),
    (MixFFN, lambda: MixFFN4(act=nn.ReLU()), "is not the exact GELU"),
    (MixFFN, lambda: MixFFN4(p=0.1), "its dropout is Dropout"),
    (MixFFN, lambda: MixFFN4(stride=2), "is not a depthwise 3x3 convolution"),
    (MixFFN, lambda: changed(MLPMiT(), fc1=nn.Conv2d(16, 24, 1)), "are not linear layers around"),
    (MixFFN, lambda: changed(MLPMiT(), fc1=nn.Linear(16, 24, bias=False)), r"fc1\.bias is missing"),
    (MixFFN, lambda: changed(MLPMiT(), fc2=nn.Linear(24, 8)), "as many channels as it takes"),
    (SelfQueryHub, lambda: nn.Linear(4, 4), "must be an nn.ModuleList of score nets"),
    (SelfQueryHub, lambda: nn.ModuleList(), "must be an nn.ModuleList of score nets"),
    (SelfQueryHub, lambda: nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3))]),
     r"score_nets\.0\.0 must be a 3x3 convolution of 4 channels to 4 in 4 groups"),
    (SelfQueryHub, lambda: nn.ModuleList([nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 2, 1))]),
     r"score_nets\.0\.1 must be a 1x1 convolution of 4 channels to 1"),
    (SelfQueryHub, lambda: nn.ModuleList([nn.Sequential(
        *PredictorConv(4, 1).score_nets[0], nn.BatchNorm2d(1))]),
     r"no place for score_nets\.0\.2\.weight, .*score_nets\.0\.2\.running_mean"),
    (SelfQueryHub, lambda: nn.ModuleList([nn.Sequential(
        *PredictorConv(4, 1).score_nets[0], nn.BatchNorm2d(1, affine=False))]),
     r"no place for score_nets\.0\.2\.running_mean"),
    (ParallelPoolingMixer, lambda: nn.Linear(4, 4), "lacks norm1"),
    (ParallelPoolingMixer, lambda: changed(MSPABlock(4, 2), layer_scale_1=None),
     "lacks layer_scale_1 or layer_scale_2"),
    (ParallelPoolingMixer, lambda: changed(MSPABlock(4, 2), norm1=nn.LayerNorm(4)),
     "norm1 must be an nn.BatchNorm2d; got LayerNorm"),
    (ParallelPoolingMixer, lambda: changed(MSPABlock(4, 2), attn__conv0=nn.Conv2d(4, 4, 5)),
     r"attn\.conv0\.weight must have shape \[4, 1, 7, 7\]"),
    (ParallelPoolingMixer, lambda: changed(MSPABlock(4, 2), mlp__fc1=nn.Linear(4, 8)),
     r"mlp\.fc1"),
    (ParallelPoolingMixer, lambda: changed(MSPABlock(4, 2), mlp__dwconv__dwconv=nn.Conv2d(
        8, 8, 3, padding=1, groups=8, padding_mode="reflect")),
     r"mlp\.dwconv\.dwconv must have padding_mode 'zeros'; got 'reflect'"),
    (ParallelPoolingMixer, lambda: changed(MSPABlock(4, 2), attn__conv0=nn.Conv2d(
        4, 4, 7, padding=9, dilation=3, groups=4)),
     r"attn\.conv0 must have padding \(3, 3\); got \(9, 9\)"),
    (ParallelPoolingMixer, lambda: changed(MSPABlock(4, 2), attn__conv0=nn.Conv2d(
        4, 4, 7, padding=3, dilation=3, groups=4)),
     r"attn\.conv0 must have dilation \(1, 1\); got \(3, 3\)"),
    (ParallelPoolingMixer, lambda: changed(MSPABlock(4, 2), attn__conv0=nn.Conv2d(
        2, 4, 7, padding=3, groups=2)), r"attn\.conv0 must have groups 4; got 2"),
    (ParallelPoolingMixer, lambda: changed(MSPABlock(4, 2), mlp__act=nn.ReLU()),
     r"cannot become a ParallelPoolingMixer: its activation ReLU\(\) is not the exact GELU"),
    (ParallelPoolingMixer,
     lambda: changed(MSPABlock(4, 2), norm1=nn.BatchNorm2d(4, momentum=None)),
     "norm1 must have a number as momentum; got None"),
    (SegmentationHead,
     lambda: changed(DecodeHead([4] * 4, 8, 3, True), linear_pred=nn.Conv2d(8, 3, 1, stride=2)),
     r"linear_pred must have stride \(1, 1\); got \(2, 2\)"),
    (SegmentationHead, lambda: nn.Linear(4, 4), "Linear lacks linear_c1.proj"),
    (SegmentationHead, lambda: changed(DecodeHead([4] * 4, 8, 3, True), linear_c3=None),
     r"lacks linear_c3\.proj"),
    (SegmentationHead, lambda: changed(DecodeHead([4] * 4, 8, 3, True), dropout=nn.ReLU()),
     "dropout must be an nn.Dropout"),
    (SegmentationHead,
     lambda: changed(DecodeHead([4] * 4, 8, 3, True), linear_fuse__conv=nn.Conv2d(32, 8, 1)),
     r"no place for linear_fuse\.conv\.bias"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "build", "message"), WRONG, ids=lambda x: None)
def test_from_torch_says_what_is_wrong(layer: Any, build: Callable, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        layer.from_torch(build())


class TestRowsLeftOut:
    """Of the statistics of a batch norm."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_may_hold_anything(self, value: float) -> None:
        rows = torch.tensor([True, False, True])
        x = torch.randn(3, H * W, C, dtype=torch.float64)
        norm = randomise(BatchNorm2d(C)).train()
        expected_norm = copy.deepcopy(norm)
        expected = expected_norm(x[rows].mT.unflatten(-1, (H, W))).flatten(2).mT
        x[1, 3, 5] = value
        actual = batch_norm_tokens(norm, x, H, W, rows)
        torch.testing.assert_close(actual[rows], expected)
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(buffer, expected_norm.get_buffer(name))


class TestRepr:
    def layers(self) -> Iterator[tuple[nn.Module, str]]:
        yield EfficientSelfAttention(C, 2, 2), "dim=16, heads=2, sr_ratio=2, backend="
        yield MixFFN(C, 24), "dim=16, hidden=24, backend="
        yield ParallelPoolingMixer(C, 2), "dim=16, ratio=2, backend="
        yield SelfQueryHub(C, M), "dim=16, modalities=3, backend="
        yield SelfGuidedGate(C), "dim=16, rho=0.5, tau=1.0, backend="

    def test_sizes_and_backend(self) -> None:
        for layer, sizes in self.layers():
            assert f"{sizes}auto -> torch" in repr(layer)
            with use_backend("reference"):
                assert layer.extra_repr() == f"{sizes}reference"
            with use_backend("triton"):
                on_cpu = "triton" if _backend.INTERPRET else "triton -> none"
                assert layer.extra_repr() == f"{sizes}{on_cpu}"
                assert layer.double().extra_repr() == f"{sizes}triton -> none"
        assert "modalities=3" in repr(CrossModalBlock(C, M, 2, 2))
        head = SegmentationHead([4, 8, 12, 16], 8, 3)
        assert head.extra_repr() == "in_channels=[4, 8, 12, 16], dim=8, num_classes=3, fold=True"
        with use_backend("triton"):
            wide = CrossModalAttention(256, 1)
            assert wide.extra_repr().endswith("triton -> none")  # heads of 256 channels

    def test_of_layers_taken_over(self) -> None:
        assert "dim=16, heads=2" in repr(EfficientSelfAttention.from_torch(SegformerAttention4()))
        assert "modalities=3" in repr(SelfQueryHub.from_torch(PredictorConv(C, M)))

    def test_does_not_import_triton(self) -> None:
        code = (
            "import sys, equiseg_fast.nn as nn\n"
            "print(nn.CrossModalBlock(16, 2, 2, 2), nn.SelfGuidedGate(16))\n"
            "assert 'triton' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
