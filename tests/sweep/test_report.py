"""report.html: whole, self-contained, and fit to be looked at in a browser; report.png."""

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rc_context

from minimind_ray.sweep.chart import (
    STYLE,
    Dimension,
    axis_dimension,
    distinct_labels,
    dodge,
    inline_svg,
    picture,
    robust_range,
    round_values,
)
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.report import matrix, render, write_report
from minimind_ray.sweep.text import count_text, duration_text, number_text, shorten, value_text
from minimind_ray.sweep.trials import MoreSeeds, read_sweep
from tests.sweep.synthetic import make_full_sweep, make_sweep

pytestmark = pytest.mark.slow

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
ATTACK = '</p><script>throw new Error("ran")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'


def report_of(directory: Path) -> Path:
    sweep = read_sweep(directory)
    return write_report(sweep, compare([sweep]))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_of(make_full_sweep(tmp_path_factory.mktemp("report") / "betas"))


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 points, drawn axes, long values, one far outside the others, and samples that attack."""

    def quality(point: dict[str, Any]) -> float:
        return 3 + 0.3 * (math.log10(point["optim.lr"]) + 3.2) ** 2 + (9 if point["optim.lr"] < 3e-5 else 0)

    directory = make_sweep(
        tmp_path_factory.mktemp("report") / "crowded", stage="pretrain", draws=5, quality=quality, steps=30,
        failed=2, stopped=5, running=7, samples=[ATTACK, "长" * 400, "word" * 200],
        axes={
            "optim.lr": "log(1e-5,1e-2)", "optim.weight_decay": "uniform(0,0.2)", "schedule.name": "cosine,wsd",
            "data.train": "corpus/of/everything/part-1.jsonl,corpus/of/everything/part-2.jsonl",
        },
    )  # fmt: skip
    run = directory / "trials" / sorted(p.name for p in (directory / "trials").iterdir())[0] / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "state": "failed", "error": ATTACK}))
    return report_of(directory)


def test_an_interval_that_the_table_leaves_out_is_not_in_the_matrix(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "s", axes={"dpo.beta": "0.02,0.1,0.3"}, steps=10))
    comparison = compare([sweep])
    vague = replace(comparison, hidden_PP=np.eye(3, k=1, dtype=bool))
    assert " to " in matrix(comparison, comparison.rows)[0][1][1]
    assert " to " not in matrix(vague, vague.rows)[0][1][1] and " to " in matrix(vague, vague.rows)[0][2][1]


def test_a_point_may_have_more_seeds_than_the_sweep(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, steps=10))
    more = [MoreSeeds(point={"dpo.beta": 0.1}, seeds=5)]
    for info, text in ((sweep.info, "2 × 2<"), (sweep.info.model_copy(update={"more_seeds": more}), "2 × 2 to 5<")):
        assert text in render(replace(sweep, info=info), compare([sweep]))


def test_everything_is_on_the_page(full: Path) -> None:
    page = full.read_text(encoding="utf-8")
    for heading in (
        "Points, best first", "Differences to the best", "All pairs", "Which axis matters", "What each axis does",
        "All axes at once", "Learning curves", "What the trials answer", "Failed trials", "Done once for all trials",
        "Config",
    ):  # fmt: skip
        assert f">{heading}<" in page, heading
    assert re.search(r"<b>Best:</b> beta 0.1, lr 1e-5", page)
    assert "reference log-probabilities</dt><dd>1,200<" in page
    assert "春风又绿江南岸" in page
    assert "weight_decay: 0.01" in page
    assert full.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # 2 axes, parallel coordinates and 2 kinds of curves; a bar for each point and each difference, and their scale.
    assert page.count("<svg") == 2 + 1 + 2
    assert page.count('<span class="bar ') == 8 + 7
    assert page.count('<div class="scale">') == 1
    # On hover, each mark says what it is: 8 points against each axis and over all, 16 trials in each kind of curves.
    best = r"<title>beta 0.1, lr 1e-5: val/loss 0.347 \(0.3\d\d to 0.3\d\d\), best</title>"
    assert len(re.findall(best, page)) == 2 + 1
    assert page.count('<g class="point ') == 8 * 2
    assert page.count('<g class="curve ') == 8 + 16 * 2


def test_nothing_comes_from_elsewhere_and_nothing_runs(full: Path, crowded: Path) -> None:
    for path in (full, crowded):
        page = path.read_text(encoding="utf-8")
        assert "default-src 'none'" in page
        assert not re.search(r"https?://|<script|<link|<img|<[^>]*\s(src|href|on\w+)=|@import|url\(", page)
    assert html.escape("<script>throw") in crowded.read_text(encoding="utf-8")
    assert "{{ 7 * 7 }}" in crowded.read_text(encoding="utf-8")


def test_values_outside_a_picture_are_triangles(crowded: Path) -> None:
    page = crowded.read_text(encoding="utf-8")
    # The 4 points with the lowest learning rate, in the table and in the differences.
    assert page.count('<i class="dot above"') == 4 * 2
    assert page.count('<i class="dot below"') == 0


@pytest.mark.parametrize("text", ["$x_2$ and $", "<script>alert(1)</script>", '"&amp;"', "a\0b", "#0a7d4f: #fff", "长"])
def test_hostile_texts_in_a_picture(text: str) -> None:
    with rc_context(STYLE):
        figure, axes = picture(400, 270)
        axes.set_xlabel(text)
        axes.plot([0, 1], [0, 1], color="#0a7d4f", gid=f"curve best: {text}")
        svg = inline_svg(figure, "a picture")
    shown = text.replace("\0", "\ufffd")
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert shown in [node.text for node in root.iter("text")]
    assert [(node.get("class"), node.findtext("title")) for node in root.iter("g") if node.get("class")] == [
        ("curve best", shown)
    ]
    assert [node.tag for node in root.iter("script")] == []
    # The four verdicts' colours are the page's, which dark mode changes.
    assert "stroke: var(--colour)" in svg
    assert not re.search(r"https?://|url\(|<style|#0a7d4f;", svg)


def test_same_sweep_same_page(full: Path) -> None:
    before = full.read_bytes()
    assert report_of(full.parent).read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        {"axes": {}, "seeds": 3, "quality": lambda point: 0.5},
        {"axes": {"dpo.beta": "0.1,0.3"}, "seeds": 1, "running": 0, "failed": 1, "quality": lambda point: 0.5},
        {"axes": {"dpo.beta": "0.1,0.3"}, "metric": "val/accuracy", "mode": "max"},
        {"axes": {"lora.targets": "[q_proj, v_proj],all-linear", "dpo.lora": "true"}, "quality": lambda point: 0.5},
        {"axes": {"dpo.beta": "0.1,0.3"}, "samples": [], "price_per_hour": 0.0},
    ],
    ids=["no-axes", "nothing-finished", "higher-is-better", "lists", "no-samples"],
)
def test_small_and_unfinished_sweeps(tmp_path: Path, options: dict[str, Any]) -> None:
    page = report_of(make_sweep(tmp_path / "s", steps=10, examples=40, **options)).read_text(encoding="utf-8")
    assert ("No trial has been validated" in page) == ("running" in options)
    # The legend names a verdict only if a point has it.
    assert ('<li class="best">' in page) != ("running" in options)
    assert "nan" not in re.sub(r"<p class=.text.>.*?</p>", "", page)


def in_chromium(page: Path, tmp_path: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """What a browser makes of the page in a frame of this width; fails on any message on its console."""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"""<!doctype html><meta charset=utf-8><body><iframe style="width:{width}px;height:800px;border:0"
        srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"></iframe><pre></pre><script>
        document.querySelector("iframe").onload = ({{target}}) => {{
          const page = target.contentDocument, root = page.documentElement;
          const inScroller = e => e.closest(".scroll, pre") !== null;
          const wide = [...page.querySelectorAll("body *")].filter(e => !inScroller(e)
            && e.getBoundingClientRect().right > root.clientWidth + 1);
          const box = e => e.getBoundingClientRect();
          const texts = [...page.querySelectorAll("svg text")];
          const cut = texts.filter(e => inScroller(e)
            && (box(e).left < box(e.ownerSVGElement).left || box(e).right > box(e.ownerSVGElement).right));
          const overlap = (a, b) => Math.min(a.right, b.right) > Math.max(a.left, b.left) + 1
            && Math.min(a.bottom, b.bottom) > Math.max(a.top, b.top) + 4;
          const clash = texts.filter(a => texts.some(b =>
            a !== b && a.ownerSVGElement === b.ownerSVGElement && overlap(box(a), box(b))));
          const scale = page.querySelector(".scale");
          const bars = [...page.querySelectorAll(".differences .bar")].filter(e =>
            Math.abs(box(e).left - box(scale).left) + Math.abs(box(e).right - box(scale).right) > 1);
          document.querySelector("pre").textContent = JSON.stringify({{
            width: root.clientWidth, needed: root.scrollWidth, scripts: page.scripts.length,
            wide: wide.map(e => e.outerHTML.slice(0, 200)), images: page.images.length,
            smallest: Math.min(...texts.map(e => box(e).height)), bars_off_scale: bars.length,
            cut: cut.map(e => e.textContent), clash: clash.map(e => e.textContent),
            background: target.contentWindow.getComputedStyle(page.body).backgroundColor,
            ink: target.contentWindow.getComputedStyle(page.body).color,
            best: [...page.querySelectorAll("svg .curve.best > path, .bar.best .dot")].map(e =>
              target.contentWindow.getComputedStyle(e)[e.localName == "path" ? "stroke" : "backgroundColor"]),
          }});
        }};
        </script>""",
        encoding="utf-8",
    )
    assert CHROMIUM
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--window-size=1400,1000", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom", wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r"<pre>(\{.*?\})</pre>", done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize(("name", "width", "dark"), [("full", 390, True), ("crowded", 390, False)])
def test_in_a_browser(name: str, width: int, dark: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    seen = in_chromium(request.getfixturevalue(name), tmp_path, width=width, dark=dark)
    assert seen["wide"] == []
    assert seen["needed"] <= seen["width"] <= width
    assert seen["wide"] == []
    assert seen["scripts"] == seen["images"] == 0
    assert seen["smallest"] >= 13
    assert seen["cut"] == seen["clash"] == []
    assert seen["bars_off_scale"] == 0
    assert set(seen["best"]) == {"rgb(69, 207, 149)" if dark else "rgb(10, 125, 79)"}
    luminance = {key: sum(map(int, re.findall(r"\d+", seen[key])[:3])) / 3 for key in ("background", "ink")}
    assert (luminance["background"] < 60 and luminance["ink"] > 200) == dark
    assert (luminance["background"] > 200 and luminance["ink"] < 60) != dark


def test_ticks() -> None:
    def ticks(low: float, high: float, log: bool = False) -> list[str]:
        return [text for _, text in round_values(low, high, log)]

    assert ticks(0, 1) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert ticks(-0.3, 0.3) == ["-0.3", "-0.2", "-0.1", "0", "0.1", "0.2", "0.3"]
    assert ticks(0.75, 1.85) == ["0.8", "1", "1.2", "1.4", "1.6", "1.8"]
    assert ticks(3.21, 3.29) == ["3.22", "3.24", "3.26", "3.28"]
    assert ticks(0.52, 0.645) == ["0.52", "0.54", "0.56", "0.58", "0.6", "0.62", "0.64"]
    assert ticks(1.0000001, 1.0000002) == ["1", "1"]
    assert ticks(1.1e-5, 4e-5, log=True) == ["1.5e-5", "2e-5", "2.5e-5", "3e-5", "3.5e-5", "4e-5"]
    assert ticks(1e-6, 1e-3, log=True) == ["1e-6", "1e-5", "1e-4", "0.001"]
    assert ticks(0.02, 0.3, log=True) == ["0.02", "0.05", "0.1", "0.2"]
    assert ticks(1.2e-5, 1.7e-5, log=True) == ["1.2e-5", "1.3e-5", "1.4e-5", "1.5e-5", "1.6e-5", "1.7e-5"]


def test_shares() -> None:
    log = Dimension("lr", float, 1e-4, 1, log=True)
    assert [log.share(x) for x in (1e-4, 1e-2, 1, 5)] == pytest.approx([0, 0.5, 1, 1])
    assert [log.clip(x) for x in (0.5, 5, 1e-9)] == [0.5, 1, 1e-4]
    assert Dimension("loss", float, 0, 10).share(2.5) == 0.25
    # One far value does not flatten the others, and equal ones still have a range.
    assert robust_range([1, 2, 3, 2, 1, 1000])[1] < 10
    low, high = robust_range([2.0, 2.0])
    assert low < 2 < high


def test_dimensions() -> None:
    assert axis_dimension("beta", [0.02, 0.3], [0.02, 0.3]).log
    assert not axis_dimension("beta", [0.1, 0.3], [0.1, 0.3]).log
    assert not axis_dimension("decay", [0, 0.1, 1], [0, 0.1, 1]).log
    assert axis_dimension("lr", "log(1e-5,2e-5)", [1.2e-5, 1.7e-5]).log
    names = axis_dimension("train", None, ["a/b/x.jsonl", "a/b/y.jsonl"])
    assert names.marks == [(0.0, "x.jsonl"), (1.0, "y.jsonl")]
    assert names.number("a/b/y.jsonl") == 1.0
    files = [f"set-{letter}-large.jsonl" for letter in "abcdefg"]
    assert distinct_labels(files) == [f"…{letter}…" for letter in "abcdefg"]
    assert distinct_labels(["aa" * 9, "aa" * 9 + "a"]) == ["…", "…a"]
    assert distinct_labels(["cosine", "wsd"]) == ["cosine", "wsd"]
    crowded = axis_dimension("rank", list(range(1, 60)), list(range(1, 60)))
    at = [share for share, _ in crowded.ticks(0.1)]
    assert len(at) >= 3
    assert all(b - a >= 0.1 for a, b in zip(at, at[1:]))
    assert dodge([0.5, 0.9, 0.5], 1, 0.2) == pytest.approx([0.45, 0.9, 0.55])
    assert dodge([0.5, 0.9, 0.5], 0.05, 0.2) == pytest.approx([0.475, 0.9, 0.525])
    assert dodge([0.1, 0.1, 0.96, 0.96], 1, 0.5) == pytest.approx([0.05, 0.15, 0.94, 0.98])


def test_texts() -> None:
    assert [number_text(x) for x in (8, 0.05, 1.0, 1e-5, 2.5e-4, 1e6, 0, -0.5)] == [
        "8", "0.05", "1", "1e-5", "2.5e-4", "1e6", "0", "-0.5",
    ]  # fmt: skip
    assert [value_text(v) for v in (True, None, ["a", 1e-5], "x", {"a": 1})] == [
        "true",
        "null",
        "a+1e-5",
        "x",
        '{"a": 1}',
    ]
    assert [count_text(x) for x in (950, 12_500, 1_234_567, 2e9)] == ["950", "12.5k", "1.23M", "2B"]
    assert [duration_text(x) for x in (59.6, 3723)] == ["1:00", "1:02:03"]
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert shorten("abc", 7) == "abc"


def test_the_marks_of_pairs_are_their_verdicts(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "s", axes={"dpo.beta": "0.02,0.1,3"}, seeds=1, steps=10))
    comparison = compare([sweep])
    rows = [row for row in comparison.rows if row.verdict]
    assert {mark for line in matrix(comparison, rows) for mark, _ in line} <= {"", "·", "≠"}
    assert matrix(comparison, rows)[-1][0][0] == "≠" and rows[-1].verdict == "differs on these examples; one seed"
    assert "≠ differs on these examples; one seed." in render(sweep, comparison)
