"""`raymoe generate` and `raymoe.load`: the completions of a small artifact in this process."""

from __future__ import annotations

import pwd
import shutil
from pathlib import Path

import pytest

import raymoe
from raymoe.commands.generate import main
from raymoe.serving.engine import native
from raymoe.serving.http.prompts import check_context
from raymoe.serving.local_model import LocalModel
from tests.support.served import artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("generate") / "made").folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LocalModel:
    return raymoe.load(str(folder))  # type: ignore[operator]


def test_a_list_of_prompts_gives_the_completions_of_each(model: LocalModel) -> None:
    one = model.generate("the ", max_tokens=4, temperature=0)
    assert model.generate(["the ", "a"], max_tokens=4, temperature=0) == [
        one,
        model.generate("a", max_tokens=4, temperature=0),
    ]
    assert (
        isinstance(one, str) and "".join(text for _, text in model.stream(["the "], max_tokens=4, temperature=0)) == one
    )


def test_the_same_seed_gives_the_same_text(model: LocalModel) -> None:
    texts = {model.generate("the ", max_tokens=8, temperature=1.0, seed=seed) for seed in range(8)}
    assert len(texts) > 1
    assert model.generate("the ", max_tokens=8, seed=3) == model.generate("the ", max_tokens=8, seed=3)


def test_a_prompt_beyond_the_context_is_refused_with_the_servers_text(
    model: LocalModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a" * model.context
    with pytest.raises(ValueError) as server:
        check_context(model.context, 4, model.context)
    with pytest.raises(ValueError) as ours:
        model.generate(prompt, max_tokens=4)
    assert str(ours.value) == str(server.value)
    assert f"maximum context length is {model.context} tokens" in str(ours.value)
    assert main([str(folder), prompt, "--max-tokens", "4"], "raymoe generate") == 2
    assert capsys.readouterr().err == f"raymoe generate: {server.value}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1}, "temperature"), ({"max_tokens": "many"}, "max_tokens"), ({"stop": [""]}, "stop")],
)
def test_a_bad_option_is_refused_before_the_first_piece(model: LocalModel, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.stream(["the"], **options)


def test_the_command_prints_prompt_and_completion(
    model: LocalModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), "the ", "--max-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "the " + model.generate("the ", max_tokens=4, temperature=0) + "\n"
    assert main([str(folder), "the ", "a", "--max-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("the ")


def test_a_missing_or_damaged_artifact_is_refused(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nothing", "a", "--root", str(tmp_path)], "raymoe generate") == 2
    assert capsys.readouterr().err.startswith("raymoe generate: ")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "tokenizer.json").write_text("{}")
    assert main([str(damaged), "a"], "raymoe generate") == 2
    with pytest.raises(ValueError, match="precision='half' is not allowed"):
        raymoe.load(str(folder), precision="half")  # type: ignore[operator]


def test_a_user_without_a_home_computes_without_native_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert native._library.__wrapped__("cc") is None
    assert "no native kernels (Could not determine home directory.)" in caplog.text
