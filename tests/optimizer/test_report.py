"""report.json keeps the contract; report.html and the terminal say the same, safely, also when nothing was measured."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from paredown.optimizer import report, verdict
from paredown.optimizer.errors import InputError
from paredown.optimizer.report_chart import Point, scatter, ticks
from paredown.optimizer.report_format import DASH, mapping, size, span

from .example_report import Json, full_report, hostile_report, null_report, served_report, slower_report

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
CHROMIUM = Path("/usr/bin/chromium")
EXAMPLES = [full_report, slower_report, served_report, hostile_report, null_report]
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason="/usr/bin/chromium is absent")


def _printed(print_: Callable[[Console], None], width: int = 140) -> str:
    console = Console(file=io.StringIO(), record=True, width=width)
    print_(console)
    return console.export_text()


# --- json


def test_written_json_has_the_contract_in_order(tmp_path: Path) -> None:
    report.write(full_report(), tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found) == list(report.KEYS)
    assert list(found["final"]) == list(report.KEYS["final"])
    assert list(found["bench"][0]) == [*report.KEYS["bench"], "quantiles_ms"]
    assert list(found["layers"][0]) == list(report.KEYS["layers"])
    assert found == json.loads(json.dumps(full_report())) | {"verify": found["verify"]}
    assert report.read(tmp_path) == report.read(tmp_path / "report.json") == found


def test_missing_keys_become_null_and_lists_empty() -> None:
    found = report.assemble({"final": {"drop": 0.5}, "layers": [{"name": "fc"}], "extra": (1, 2)})
    assert found["schema"] == "paredown.report/1"
    assert found["steps"] == []
    assert found["final"] == dict.fromkeys(report.KEYS["final"]) | {"drop": 0.5}
    assert found["layers"] == [dict.fromkeys(report.KEYS["layers"]) | {"name": "fc"}]
    assert found["extra"] == [1, 2]


def test_only_json_values_are_written(tmp_path: Path) -> None:
    values: Json = {
        "drop": math.nan,
        "macs": np.int64(7),
        "size_bytes": np.float32(0.5),
        "drop_ci95": np.array([1.0, np.inf]),
    }
    report.write({"final": values, "command": Path("x")}, tmp_path)
    final = report.read(tmp_path)["final"]
    assert final == dict.fromkeys(report.KEYS["final"]) | {"macs": 7, "size_bytes": 0.5, "drop_ci95": [1.0, None]}
    assert "NaN" not in (tmp_path / "report.json").read_text()


def test_what_is_not_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report.json: there is no report; name the --out folder of a run"):
        report.read(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(InputError, match="this is not JSON"):
        report.read(tmp_path)
    (tmp_path / "report.json").write_text('{"schema": "other/9"}')
    with pytest.raises(InputError, match=r'schema is "other/9", not "paredown.report/1"; run again'):
        report.read(tmp_path)


# --- the verdict


def test_headline_says_slower_plainly() -> None:
    failed = slower_report()
    assert verdict.headline(failed) == (
        "Verification failed at layer2.0.conv1, slower: 1.60 times the latency (batch 32, 1 thread), "
        "7.3 times smaller, top1 0.31 points lower"
    )
    assert verdict.headline(failed | {"verify": []}).startswith("Slower: 1.60 times the latency")
    assert verdict.headline(full_report()).startswith("Faster: 1.48 times as fast (batch 32, 1 thread), 7.3 times")
    assert verdict.headline(null_report()) == "Speed not measured, size not measured, metric not measured"


def test_a_failed_run_says_so_first() -> None:
    failed = full_report() | {"failure": "top1 fell by 2.10 points, gates.max_drop allows 1; use more bits"}
    assert verdict.headline(failed).startswith("Run failed, faster: 1.48 times as fast")
    assert "gates.max_drop allows 1; use more bits" in report.render(failed)
    assert "gates.max_drop allows 1; use more bits" in _printed(lambda console: report.show(failed, console))


def test_is_slower_looks_at_every_condition() -> None:
    bench = slower_report()["bench"]
    assert isinstance(bench, list)
    assert verdict.is_slower(bench)
    assert not verdict.is_slower(bench[:1])
    assert not verdict.is_slower([])


def test_a_drop_inside_its_interval_is_called_so() -> None:
    final: Json = {"drop": 0.2, "drop_ci95": [-0.1, 0.5], "size_bytes": 200}
    found = {"baseline": {"size_bytes": 100}, "final": final}
    assert verdict.headline(found) == "Speed not measured, 2.0 times larger, metric 0.20 lower (within its interval)"


def test_reason_of_the_whole_model_is_given_when_slower() -> None:
    shown = report.render(slower_report())
    assert "a folded codebook runs at fp32 speed until low-bit kernels exist." in shown
    assert verdict.reason_when_slower({"decisions": [{"layer": "fc", "kept": True, "reason": "x"}]}) == ""


# --- html


class _Page(HTMLParser):
    """Collects tags, links to anything, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _parsed(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    return page


@pytest.mark.parametrize("example", EXAMPLES)
def test_page_is_self_contained(example: Callable[[], Json]) -> None:
    html = report.render(example())
    page = _parsed(html)
    assert page.links == []
    assert "script" not in page.tags
    assert not re.search(r"https?://|url\(|@import", html)
    assert page.tags.count("h1") == 1
    assert "Content-Security-Policy" in html
    assert len(html) < 200_000


def test_names_are_escaped() -> None:
    html = report.render(hostile_report())
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10


def test_page_begins_with_the_verdict_and_shows_everything() -> None:
    example = full_report()
    shown = " ".join(" ".join(_parsed(report.render(example)).text).split())
    assert shown.startswith(verdict.headline(example))
    expected = [
        "81.03 %",
        "79.94 to 81.48",
        f"{MINUS}0.31 points",
        f"{MINUS}0.57 to {MINUS}0.05",
        f"7.31{TIMES} smaller",
        "0.543 to 0.577",
    ]
    expected += ["layer3.2.conv2", "measured 1.12 times slower", "torch reference", "48.7 s", "612 MB", "--set steps.0"]
    expected += ["Seed 0.", "avx512_vnni", "override: {conv1: {bits: 8}}", "197 kB"]
    assert [text for text in expected if text not in shown] == []


def test_page_without_measurements_says_so() -> None:
    shown = " ".join(_parsed(report.render(null_report())).text)
    for text in ("Speed was not measured.", "Not verified.", "The command was not recorded.", "None recorded."):
        assert text in shown
    assert "None," not in shown
    assert "nan" not in shown.lower().split()


# --- the terminal


@pytest.mark.parametrize("example", EXAMPLES)
def test_show_begins_with_the_verdict(example: Callable[[], Json]) -> None:
    shown = _printed(lambda console: report.show(example(), console), width=400)
    assert shown.splitlines()[0] == verdict.headline(example())


def test_show_lists_widths_layers_decisions_and_verification() -> None:
    shown = _printed(lambda console: report.show(full_report(), console))
    for text in (
        "bit widths",
        "99.6 %",
        "codebook",
        "fallback int8",
        "whole model",
        "100.00 %",
        "80.72 % (79.94 to 81.48)",
        "197 kB",
    ):
        assert text in shown


def test_show_cuts_long_layer_tables() -> None:
    layers = [{"name": f"layer{index}", "bits": 4} for index in range(100)]
    shown = _printed(lambda console: report.show({"layers": layers}, console))
    assert "first 40 of 100" in shown
    assert "layer39" in shown
    assert "layer40" not in shown


# --- parts


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (79.3, 82.2), (-3e-9, 2e-7), (0.0, 7e5), (5.0, 5.0001)])
def test_ticks_enclose_with_even_round_steps(low: float, high: float) -> None:
    found = np.array(ticks(low, high))
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 3 <= len(found) <= 8
    np.testing.assert_allclose(np.diff(found), found[1] - found[0], rtol=1e-6)


def test_scatter_places_points_inside_and_better_upwards() -> None:
    points = [Point(label="a", x=4, y=81, y_ci95=(80, 82)), Point(label="b", x=1, y=80.5, x_ci95=(0.9, 1.1))]
    chart = scatter("t", "x", points)
    first, second = chart.marks
    assert chart.left < second.x < first.x < chart.right
    assert chart.top < first.y1 < first.y < second.y < chart.bottom


def test_one_point_with_no_spread_still_draws() -> None:
    assert len(scatter("t", "x", [Point(label="a", x=1, y=0)]).y_ticks) >= 2


def test_formats() -> None:
    assert [size(value) for value in (None, 12, 149_120, 999_700, 1_089_576)] == [
        DASH,
        "12 B",
        "149 kB",
        "1000 kB",
        "1.09 MB",
    ]
    assert span((0.05, 0.57)) == "0.05 to 0.57"
    assert span((-1.0, -1.0)) == f"{MINUS}1.00 to {MINUS}1.00"
    assert span((0.8025, 0.8179), 100) == "80.25 to 81.79"
    assert span(None) == ""
    assert mapping({"a": {"b": [1, None]}, "c": {}}) == f"a: {{b: [1, {DASH}]}}, c: {{}}"


def test_importing_the_report_imports_no_heavy_library() -> None:
    code = "import sys, paredown.optimizer.report; print({'torch', 'jinja2', 'rich', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- in a browser


def _chromium(folder: Path, *options: str) -> str:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars"
    profile = folder / f"profile{len(list(folder.glob('profile*')))}"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={profile}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@needs_chromium
@pytest.mark.parametrize(("width", "height"), [pytest.param(400, 900, marks=pytest.mark.slow), (1200, 1600)])
def test_screenshots_light_and_dark(tmp_path: Path, width: int, height: int) -> None:
    _, html = report.write(full_report(), tmp_path)
    means = []
    for name, scheme in (("dark", 0), ("light", 1)):
        options = [f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},{height}"]
        _chromium(tmp_path, *options, f"--screenshot={tmp_path / name}.png", html.as_uri())
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert pixels.shape == (height, width, 3)
        assert len(np.unique(pixels[::2, ::2] @ np.array([65536, 256, 1]))) > 100
        means.append(pixels.mean())
    assert means[0] < 60
    assert means[1] > 200


@needs_chromium
def test_browser_shows_the_texts(tmp_path: Path) -> None:
    _, page = report.write(full_report(), tmp_path)
    shown = _parsed(_chromium(tmp_path, "--dump-dom", page.as_uri())).text
    for text in (verdict.headline(full_report()), "81.03 %", "layer3.2.conv2", "optimized", "Environment"):
        assert text in [part.strip() for part in shown]


def _wide_report() -> Json:
    """Return a report whose table of layers has every column, and long names."""
    report = full_report()
    report["layers"] = [
        {
            "name": f"model.encoder.layers.{index}.self_attention.query_projection.weight",
            "shape": [512, 512, 3, 3],
            "channels_kept": 512,
            "rank": 128,
            "format": "codebook 4 + rank 128",
            "bits": 4.2,
            "size_bytes": 1_234_567,
            "error_rel": 0.0123,
            "mode": "int8 dynamic + decoded",
        }
        for index in range(3)
    ]
    return report


@needs_chromium
@pytest.mark.parametrize("example", [full_report, served_report, hostile_report, _wide_report])
def test_page_does_not_scroll_sideways(tmp_path: Path, example: Callable[[], Json]) -> None:
    """At 360 pixels, and at 1100 pixels no table of layers either.

    Frames, because the window of --dump-dom is never narrower than 500 pixels.
    """
    html = escape(re.sub(r"<meta http-equiv[^>]*>", "", report.render(example())))
    of_page = "contentDocument.documentElement.scrollWidth + ' of ' + contentWindow.innerWidth"
    panel = "contentDocument.querySelector('.layers, .pair').parentElement"
    of_table = f"{panel}.scrollWidth + ' of ' + {panel}.clientWidth"
    probe = f"document.title += {of_page} + ', ' + {of_table} + ';'"
    frames = [
        f'<iframe width="{width}" height="900" onload="{probe}" srcdoc="{html}"></iframe>' for width in (360, 1100)
    ]
    page = tmp_path / "frames.html"
    page.write_text("<title></title>" + "".join(frames))
    found = re.search(r"<title>(.*)</title>", _chromium(tmp_path, "--dump-dom", page.as_uri()))
    assert found is not None
    sizes = {}
    for frame in found[1].removesuffix(";").split(";"):
        needed, width, of_layers, panel_width = map(int, re.findall(r"\d+", frame))
        assert needed <= width
        sizes[width] = of_layers, panel_width
    assert sizes.keys() == {360, 1100}
    assert sizes[1100][0] <= sizes[1100][1]
