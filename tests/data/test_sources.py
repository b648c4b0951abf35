"""Files that users have beside or instead of UTF-8 text: read, or named with what to do about them."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.config import DataSection, preset
from raymoe.data.sources import check_source, digest, documents, in_short, skipped
from raymoe.data.text_files import foreign_encoding, open_text
from tests.data.test_corpus import prepared, prose

TEXT = "naïve café\n" + "plain words\n" * 20


def section(path: Path, **changes: str) -> DataSection:
    return replace(preset("tiny").data, path=str(path), **changes)


def texts(path: Path, **changes: str) -> dict[str, str]:
    """The text of each domain."""
    found: dict[str, str] = {}
    for document in documents(section(path, **changes)):
        found[document.domain] = found.get(document.domain, "") + document.text
    return found


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


WRITERS: dict[str, Callable[[Path], object]] = {
    "d.txt.gz": lambda file: file.write_bytes(gzip.compress(TEXT.encode())),
    "d.gz": lambda file: file.write_bytes(gzip.compress(TEXT.encode())),
    "D.MD.GZ": lambda file: file.write_bytes(gzip.compress(b"\xef\xbb\xbf" + TEXT.encode())),
    "d.jsonl.gz": lambda file: file.write_bytes(gzip.compress(lines({"text": TEXT}))),
    "d.json": lambda file: file.write_bytes(lines({"text": TEXT})),
    "d.json.gz": lambda file: file.write_bytes(gzip.compress(lines({"text": TEXT}))),
    "d.txt": lambda file: file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode()),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("inside", [True, False], ids=["in a folder", "by itself"])
def test_compressed_text_and_json_lines_are_read(tmp_path: Path, name: str, inside: bool) -> None:
    WRITERS[name](tmp_path / name)
    path = tmp_path if inside else tmp_path / name
    assert list(texts(path).values()) == [TEXT]
    assert skipped(section(path)) == []
    assert {domain.lower() for domain in texts(path)} == {"d"}


def test_a_big_compressed_file_is_cut_like_a_plain_one(tmp_path: Path) -> None:
    text = prose("abcdef", 3000)
    for folder, name, content in (("a", "d.txt", text.encode()), ("b", "d.txt.gz", gzip.compress(text.encode()))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    plain, packed = (list(documents(section(tmp_path / folder))) for folder in "ab")
    assert plain == packed and len(plain) > 1


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder as people have them: text beside a table, documentation, metadata and an archive."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(lines({"text": TEXT})))
    (tmp_path / "README").write_text("About this data set")
    (tmp_path / "README.md").write_text("About this data set")
    (tmp_path / "LICENSE.txt").write_text("Licence")
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "archive.tar.gz").write_bytes(gzip.compress(b"tar"))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=1))
    (tmp_path / "list.json").write_text('[{"text": "a"}]')
    (tmp_path / "_SUCCESS").touch()
    return tmp_path


def test_files_that_are_not_read_are_named_with_the_reason(mixed: Path) -> None:
    assert texts(mixed) == {"text": TEXT, "more": TEXT}
    assert skipped(section(mixed)) == [
        "LICENSE.txt (describes the data)",
        "README (describes the data)",
        "README.md (describes the data)",
        "archive.tar.gz (unsupported format)",
        "dataset_info.json (not one JSON object per line with 'text')",
        "list.json (not one JSON object per line with 'text')",
        "table.csv (unsupported format)",
    ]


def test_preparing_names_the_files_that_are_not_read(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mixed / "text.txt").write_text(prose("abcdef", 300))
    config = ["data.validation_share=0.2"]
    from raymoe.data.prepare import prepare
    from tests.data.test_corpus import config as config_of

    for _ in range(2):  # also when the corpus comes from the cache
        prepare(config_of(mixed, mixed.parent / "cache", *config))
        printed = capsys.readouterr().err
        assert "7 files are not read" in printed and "table.csv (unsupported format)" in printed


def test_a_skipped_file_does_not_change_the_corpus(mixed: Path) -> None:
    before = digest(section(mixed))
    (mixed / "table.csv").write_text("c,d\n")
    assert digest(section(mixed)) == before
    (mixed / "more.jsonl.gz").write_bytes(gzip.compress(lines({"text": TEXT + "more"})))
    assert digest(section(mixed)) != before


def test_a_folder_without_text_names_what_it_has(mixed: Path) -> None:
    (mixed / "text.txt").unlink()
    (mixed / "more.jsonl.gz").unlink()
    for read in (lambda: list(documents(section(mixed))), lambda: check_source(section(mixed))):
        with pytest.raises(ValueError, match=r"no file in a supported format .* skipped: LICENSE\.txt .*table\.csv"):
            read()
    empty = mixed / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no file in a supported format .* it is empty"):
        check_source(section(empty))


def test_long_lists_of_files_are_cut() -> None:
    assert in_short([f"{i}" for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_documentation_given_by_itself_is_text(mixed: Path) -> None:
    assert texts(mixed / "README.md") == {"README": "About this data set"}


def test_a_json_file_given_by_itself_is_refused_with_the_expected_format(mixed: Path) -> None:
    with pytest.raises(ValueError, match=r"list\.json:1 is not a JSON object: .*jq -c"):
        list(documents(section(mixed / "list.json")))
    with pytest.raises(ValueError, match=r"dataset_info\.json:1 is not JSON .*jq -c"):
        list(documents(section(mixed / "dataset_info.json")))


def test_json_lines_with_another_column_are_skipped_by_that_name(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_bytes(lines({"body": TEXT}))
    (tmp_path / "d.txt").write_text(TEXT)
    assert skipped(section(tmp_path)) == ["d.json (not one JSON object per line with 'text')"]
    assert skipped(section(tmp_path, text_field="body")) == []


@pytest.mark.parametrize("cut", [1, 5, 12, 40, -8, -1])
def test_damaged_gzip_files_are_named(tmp_path: Path, cut: int) -> None:
    whole = gzip.compress(prose("abcdef", 200).encode())
    (tmp_path / "d.txt.gz").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"d\.txt\.gz is not a readable gzip file .*download it again"):
        list(documents(section(tmp_path / "d.txt.gz")))
    (tmp_path / "d.txt.gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"d\.txt\.gz is not a readable gzip file"):
        list(documents(section(tmp_path / "d.txt.gz")))


# Encodings


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["d.txt", "d.jsonl", "d.txt.gz"])
def test_utf_16_and_32_are_named_and_the_command_converts_them(tmp_path: Path, encoding: str, name: str) -> None:
    """The advice is run as it is printed: its result is the text."""
    text = json.dumps({"text": TEXT}) + "\n" if "jsonl" in name else TEXT
    raw = text.encode(encoding) if encoding in ("utf-16", "utf-32") else ("\ufeff" + text).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    family = encoding[:6].upper()
    with pytest.raises(ValueError, match=rf"is {family} \(byte order mark [0-9A-F ]+\), not UTF-8") as caught:
        list(documents(section(tmp_path / name)))
    assert "latin" not in str(caught.value).lower()
    command = str(caught.value).split("convert it with: ")[1]
    if shutil.which("iconv") is None:
        pytest.skip("iconv is not installed")
    subprocess.run(["bash", "-c", command], check=True, timeout=30)
    (tmp_path / name).unlink()
    assert list(texts(tmp_path).values()) == [TEXT]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_found_by_its_zeros(tmp_path: Path, encoding: str) -> None:
    """As UTF-8 it would be text in which every second character is NUL."""
    (tmp_path / "d.txt").write_bytes("plain words\n".encode(encoding))
    with pytest.raises(ValueError, match=rf"is {encoding.upper()[:6]}{encoding.upper()[-2:]} "):
        list(documents(section(tmp_path / "d.txt")))


def test_other_encodings_are_offered_as_a_guess(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes("café\n".encode("latin1"))
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 3: convert it. If it is Latin-1: iconv -f LATIN1"):
        list(documents(section(tmp_path / "d.txt")))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(("é" * 10 + "\n").encode() + b"\xc3"))
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 21: .*gzip -dc"):
        list(documents(section(tmp_path / "d.txt.gz")))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=60))
def test_utf_8_is_never_taken_for_another_encoding(text: str) -> None:
    assert foreign_encoding(text.encode()) is None


def test_names_with_spaces_are_quoted_in_the_command(tmp_path: Path) -> None:
    (tmp_path / "my text.txt").write_bytes(TEXT.encode("utf-16"))
    with pytest.raises(ValueError, match=r"UTF-8 '.*/my text\.txt' > '.*/utf8-my text\.txt'"):
        open_text(tmp_path / "my text.txt")


def test_a_corpus_of_compressed_files_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "d.txt.gz").write_bytes(gzip.compress(prose("abcdef", 300).encode()))
    assert prepared(tmp_path / "text", tmp_path / "cache").domains == ("d",)
