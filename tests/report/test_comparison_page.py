"""The page of compared runs: complete, self-contained, and safe for hostile names."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from raymoe.commands.runs.comparison import compared, grouped
from raymoe.config import override, preset
from raymoe.report.comparison_page import mean_line, render_comparison
from raymoe.report.comparison_plots import LEGEND, frontier, legend_labels
from tests.support.recorded_runs import record_run


def results(root: Path, **more: Any) -> dict[str, Any]:
    runs = []
    for name, experts, perplexity in (("flat", "flat", 60.0), ("ours", "clustered", 50.0)):
        for seed in (0, 1):
            changes = [
                f"run.root={root}",
                f"run.name={name}-seed{seed}",
                f"run.seed={seed}",
                f"model.experts={experts}",
            ]
            runs.append(record_run(override(preset("tiny"), ["train.steps=8", *changes]), perplexity=perplexity + seed))
    records, labels = grouped(runs)
    return compared("c", records, labels, "1", **more)


class Page(HTMLParser):
    """Collects text of table cells, the attributes that load something, and unbalanced elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_has_the_table_the_plots_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = render_comparison(results(tmp_path, title="two models", file="variants: {a: }"))
    page = Page(text)
    for cell in ("flat", "ours", "60.50 ±6.35", "50.50 ±6.35", "0.8347 ±0.0174", "1.0000 ±0.0000", "250 ±0", "4 ±0"):
        assert cell in page.cells, cell
    for title in (
        "Perplexity over tokens",
        "Perplexity over training time",
        "Perplexity over parameters",
        "Perplexity over active parameters",
    ):
        assert f"<h3>{title}</h3>" in text
    assert "model.experts" in page.cells, "the fields that differ"
    assert "variants: {a: }" in text and "<h1>two models</h1>" in text
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(value.startswith(("#", "data:")) for value in page.loads)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", text) and "@import" not in text and "url(http" not in text


def test_the_sweep_the_failures_and_hostile_text_are_shown(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    made = results(tmp_path)
    runs = [r | {"settings": {"train.lr": lr}} for r, lr in zip(made["runs"], ("1e-3", "2e-3") * 2, strict=True)]
    made["sweep"] = {
        "select": "perplexity", "seed": 0, "tune_share": 0.05, "grid": {"train.lr": ["1e-3", "2e-3"]}, "runs": runs,
        "chosen": {"1": {"train.lr": "1e-3"}, "2": {"train.lr": "1e-3"}}, "at_edge": [f"{evil}: train.lr=1e-3"],
    }  # fmt: skip
    made |= {"title": evil, "failed": [{"name": "x", "error": evil, "log": "/log.txt"}]}
    made["labels"]["2"] = evil
    text = render_comparison(made)
    page = Page(text)
    assert evil not in text and "script" not in page.tags
    assert {"train.lr=1e-3", "train.lr=2e-3", "chosen", "/log.txt"} <= set(page.cells)
    assert page.cells.count("chosen") == 2 and "<h3>Sweep of train.lr</h3>" in text


def test_a_page_without_a_run_is_complete() -> None:
    text = render_comparison(compared("c", [], {"a": "A"}, "a", expected_runs=3))
    assert "No run has results yet." in text and "0 of 3 finished" in text


def test_a_mean_line_has_the_steps_that_all_runs_have() -> None:
    curve = [{"step": s, "tokens": 10 * s, "perplexity": p} for s, p in ((1, 8.0), (2, 4.0))]
    x, y = mean_line([{"curve": curve}, {"curve": [curve[0] | {"perplexity": 10.0}]}], "tokens")
    assert (x.tolist(), y.tolist()) == ([10.0], [9.0])


def test_the_frontier_has_the_points_that_no_other_is_better_than() -> None:
    assert frontier([(3, 5), (1, 9), (2, 9.5), (2, 6), (4, 5)]) == [(1, 9), (2, 6), (3, 5)]


def test_labels_of_a_legend_are_short_and_distinct() -> None:
    labels = {f"{s}{a}": f"live, similarity={s}, alpha={a}" for s in ("counterfactual", "paper") for a in (0, 0.5, 1)}
    labels |= {"x": "y" * 40, "z": "y" * 41, "a": "short"}
    found = legend_labels(labels)
    assert len(set(found.values())) == len(labels) and max(map(len, found.values())) <= LEGEND
    assert found["a"] == "short" and found["counterfactual0.5"] == "live, simila…tual, alpha=0.5"
