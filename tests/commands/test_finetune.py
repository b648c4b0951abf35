"""`raymoe finetune` on a small run and its export: the table, the stored results, refusals and the interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from raymoe.commands.finetune import main
from raymoe.export.export import export
from raymoe.finetune import compare
from tests.export.test_export import write_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `first`, its export, and the files of SST-2 and MRPC."""
    root = tmp_path_factory.mktemp("finetune")
    write_run(root)
    export(str(root), "first", tokens=200)
    rows = [("the cat sat on the mat", 1), ("où the mat", 0), ("cat cat sat " * 12, 1), ("mat", 0)]
    for task, header, row in (
        ("SST-2", "sentence\tlabel\n", "{0}\t{1}\n"),
        ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", "{1}\t0\t0\t{0}\t{0}\n"),
    ):
        folder = root / "glue" / task
        folder.mkdir(parents=True)
        for name, times in (("train.tsv", 4), ("dev.tsv", 2)):
            (folder / name).write_text(header + "".join(row.format(*r) for r in rows) * times)
    return root


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*words: str, results: Path = tmp_path) -> int:
        """Run the command on models of `root`, with results in a folder of this test."""
        for name in ("first", "exports"):
            if not (results / name).exists():
                (results / name).symlink_to(root / name)
        options = ("--data", str(root / "glue"), "--root", str(results), "--threads", "1", "--epochs", "1")
        return main([*words, *options], "raymoe finetune")

    return run


def test_models_are_compared_by_seed(
    run: Callable[..., int], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = str(root / "exports" / "first")
    out = tmp_path / "out.json"
    assert run("first", artifact, "--task", "mrpc", "--seeds", "2", "--init", "both", "--json", str(out)) == 0
    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [model["name"] for model in result["models"]] == [
        "first",
        "first (random)",
        artifact,
        f"{artifact} (random)",
    ]
    assert result["epoch"] == "last" and result["majority"]["accuracy"] == 0.5
    first, other = result["models"][0], result["models"][2]
    for score in ("accuracy", "F1"):
        by_seed = [[seed["scores"][score] for seed in model["seeds"]] for model in (first, other)]
        assert first["scores"][score]["mean"] == pytest.approx(sum(by_seed[0]) / 2)
        assert first["scores"][score]["difference"] is None
        difference = sum(b - a for a, b in zip(*by_seed, strict=True)) / 2
        assert other["scores"][score]["difference"]["mean"] == pytest.approx(difference)
    assert first["truncated"] == {"train": 8, "dev": 4} and [seed["seed"] for seed in first["seeds"]] == [0, 1]
    assert (first["step"], other["step"]) == (7, None)
    assert "MRPC: 16 training examples, 8 dev examples" in text and "majority class" in text
    assert f"truncated  8 train, 4 dev examples, to the context of {tmp_path.resolve() / 'first'}" in text
    assert sum(line.startswith("first ") for line in text.splitlines()) == 4


def test_a_finished_seed_is_not_repeated_unless_its_conditions_change(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    computed: list[int] = []
    real = compare.run_seed
    monkeypatch.setattr(compare, "run_seed", lambda *a, **k: (computed.append(a[5]), real(*a, **k))[1])
    words = ("first", "--task", "sst2", "--seeds", "2")
    assert run(*words) == 0
    table = capsys.readouterr().out
    assert computed == [0, 1]
    assert run(*words) == 0 and computed == [0, 1] and capsys.readouterr().out == table
    assert run("first", "--task", "sst2", "--seeds", "3") == 0 and computed == [0, 1, 2]
    assert run(*words, "--lr", "1e-3") == 0 and computed == [0, 1, 2, 0, 1]
    assert run(*words, "--init", "random") == 0 and computed == [0, 1, 2, 0, 1, 0, 1]
    damaged = sorted((tmp_path / "finetune" / "sst2" / "first").glob("*-seed1.json"))
    assert len(damaged) == 3
    for file in damaged:
        file.write_text(file.read_text().replace('"accuracy"', '"precision"'))
    capsys.readouterr()
    assert run(*words) == 0 and computed[7:] == [1]
    found = capsys.readouterr()
    assert found.out == table and "stored result skipped, seed 1 is repeated" in found.err


def test_an_interruption_keeps_the_finished_seeds(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, computed = compare.run_seed, []

    def interrupted(*arguments, **options):  # noqa: ANN002, ANN003, ANN202
        computed.append(arguments[5])
        if len(computed) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(compare, "run_seed", interrupted)
    assert run("first", "--task", "sst2", "--seeds", "2") == 130
    assert "finished seeds are stored" in capsys.readouterr().err
    assert run("first", "--task", "sst2", "--seeds", "2") == 0 and computed == [0, 1, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("second", "--task", "sst2"), "there is no run 'second'"),
        (("first", "first", "--task", "sst2"), "each model once"),
        (("first", "--task", "sst2", "--seeds", "0"), "--seeds=0 is not allowed"),
        (("first", "--task", "sst2", "--lr", "nan"), "--lr=nan is not allowed"),
        (("first", "--task", "cola"), "CoLA/train.tsv: give the folder"),
    ],
)
def test_a_bad_request_is_refused(
    words: tuple[str, ...], message: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    text = capsys.readouterr().err
    assert text.startswith("raymoe finetune: ") and message in text


def test_a_loss_that_is_not_finite_is_a_failure(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("first", "--task", "sst2", "--seeds", "1", "--lr", "1e30", "--batch", "4") == 1
    assert "give a lower --lr" in capsys.readouterr().err
    assert not (tmp_path / "finetune").exists()
