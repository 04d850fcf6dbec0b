"""report.html: what the page shows, prepared as values; report.html.j2 lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import report_bars as bars
from . import report_chart as chart
from . import report_curves as curves
from . import report_format as fmt
from .history import History
from .report_summary import Line, Pair, Tone, computing, lines, pairs, widths
from .report_value import Report, at, decision, interval, is_fraction, layer_name, number, rows, text
from .verdict import comparisons, condition, doubt, headline, is_bench, reason_when_slower, speed

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One row of the bench table, as text; notes are 95 % intervals."""

    artifact: str
    where: str
    p50: str
    p50_note: str
    p90: str
    p99: str
    strip: chart.Strip | None
    throughput: str
    memory: str
    ratio: str
    ratio_note: str
    doubt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchGroup:
    """The bench rows of one condition, on one scale that ends at `longest` ms."""

    condition: str
    longest: float
    rows: tuple[BenchRow, ...]


def page(report: Report, history: History | None = None) -> str:
    """Return the page of a full report (`report.assemble`), or of a benchmark alone."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    view = _view(report) | _measured(report, history or History())
    return environment.get_template(_TEMPLATE).render(view)


def _measured(report: Report, history: History) -> dict[str, object]:
    """Return what the charts of speed show, and for each chart that there is no data for, why."""
    bench = rows(report, "bench")
    found: dict[str, tuple[object, str]] = {
        "distributions": (curves.distributions(bench), "these rows are of a version that kept no quantiles"),
        "loads": (curves.loads(bench), f"only a server scenario varies the load, this is {_scenarios(bench)}"),
        "stages": (bars.stages(bench), f"requests of {_scenarios(bench)} have one stage"),
        "energies": (bars.energies(bench), bars.why_no_energy(bench)),
        "runs": (curves.runs(history), "this is the first run in its folder"),
    }
    names = {"distributions": "latency distributions", "loads": "throughput against latency", "stages": "stages"}
    names |= {"energies": "energy per inference", "runs": "history"}
    absent = [(names[key], why) for key, (value, why) in found.items() if not value and (bench or key == "runs")]
    return {key: value for key, (value, _) in found.items()} | {"absent": absent}


def _scenarios(bench: Sequence[Report]) -> str:
    return ", ".join(dict.fromkeys(text(row, "scenario") for row in bench if text(row, "scenario"))) or "another one"


def _view(report: Report) -> dict[str, object]:
    layers = rows(report, "layers")
    summary = lines(report)
    return {
        "fmt": fmt,
        "alone": is_bench(report),
        "tone": _tone(report),
        "headline": headline(report),
        "sentences": speed(rows(report, "bench"), reason_when_slower(report)).splitlines(),
        "failure": text(report, "failure"),
        "caution": text(report, "environment", "bench_caution"),
        "summary": summary,
        "cards": _cards(summary),
        "charts": _charts(report),
        "computing": computing(report),
        "layers": [_layer(layer, layers) for layer in layers],
        "layer_columns": {key for key in ("rank", "channels_kept", "mode") if any(text(row, key) for row in layers)},
        "widths": widths(layers),
        "steps": [_step(step, is_fraction(report)) for step in rows(report, "steps")],
        "decisions": [_decision(row) for row in rows(report, "decisions")],
        "verify": [_verified(row) for row in rows(report, "verify")],
        "bench": _bench(report),
        "environment": _flat(at(report, "environment")),
        "command": text(report, "command"),
        "seed": text(report, "seed"),
    }


def _tone(report: Report) -> Tone:
    """Return the colour of the verdict: that of the worst thing it says."""
    found = comparisons(rows(report, "bench"))
    bad_layer = any(text(row, "first_bad_layer") for row in rows(report, "verify"))
    if bad_layer or text(report, "failure") or (found and found[0].speed == "slower"):
        return "bad"
    return "good" if found and found[0].speed == "faster" and not found[0].doubt else "same"


def _cards(summary: Sequence[Line]) -> list[Line]:
    """Return the lines that a reader looks for first: metric, size, bits, latency."""
    names = ("latency p50", "weights on disk", "bits per weight")
    first = [summary[0]] if summary[0].label != "latency p50" else []
    return [*first, *(line for name in names for line in summary if line.label.startswith(name))]


def _charts(report: Report) -> list[chart.Scatter]:
    first = next(iter(pairs(report)), None)
    found = [_chart(report, "size", _sizes(report))]
    if first is not None and first.optimized is not None:
        found.append(_chart(report, f"latency p50, {first.condition}", _latencies(first)))
    return [item for item in found if item is not None]


def _sizes(report: Report) -> list[tuple[float | None, tuple[float, float] | None]]:
    largest = max((number(report, side, "size_bytes") or 0.0 for side in ("baseline", "final")), default=0.0)
    scale = 1e-6 if largest >= 1e6 else 1e-3
    sizes = (number(report, side, "size_bytes") for side in ("baseline", "final"))
    return [(None if size is None else size * scale, None) for size in sizes]


def _latencies(pair: Pair) -> list[tuple[float | None, tuple[float, float] | None]]:
    sides = (pair.baseline, pair.optimized or {})
    return [(number(row, "latency_ms_p50"), interval(row, "ci95")) for row in sides]


def _chart(
    report: Report, against: str, xs: Sequence[tuple[float | None, tuple[float, float] | None]]
) -> chart.Scatter | None:
    """Return metric against `xs` of original and optimized; None unless both were measured."""
    scale = 100.0 if is_fraction(report) else 1.0
    name = text(report, "final", "metric", "name") or "metric"
    points = []
    for label, side, (x, x_ci95) in zip(("original", "optimized"), ("baseline", "final"), xs, strict=True):
        y, ends = number(report, side, "metric", "value"), interval(report, side, "metric_ci95")
        if x is None or y is None or x < 0:
            return None
        y_ci95 = None if ends is None else (ends[0] * scale, ends[1] * scale)
        points.append(chart.Point(label=label, x=x, y=y * scale, x_ci95=x_ci95, y_ci95=y_ci95))
    if not any(point.x > 0 for point in points):
        return None
    unit = _size_unit(report) if against == "size" else "ms"
    metric = f"{name} (%)" if scale == 100.0 else name
    return chart.scatter(f"{metric} against {against}", f"{against.partition(',')[0]} ({unit})", points)


def _size_unit(report: Report) -> str:
    largest = max(number(report, side, "size_bytes") or 0.0 for side in ("baseline", "final"))
    return "MB" if largest >= 1e6 else "kB"


def _layer(layer: Report, layers: Sequence[Report]) -> dict[str, object]:
    bits, error = number(layer, "bits"), number(layer, "error_rel")
    widest = max([8.0, *(number(row, "bits") or 0.0 for row in layers)])
    worst = max((number(row, "error_rel") or 0.0 for row in layers), default=0.0)
    return {
        "name": text(layer, "name") or fmt.DASH,
        "format": text(layer, "format") or fmt.DASH,
        "mode": text(layer, "mode") or fmt.DASH,
        "rank": text(layer, "rank") or fmt.DASH,
        "channels_kept": fmt.mapping(at(layer, "channels_kept")),
        "shape": _shape(at(layer, "shape")),
        "bits": fmt.plain(bits),
        "bits_bar": 100 * (bits or 0.0) / widest,
        "error": fmt.plain(error, 2),
        "error_bar": 100 * (error or 0.0) / worst if worst > 0 else 0.0,
        "size": fmt.size(number(layer, "size_bytes")),
    }


def _shape(shape: object) -> str:
    if not isinstance(shape, list | tuple) or not shape:
        return fmt.DASH
    return " \N{MULTIPLICATION SIGN} ".join(str(size) for size in shape)


def _step(step: Report, fraction: bool) -> dict[str, str]:
    value = number(step, "metric", "value")
    value = number(step, "metric") if value is None else value
    return {
        "step": text(step, "step") or fmt.DASH,
        "spec": fmt.mapping(at(step, "spec")),
        "seconds": fmt.seconds(number(step, "seconds")),
        "memory": fmt.size(number(step, "peak_rss_bytes")),
        "metric": fmt.score(value, fraction=fraction),
        "error": fmt.plain(number(step, "error_rel"), 2),
    }


def _decision(row: Report) -> dict[str, str]:
    kind, value = decision(row)
    return {
        "layer": layer_name(row),
        "kind": kind or fmt.DASH,
        "value": value,
        "reason": text(row, "reason") or fmt.DASH,
    }


def _verified(row: Report) -> dict[str, str]:
    agreement = number(row, "argmax_agreement")
    return {
        "runtime": text(row, "runtime") or fmt.DASH,
        "batch": text(row, "batch") or fmt.DASH,
        "max_abs": fmt.plain(number(row, "max_abs")),
        "rel": fmt.plain(number(row, "rel")),
        "agreement": fmt.DASH if agreement is None else f"{100 * agreement:.2f} %",
        "size": fmt.size(number(row, "size_bytes")),
        "bad": text(row, "first_bad_layer"),
    }


def _bench(report: Report) -> list[BenchGroup]:
    bench = rows(report, "bench")
    names = list(dict.fromkeys(condition(row) for row in bench))
    return [_bench_group(name, [row for row in bench if condition(row) == name]) for name in names]


def _bench_group(name: str, group: Sequence[Report]) -> BenchGroup:
    longest = max((number(row, "latency_ms_p99") or 0.0 for row in group), default=0.0)
    return BenchGroup(condition=name, longest=longest, rows=tuple(_bench_row(row, longest) for row in group))


def _bench_row(row: Report, longest: float) -> BenchRow:
    values = [number(row, f"latency_ms_{name}") for name in ("p50", "p90", "p99")]
    known = [value for value in values if value is not None]
    drawable = len(known) == 3 and longest > 0
    strip = chart.strip((known[0], known[1], known[2]), interval(row, "ci95"), longest) if drawable else None
    return BenchRow(
        artifact=text(row, "artifact") or fmt.DASH,
        where=" · ".join(
            part for part in (f"{text(row, 'runtime')} {text(row, 'scenario')}".strip(), _beside(row)) if part
        ),
        p50=fmt.plain(values[0], 4),
        p50_note=fmt.span(interval(row, "ci95")),
        p90=fmt.plain(values[1], 4),
        p99=fmt.plain(values[2], 4),
        strip=strip,
        throughput=fmt.plain(number(row, "throughput_per_s"), 4),
        memory=fmt.size(number(row, "peak_rss_bytes")),
        ratio=fmt.times(number(row, "ratio_to_baseline")),
        ratio_note=fmt.span(interval(row, "ratio_ci95")),
        doubt=doubt(row),
    )


def _beside(row: Report) -> str:
    """Return the size and the accuracy of an artifact that is measured beside baselines of others."""
    size, score = number(row, "details", "size_bytes"), number(row, "details", "metric", "value")
    found = [] if size is None else [fmt.size(size)]
    return " · ".join(
        found + ([] if score is None else [f"{text(row, 'details', 'metric', 'name')} {fmt.plain(score, 4)}"])
    )


def _flat(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Return the leaves of nested mappings as ("cpu model", "...") in order."""
    if not isinstance(value, Mapping):
        return [(prefix, fmt.mapping(value))] if prefix else []
    return [leaf for key, item in value.items() for leaf in _flat(item, f"{prefix} {key}".strip())]
