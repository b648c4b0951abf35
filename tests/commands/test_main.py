"""The command `raymoe`: its help, the names in its errors, and what it imports before it works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import raymoe
from raymoe.__main__ import COMMANDS, entry_point, main
from raymoe.commands.entry import sibling
from tests.support.paths import REPO_ROOT

HEAVY = ("torch", "ray", "pyarrow", "matplotlib", "scipy", "datasets")


def imported(*words: str, environment: dict[str, str] | None = None) -> tuple[int, list[str], str]:
    """Run `raymoe WORDS` in a process; return its status, the heavy packages that it imported, and its stderr."""
    code = (
        "import json, sys\nfrom raymoe.__main__ import main\ntry:\n    status = main(sys.argv[1:])\n"
        f"except SystemExit as error:\n    status = error.code\nheavy = [m for m in {HEAVY} if m in sys.modules]\n"
        "print('\\n' + json.dumps([status, heavy]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPO_ROOT)} | (environment or {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    status, heavy = json.loads(done.stdout.splitlines()[-1])
    return status, heavy, done.stderr


def test_help_lists_each_command_once_and_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    text = capsys.readouterr().out
    assert exited.value.code == 0
    for name, summary in COMMANDS.items():
        assert text.count(f"  {name:12}{summary}\n") == 1
    assert all(f"  {status:<3}  " in text for status in (0, 1, 2, 130, 143))


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert imported(*words)[:2] == (0, [])


def test_a_bad_key_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("preset: tiny\ntrain: {stepz: 3}\n")
    for words in (["train", "tiny", "train.stepz=3"], ["train", "--config", str(config)]):
        status, heavy, stderr = imported(*words)
        assert (status, heavy) == (2, [])
        assert "unknown key 'train.stepz': did you mean 'train.steps'?" in stderr


def test_a_missing_file_is_refused_before_ray_is_imported(tmp_path: Path) -> None:
    for override in ("data.path=/missing/text.txt", "data.tokenizer=/missing/tokenizer.json"):
        status, heavy, stderr = imported("train", "tiny", override, f"run.root={tmp_path}")
        assert status == 2 and not {"torch", "ray"} & set(heavy)
        assert override in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_name_or_a_home_gets_help_and_one_line(tmp_path: Path) -> None:
    """OpenShift runs containers as a user that has no entry in /etc/passwd and no HOME."""
    code = (
        "import pwd, sys\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
        "from raymoe.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "RAYMOE_HOME", "USER", "LOGNAME")}
    environment["PYTHONPATH"] = str(REPO_ROOT)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, timeout=120
        )

    for command in ("train", "export", "evaluate", "generate", "serve", "load", "doctor"):
        assert run(command, "--help").returncode == 0, command
    refused = run("train", "tiny", "train.steps=3")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1 and "set RAYMOE_HOME" in refused.stderr


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["trian"])
    assert exited.value.code == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_no_command_prints_the_help_and_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_both_entries_of_a_command_name_themselves(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: raymoe {command} ")
    monkeypatch.setattr(sys, "argv", [f"jobs/{command}.py", "--no-such-option"])
    with pytest.raises(SystemExit) as exited:
        entry_point(command)(None, None)  # type: ignore[arg-type]  # as jobs/X.py calls it
    assert exited.value.code == 2
    assert f"{command}.py: error: " in capsys.readouterr().err
    assert (REPO_ROOT / "jobs" / f"{command}.py").is_file()


def test_a_hint_names_the_next_command_as_the_user_started_this_one() -> None:
    assert sibling("raymoe train", "export") == "raymoe export"
    assert sibling("train.py", "export") == "python jobs/export.py"


def test_importing_raymoe_is_light_and_its_api_is_found() -> None:
    code = "import raymoe, sys; print([m for m in ('torch', 'ray', 'yaml') if m in sys.modules], dir(raymoe))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(REPO_ROOT)},
    )  # fmt: skip
    assert done.stdout.startswith("[] ") and "'train'" in done.stdout and "'load'" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        raymoe.nothing  # noqa: B018


@pytest.mark.parametrize(
    "words",
    [
        ("finetune", "x", "--task", "sst2", "--json"), ("load", "--json"), ("evaluate", "x", "--json"),
        ("compare", "x", "--out"), ("experiment", "opponents", "--json"), ("doctor", "--json"),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_an_output_file_in_a_missing_folder_is_refused_before_the_work(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, str(tmp_path / "missing/file")]) == 2
    message = f"raymoe {words[0]}: {words[-1]}: the folder {tmp_path}/missing does not exist: create it\n"
    assert capsys.readouterr().err == message
