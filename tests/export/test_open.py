"""Runs opened for export and evaluation: with the corpus and the tokenizer that they were trained with, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raymoe.data.corpus import Corpus
from raymoe.export.open import open_any, open_run
from raymoe.storage.checkpoint import step_folder
from raymoe.storage.run_folder import RunFolder
from tests.export.test_export import write_run


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def store_fingerprints(root: Path, **fingerprints: str) -> None:
    """Store the fingerprints of the data in the checkpoint, as training does."""
    manifest = step_folder(RunFolder(root / "first").checkpoints, 7) / "manifest.json"
    meta = json.loads(manifest.read_text())["meta"]
    edit(manifest, meta=meta | {"data": fingerprints})


def corpus_of(root: Path) -> Corpus:
    return Corpus.open(json.loads(RunFolder(root / "first").config.read_text())["corpus"])


def test_a_cleared_cache_is_prepared_again(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = corpus_of(tmp_path)
    store_fingerprints(tmp_path, corpus=before.fingerprint, tokenizer=before.tokenizer_fingerprint)
    shutil.rmtree(before.folder)
    stored, skipped = open_run(str(tmp_path), "first")
    assert stored.corpus == before.folder and not skipped


@pytest.mark.parametrize("fingerprints", [True, False], ids=["stored", "of version 0.1"])
def test_a_text_that_changed_since_training_is_refused(tmp_path: Path, fingerprints: bool) -> None:
    """A new text gives a new tokenizer, and the weights would be read with other ids."""
    write_run(tmp_path)
    before = corpus_of(tmp_path)
    if fingerprints:
        store_fingerprints(tmp_path, corpus=before.fingerprint, tokenizer=before.tokenizer_fingerprint)
    with (tmp_path / "text.txt").open("a") as file:
        file.write("zebra quilt " * 2000)
    open_run(str(tmp_path), "first")  # the cached corpus of the run is used
    shutil.rmtree(before.folder)
    with pytest.raises(
        ValueError, match=rf"trained with corpus {before.fingerprint}, and .* now gives corpus \w{{16}}"
    ):
        open_run(str(tmp_path), "first")


def test_a_replaced_tokenizer_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    corpus = corpus_of(tmp_path)
    store_fingerprints(tmp_path, corpus=corpus.fingerprint, tokenizer="0" * 16)
    with pytest.raises(
        ValueError, match=f"trained with tokenizer {'0' * 16}, .* tokenizer {corpus.tokenizer_fingerprint}"
    ):
        open_run(str(tmp_path), "first")


def test_a_name_is_a_folder_or_a_run_or_an_export(tmp_path: Path) -> None:
    from raymoe.export.export import export

    write_run(tmp_path)
    target = export(str(tmp_path), "first").target
    assert open_any(str(tmp_path), "first")[0].step == 7
    assert open_any(str(tmp_path), str(target))[0].step is None
    shutil.rmtree(tmp_path / "first")
    assert open_any(str(tmp_path), "first")[0].folder == target
    with pytest.raises(FileNotFoundError, match="there is no run 'second'"):
        open_any(str(tmp_path), "second")
