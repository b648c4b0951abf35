"""The report of a run: complete from its folder, safe for hostile records, and equal to them."""

from __future__ import annotations

import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymoe.config import Config, override, preset
from raymoe.report.plots import VARIABLES
from raymoe.report.regroup_plots import _slots, decisions, purity
from raymoe.report.sections import over_time, over_tokens, step_times
from raymoe.training.run_report import write_report

Record = dict[str, Any]


def config(experts: str = "clustered", name: str = "first") -> Config:
    pinned = ["train.steps=400", "train.validate_every=100", "checkpoint.every=100"]
    pinned += ["model.n_experts=16", "model.n_clusters=4", "model.experts_per_token=2"]
    return override(preset("tiny"), [f"run.name={name}", f"model.experts={experts}", *pinned])


def train_record(step: int, of: Config, rng: np.random.Generator) -> Record:
    """Return a record as the training loop writes it. The load becomes more even over time."""
    model, progress = of.model, step / of.train.steps

    def shares(groups: int, spread: float) -> list[list[float]]:
        return [(rng.dirichlet(np.full(groups, 2 + 60 * progress) / spread)).tolist() for _ in range(model.layers)]

    clustered, sparse = model.experts == "clustered", model.experts != "dense"
    levels = {
        "experts": (0.9 - 0.6 * progress) if sparse else None,
        "clusters": (0.5 - 0.4 * progress) if clustered else None,
        "workers": 0.25 - 0.2 * progress if sparse else None,
    }
    return {
        "kind": "train", "step": step, "loss": 3.2 + 4.5 * math.exp(-6 * progress) + rng.normal(0, 0.04),
        "lr": 4e-3 * min(1, step / 40) * (0.55 + 0.45 * math.cos(math.pi * progress)), "tokens": step * 4096,
        "grad_norm": 0.6 + rng.gamma(2, 0.2), "tokens_per_s": 9000 + rng.normal(0, 250), "step_ms": 455.0,
        "load_cv": levels, "load_max_vio": {k: v and 2 * v for k, v in levels.items()},
        "a2a_bytes_per_token": 2048.0 + rng.normal(0, 60), "version": 0, "rss_mb": [812.5 + 40 * progress, 798.1 + 55 * progress],
        "skipped_steps": 0, "load_experts": shares(model.n_experts, 1) if sparse else [],
        "load_clusters": shares(model.n_clusters, 0.25) if clustered else [],
    }  # fmt: skip


def validation_record(step: int, of: Config, domains: dict[str, float], whole: bool) -> Record:
    model = of.model
    counts = [
        [
            [(g + 1) * (100 + 900 * ((g + layer) % model.n_clusters == c)) for c in range(model.n_clusters)]
            for g in range(len(domains))
        ]
        for layer in range(model.layers)
    ]  # fmt: skip
    loss = sum(domains.values()) / len(domains)
    return {
        "kind": "validation", "step": step, "loss": loss, "perplexity": math.exp(loss), "domains": domains,
        "load_cv": {"experts": 0.31, "clusters": 0.12, "workers": 0.05}, "load_max_vio": {}, "windows": 128, "whole": whole,
        "cluster_by_domain": counts if model.experts == "clustered" else [],
    }  # fmt: skip


def records(of: Config, domains: tuple[str, ...] = ("reference", "source", "licenses", "docstrings")) -> list[Record]:
    rng = np.random.default_rng(0)
    assignment = [
        [(e * 7 + layer) % of.model.n_clusters for e in range(of.model.n_experts)] for layer in range(of.model.layers)
    ]
    out: list[Record] = [{"kind": "assignment", "step": 0, "version": 0, "assignment": assignment}]
    for step in range(10, of.train.steps + 1, 10):
        out.append(train_record(step, of, rng))
        if step % of.train.validate_every == 0:
            losses = {domain: 3.0 + 0.3 * i + 2 * math.exp(-step / 150) for i, domain in enumerate(domains)}
            out.append(validation_record(step, of, losses, step == of.train.steps))
            out.append(
                {"kind": "event", "step": step, "name": "checkpoint_completed", "checkpoint": step, "seconds": 0.41}
            )
        if step == 250:
            out.append({"kind": "event", "step": 243, "name": "step_skipped", "loss": None, "grad_norm": 3.0})
            out.append({"kind": "event", "step": 250, "name": "resumed", "workers": 2})
    return out


def save(run: Path, of: Config, lines: list[Record], plans: list[Record] | None = None, **about: Any) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    versions = {"raymoe": "0.1.0", "ray": "2.60.0", "torch": "2.15.0", "python": "3.11.9"}
    (run / "config.json").write_text(json.dumps({"config": of.to_dict(), "corpus": "c", "versions": versions, **about}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if plans is not None:
        (run / "plans.jsonl").write_text("".join(json.dumps(plan) + "\n" for plan in plans))
    return run


class Page(HTMLParser):
    """A parsed report with its tags, text, facts and plots. Every tag must close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.facts: dict[str, str] = {}
        self.feed(self.source)
        assert not self.open
        self.titles = re.findall(r"<h3>(.*?)</h3>", self.source)
        self.plots = dict(zip(self.titles, re.findall(r"<svg.*?</svg>", self.source, re.DOTALL), strict=True))
        self.labels = {title: ElementTree.fromstring(svg).attrib["aria-label"] for title, svg in self.plots.items()}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] == ["dt"]:
            self.facts[data] = ""
        elif self.open[-1:] == ["dd"]:
            self.facts[list(self.facts)[-1]] = data


ABOUT: dict[str, Any] = {
    "validation_bytes_per_token": 4.0,
    "command": ["raymoe", "train", "tiny", "run.name=a b"],
    "commit": "0123abcd" * 5 + "+",
    "started": "2026-01-02T03:04:05+0000",
    "machine": {
        "host": "node",
        "platform": "Linux",
        "processor": "CPU X",
        "device": "CPU",
        "cores": 8,
        "memory": 2**34,
    },
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Page:
    of = config()
    run = save(tmp_path_factory.mktemp("run"), of, records(of), parameters={"total": 1234567}, **ABOUT)
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob(".*"))
    return Page(path)


def test_report_has_every_plot(full: Page) -> None:
    assert full.titles == [
        "Loss", "Validation loss by domain", "Loss over tokens", "Loss over training time",
        "Validation in bits per byte", "Learning rate", "Gradient norm", "Coefficient of variation", "Maximum violation",
        "Clusters of layer 0", "Clusters of layer 1", "Experts of layer 0", "Experts of layer 1", "Layer 0", "Layer 1",
        "Speed", "Step time", "Memory", "All-to-all",
    ]  # fmt: skip


def test_page_requires_no_other_file(full: Page) -> None:
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & {tag for tag, _ in full.tags}
    assert "//" not in re.sub('base64,[^"]*', "", full.source)  # no address
    for tag, attributes in full.tags:
        for name in ("href", "src", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in full.source and set(re.findall(r"url\((.)", full.source)) == {"#"}


def test_references_inside_the_page_resolve_and_ids_are_unique(full: Page) -> None:
    ids = [attributes["id"] for _, attributes in full.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {a["href"][1:] for _, a in full.tags if (a.get("href") or "").startswith("#")}  # type: ignore[union-attr, index]
    used |= set(re.findall(r"url\(#([^)]*)\)", full.source))
    assert used and used <= set(ids)


def test_plots_follow_the_color_scheme_and_have_labels(full: Page) -> None:
    style = full.source[: full.source.index("</style>")]
    assert "prefers-color-scheme: dark" in style
    for variable in set(re.findall(r"var\((--\w+)\)", full.source)):
        assert style.count(f"{variable}:") == 2, variable  # light and dark
    for title, svg in full.plots.items():
        assert 'role="img"' in svg and len(full.labels[title]) > 30
        assert not any(placeholder in svg for placeholder in VARIABLES)


def test_facts_describe_the_run(full: Page) -> None:
    of, lines = config(), records(config())
    last = [line for line in lines if line["kind"] == "train"][-1]
    validation = [line for line in lines if line["kind"] == "validation"][-1]
    assert {title: full.facts[title] for title in list(full.facts)[:15]} == {
        "Preset": "tiny", "Experts per layer": "clustered, 16 in 4 clusters", "Parameters total": "1,234,567",
        "Steps": f"{of.train.steps} of {of.train.steps}", "Tokens": f"{last['tokens']:,}", "Workers": "2",
        "Training loss": f"{last['loss']:.4f} nats/token",
        "Validation loss": f"{validation['loss']:.4f} nats/token, whole set",
        "Bits per byte": f"{validation['loss'] / math.log(2) / 4:.4f}",
        "Perplexity": f"{validation['perplexity']:.2f} per token",
        "Best validation loss": f"{validation['loss']:.4f} at step 400",
        "Load CV, experts": "0.310", "Load CV, clusters": "0.120", "Load CV, workers": "0.050",
        "Command": "raymoe train tiny 'run.name=a b'",
    }  # fmt: skip
    environment = {title: full.facts[title] for title in list(full.facts)[15:]}
    assert re.fullmatch(r"\d+ h \d+ min", environment.pop("Duration of the last launch"))
    assert environment == {
        "Commit": "0123abcd0123+", "Started": "2026-01-02T03:04:05+0000", "Time of all training steps": "3 min 2 s",
        "Machine of the driver": "node, Linux", "Processor": "CPU X, 8 cores", "Memory": "16 GiB", "Device": "CPU",
        "raymoe": "0.1.0", "ray": "2.60.0", "torch": "2.15.0", "python": "3.11.9",
    }  # fmt: skip
    assert "<h1>first</h1>" in full.source
    assert "train.steps=400\n" in full.text and "model.n_clusters=4\n" in full.text


def test_events_are_marked_and_listed(full: Page) -> None:
    loss = full.plots["Loss"]
    assert all(
        f">{what}</text>" in loss for what in ("training", "validation", "checkpoint", "resumed", "step skipped")
    )
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", full.source)
    assert ("243", "step_skipped", "loss None, grad_norm 3") in rows and ("250", "resumed", "workers 2") in rows
    assert [step for step, what, _ in rows if what == "checkpoint_completed"] == ["100", "200", "300", "400"]


def test_domain_rows_are_shares(full: Page) -> None:
    """The tokens of a domain are 10 : 1 : 1 : 1 over the clusters, with 10 at (domain + layer) mod 4."""
    cells = re.findall(r">(\d+%)</text>", full.plots["Layer 1"])
    assert cells == ["8%", "77%", "8%", "8%"] + ["8%", "8%", "77%", "8%"] + ["8%", "8%", "8%", "77%"] + [
        "77%",
        "8%",
        "8%",
        "8%",
    ]
    assert "source: 8%, 8%, 77%, 8%" in full.labels["Layer 1"]
    assert "on the whole validation set at step 400" in full.text


def test_experts_are_sorted_by_cluster_relative_to_an_even_share(full: Page) -> None:
    lines = records(config())
    assignment = lines[0]["assignment"][1]
    share = [line for line in lines if line["kind"] == "train"][-1]["load_experts"][1]
    order = sorted(range(16), key=lambda e: (assignment[e], e))
    end = full.labels["Experts of layer 1"].split("share: ")[1]
    assert end == ", ".join(f"{e} {16 * share[e]:.2f}" for e in order)
    assert [c in full.plots["Experts of layer 1"] for c in (">cluster 0<", ">cluster 3<", ">cluster 4<")] == [
        True,
        True,
        False,
    ]


def test_text_of_records_is_escaped(tmp_path: Path) -> None:
    names = (
        "<script>alert(1)</script>",
        "$x^2$ & $\\frac$",
        'a" onload="b',
        "日本語",
        "x" * 300,
        "two\nlines",
        "_under",
        "bad\udc80byte",
        "fill: #0072b2",
    )
    of = config()
    lines = [
        *records(of, names),
        {"kind": "event", "step": 400, "name": "<b>odd</b>", "reason": "<i>&</i>", "$a$": [1, None]},
    ]
    save(tmp_path, of, lines, versions={"<u>": "<s>"}, parameters={"<em>": 3})
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["config"]["run"]["name"] = "</title><script>alert(2)</script>"
    saved["config"]["data"]["path"] = "</pre><script>"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    page = Page(write_report(tmp_path))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "b", "i", "u", "s", "em"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    labels = page.plots["Validation loss by domain"]
    assert all(
        f">{label}</text>" in labels
        for label in ("$x^2$ &amp; $\\frac$", "日本語", "x" * 27 + "…", "two lines", "\u200b_under", "bad?byte")
    )
    assert "<script>alert(1)</script>" in page.labels["Layer 0"]


@pytest.mark.parametrize(
    ("experts", "absent"),
    [
        ("flat", {"Clusters of layer 0", "Layer 0"}),
        ("dense", {"Clusters of layer 0", "Experts of layer 0", "Layer 0", "Coefficient of variation"}),
    ],
)
def test_reports_of_baselines_leave_out_missing_figures(tmp_path: Path, experts: str, absent: set[str]) -> None:
    of = config(experts)
    page = Page(write_report(save(tmp_path, of, records(of))))
    assert not absent & set(page.titles) and "Loss" in page.titles
    if experts == "flat":
        assert "clusters" not in page.labels["Coefficient of variation"]
        assert ">cluster" not in page.plots["Experts of layer 0"]  # flat experts have no clusters
        assert page.labels["Experts of layer 0"].split("share: ")[1].startswith("0 ")


def test_one_record_makes_a_report(tmp_path: Path) -> None:
    of = config()
    page = Page(write_report(save(tmp_path, of, [records(of)[1]])))
    assert {"Loss", "Clusters of layer 0", "Experts of layer 1"} <= set(page.titles)
    assert not {"Validation loss by domain", "Layer 0"} & set(page.titles)
    assert page.facts["Steps"] == "10 of 400" and "Validation loss" not in page.facts


def test_report_without_records(tmp_path: Path) -> None:
    save(tmp_path, config(), [])
    (tmp_path / "metrics.jsonl").unlink()
    page = Page(write_report(tmp_path))
    assert "No training step is recorded yet." in page.text and page.titles == []
    assert page.facts["Preset"] == "tiny"


def test_null_losses_are_gaps(tmp_path: Path) -> None:
    of = config()
    lines = records(of)
    for line in lines:
        if line["kind"] in ("train", "validation"):
            line["loss"] = None if line["step"] > 50 else line["loss"]
            line["perplexity"] = None
            line["domains"] = dict.fromkeys(line.get("domains", ()))
            line.pop("grad_norm", None)
    page = Page(write_report(save(tmp_path, of, lines)))
    last_finite = [line["loss"] for line in lines if line["kind"] == "train"][4]
    assert page.facts["Training loss"] == f"{last_finite:.4f} nats/token"
    assert page.facts["Validation loss"] == "– nats/token, whole set" and page.facts["Perplexity"] == "– per token"
    assert "Gradient norm" not in page.titles and "Validation loss by domain" not in page.titles


def test_without_a_whole_validation_the_last_one_is_drawn(tmp_path: Path) -> None:
    of = config()
    lines = [line for line in records(of) if line["kind"] == "validation" and not line["whole"]]
    page = Page(write_report(save(tmp_path, of, lines)))
    assert "on 128 validation windows at step 300" in page.text


def test_a_stopped_run_is_marked(tmp_path: Path) -> None:
    of = config()
    lines = [line for line in records(of) if line["step"] <= 200] + [{"kind": "event", "step": 200, "name": "stopped"}]
    assert Page(write_report(save(tmp_path, of, lines))).facts["Steps"] == "200 of 400, stopped"


@pytest.mark.parametrize(
    "bad", ['{"kind": "train", "st', "[1]", '{"step": null}', '{"kind": "train"}', "", "[" * 10**5]
)
def test_damaged_records_are_skipped(tmp_path: Path, bad: str) -> None:
    of = config()
    run = save(tmp_path, of, records(of)[:5], [{"kind": "plan", "step": 1, "name": "clusterer_restarted"}])
    expected = write_report(run).read_text()
    for file in ("metrics.jsonl", "plans.jsonl"):
        (run / file).write_text(f"{bad}\n" + (run / file).read_text() + bad)
    assert write_report(run).read_text() == expected


def test_a_record_without_a_kind_is_ignored(tmp_path: Path) -> None:
    of = config()
    run = save(tmp_path, of, [*records(of)[:3], {"step": 40}], [{"step": 40}])
    assert "Loss" in Page(write_report(run)).titles


COMPARISON = {
    "title": "Three models", "head": ["model", "bits/byte"], "rows": [["flat", "1.2 ±0.1"], ["<b>clustered</b>", "1.1"]],
    "note": "Lower is better.",
}  # fmt: skip


def test_comparison_is_a_table(tmp_path: Path) -> None:
    run = save(tmp_path, config(), [])
    (run / "comparison.json").write_text(json.dumps(COMPARISON))
    page = Page(write_report(run))
    cells = re.findall(r"<td>(.*?)</td>", page.source[page.source.index("Three models") :])
    assert cells == ["flat", "1.2 ±0.1", "&lt;b&gt;clustered&lt;/b&gt;", "1.1"] and "Lower is better." in page.text


@pytest.mark.parametrize("content", ["[1]", "{", '{"head": 3, "rows": {}}', '{"head": ["a"], "rows": []}', "{}"])
def test_a_malformed_comparison_is_left_out(tmp_path: Path, content: str) -> None:
    run = save(tmp_path, config(), [])
    (run / "comparison.json").write_text(content)
    assert "Comparison" not in Page(write_report(run)).text


def test_curves_over_tokens_and_time() -> None:
    """4,096 tokens and 455 ms per step; validation steps are interpolated."""
    trains = [{"step": s, "tokens": 4096 * s, "step_ms": 455.0} for s in range(10, 1001, 10)]
    losses = {"validation": (np.array([0.0, 5.0, 1000.0]), np.array([5.0, 4.0, 3.0]))}
    unit, lines = over_tokens(trains, losses)
    assert unit == "million tokens"
    np.testing.assert_allclose(lines["validation"][0], [0, 0.02048, 4.096])
    unit, lines = over_time(trains, losses)
    assert unit == "minutes"
    np.testing.assert_allclose(lines["validation"][0], np.array([0, 2.275, 455]) / 60)
    assert over_time([], losses)[1] == over_tokens([], losses)[1] == {}


def test_step_time_splits_into_parts() -> None:
    record = {"step": 1, "step_ms": 100.0, "compute_ms": [60.0, 40.0]}
    parts = {name: line[1].tolist() for name, line in step_times([record]).items()}
    assert parts == {"step": [100], "forward and backward": [50], "communication and rest": [50]}
    record["communication_ms"] = [10.0, 20.0]
    parts = {name: line[1].tolist() for name, line in step_times([record]).items()}
    assert parts == {"step": [100], "forward and backward": [50], "communication and waits": [15], "rest": [35]}


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match=r"has no object 'config'"):
        write_report(tmp_path)


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save(tmp_path, config(), [])
    old = write_report(run).read_text()
    save(tmp_path, config(name="second"), [])

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_text() == old and not list(run.glob(".*"))


def test_the_same_records_make_the_same_report(tmp_path: Path) -> None:
    of = config()
    first, second = (write_report(save(tmp_path / name, of, records(of)[:12])).read_bytes() for name in "ab")
    assert first == second


# Regrouping


def swapped(assignment: list[list[int]], layer: int, *pairs: tuple[int, int]) -> list[list[int]]:
    after = [list(row) for row in assignment]
    for a, b in pairs:
        after[layer][a], after[layer][b] = after[layer][b], after[layer][a]
    return after


def similar(layer: int, clusters: list[int], inside: float, across: float) -> Record:
    matrix = [
        [1.0 if i == j else inside if c == d else across for j, d in enumerate(clusters)]
        for i, c in enumerate(clusters)
    ]
    return {"layer": layer, "matrix": matrix, "before": clusters, "after": clusters}


def regrouped(of: Config) -> tuple[list[Record], list[Record]]:
    """Plan 1 gained. Plan 2 was late, made again, applied, and lost. Malformed records follow."""
    lines = records(of)
    first = lines[0]["assignment"]
    second = swapped(first, 1, (0, 1), (2, 3))
    third = swapped(second, 0, (4, 5))

    def plan(version: int, made_at: int, assignment: list[list[int]]) -> Record:
        return {
            "version": version, "made_at_step": made_at, "effective_step": made_at + 20, "assignment": assignment,
            "reason": f"gain by {version}", "expected_gain": 0.01 * version,
        }  # fmt: skip

    def record(step: int, what: str, **fields: Any) -> Record:
        return {"kind": "plan", "step": step, "name": what, **fields, "time": 1e9}

    def applied(plan: Record, moves: int, pause: float) -> Record:
        probes = {"probe_before": 4.5, "probe_after": 4.25}
        return record(
            plan["effective_step"], "applied", plan=plan, moves=moves, changes=[], bytes=4096000, pause_ms=pause, **probes
        )  # fmt: skip

    one, late, two = plan(1, 80, second), plan(2, 180, third), plan(2, 240, third)
    plans = [
        record(82, "made", plan=one, seconds=0.1, similarity=similar(1, first[1], 0.25, 0.125)),
        applied(one, 4, 91.0),
        record(132, "overlap_ended", version=1, probe=4.0),
        record(182, "gain_measured", version=1, gain=0.005, similarity=similar(1, second[1], 0.5, -0.25)),
        record(182, "made", plan=late, seconds=0.1, similarity=None),
        record(205, "refused", reason="late", detail="effective at step 200, the next step is 206", plan=late),
        record(242, "made", plan=two, seconds=0.1, similarity=None),
        applied(two, 2, 182.0),
        record(302, "gain_measured", version=2, gain=-0.001, similarity=None),
        record(
            302, "no_plan", made_at_step=300, reason="nothing to gain", detail="best", expected_gain=0.003, seconds=0.1
        ),
        record(310, "clusterer_restarted"),
        record(320, "refused", reason="malformed: <b>", plan=["<i>"]),
        record(
            330,
            "made",
            plan=plan(3, 330, first),
            seconds=0.1,
            similarity=None,
            similarity_kind="coactivation",
            force_kind="random",
        ),
    ]
    for version, made in enumerate((one, two), 1):
        at = {
            "kind": "assignment",
            "step": made["effective_step"],
            "version": version,
            "assignment": made["assignment"],
        }
        lines.insert(next(i for i, line in enumerate(lines) if line["step"] > at["step"]), at)
    return lines, plans


@pytest.fixture(scope="module")
def regrouping(tmp_path_factory: pytest.TempPathFactory) -> Page:
    lines, plans = regrouped(config())
    return Page(write_report(save(tmp_path_factory.mktemp("regrouped"), config(), lines, plans, **ABOUT)))


def test_regrouping_follows_the_domains(regrouping: Page, full: Page) -> None:
    at = full.titles.index("Speed")
    assert regrouping.titles == [
        *full.titles[:at], "Membership in layer 0", "Membership in layer 1", "Similarity before plan 1, layer 1",
        "Similarity after plan 1, layer 1", "Domain purity of clusters", "Training loss around plans", *full.titles[at:],
    ]  # fmt: skip
    test_page_requires_no_other_file(regrouping)
    test_references_inside_the_page_resolve_and_ids_are_unique(regrouping)
    test_plots_follow_the_color_scheme_and_have_labels(regrouping)


def test_regrouping_facts(regrouping: Page) -> None:
    """Pauses of 91 and 182 ms, steps of 455 ms."""
    expected = {
        "Plans made": "4", "Plans applied": "2", "Plans refused": "2", "Periods without a plan": "1",
        "Mean expected gain": "+0.0150 of the objective", "Mean measured gain": "+0.0020, 2 of 2 plans measured",
        "Measured gain above 0": "1 of 2 plans", "Similarity inside clusters": "0.250 before, 0.500 after, 1 plan",
        "Similarity across clusters": "0.125 before, -0.250 after, 1 plan",
        "Median pause without probes": "136 ms, 0.30 steps", "Clusterer restarts": "1", "Similarity of experts": "coactivation",
    }  # fmt: skip
    assert {term: regrouping.facts.get(term) for term in expected} == expected
    assert "A positive measured gain does not show that a plan was useful." in regrouping.text


def test_each_plan_and_decision_is_a_row(regrouping: Page) -> None:
    table = regrouping.source[regrouping.source.index("Plans and decisions (7)") :]
    table = table[: table.index("</table>")]
    none = "–"
    assert [re.findall(r"<td>(.*?)</td>", row) for row in table.split("</tr>")[1:-1]] == [
        [
            "100",
            "applied",
            "1",
            "4",
            "4,096,000",
            "91.0",
            "+0.0100",
            "+0.0050",
            "4.5000",
            "4.2500",
            "4.0000",
            "gain by 1",
        ],
        [
            "205",
            "refused",
            "2",
            *3 * [none],
            "+0.0200",
            *4 * [none],
            "late: effective at step 200, the next step is 206",
        ],
        ["260", "applied", "2", "2", "4,096,000", "182.0", "+0.0200", "-0.0010", "4.5000", "4.2500", none, "gain by 2"],
        ["302", "no_plan", *4 * [none], "+0.0030", *4 * [none], "nothing to gain: best"],
        ["310", "clusterer_restarted", *9 * [none], ""],
        ["320", "refused", *9 * [none], "malformed: &lt;b&gt;"],
        ["330", "made", "3", *3 * [none], "+0.0300", *4 * [none], "forced: random"],
    ]


def test_flow_names_the_moves(regrouping: Page) -> None:
    """Initially, expert e of layer l is in cluster (7e + l) mod 4."""
    label = {layer: regrouping.labels[f"Membership in layer {layer}"].split("clusters. ")[1] for layer in (0, 1)}
    assert label[0] == "version 2 at step 260: 4 from 0 to 3, 5 from 3 to 0"
    assert label[1] == "version 1 at step 100: 0 from 1 to 0, 1 from 0 to 1, 2 from 3 to 2, 3 from 2 to 3"
    assert ">v2</text>" in regrouping.plots["Membership in layer 0"]
    assert ">v1</text>" not in regrouping.plots["Membership in layer 0"]


def test_similarity_is_sorted_by_the_clusters_of_its_step(regrouping: Page) -> None:
    clusters = [(7 * e + 1) % 4 for e in range(16)]
    for when, inside, across, swap in (("before", 0.25, 0.125, ()), ("after", 0.5, -0.25, ((0, 1), (2, 3)))):
        (then,) = swapped([clusters], 0, *swap)
        order = ", ".join(str(e) for e in sorted(range(16), key=lambda e: (then[e], e)))
        label = regrouping.labels[f"Similarity {when} plan 1, layer 1"]
        assert f"Mean inside clusters {inside:.3f}, across clusters {across:.3f}. Experts by cluster: {order}" in label


def test_purity_is_the_share_of_the_most_frequent_domain(regrouping: Page) -> None:
    """Domain g has (g + 1) x 1000 tokens in a cluster of its own and (g + 1) x 100 in the others; 4 of 10 are domain 3's."""
    assert "clusters 0.769, all tokens 0.400" in regrouping.labels["Domain purity of clusters"]  # 10 of 13
    assert ">plan applied</text>" in regrouping.plots["Domain purity of clusters"]


def test_loss_around_a_plan_is_relative_to_the_record_before(regrouping: Page) -> None:
    loss = {line["step"]: line["loss"] for line in records(config()) if line["kind"] == "train"}
    label = regrouping.labels["Training loss around plans"]
    assert f"plan 1 at 100 {loss[300] - loss[100]:+.4f}, plan 2 at 260 {loss[400] - loss[260]:+.4f}" in label


def test_a_run_without_plans_has_no_regrouping_section(tmp_path: Path) -> None:
    of = config()
    without, empty = (
        write_report(save(tmp_path / name, of, records(of)[:12], plans)).read_bytes()
        for name, plans in (("without", None), ("empty", []))
    )
    assert without == empty and b"Regrouping" not in without


def test_the_layers_that_change_most_are_drawn(tmp_path: Path) -> None:
    first = [[0, 0, 1, 1] for _ in range(10)]
    second = first
    for layer in range(1, 10):
        second = swapped(second, layer, (0, 2), *[(1, 3)] * (layer != 4))
    lines = [
        {"kind": "assignment", "step": 9 * v, "version": v, "assignment": a} for v, a in enumerate((first, second))
    ]
    page = Page(write_report(save(tmp_path, config(), lines, [{"kind": "plan", "step": 9, "name": "applied"}])))
    assert page.titles == [f"Membership in layer {layer}" for layer in (1, 2, 3, 5, 6, 7, 8, 9)]
    assert "2 layers are left out" in page.text


@given(st.data(), st.integers(1, 4), st.integers(1, 12), st.integers(1, 6))
@settings(deadline=None)
def test_an_expert_keeps_its_row_in_the_flow_until_it_moves(
    data: st.DataObject, n: int, experts: int, versions: int
) -> None:
    row = st.lists(st.integers(0, n - 1), min_size=experts, max_size=experts)
    clusters_VE = np.array(data.draw(st.lists(row, min_size=versions, max_size=versions)))
    size_C = np.array([(clusters_VE == c).sum(1).max() for c in range(n)])
    base_C = 100 * np.arange(n)
    slot_VE = _slots(clusters_VE, base_C, size_C)
    assert (slot_VE // 100 == clusters_VE).all() and (slot_VE % 100 < size_C[clusters_VE]).all()
    assert all(len(set(slots)) == experts for slots in slot_VE.tolist())
    stays = clusters_VE[1:] == clusters_VE[:-1]
    assert (slot_VE[1:] == slot_VE[:-1])[stays].all()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["<script>", "$\\frac$", "</td>"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
    max_leaves=6,
)  # fmt: skip


def mostly(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return strategy | strategy | strategy | ANYTHING


PICTURES = st.fixed_dictionaries({
    "layer": mostly(st.integers(0, 2)), "before": mostly(st.just([0, 1])), "after": mostly(st.just([1, 0])),
    "matrix": mostly(st.lists(st.lists(mostly(st.floats()), min_size=2, max_size=2), min_size=2, max_size=2)),
})  # fmt: skip
VERSION = mostly(st.integers(0, 2))
HOSTILE = st.fixed_dictionaries(
    {
        "kind": mostly(st.just("plan")), "step": mostly(st.integers(0, 60)) | st.just(10**400),
        "name": mostly(st.sampled_from(["made", "applied", "refused", "no_plan", "gain_measured", "overlap_ended", "clusterer_restarted"])),
    },
    optional={
        "plan": mostly(st.fixed_dictionaries({"version": VERSION, "made_at_step": mostly(st.just(5)), "reason": ANYTHING})),
        "version": VERSION, "similarity": mostly(PICTURES), "reason": ANYTHING, "gain": ANYTHING, "probe": ANYTHING,
        "similarity_kind": ANYTHING, "force_kind": ANYTHING, "moves": ANYTHING, "bytes": ANYTHING, "pause_ms": ANYTHING, "probe_before": ANYTHING, "expected_gain": ANYTHING,
    },
)  # fmt: skip


@given(st.lists(HOSTILE, max_size=8))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_records_of_plans_make_a_page(tmp_path: Path, plans: list[Record]) -> None:
    of = config()
    assignment = records(of)[0]["assignment"]
    lines = [
        {"kind": "assignment", "step": 0, "version": 0, "assignment": assignment},
        *({"kind": "train", "step": step, "loss": 5.0, "step_ms": 400.0} for step in (10, 20, 30)),
    ]
    kept = [plan for plan in plans if isinstance(plan["step"], int)]
    page = Page(write_report(save(tmp_path, of, lines, kept)))
    assert "script" not in {tag for tag, _ in page.tags}
    assert ("Regrouping" in page.source) == any(plan["kind"] == "plan" for plan in kept)


@given(st.lists(HOSTILE.filter(lambda plan: isinstance(plan["step"], int)), max_size=12))
@settings(deadline=None)
def test_any_records_of_plans_make_decisions(plans: list[Record]) -> None:
    rows = decisions(plans)
    whats = [plan["name"] for plan in plans]
    assert sum(row.outcome == "applied" for row in rows) == whats.count("applied")
    assert sum(row.outcome == "refused" for row in rows) == whats.count("refused")
    for row in rows:
        assert isinstance(row.reason, str) and isinstance(row.outcome, str)
        for picture in (row.before, row.after):
            assert picture is None or np.nanmax(abs(picture.similarity_EE)) <= 1


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, [[None, 0.5], [-0.5, None]]),
        ({"matrix": [[9, 1e308], [-1e308, 9]]}, [[None, 1], [-1, None]]),
        ({"matrix": [[1, None], [0.25, 1]]}, [[None, None], [0.25, None]]),
        ({"matrix": [[1, None], [None, 1]]}, None),
        ({"matrix": [[1, 0.5]]}, None),
        ({"matrix": [[1, "x"], [{}, 1]]}, None),
        ({"matrix": []}, None),
        ({"before": [0.0, 1.0]}, None),
        ({"before": [0, -1]}, None),
        ({"before": [0, 10**9]}, None),
        ({"before": [0, 10**30]}, None),
        ({"before": [[0], [1]]}, None),
        ({"before": 0}, None),
        ({"layer": None}, None),
    ],
)
def test_a_similarity_is_a_picture_or_none(changes: Record, kept: list[list[float | None]] | None) -> None:
    shown = {"layer": 0, "matrix": [[1, 0.5], [-0.5, 1]], "before": [1, 0], "after": [0, 1]} | changes
    (row,) = decisions([{"kind": "plan", "step": 1, "name": "made", "similarity": shown}])
    if kept is None:
        assert row.before is None
    else:
        assert row.before is not None
        np.testing.assert_array_equal(row.before.similarity_EE, np.array(kept, dtype=float))


def test_purity_by_hand() -> None:
    assert purity(np.array([[6, 0], [2, 2]])) == 0.8
    assert purity(np.zeros((2, 2))) == 0
