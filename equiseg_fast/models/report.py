"""What loading weights did, in words."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """What `load_backbone` did; `str` of it is a summary of a few lines.

    Names of tensors that the file has beside its state dict have the keys of the mappings around
    them in front, with dots.
    """

    layout: str
    """Whose names the file uses: "NVlabs" (ours are the same), "CMX", "CMNeXt", "StitchFusion",
    "MMSegmentation", "timm PVTv2", "Hugging Face v4" or "Hugging Face v5"."""
    loaded: tuple[str, ...]
    """Parameters of the model that were overwritten."""
    ignored: tuple[str, ...]
    """Tensors of the file that were not used: heads, auxiliary branches, adapters, copies."""
    missing: tuple[str, ...]
    """Encoder parameters of the model that the file lacks; never any with `strict=True`."""
    prefixes: tuple[str, ...] = ()
    """What the names of its weights begin with in the file, for each encoder of the model."""
    not_taken: tuple[str, ...] = ()
    """Prefixes of further encoders in the file."""
    adapted: tuple[str, ...] = ()
    """Convolutions whose input channels were summed or repeated."""
    not_finite: tuple[str, ...] = ()
    """Parameters of the model that got NaN or infinity from the file."""
    overflowed: tuple[str, ...] = ()
    """Parameters of the model that got infinity because their dtype cannot hold finite values."""

    def __str__(self) -> str:
        lines = [f"{self.layout}: {len(self.loaded)} parameters loaded"]
        if len(set(self.prefixes)) > 1 or self.not_taken:
            others = f"; not from {quoted(self.not_taken)}" if self.not_taken else ""
            lines.append(f"  from {quoted(self.prefixes)}{others}")
        for label, names in (("missing", self.missing), ("ignored", self.ignored)):
            count = len(names) or "none"
            lines.append(f"  {count} {label}" + (f": {summary(names)}" if names else ""))
        for label, names in (
            ("with input channels summed or repeated", self.adapted),
            ("with NaN or infinity in the file", self.not_finite),
            ("with values beyond the dtype of the model", self.overflowed),
        ):
            if names:
                lines.append(f"  {len(names)} {label}: {summary(names)}")
        return "\n".join(lines)


def quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def summary(names: Sequence[str], limit: int = 6) -> str:
    """A few names as they are; of more, how many there are of the most frequent kinds."""
    if len(names) <= limit:
        return ", ".join(names)
    kinds = Counter(re.sub(r"\d+", "*", name.rpartition(".")[0] or name) for name in names)
    shown = [f"{kind} ({count})" for kind, count in kinds.most_common(limit)]
    return ", ".join(shown) + (", .." if len(kinds) > limit else "")
