"""From text to a model that was instructed: train, export, train from the artifact on conversations, serve with the template."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raymoe.data.chat import CHAT_TEMPLATE
from raymoe.ops.ray_head import head
from raymoe.serving.http.bodies import Message
from raymoe.serving.http.prompts import ChatTemplate, Codec
from raymoe.storage.artifact import Artifact
from raymoe.storage.run_folder import artifact_folder, read_records
from tests.data.test_chat import conversation, write
from tests.support.paths import REPO_ROOT

SMALL = [
    "model.d_model=32", "model.d_expert=32", "model.vocabulary=400", "model.context=32", "train.workers=2",
    "train.global_batch=8", "train.grain=4", "train.warmup=2", "train.log_every=1", "train.validate_windows=8",
]  # fmt: skip


@pytest.mark.soak
def test_a_text_model_is_instructed_and_exported_with_its_template(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"what is it number {i}? THE ANSWER {i} IS {i % 3}\n" for i in range(900)))
    chat = write(tmp_path / "chat.jsonl", [conversation(i, turns=1 + i % 2) for i in range(200)])
    with head(cpus=2) as ray:

        def job(name: str, *words: str, status: int = 0) -> str:
            line = [sys.executable, str(REPO_ROOT / "jobs" / f"{name}.py"), *words]
            done = subprocess.run(line, env=ray.environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
            assert done.returncode == status, done.stdout + done.stderr
            return done.stdout + done.stderr

        root = f"run.root={tmp_path}"
        job("train", "tiny", root, "run.name=base", f"data.path={text}", "train.steps=10", *SMALL)
        job("export", "base", "--root", str(tmp_path))
        target = artifact_folder(str(tmp_path), "base")
        instruct = ["tiny", root, "run.name=chat", f"train.init={target}", f"data.path={chat}", "data.format=chat"]
        refused = job("train", *instruct, "train.mixture=other:1", status=2)
        assert "names the domain 'other', and the text has chat" in refused
        shown = job("train", *instruct, "train.steps=5", "train.mixture=chat:1", *SMALL[4:])
        assert f"weights   of {target}" in shown and "training tokens of answers" in shown
        shutil.rmtree(target)  # neither the resume nor the export needs the source
        job("train", root, "train.resume=chat", "train.steps=7")
        job("export", "chat", "--root", str(tmp_path))
        evaluated = job("evaluate", "chat", "--root", str(tmp_path), "--quiet")
        completed = job(
            "generate", "chat", "user: what is it number 5 0\nassistant:", "--root", str(tmp_path), "--max-tokens", "8"
        )
        assert completed.startswith("user: what is it number 5 0\nassistant:")
        scored = job(
            "evaluate", "chat", "--root", str(tmp_path), "--data", str(chat), "--format", "chat", "--json", "out.json"
        )
    assert "perplexity" in evaluated and "perplexity" in scored
    answers = json.loads((tmp_path / "out.json").read_text())
    assert answers["tokens"] < 15 * 300 and answers["bytes"] == sum(
        len(f" THE ANSWER {i} IS {t}") for i in range(200) for t in range(1 + i % 2)
    )
    run = read_records(tmp_path / "chat" / "metrics.jsonl")
    (origin,) = [r for r in run if r.get("name") == "initialized"]
    assert origin["source"] == str(target) and origin["source_step"] == 10
    assert [r["step"] for r in run if r["kind"] == "train"] == list(range(1, 8))
    assert (tmp_path / "chat" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    artifact = Artifact.open(artifact_folder(str(tmp_path), "chat"))
    assert artifact.chat_template() == CHAT_TEMPLATE
    codec = Codec(artifact.tokenizer())
    prompt = ChatTemplate(artifact.chat_template(), codec).tokens([Message(role="user", content="what is it")], 99)
    assert codec.tokenizer.decode(list(prompt)) == "user: what is it\nassistant:"
