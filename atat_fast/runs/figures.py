"""Pictures of a run: the loss with its held-out bound, and the throughput. Curves in, PNG bytes out.

Figures use matplotlib's objects (Figure, FigureCanvasAgg) and never pyplot's state, so the bytes depend on the curves alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes", "Curves", "Theme"], None]
Array = np.ndarray[Any, np.dtype[Any]]

# The look of all figures. Okabe and Ito's series colours stay distinct in every common colour blindness.
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.6,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Theme:
    """Colours of one scheme. paper: the page behind the figure."""

    paper: str
    ink: str
    faint: str
    grid: str
    train: str
    held_out: str


LIGHT = Theme(paper="#ffffff", ink="#33363b", faint="#70757d", grid="#e6e8eb", train="#0072b2", held_out="#d55e00")
DARK = Theme(paper="#16181c", ink="#d5d8dd", faint="#9aa0a9", grid="#2c3036", train="#56b4e9", held_out="#e69f00")


@dataclass(frozen=True)
class Curves:
    """Data of the pictures. Values that are not finite are left out of lines and marked at their place.

    train_x, loss, throughput: one entry a training row. eval_x, nll, nll_se: one entry an evaluation. x counts tokens seen, or
    steps if tokens_per_step is None. unigram: nats per token.
    """

    train_x: Array
    loss: Array
    throughput: Array
    eval_x: Array
    nll: Array
    nll_se: Array
    unigram: float | None
    tokens_per_step: float | None


@dataclass(frozen=True)
class ImportanceCurves:
    """Data of the pictures of importance.

    x, tilt, focus: one entry a training row. quarters [n, 4]: its mean nll by rising score, or NaN. count, predicted, observed:
    the last evaluation's reliability, or empty. tokens_per_step as in `Curves`.
    """

    x: Array
    tilt: Array
    focus: Array
    quarters: Array
    count: Array
    predicted: Array
    observed: Array
    tokens_per_step: float | None


def compact(value: float, plain_below: float = 10_000) -> str:
    """A count for people: 950, 9,876, 12.3 k, 1.5 M, 2 B. Three significant digits from `plain_below` on."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) < plain_below - 0.5:
        return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"
    rounded = float(f"{value:.3g}")  # before choosing the unit, or 999,999 would read 1000 k
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(rounded) >= size:
            return f"{rounded / size:g} {unit}"
    return f"{rounded / 1e3:g} k"


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 42 s, 4 min 10 s, 3 h 5 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "not known"
    whole = round(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s" if seconds >= 9.95 else f"{seconds:.2g} s"


def measured(value: float, error: float = math.nan) -> str:
    """A number with as many digits as its standard error supports: 4.123 ± 0.012. Three decimals without an error."""
    if not math.isfinite(value):
        return "not finite"
    if not (math.isfinite(error) and error > 0):
        return f"{value:,.3f}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def loss_png(curves: Curves, theme: Theme = LIGHT) -> bytes:
    """Training loss, val/nll ± one standard error, and the unigram entropy as the line to get below."""
    return _render((6.4, 4.1), 200, theme, [_draw_loss], curves)


def throughput_png(curves: Curves, theme: Theme = LIGHT) -> bytes:
    """Training tokens a second, with the median."""
    return _render((6.4, 2.9), 200, theme, [_draw_throughput], curves)


def overview_png(curves: Curves, theme: Theme = LIGHT) -> bytes:
    """Both pictures side by side, 1200 pixels wide."""
    return _render((8.0, 3.4), 150, theme, [_draw_loss, _draw_throughput], curves, {"font.size": 8, "axes.labelsize": 8})


def importance_png(curves: ImportanceCurves, theme: Theme = LIGHT) -> bytes:
    """The curriculum, the loss by importance, and predicted against observed chance of error, one above the other."""
    nothing = np.zeros(0)
    axis = Curves(curves.x, nothing, nothing, nothing, nothing, nothing, None, curves.tokens_per_step)
    panels: list[Panel] = [partial(draw, curves) for draw in (_draw_curriculum, _draw_quarters, _draw_reliability)]
    return _render((6.4, 9.0), 160, theme, panels, axis, stacked=True)


def smooth(x: Array, values: Array) -> tuple[Array, Array]:
    """A Gaussian running mean, about a fiftieth of the run wide, narrower at the start, where the loss falls steeply.

    Long runs are first averaged in groups, to a thousand points at most.
    """
    if len(x) > 1000:
        x = np.array([part.mean() for part in np.array_split(x, 1000)])
        values = np.array([part.mean() for part in np.array_split(values, 1000)])
    count = len(x)
    result = np.empty(count)
    for i in range(count):
        width = max(0.5, min(count / 50, i / 3))
        near = np.arange(max(0, i - int(3 * width)), min(count, i + int(3 * width) + 1))
        weight = np.exp(-0.5 * ((near - i) / width) ** 2)
        result[i] = (weight @ values[near]) / weight.sum()
    return x, result


def _render(
    size: tuple[float, float],
    dpi: int,
    theme: Theme,
    panels: list[Panel],
    curves: Curves,
    extra: dict[str, Any] | None = None,
    *,
    stacked: bool = False,
) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.grid,
    }
    small = {"legend.fontsize": 7.5, "axes.titlesize": 8.5} if extra else {}
    style: Any = STYLE | colours | (extra or {}) | small
    with rc_context(style):
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        ratios = [1.5, 1.0] if len(panels) == 2 else None
        shape = (len(panels), 1) if stacked else (1, len(panels))
        grid = figure.subplots(*shape, squeeze=False, width_ratios=None if stacked else ratios)
        for axes, draw in zip(grid.flatten(), panels, strict=True):
            draw(axes, curves, theme)
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})  # a version would make equal pictures differ
    return buffer.getvalue()


def _draw_loss(axes: Axes, curves: Curves, theme: Theme) -> None:
    axes.set_title("Loss and held-out bound")
    axes.set_ylabel("nats per token")
    _count_axis(axes, curves, theme)
    good = np.isfinite(curves.loss)
    x, loss = curves.train_x[good], curves.loss[good]
    bounds = [curves.unigram] if curves.unigram is not None else []
    if len(x):
        size = float(np.clip(1500 / len(x), 4, 16))
        axes.scatter(x, loss, s=size, color=theme.train, alpha=0.45, linewidths=0, label="training loss")
        bounds += [*np.quantile(loss, [0.005, 0.995])]
        if len(x) > 2:
            where, line = smooth(x, loss)
            axes.plot(where, line, color=theme.train, linewidth=1.6, label="smoothed")
            bounds += [float(line.min()), float(line.max())]
    if not good.all():
        lost = curves.train_x[~good]
        rug: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "linestyle": "none", "marker": "x", "markersize": 5}
        axes.plot(lost, np.full(len(lost), 0.03), color=theme.ink, label="loss not finite", clip_on=False, **rug)
    measured = np.isfinite(curves.nll)
    if measured.any():
        nll, error = curves.nll[measured], np.nan_to_num(curves.nll_se[measured], posinf=0.0)
        size = 4 if len(nll) < 25 else 2.5
        look: dict[str, Any] = {"fmt": "o-", "markersize": size, "linewidth": 1.1, "elinewidth": 1.1, "capsize": 2.5}
        axes.errorbar(curves.eval_x[measured], nll, yerr=error, color=theme.held_out, label="val/nll ± 1 s.e.", zorder=4, **look)
        bounds += [float((nll - error).min()), float((nll + error).max())]
    if not bounds:
        _say_nothing(axes, "no finite loss yet", theme)
        return
    low, high = min(bounds), max(bounds)
    margin = 0.08 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    if curves.unigram is not None:
        axes.axhline(curves.unigram, color=theme.faint, linewidth=1.1, linestyle=(0, (5, 3)))
        label = f"unigram entropy {curves.unigram:.2f}"
        # A halo of the page's colour keeps the words readable over dots.
        halo: dict[str, Any] = {"boxstyle": "square,pad=0.15", "facecolor": theme.paper, "edgecolor": "none", "alpha": 0.75}
        axes.annotate(
            label,
            (1, curves.unigram),
            (-2, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=theme.faint,
            fontsize="small",
            bbox=halo,
            zorder=5,
        )
    outside = int(((loss > high + margin) | (loss < low - margin)).sum())
    if outside:
        words = f"{outside} point{'s lie' if outside > 1 else ' lies'} outside the frame"
        place: dict[str, Any] = {"xytext": (4, 4), "xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(words, (0, 0), color=theme.faint, fontsize="small", **place)
    if axes.get_legend_handles_labels()[0]:
        _legend(axes)


def _draw_throughput(axes: Axes, curves: Curves, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_title("Throughput")
    axes.set_ylabel("tokens per second")
    _count_axis(axes, curves, theme)
    good = np.isfinite(curves.throughput)
    if not good.any():
        _say_nothing(axes, "no throughput yet", theme)
        return
    x, rate = curves.train_x[good], curves.throughput[good]
    few = len(x) < 60
    axes.plot(x, rate, color=theme.train, linewidth=0.9, marker="o" if few else "", markersize=3, alpha=0.75, label="as logged")
    median = float(np.median(rate))
    axes.axhline(median, color=theme.held_out, linewidth=1.4, linestyle=(0, (5, 3)), label=f"median {compact(median)}")
    axes.set_ylim(0, 1.18 * float(np.quantile(rate, 0.995)) or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    _legend(axes)


def _draw_curriculum(importance: ImportanceCurves, axes: Axes, curves: Curves, theme: Theme) -> None:
    axes.set_title("Curriculum")
    axes.set_ylabel("exponent")
    _count_axis(axes, curves, theme)
    axes.axhline(0, color=theme.faint, linewidth=0.8)
    axes.plot(importance.x, importance.tilt, color=theme.train, linewidth=1.6, label="tilt of masks")
    axes.plot(importance.x, importance.focus, color=theme.held_out, linewidth=1.6, label="focus of weights")
    _legend(axes)


def _draw_quarters(importance: ImportanceCurves, axes: Axes, curves: Curves, theme: Theme) -> None:
    axes.set_title("Loss of hidden tokens by importance")
    axes.set_ylabel("nats per token, unweighted")
    _count_axis(axes, curves, theme)
    if not np.isfinite(importance.quarters).any():
        _say_nothing(axes, "none logged yet", theme)
        return
    names = ("least important quarter", "second", "third", "most important quarter")
    for i, name in enumerate(names):
        part = i / (len(names) - 1)
        good = np.isfinite(importance.quarters[:, i])
        where, line = smooth(importance.x[good], importance.quarters[good, i]) if good.any() else (importance.x[:0],) * 2
        axes.plot(where, line, color=_mix(theme.train, theme.held_out, part), linewidth=1.5, label=name)
    _legend(axes, columns=2)


def _draw_reliability(importance: ImportanceCurves, axes: Axes, curves: Curves, theme: Theme) -> None:
    axes.set_title("Reliability of importance on held-out text")
    axes.set_xlabel("predicted chance of error")
    axes.set_ylabel("observed")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.plot([0, 1], [0, 1], color=theme.faint, linewidth=1.0, linestyle=(0, (5, 3)))
    some = importance.count > 0
    if not some.any():
        _say_nothing(axes, "none measured yet", theme)
        return
    size = 20 + 180 * importance.count[some] / importance.count.sum()
    axes.plot(importance.predicted[some], importance.observed[some], color=theme.train, linewidth=1.1)
    axes.scatter(importance.predicted[some], importance.observed[some], s=size, color=theme.train, linewidths=0, zorder=3)


def _mix(first: str, second: str, part: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple((1 - part) * a + part * b for a, b in zip(to_rgb(first), to_rgb(second), strict=True))


def _count_axis(axes: Axes, curves: Curves, theme: Theme) -> None:
    """The x axis in tokens below and in steps above, or in steps alone if tokens are unknown."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    last = max([*curves.train_x, *curves.eval_x], default=0.0)
    axes.set_xlim(0, 1.02 * last or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlabel("steps" if curves.tokens_per_step is None else "tokens seen")
    if curves.tokens_per_step is not None and last > 0:
        scale = curves.tokens_per_step
        both_ways: Any = (lambda tokens: tokens / scale, lambda steps: steps * scale)
        above = axes.secondary_xaxis("top", functions=both_ways)
        above.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        above.xaxis.set_major_formatter(FuncFormatter(_tick))
        above.tick_params(labelsize="small", labelcolor=theme.faint, length=2, pad=1)
        above.spines["top"].set_visible(False)
        above.set_xlabel("steps", color=theme.faint, fontsize="small", loc="right", labelpad=2)


def _tick(value: float, _: int | None = None) -> str:
    return compact(value, 1_000)  # so that 5 k and 10 k on one axis look alike


def _legend(axes: Axes, columns: int = 4) -> None:
    """The legend in a row below the axis, clear of curves."""
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, -(3 * _font_size() + 8) / 72, axes.figure.dpi_scale_trans)
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": below, "borderaxespad": 0}
    axes.legend(ncols=columns, markerscale=1.2, columnspacing=1.4, handletextpad=0.5, borderpad=0, **place)


def _font_size() -> float:
    from matplotlib import rcParams

    return float(rcParams["font.size"])


def _say_nothing(axes: Axes, words: str, theme: Theme) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=theme.faint)
