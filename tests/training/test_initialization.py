"""Runs that start from stored weights: the same model, a new run, and no need of the source afterward."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from raymoe.commands.train import main
from raymoe.config import Config, override, preset
from raymoe.data.chat import CHAT_TEMPLATE
from raymoe.data.corpus import Corpus
from raymoe.export.export import export
from raymoe.export.open import open_any, open_run
from raymoe.metrics import TrainingMetrics
from raymoe.model.transformer import Transformer
from raymoe.storage.artifact import Artifact
from raymoe.storage.checkpoint import step_folder, write_manifest, write_shard
from raymoe.storage.run_folder import RunFolder, read_records
from raymoe.training.failures import Unrecoverable
from raymoe.training.initialization import initial_weights, with_files_of
from raymoe.training.launch import check_inputs, start_folder
from raymoe.training.loop import Trainer
from raymoe.training.resolve import resolve
from raymoe.training.run_report import write_report
from tests.data.test_chat import CHATML, conversation, write
from tests.export.test_export import write_run
from tests.support import processes

TRAIN = [
    "run.name=second", "train.init=first", "train.precision=float32", "train.steps=3", "train.global_batch=4",
    "train.grain=2", "train.log_every=1", "train.workers=1", "checkpoint.every=2", "regroup.mode=off",
]  # fmt: skip
StoredTensors = dict[str, Tensor]
STILL = ["train.lr=1e-30", "train.bias_rate=0", "train.weight_decay=0"]
"""Steps that change no weight."""


def write_source(root: Path, *more: str) -> StoredTensors:
    """Write the run `first` with random weights and biases and, if clustered, clusters other than the default."""
    config = write_run(root, *more)
    moved = config.model.experts == "clustered" and config.model.n_clusters == 3
    rows = ((2, 0, 1, 1, 0, 2), (0, 1, 2, 0, 1, 2)) if moved else None
    assignment = rows or config.model.default_assignment()
    model = Transformer(config.model, assignment)
    model.initialize(3)
    for key, view in model.logical().items():
        if key.endswith("bias"):
            view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(len(key))))
    tensors = {key: view.clone() for key, view in model.logical().items()}
    run = RunFolder(root / "first")
    shutil.rmtree(run.checkpoints)
    meta = {"config": config.to_dict(), "assignment": assignment, "version": 2}
    keys = sorted(tensors)
    for rank in range(2):
        write_shard(step_folder(run.checkpoints, 9), rank, 2, {key: tensors[key] for key in keys[rank::2]})
    write_manifest(step_folder(run.checkpoints, 9), step=9, world=2, meta=meta)
    (root / "new.txt").write_text("a mat sat on the other cat, où, and so do we all\n" * 400)
    return tensors


def resolved(root: Path, *changes: str) -> Config:
    return resolve(preset("tiny"), [f"run.root={root}", f"data.path={root / 'new.txt'}", *TRAIN, *changes])


def started(config: Config) -> tuple[Config, Path, Corpus]:
    """Create the run's folder as a launch does."""
    run = Path(config.run.root) / config.run.name
    weights = initial_weights(config)
    corpus, _ = check_inputs(with_files_of(config, weights), run)
    return start_folder(config, run, corpus, weights)[0], run, corpus


def train(rank: int, world: int, config: Config, run: Path, corpus: Path) -> StoredTensors:
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker=str(rank))
    trainer = Trainer(config, Corpus.open(corpus), run, metrics, torch.device("cpu"))
    before = {key: view.clone() for key, view in trainer.model.logical().items()}
    assert all(not view.any() for view in trainer.optimizer.logical().values())
    trainer.train()
    return before


def logits(name: Path | str, root: Path) -> Tensor:
    model = open_any(str(root), str(name))[0].model()
    with torch.no_grad():
        return model(torch.arange(2 * 16).view(2, 16))


# The model travels


def test_the_model_comes_from_the_weights_and_may_change_where_no_weight_does(tmp_path: Path) -> None:
    write_source(tmp_path)
    model = resolved(tmp_path).model
    assert model == open_run(str(tmp_path), "first")[0].config.model != preset("tiny").model
    free = {"context": 64, "gate_scale": 2.0, "rope_theta": 5e4, "experts_per_token": 1, "clusters_per_token": 2}
    changed = resolved(tmp_path, *(f"model.{field}={value}" for field, value in free.items()), "model.layers=2").model
    assert {field: getattr(changed, field) for field in free} == free and changed.d_model == model.d_model


@pytest.mark.parametrize(
    "change",
    ["layers=3", "d_model=64", "d_expert=64", "n_experts=12", "n_clusters=2", "residual_width=8", "heads=4",
     "kv_heads=2", "vocabulary=301", "tied_head=false", "experts=flat"],
)  # fmt: skip
def test_a_change_of_the_weights_is_refused_with_the_field(change: str, tmp_path: Path) -> None:
    write_source(tmp_path)
    field = change.partition("=")[0]
    with pytest.raises(ValueError, match=rf"model\.{field}=.* is not allowed: the weights of train.init=first have"):
        resolved(tmp_path, f"model.{change}")


def test_the_width_of_a_dense_layer_cannot_change(tmp_path: Path) -> None:
    write_source(tmp_path, "model.experts=dense")
    with pytest.raises(ValueError, match=r"model\.experts_per_token=1 is not allowed"):
        resolved(tmp_path, "model.experts_per_token=1")


def test_a_cluster_must_have_the_experts_that_a_token_takes(tmp_path: Path) -> None:
    write_source(tmp_path, "model.experts_per_token=1", "model.n_experts=6", "model.n_clusters=2")
    checkpoint = step_folder(RunFolder(tmp_path / "first").checkpoints, 9) / "manifest.json"
    content = json.loads(checkpoint.read_text())
    content["meta"]["assignment"] = [[0, 1, 1, 1, 1, 1]] * 2
    checkpoint.write_text(json.dumps(content))
    initial_weights(resolved(tmp_path))
    with pytest.raises(
        ValueError, match="experts_per_token=2 is not allowed: a cluster of train.init=first has 1 experts"
    ):
        initial_weights(resolved(tmp_path, "model.experts_per_token=2"))


def test_what_contradicts_initial_weights_is_refused(tmp_path: Path) -> None:
    write_source(tmp_path)
    with pytest.raises(ValueError, match="regroup.start='dense' is not allowed.*train.init gives trained weights"):
        resolved(tmp_path, "regroup.start=dense", "regroup.burn_in=2", "regroup.mode=async")
    config, run, _ = started(resolved(tmp_path))
    with pytest.raises(ValueError, match="train.init=other starts a new run, and train.resume=second continues one"):
        resolve(preset("tiny"), [f"run.root={tmp_path}", "train.resume=second", "train.init=other"])
    assert resolve(preset("tiny"), [f"run.root={tmp_path}", "train.resume=second"]).model == config.model


@pytest.mark.parametrize("name", ["nothing", "empty", "missing/folder"])
def test_a_wrong_name_is_refused_before_anything_heavy_is_imported(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    words = ["tiny", f"run.root={tmp_path}", f"train.init={name}"]
    code = "import sys; from raymoe.commands.train import main; status = main(sys.argv[1:]); assert not {'torch', 'ray'} & sys.modules.keys(); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    reason = (
        "the run has no complete checkpoint"
        if name == "empty"
        else f"train.init={name} is no artifact, and there is no run"
    )
    assert reason in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_bad_override_is_refused_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path)
    assert main(["tiny", f"run.root={tmp_path}", "train.init=first", "model.layers=9"]) == 2
    assert "model.layers=9 is not allowed" in capsys.readouterr().err


# The weights travel


@pytest.mark.parametrize(
    "kind", ["experts=clustered", "expert_kind=private", "residual_width=0", "experts=flat", "experts=dense"]
)
def test_steps_that_change_nothing_give_the_logits_of_the_source(kind: str, tmp_path: Path) -> None:
    expected = write_source(tmp_path, f"model.{kind}")
    config, run, corpus = started(resolved(tmp_path, *STILL))
    before = train(0, 1, config, run, corpus.folder)
    assert before.keys() == expected.keys() and all(torch.equal(before[key], expected[key]) for key in expected)
    source, stored = open_run(str(tmp_path), "first")[0], open_run(str(tmp_path), "second")[0]
    assert (stored.step, stored.version, stored.assignment) == (3, 0, source.assignment)
    assert torch.equal(logits("first", tmp_path), logits("second", tmp_path))


@pytest.mark.dist
def test_any_number_of_workers_starts_from_the_same_weights(tmp_path: Path) -> None:
    expected = write_source(tmp_path)
    config, run, corpus = started(resolved(tmp_path))
    results = processes.run(3, train, config, run, corpus.folder, folder=tmp_path)
    found = {key: value for result in results for key, value in result.items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_artifact_gives_the_weights_that_it_serves(tmp_path: Path) -> None:
    write_source(tmp_path)
    target = export(str(tmp_path), "first").target
    config, run, corpus = started(resolved(tmp_path, *STILL, f"train.init={target}"))
    shutil.rmtree(target)  # the run has its own copy
    train(0, 1, config, run, corpus.folder)
    export(str(tmp_path), "first")
    assert torch.equal(logits(target, tmp_path), logits("second", tmp_path))
    about = json.loads((run / "config.json").read_text())["init"]
    assert about == {"folder": str(target), "kind": "artifact", "run": "first", "step": 9}


def test_a_run_resumes_without_its_source(tmp_path: Path) -> None:
    write_source(tmp_path)
    config, run, corpus = started(resolved(tmp_path))
    shutil.rmtree(tmp_path / "first")
    train(0, 1, override(config, ["train.steps=1"]), run, corpus.folder)
    again = resolve(preset("tiny"), [f"run.root={tmp_path}", "train.resume=second", "train.steps=5"])
    assert again.data == config.data and initial_weights(again) is None
    shutil.rmtree(corpus.folder)  # a cleared cache: the text is prepared again with the run's copy of the tokenizer
    rebuilt, _ = check_inputs(again, run)
    assert rebuilt.tokenizer_fingerprint == corpus.tokenizer_fingerprint
    start_folder(again, run, rebuilt, None)
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
    trainer = Trainer(again, rebuilt, run, metrics, torch.device("cpu"))
    assert trainer.position.step == 1 and trainer.train()["step"] == 5
    assert json.loads((run / "config.json").read_text())["init"]["run"] == "first"


def test_a_run_that_has_lost_its_initial_weights_does_not_use_random_ones(tmp_path: Path) -> None:
    write_source(tmp_path)
    config, run, corpus = started(resolved(tmp_path))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(Unrecoverable, match="not even the one of step 0 with the weights of train.init=first"):
        train(0, 1, config, run, corpus.folder)


def test_a_group_that_is_lost_before_its_first_checkpoint_starts_from_the_weights_again(tmp_path: Path) -> None:
    write_source(tmp_path)
    config, run, corpus = started(resolved(tmp_path))
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
    Trainer(config, corpus, run, metrics, torch.device("cpu"))
    train(0, 1, config, run, corpus.folder)
    names = [r["name"] for r in read_records(run / "metrics.jsonl") if r["kind"] == "event"]
    assert names[:2] == ["initialized", "restarted"]


def test_the_origin_is_in_the_records_and_in_the_report(tmp_path: Path) -> None:
    write_source(tmp_path)
    config, run, corpus = started(resolved(tmp_path))
    train(0, 1, config, run, corpus.folder)
    (event,) = [r for r in read_records(run / "metrics.jsonl") if r.get("name") == "initialized"]
    assert (event["step"], event["kind"], event["source"], event["source_step"]) == (
        0,
        "event",
        str(tmp_path / "first"),
        9,
    )
    (first, *_) = [r for r in read_records(run / "metrics.jsonl") if r["kind"] == "assignment"]
    assert first["assignment"][0] == [2, 0, 1, 1, 0, 2]
    page = write_report(run).read_text()
    assert "Started from" in page and f"run {tmp_path / 'first'}, step 9" in page


# The tokenizer travels


def test_the_tokenizer_is_that_of_the_weights(tmp_path: Path) -> None:
    write_source(tmp_path)
    source = open_run(str(tmp_path), "first")[0]
    config, run, corpus = started(resolved(tmp_path))
    assert (corpus.folder / "tokenizer.json").read_bytes() == source.tokenizer.read_bytes()
    assert config.data.tokenizer == str(run / "tokenizer.json")


def test_another_tokenizer_is_refused_and_an_equal_one_accepted(tmp_path: Path) -> None:
    write_source(tmp_path)
    source = open_run(str(tmp_path), "first")[0]
    equal = tmp_path / "equal.json"
    equal.write_text(json.dumps(json.loads(source.tokenizer.read_text())))  # other spaces
    started(resolved(tmp_path, f"data.tokenizer={equal}"))
    other: dict[str, Any] = json.loads(source.tokenizer.read_text())
    other["model"]["merges"] = other["model"]["merges"][:-1]
    equal.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="is not the tokenizer of train.init=first"):
        started(resolved(tmp_path, f"data.tokenizer={equal}", "run.name=third"))


def test_the_chat_template_is_that_of_the_weights_and_a_text_keeps_it(tmp_path: Path) -> None:
    write_source(tmp_path)
    RunFolder(tmp_path / "first").chat_template.write_text(CHATML)
    chat = write(tmp_path / "chat.jsonl", [conversation(i) for i in range(60)])
    config, run, corpus = started(resolved(tmp_path, f"data.path={chat}", "data.format=chat"))
    assert corpus.chat_template == CHATML and config.data.chat_template == str(RunFolder(run).chat_template)
    other = tmp_path / "other.jinja"
    other.write_text(CHAT_TEMPLATE)
    options = (f"data.path={chat}", "data.format=chat", f"data.chat_template={other}", "run.name=third")
    assert started(resolved(tmp_path, *options))[2].chat_template == CHAT_TEMPLATE
    assert RunFolder(tmp_path / "third").chat_template.read_text() == CHAT_TEMPLATE
    config, run, corpus = started(resolved(tmp_path, "run.name=fourth"))
    train(0, 1, config, run, corpus.folder)
    exported = export(str(tmp_path), "fourth", tokens=200).target
    assert Artifact.open(exported).chat_template() == CHATML


def test_a_run_that_was_moved_uses_its_own_files(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    write_source(old)
    chat = write(tmp_path / "chat.jsonl", [conversation(i) for i in range(60)])
    template = tmp_path / "other.jinja"
    template.write_text(CHATML)
    options = (f"data.path={chat}", "data.format=chat", f"data.chat_template={template}")
    config, run, corpus = started(resolved(old, *options))
    train(0, 1, config, run, corpus.folder)
    template.unlink()
    old.rename(new)  # with the cache, so that the corpus is prepared again
    moved = RunFolder(new / "second")
    stored = open_run(str(new), "second")[0]
    assert stored.tokenizer.read_bytes() == moved.tokenizer.read_bytes()
    again = resolve(preset("tiny"), [f"run.root={new}", "train.resume=second", "train.steps=5"])
    assert again.data.tokenizer == str(moved.tokenizer) and again.data.chat_template == str(moved.chat_template)
    assert check_inputs(again, moved.path)[0].fingerprint == corpus.fingerprint


def test_the_space_of_the_initial_weights_does_not_count_as_that_of_a_checkpoint(tmp_path: Path) -> None:
    write_source(tmp_path)
    config, run, corpus = started(resolved(tmp_path, "checkpoint.keep=2"))
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
    trainer = Trainer(config, corpus, run, metrics, torch.device("cpu"))
    trainer.checkpoints.free_bytes = lambda _: 0
    with pytest.raises(Unrecoverable, match="for 3 checkpoints"):
        trainer.checkpoints.check_space()


@pytest.mark.parametrize("step", ["initialization.write_manifest", "launch.save_config"])
def test_a_full_disk_leaves_no_run(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"raymoe.training.{step}", full)
    with pytest.raises(OSError, match="No space left"):
        started(resolved(tmp_path))
    assert not (tmp_path / "second").exists()
