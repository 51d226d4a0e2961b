"""Self-query hub: what the other modalities have to say to each primary one."""

from collections.abc import Sequence
from math import sqrt
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from equiseg_fast.ops import query_hub
from equiseg_fast.ops._checks import check_sequence, check_sizes

from ._foreign import child
from ._forms import as_tokens, check_channels, like
from ._init import normal_
from ._layer import Layer
from ._plain import keeps_size
from ._sharing import JoinedParameter, replace_by_joined
from .common import backend_repr

_NETS = ("dw_weight", "dw_bias", "pw_weight", "pw_bias")


class SelfQueryHub(Layer):
    """One score net per modality; all primaries are served in one pass (`ops.query_hub`)."""

    def __init__(self, dim: int, modalities: int) -> None:
        super().__init__()
        check_sizes(dim=dim, modalities=modalities)
        self.dw_weight = nn.Parameter(torch.empty(modalities, dim, 3, 3))
        self.dw_bias = nn.Parameter(torch.zeros(modalities, dim))
        self.pw_weight = nn.Parameter(torch.empty(modalities, dim))
        self.pw_bias = nn.Parameter(torch.zeros(modalities))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each net as `init_module` would start its two convolutions."""
        normal_(self.dw_weight, sqrt(2 / 9))
        normal_(self.pw_weight, sqrt(2))

    @classmethod
    def from_torch(cls, module: Any) -> "SelfQueryHub":
        """This layer on the score nets of somebody else's, whose parameters stay the same objects.

        module: CMNeXt's `PredictorConv`, with a net per modality in `score_nets`, or those nets as
        an `nn.ModuleList`: each a depthwise 3x3 convolution, then a 1x1 convolution to one channel,
        both with bias. They are joined whenever the layer is called; its state dict has the joined
        ones, which are copies: writing into them does not reach the parameters, `load_state_dict`
        does. Raises TypeError that says what is missing, different or too much.
        """
        nets = getattr(module, "score_nets", module)
        if not isinstance(nets, nn.ModuleList) or not len(nets):
            raise TypeError(
                "module must be an nn.ModuleList of score nets, or have one named score_nets; "
                f"got {type(module).__name__}"
            )
        pairs = [(child(net, "0"), child(net, "1")) for net in nets]
        dim = getattr(pairs[0][0], "out_channels", 0)
        for i, (depthwise, pointwise) in enumerate(pairs):
            _check_conv(f"score_nets.{i}.0", depthwise, dim, dim, 3, dim)
            _check_conv(f"score_nets.{i}.1", pointwise, dim, 1, 1, 1)
        used = {id(p) for pair in pairs for conv in pair for p in conv.parameters()}
        tensors = *nets.named_parameters(), *nets.named_buffers()
        if extra := [f"score_nets.{name}" for name, x in tensors if id(x) not in used]:
            raise TypeError(f"{cls.__name__} has no place for {', '.join(extra)}")
        with torch.device("meta"):
            layer = cls(dim, len(nets))
        for k, kind in enumerate(("dw", "pw")):
            for name in ("weight", "bias"):
                parts = [getattr(pair[k], name) for pair in pairs]
                replace_by_joined(layer, f"{kind}_{name}", parts)
        return layer.train(module.training)

    def forward(
        self,
        x: Tensor,
        height: int | None = None,
        width: int | None = None,
        *,
        present: Tensor | None = None,
        subset: Sequence[int] | None = None,
    ) -> Tensor:
        """x, tokens `[M, B, L, dim]` with height and width, or maps `[M, B, dim, H, W]` -> hub of
        every primary, in the form of x.

        present `[M, B]` bool; subset: which score nets serve the M modalities of x, None for all.
        Raises TypeError or ValueError naming the argument.
        """
        tokens, height, width = as_tokens("x", x, height, width, "M, B")
        modalities, dim = self.dw_bias.shape
        check_channels("x", tokens, dim)
        if subset is not None:
            check_sequence("subset", subset, Integral, "indices of score nets")
        chosen = range(modalities) if subset is None else list(subset)
        if len(chosen) != len(tokens) or not set(chosen) <= set(range(modalities)):
            raise ValueError(
                f"subset must choose one of the {modalities} score nets for each of the "
                f"{len(tokens)} modalities of x; got {subset}"
            )
        own = (getattr(self, name) for name in _NETS)
        nets = [p() if isinstance(p, JoinedParameter) else p for p in own]
        if subset is not None:
            nets = [p[chosen] for p in nets]
        dw_weight, dw_bias, pw_weight, pw_bias = nets
        hub = query_hub(
            tokens, dw_weight, dw_bias, pw_weight, pw_bias, height, width, present=present
        )
        return like(hub, x, height, width)

    def extra_repr(self) -> str:
        modalities, dim = self.dw_bias.shape
        backend = backend_repr("query_hub", self, (modalities, 0, 0, dim))
        return f"dim={dim}, modalities={modalities}, {backend}"


def _check_conv(label: str, conv: Any, channels: int, out: int, kernel: int, groups: int) -> None:
    """A convolution of these sizes that keeps the size of the map, with bias."""
    if isinstance(conv, nn.Conv2d) and conv.bias is not None:
        sizes = conv.in_channels, conv.out_channels
        if keeps_size(conv, kernel, groups) and sizes == (channels, out):
            return
    raise TypeError(
        f"{label} must be a {kernel}x{kernel} convolution of {channels} channels to {out} in "
        f"{groups} groups, with bias and padding {kernel // 2}; got {conv}"
    )
