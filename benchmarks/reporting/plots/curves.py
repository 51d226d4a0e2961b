"""Lines over a size that was varied, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases.common.cost import Limits
from benchmarks.measure.record import Record
from benchmarks.reporting.plots.style import colour, in_order, legend, panels, pyplot, save

VARIABLES = ("tokens", "channels", "modalities")
POINTS = 3
"""As many sizes make a line."""

MARKERS = "osD^vP*X<>hpd8"


@dataclass(frozen=True)
class Sweep:
    """Records of one operation in one mode that differ in provider and one variable."""

    variable: str
    op: str
    mode: str
    dtype: str
    records: tuple[Record, ...]

    @property
    def label(self) -> str:
        sizes = _sizes(self.records[0])
        kept = ", ".join(f"{sizes[k]} {k}" for k in VARIABLES if k != self.variable)
        return f"{self.op} {self.mode} {self.dtype}\n{kept}, batch {sizes['batch']}"


def _sizes(record: Record) -> dict[str, int]:
    """What may be varied; whole networks are seen by their first stage."""
    shape = record.shape
    first = shape if shape.stage else replace(shape, stage=1)
    return {
        "tokens": first.tokens,
        "channels": first.channels,
        "modalities": shape.modalities,
        "batch": shape.batch,
    }


def sweeps(records: Sequence[Record]) -> list[Sweep]:
    """Per variable, operation, mode and dtype the longest line with at least POINTS sizes."""
    found = []
    for variable in VARIABLES:
        lines: dict[tuple[str, str, str], dict[Any, list[Record]]] = {}
        for r in records:
            kept = tuple(v for k, v in _sizes(r).items() if k != variable)
            # a network of another depth is another network
            kept += (r.shape.variant,) if not r.shape.stage else ()
            lines.setdefault((r.op, r.mode, r.dtype), {}).setdefault(kept, []).append(r)
        for names, candidates in lines.items():
            points = {k: len({_sizes(r)[variable] for r in v}) for k, v in candidates.items()}
            longest = max(points, key=lambda k: points[k])
            if points[longest] >= POINTS:
                found.append(Sweep(variable, *names, tuple(candidates[longest])))
    return found


def _axes(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(True, which="major", color="#e3e7ee", lw=0.8)
    axis.set_title(title, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def draw_lines(sweeps: Sequence[Sweep], field: str, unit: str, title: str, path: Path) -> str:
    """Medians with p20 to p80 bands over the variable; returns the file name."""
    figure, axes = panels(len(sweeps), 4.9, 3.5, columns=2)
    scale = 1e-3 if field == "p50_us" else 1.0
    for axis, sweep in zip(axes, sweeps, strict=True):
        for provider in in_order(r.provider for r in sweep.records):
            rows = [r for r in sweep.records if r.provider == provider and getattr(r, field)]
            rows.sort(key=lambda r: _sizes(r)[sweep.variable])
            x = [_sizes(r)[sweep.variable] for r in rows]
            y = [scale * getattr(r, field) for r in rows]
            axis.plot(x, y, marker="o", ms=4, lw=1.8, color=colour(provider))
            if field == "p50_us":
                low, high = ([scale * getattr(r, f) for r in rows] for f in ("p20_us", "p80_us"))
                axis.fill_between(x, low, high, color=colour(provider), alpha=0.2, lw=0)
        per_image = " per image" if sweep.variable == "tokens" else ""
        _axes(axis, sweep.label, sweep.variable + per_image, unit)
    legend(figure, (r.provider for sweep in sweeps for r in sweep.records))
    band = "; bands: p20 to p80" if field == "p50_us" else ""
    figure.suptitle(f"{title} over {sweeps[0].variable}\n({unit}, lower is better{band})")
    return save(figure, path)


def draw_roofline(records: Sequence[Record], limits: Mapping[str, Any], path: Path) -> str:
    """FLOP/s over FLOPs per byte, a panel per dtype, below the roofs that were measured in the same
    run; exponentials have no roof in this plane. Returns the file name."""
    known = Limits.read(limits)
    rows = [r for r in records if r.gbps and r.tflops and r.dtype in known.peak]
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    ops = list(dict.fromkeys(r.op for r in rows))
    figure, axes = panels(len(dtypes), 8.6, 5.4, columns=1)
    for axis, dtype in zip(axes, dtypes, strict=True):
        shown = [r for r in rows if r.dtype == dtype]
        for r in shown:
            axis.scatter(
                1e3 * r.tflops / r.gbps, r.tflops, s=44, color=colour(r.provider), alpha=0.8,
                marker=MARKERS[ops.index(r.op) % len(MARKERS)], edgecolor="white", lw=0.5,
            )  # fmt: skip
        _roofs(axis, known, dtype, [1e3 * r.tflops / r.gbps for r in shown])
        _axes(axis, dtype, "FLOPs per byte (declared minimum)", "TFLOP/s")
    legend(figure, (r.provider for r in rows))
    line = pyplot().Line2D
    handles = [
        line([], [], ls="", color="#444444", marker=MARKERS[i % len(MARKERS)], label=op)
        for i, op in enumerate(ops)
    ]
    axes[0].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.suptitle("Roofline: distance to what the device was seen to do")
    return save(figure, path)


def _roofs(axis: Any, limits: Limits, dtype: str, intensities: Sequence[float]) -> None:
    low, high = min(intensities) / 2, max(*intensities, limits.peak[dtype] / limits.bandwidth) * 4
    bandwidth, peaks = limits.bandwidth / 1e12, {"matrix products": limits.peak[dtype] / 1e12}
    if dtype != "fp32":
        peaks["other arithmetic"] = limits.peak["fp32"] / 1e12
    top = max(peaks.values())
    axis.plot([low, top / bandwidth], [low * bandwidth, top], color="#222222", lw=1.4)
    axis.annotate(
        f"memory {limits.bandwidth / 1e9:.0f} GB/s", (low, low * bandwidth), xytext=(8, 0),
        textcoords="offset points", rotation=0, va="top",
    )  # fmt: skip
    for name, peak in peaks.items():
        axis.plot([peak / bandwidth, high], [peak, peak], color="#222222", lw=1.4)
        axis.annotate(
            f"{name} {peak:.3g} TFLOP/s", (high, peak), xytext=(0, 4),
            textcoords="offset points", ha="right",
        )  # fmt: skip
    axis.set_xlim(low, high)
