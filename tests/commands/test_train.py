"""`raymoe train`: presets, config files and overrides become one request."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raymoe.commands.train import parser, requested
from raymoe.config import LARGEST_YAML, Config, override


def asked(*words: str) -> Config:
    return override(*requested(parser().parse_intermixed_args(words)))


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_overrides_apply_after_the_file_and_the_file_after_the_preset(tmp_path: Path) -> None:
    file = write(tmp_path, "preset: tiny\nmodel: {layers: 3}\ntrain: {steps: 7, workers: '2,4'}\n")
    config = asked("--config", file, "model.layers=6")
    assert (config.preset, config.model.layers, config.model.d_model) == ("tiny", 6, 128)
    assert (config.train.steps, config.train.workers, config.train.max_workers) == (7, 2, 4)
    assert asked("model.layers=6", "--config", file) == config
    assert asked("tiny", "--config", file, "model.layers=6") == config
    assert asked("--config", file, "train.workers=3").train.max_workers == 0


def test_a_preset_may_be_left_out_where_it_is_known(tmp_path: Path) -> None:
    assert asked("--config", write(tmp_path, "train: {steps: 9}\n")).preset == "small"
    assert asked("train.resume=first").train.resume == "first"
    assert asked("tiny").preset == "tiny"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a preset is missing"),
        (["train.steps=3"], "a preset is missing"),
        (["small", "--config", "FILE"], "has the preset tiny, not small"),
        (["--config", "MISSING"], "No such file"),
        (["--config", "/dev/zero"], f"larger than {LARGEST_YAML >> 10} KiB"),
        (["tiny", "steps"], "not an override"),
    ],
)
def test_a_bad_request_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    names = {"FILE": write(tmp_path, "preset: tiny\n"), "MISSING": str(tmp_path / "missing.yaml")}
    with pytest.raises((ValueError, OSError), match=message):
        asked(*(names.get(word, word) for word in words))


def test_an_unknown_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        asked("huge")
    assert "unknown preset 'huge': one of tiny, screen, small, paper" in capsys.readouterr().err


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("preset: tiny".encode("utf-16"))
    with pytest.raises(ValueError, match=r"run\.yaml: "):
        asked("--config", str(path))


def test_a_ray_address_where_nothing_listens_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text\n" * 100)
    code = (
        "import sys\n"
        "from raymoe.commands.train import main\n"
        "status = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(status)\n"
    )
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # refuses connections
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-c", code, "tiny", f"run.root={tmp_path}", f"data.path={text}"],
            capture_output=True, text=True, timeout=60, env=os.environ | {"RAY_ADDRESS": address},
        )  # fmt: skip
    assert ended.returncode == 2 and f"no Ray listens at RAY_ADDRESS={address}" in ended.stderr, ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
