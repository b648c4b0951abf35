"""Corpora: equal text gives equal streams from any source, and batches are a pure function of the step."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from raymoe.config import Config, override, preset
from raymoe.data import builtin, sources, tokens
from raymoe.data import prepare as data
from raymoe.data.corpus import Corpus
from raymoe.data.prepare import prepare, read_text
from raymoe.data.tokens import END_OF_TEXT, load_tokenizer, train_tokenizer

CONTEXT = 16


def prose(letters: str, lines: int, seed: int = 0) -> str:
    """Lines of made-up words of these letters."""
    chance = random.Random(seed)
    words = ["".join(chance.choices(letters, k=5)) for _ in range(200)]
    return "".join(" ".join(chance.choices(words, k=12)) + "\n" for _ in range(lines))


def config(path: object, cache: Path, *more: str) -> Config:
    small = ["model.vocabulary=300", f"model.context={CONTEXT}"]
    return override(preset("tiny"), [f"data.path={path}", f"data.cache={cache}", *small, *more])


def prepared(path: object, cache: Path, *more: str) -> Corpus:
    return Corpus.open(prepare(config(path, cache, *more), progress=False))


def decoded(corpus: Corpus, split: str, domain: str) -> str:
    return corpus.tokenizer.decode(corpus.stream(split, domain).tolist(), skip_special_tokens=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two domains that share no letter, one three times as long as the other."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "early.txt").write_text(prose("abcdef", 900))
    (folder / "late.txt").write_text(prose("uvwxyz", 300))
    return prepared(folder, tmp_path_factory.mktemp("cache"))


# Batches


def epoch(corpus: Corpus, number: int, seed: int = 0) -> list[tuple[int, ...]]:
    """The windows of an epoch, in the order in which one-sequence steps read them."""
    total = corpus.windows(CONTEXT)
    rows = [
        corpus.batch(seed=seed, step=number * total + i, global_batch=1, context=CONTEXT, rows=range(1))
        for i in range(total)
    ]
    return [(int(batch.domain[0]), *batch.tokens[0].tolist()) for batch in rows]


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 24), max_size=4), seed=st.integers(0, 3))
def test_rows_do_not_depend_on_the_rank(corpus: Corpus, step: int, cuts: list[int], seed: int) -> None:
    arguments = dict(seed=seed, step=step, global_batch=24, context=CONTEXT)
    whole = corpus.batch(rows=range(24), **arguments)
    edges = [0, *sorted(cuts), 24]
    parts = [corpus.batch(rows=range(a, b), **arguments) for a, b in zip(edges, edges[1:], strict=False)]
    for field in range(3):
        np.testing.assert_array_equal(whole[field], np.concatenate([part[field] for part in parts]))
    assert whole.tokens.shape == (24, CONTEXT + 1) and whole.tokens.dtype == whole.domain.dtype == np.int64
    assert whole.mask.all()


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(corpus: Corpus) -> None:
    expected = []
    for i, domain in enumerate(corpus.domains):
        stream = corpus.stream("train", domain).tolist()
        starts = range(0, len(stream) - CONTEXT, CONTEXT)  # each token but the first and a rest is a target once
        expected += [(i, *stream[at : at + CONTEXT + 1]) for at in starts]
    first, second = epoch(corpus, 0), epoch(corpus, 1)
    assert Counter(first) == Counter(second) == Counter(expected)
    assert first != second and first != epoch(corpus, 0, seed=1)


def test_a_step_may_end_one_epoch_and_begin_the_next(corpus: Corpus) -> None:
    size = 10
    step = corpus.windows(CONTEXT) // size
    batch = corpus.batch(seed=0, step=step, global_batch=size, context=CONTEXT, rows=range(size))
    singles = (epoch(corpus, 0) + epoch(corpus, 1))[step * size : (step + 1) * size]
    assert [tuple(row) for row in np.column_stack([batch.domain, batch.tokens]).tolist()] == singles


def test_no_window_crosses_domains(corpus: Corpus) -> None:
    letters = {"early": set("abcdef"), "late": set("uvwxyz")}
    for domain, *ids in epoch(corpus, 0):
        text = set(corpus.tokenizer.decode(ids)) - set(" \n")
        assert text and text <= letters[corpus.domains[domain]]


def test_validation_counts_every_held_out_token_once(corpus: Corpus) -> None:
    total = corpus.validation_windows(CONTEXT)
    batch = corpus.validation(context=CONTEXT, limit=None, rows=range(total))
    for i, domain in enumerate(corpus.domains):
        stream = corpus.stream("validation", domain)
        here = batch.domain == i
        np.testing.assert_array_equal(batch.tokens[here][:, 1:][batch.mask[here]], stream[1:])
        np.testing.assert_array_equal(batch.tokens[here][:, :-1][batch.mask[here]], stream[:-1])
        assert (len(stream) - 1) % CONTEXT and not batch.mask[here][-1].all(), "the last window is partial"
    halves = [corpus.validation(context=CONTEXT, limit=None, rows=r) for r in (range(5), range(5, total))]
    np.testing.assert_array_equal(np.concatenate([half.tokens for half in halves]), batch.tokens)
    assert corpus.validation(context=CONTEXT, limit=None, rows=range(0)).tokens.shape == (0, CONTEXT + 1)


def test_a_limited_validation_is_spread_over_domains_by_size(corpus: Corpus) -> None:
    assert corpus.validation_windows(CONTEXT, 12) == 12
    few = corpus.validation(context=CONTEXT, limit=12, rows=range(12))
    assert np.bincount(few.domain).tolist() == [9, 3]
    whole = corpus.validation(context=CONTEXT, limit=None, rows=range(corpus.validation_windows(CONTEXT)))
    assert {tuple(row) for row in few.tokens.tolist()} < {tuple(row) for row in whole.tokens.tolist()}


# Holding out


def jsonl(path: Path, texts: list[str], **more: str) -> Path:
    path.write_text("".join(json.dumps({"text": text, **more}, ensure_ascii=False) + "\n" for text in texts))
    return path


SHAPES = {
    "many": [prose("abcdef", 1 + i % 7, i) for i in range(300)],
    "one": [prose("abcdef", 1000)],
    "tiny and long": [prose("abcdef", 900, 1), prose("abcdef", 900, 2), prose("abcdef", 2, 3)],
    "one line": [prose("abcdef", 1000).replace("\n", " ")],
    "a title and one line": ["Title\n" + prose("abcdef", 1000).replace("\n", " ")],
}


@pytest.mark.parametrize("texts", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_the_held_out_share_is_close_and_disjoint(tmp_path: Path, texts: list[str], share: float) -> None:
    corpus = prepared(jsonl(tmp_path / "d.jsonl", texts), tmp_path, f"data.validation_share={share}")
    train, held = (decoded(corpus, split, "d").split(END_OF_TEXT) for split in ("train", "validation"))
    size = sum(map(len, held))
    assert abs(size / sum(map(len, texts)) - share) < 0.1 * share
    assert sorted("".join(train + held)) == sorted("".join(texts)), "what is held out is not trained on"
    assert {text for text in held if text} <= {text[-len(part) :] for text in texts for part in held if part}


@pytest.mark.parametrize("texts", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_tuning_split_is_the_end_of_the_training_text_of_each_domain(
    tmp_path: Path, texts: list[str], share: float
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    jsonl(folder / "d.jsonl", texts)
    (folder / "other.txt").write_text(prose("uvwxyz", 400))
    plain, tuned = prepared(folder, tmp_path), prepared(folder, tmp_path, f"data.tune_share={share}")
    assert plain.tokenizer.to_str() == tuned.tokenizer.to_str(), "the same tokens with and without it"
    for domain in plain.domains:
        train = decoded(plain, "train", domain)
        kept, tail = (decoded(tuned, split, domain) for split in ("train", "validation"))
        border = "" if kept + tail == train else END_OF_TEXT  # the document at the border is cut
        assert kept.removesuffix(border) + tail == train
        assert len(tail) / len(train) == pytest.approx(share, rel=0.15)
        held = decoded(plain, "validation", domain)
        assert not any(line in kept + tail for line in held.splitlines() if len(line) > 50), "never read"
        assert tuned.bytes("validation", domain) == len(tail.replace(END_OF_TEXT, ""))


def test_without_a_tuning_split_the_fingerprint_is_that_of_earlier_versions(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [prose("abcdef", 30, i) for i in range(30)])
    assert prepare(config(path, tmp_path), progress=False).name == "4f5e4bec21d72a65"


def test_a_big_file_is_held_out_in_pieces_and_every_border_is_marked(tmp_path: Path) -> None:
    folder = tmp_path / "text" / "domain"
    folder.mkdir(parents=True)
    texts = [prose("abcdef", 5000, 1), prose("uvwxyz", 5000, 2)]
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    corpus = prepared(folder.parent, tmp_path, "data.validation_share=0.3")
    segments = []
    for split in "train", "validation":
        found = [part for part in decoded(corpus, split, "domain").split(END_OF_TEXT) if part]
        assert len(found) > 1
        assert all(any(part in text for text in texts) for part in found), "a segment runs on in the file it is from"
        assert all(part.endswith("\n") for part in found)
        segments += found
    assert sum(map(len, segments)) == sum(map(len, texts))
    assert sum(map(len, found)) / sum(map(len, texts)) == pytest.approx(0.3, abs=0.06)


def test_the_sources_own_splits_are_used_and_its_test_split_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    texts = {"train": prose("abcdef", 300), "valid": prose("uvwxyz", 20), "test": prose("mnopqr", 300)}
    for split, text in texts.items():
        (folder / f"wiki.{split}.tokens").write_text(text)
    corpus = prepared(folder, tmp_path)
    assert corpus.domains == ("wiki",)
    assert decoded(corpus, "train", "wiki").removesuffix(END_OF_TEXT) == texts["train"]
    assert decoded(corpus, "validation", "wiki").removesuffix(END_OF_TEXT) == texts["valid"]


# Files


def test_the_same_texts_in_any_format_give_the_same_corpus(tmp_path: Path) -> None:
    texts = [prose("abcdef", 10 + i, i) for i in range(20)]
    table = pa.table({"other": list(range(20)), "text": texts})
    jsonl(tmp_path / "d.jsonl", texts)
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    with pa.ipc.new_file(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    (tmp_path / "stream").mkdir()
    with pa.ipc.new_stream(str(tmp_path / "stream" / "d.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    (tmp_path / "files" / "d").mkdir(parents=True)
    for i, text in enumerate(texts):
        (tmp_path / "files" / "d" / f"{i:02d}.txt").write_text(text)
    made = {
        name: prepared(tmp_path / name, tmp_path / "cache")
        for name in ("d.jsonl", "d.parquet", "d.arrow", "stream/d.arrow", "files")
    }
    first = made["d.jsonl"]
    assert Counter(part for split in ("train", "validation") for part in decoded(first, split, "d").split(END_OF_TEXT))[
        texts[0]
    ]
    for other in made.values():
        assert other.domains == ("d",)
        for split in "train", "validation":
            np.testing.assert_array_equal(other.stream(split, "d"), first.stream(split, "d"))


def test_a_column_labels_the_domains(tmp_path: Path) -> None:
    rows = [{"body": prose(letters, 60), "kind": kind} for letters, kind in [("abc", "a"), ("xyz", "b/c")] * 10]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepared(tmp_path / "d.jsonl", tmp_path, "data.text_field=body", "data.domain_field=kind")
    assert corpus.domains == ("a", "b/c")
    assert set(decoded(corpus, "train", "b/c").replace(END_OF_TEXT, "")) == set("xyz \n")


def test_the_size_of_a_text_is_counted_in_bytes(tmp_path: Path) -> None:
    """Bits per byte divides by it, so a character of two bytes counts twice."""
    texts = {"train": "é two <unk> . \n" * 50, "valid": "é\n" * 30}
    folder = tmp_path / "text"
    folder.mkdir()
    for split, text in texts.items():
        (folder / f"wiki.{split}.tokens").write_text(text)
    corpus = prepared(folder, tmp_path)
    assert corpus.bytes("train", "wiki") == len(texts["train"].encode())
    assert corpus.validation_text()["wiki"].bytes == 3 * 30


def test_an_evaluated_text_is_read_whole(tmp_path: Path) -> None:
    texts = [prose("abcdef", 5, i) for i in range(3)]
    section = replace(preset("tiny").data, path=str(jsonl(tmp_path / "d.jsonl", texts)))
    tokenizer = train_tokenizer(texts, 300)
    found = read_text(section, tokenizer)
    assert list(found) == ["d"] and found["d"].bytes == sum(map(len, texts))
    assert tokenizer.decode(found["d"].tokens.tolist(), skip_special_tokens=False) == END_OF_TEXT.join(texts)


def test_the_file_names_of_the_hub_name_their_split(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for split, letters in (("train", "abcdef"), ("validation", "uvwxyz"), ("test", "mnopqr")):
        rows = pa.table({"text": [prose(letters, 10, i) for i in range(20)]})
        pq.write_table(rows, folder / f"{split}-00000-of-00001.parquet")
    corpus = prepared(folder, tmp_path)
    (domain,) = corpus.domains
    assert set(decoded(corpus, "train", domain).replace(END_OF_TEXT, "")) == set("abcdef \n")
    assert set(decoded(corpus, "validation", domain).replace(END_OF_TEXT, "")) == set("uvwxyz \n")


def test_a_text_may_hold_any_kind_of_line_end(tmp_path: Path) -> None:
    texts = [prose("abcdef", 30, i) + "a\u2028b\x85c\x0cd\r\n" for i in range(20)]
    section = replace(preset("tiny").data, path=str(jsonl(tmp_path / "d.jsonl", texts)))
    tokens = read_text(section, TOKENIZER)["d"].tokens
    assert TOKENIZER.decode(tokens.tolist(), skip_special_tokens=False) == END_OF_TEXT.join(texts)


def test_hidden_folders_are_left_out_and_upper_case_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "ab").write_bytes(b"\xff\xfe\x00")
    (folder / "d.TXT").write_bytes(b"\xef\xbb\xbf" + prose("abcdef", 300).encode())
    corpus = prepared(folder, tmp_path)
    assert corpus.domains == ("d",) and set(decoded(corpus, "train", "d").replace(END_OF_TEXT, "")) == set("abcdef \n")


def test_a_file_given_by_itself_is_whole_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text(prose("abcdef", 300))
    corpus = prepared(tmp_path / "test.txt", tmp_path)
    assert len(corpus.stream("train", corpus.domains[0])) > 10 * len(corpus.stream("validation", corpus.domains[0])) > 0


def test_marker_files_and_rows_without_text_are_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "_SUCCESS").write_bytes(b"")
    texts = [prose("abcdef", 3, i) for i in range(40)]
    pq.write_table(pa.table({"text": [None, *texts, ""]}), folder / "d.parquet")
    section = replace(preset("tiny").data, path=str(folder))
    tokens = read_text(section, TOKENIZER)["d"].tokens
    assert TOKENIZER.decode(tokens.tolist(), skip_special_tokens=False) == END_OF_TEXT.join(texts)


@settings(max_examples=50, deadline=None)
@given(text=st.text("a é👧\n", max_size=200), block=st.integers(1, 30))
def test_a_text_is_cut_alike_however_it_is_read(text: str, block: int) -> None:
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    with pytest.MonkeyPatch.context() as small:
        small.setattr(sources, "PIECE", 20)
        pieces = list(sources._pieces(blocks, "d", None))
        assert pieces == list(sources._pieces([text], "d", None))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(text)
    assert all(0 < len(piece.text) <= 20 for piece in pieces)
    assert all(piece.text.endswith("\n") for piece in pieces[:-1] if "\n" in piece.text)


def test_bytes_that_are_no_text_are_found_far_into_a_file(tmp_path: Path) -> None:
    good = "é\n".encode() * 1_000_000
    (tmp_path / "d.txt").write_bytes(good + b"\xc3\n")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    for name, at in (("d.txt", len(good)), ("d.jsonl", 14 + 13)):
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8 at byte {at}:"):
            list(sources.documents(replace(preset("tiny").data, path=str(tmp_path / name))))


def test_damaged_tables_are_refused_before_their_bytes_are_followed(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {i}é" for i in range(50)]})
    pq.write_table(table, tmp_path / "d.parquet")
    with pa.ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    chance = random.Random(0)
    for name in "d.parquet", "d.arrow":
        good = (tmp_path / name).read_bytes()
        section = replace(preset("tiny").data, path=str(tmp_path / name))
        refused = 0
        for _ in range(60):
            bad = bytearray(good[: chance.randrange(1, len(good))] if chance.random() < 0.3 else good)
            for _ in range(20):
                bad[chance.randrange(len(bad))] = chance.randrange(256)
            (tmp_path / name).write_bytes(bad)
            try:
                list(sources.documents(section))
            except ValueError as error:
                refused += 1
                assert str(tmp_path / name) in str(error)
        assert refused > 50


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "ab \\ud800"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:1 has half a surrogate pair at character 3"):
        prepared(tmp_path / "d.jsonl", tmp_path)


# Tokenizers

TOKENIZER = train_tokenizer([prose("abcdef", 50)], 300)


@settings(max_examples=60, deadline=None)
@given(st.text() | st.sampled_from([END_OF_TEXT, f"a{END_OF_TEXT}\n", "\0", "\ufeff", "\r\n", "  \u2028 ", "👩‍👩‍👧"]))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_to_id(END_OF_TEXT) not in ids, "a text cannot spell a document's end"


def test_the_tokens_do_not_depend_on_how_many_texts_are_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [sources.Document("d", None, prose("abcdef", 2, i), last=i % 2 == 0) for i in range(20)]
    together = tokens.encode(TOKENIZER, texts)
    monkeypatch.setattr(tokens, "ENCODED_AT_ONCE", 300)
    np.testing.assert_array_equal(tokens.encode(TOKENIZER, texts), together)
    joined = "".join(text.text + END_OF_TEXT * text.last for text in texts)
    assert TOKENIZER.decode(together.tolist(), skip_special_tokens=False) == joined


def test_the_same_texts_train_the_same_tokenizer() -> None:
    assert train_tokenizer([prose("abcdef", 50)], 300).to_str() == TOKENIZER.to_str()
    assert TOKENIZER.get_vocab_size() == 300
    assert train_tokenizer(["ab"], 300).get_vocab_size() <= 258, "a small text has a small vocabulary"
    with pytest.raises(ValueError, match="model.vocabulary=256.*need 257"):
        train_tokenizer(["ab"], 256)


def test_the_tokenizer_sees_every_domain_of_a_big_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TOKENIZER_SAMPLE", 300_000)
    (tmp_path / "text").mkdir()
    for domain, letters in (("a", "abcdef"), ("z", "uvwxyz")):
        (tmp_path / "text" / f"{domain}.txt").write_text(prose(letters, 10_000))
    learned = prepared(tmp_path / "text", tmp_path, "model.vocabulary=400").tokenizer.get_vocab()
    assert all(
        any(len(token) > 2 and set(token) <= set(letters) for token in learned) for letters in ("abcdef", "uvwxyz")
    )


def test_a_given_tokenizer_reads_all_of_the_text_and_adds_nothing(tmp_path: Path) -> None:
    given_one = train_tokenizer([prose("abcdef", 50)], 299)
    given_one.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    given_one.enable_truncation(8)
    given_one.enable_padding(length=100_000)
    given_one.save(str(tmp_path / "tokenizer.json"))
    text = prose("abcdef", 100)
    (tmp_path / "d.txt").write_text(text)
    corpus = prepared(tmp_path / "d.txt", tmp_path, f"data.tokenizer={tmp_path / 'tokenizer.json'}")
    assert "".join(decoded(corpus, split, "d").replace(END_OF_TEXT, "") for split in ("train", "validation")) == text
    assert corpus.vocabulary == 299 and max(corpus.stream("train", "d")) < 299


def test_end_of_text_is_added_to_a_tokenizer_without_it(tmp_path: Path) -> None:
    bare = json.loads(TOKENIZER.to_str())
    bare["added_tokens"], bare["model"]["vocab"] = [], {"a": 0, "b": 1}
    bare["model"]["merges"] = []
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(bare))
    assert load_tokenizer(path.read_bytes(), "t", 3).token_to_id(END_OF_TEXT) == 2
    with pytest.raises(ValueError, match="has 3 entries and model.vocabulary=2: set model.vocabulary=3 or more"):
        load_tokenizer(path.read_bytes(), "t", 2)


def test_ids_above_65535_are_kept(tmp_path: Path) -> None:
    wide = json.loads(TOKENIZER.to_str())
    wide["model"]["vocab"]["abc"] = 70_000
    wide["model"]["merges"] += [["a", "bc"]] if "bc" in wide["model"]["vocab"] else [["ab", "c"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(wide))
    (tmp_path / "d.txt").write_text(prose("abc", 300))
    given_one = f"data.tokenizer={tmp_path / 'tokenizer.json'}"
    with pytest.raises(ValueError, match="set model.vocabulary=70001 or more"):
        prepared(tmp_path / "d.txt", tmp_path, given_one)
    corpus = prepared(tmp_path / "d.txt", tmp_path, given_one, "model.vocabulary=70001")
    assert corpus.stream("train", "d").dtype == np.uint32 and corpus.vocabulary == 70_001


# The cache


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_preparing_is_deterministic(tmp_path: Path) -> None:
    for copy in "a", "b":
        (tmp_path / copy).mkdir()
        (tmp_path / copy / "x.txt").write_text(prose("abcdef", 300))
    one = prepare(config(tmp_path / "a", tmp_path / "one"), progress=False)
    two = prepare(config(tmp_path / "a", tmp_path / "two"), progress=False)
    assert one.name == two.name and content(one) == content(two)
    moved = prepare(config(tmp_path / "b", tmp_path / "two"), progress=False)
    assert moved == two, "the text counts, not its place"
    (tmp_path / "b" / "x.txt").write_text(prose("abcdef", 301))
    assert prepare(config(tmp_path / "b", tmp_path / "two"), progress=False) != two


@pytest.mark.parametrize(
    "change",
    [
        "run.seed=1",
        "model.vocabulary=301",
        "data.validation_share=0.1",
        "data.tune_share=0.1",
        "data.domain_field=kind",
    ],
)
def test_options_that_matter_make_another_corpus(tmp_path: Path, change: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", [prose("abcdef", 30, i) for i in range(30)], kind="k")
    one, other = (prepare(config(path, tmp_path, *more), progress=False) for more in ([], [change]))
    assert one != other
    same = prepare(config(path, tmp_path, "train.steps=7", "model.context=8"), progress=False)
    assert same == one, "the rest does not"


def test_a_cached_corpus_is_found_again_and_a_damaged_one_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.txt").write_text(prose("abcdef", 300))
    asked = config(tmp_path / "d.txt", tmp_path / "cache")
    folder = prepare(asked, progress=False)
    good = content(folder)
    with monkeypatch.context() as broken:
        broken.setattr(data, "_write", lambda *_: pytest.fail("read again"))
        assert prepare(asked, progress=False) == folder
    shard = next(name for name in good if name.startswith("train"))
    damages = [
        lambda: (folder / shard).write_bytes(good[shard][:-1]),
        lambda: (folder / shard).unlink(),
        lambda: (folder / "tokenizer.json").unlink(),
        lambda: (folder / "corpus.json").write_text("{"),
        lambda: (folder / "corpus.json").write_text("[]"),
    ]
    for damage in damages:
        damage()
        with pytest.raises(ValueError, match="not a complete corpus"):
            Corpus.open(folder)
        assert prepare(asked, progress=False) == folder
        assert content(folder) == good
        assert f"{folder} is damaged" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing temporary is left"


def test_concurrent_preparation_uses_the_first_finished_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.txt").write_text(prose("abcdef", 300))
    asked = config(tmp_path / "d.txt", tmp_path / "cache")
    write, winners = data._write, []

    def overtaken(*arguments: object) -> None:
        monkeypatch.setattr(data, "_write", write)
        winners.append(prepare(asked, progress=False))
        winners.append((winners[0] / "corpus.json").stat().st_ino)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(data, "_write", overtaken)
    folder = prepare(asked, progress=False)
    assert winners == [folder, (folder / "corpus.json").stat().st_ino]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_folder_is_absolute_and_others_may_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.txt").write_text(prose("abcdef", 300))
    monkeypatch.chdir(tmp_path)
    folder = prepare(config("d.txt", Path("cache")), progress=False)
    assert folder == tmp_path / "cache" / folder.name
    assert folder.stat().st_mode & 0o055 == 0o055


# What goes wrong


def test_errors_name_the_place_and_the_remedy(tmp_path: Path) -> None:
    text = prose("abcdef", 300)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "d.test.txt").write_text(text)
    bad = {"bytes.txt": text.encode() + b"caf\xe9\n", "empty.txt": b"", "short.txt": b"a b c\n", "table.csv": b"a,b\n"}
    bad |= {"torn.jsonl": b'{"text": "a"}\n{"text": "a\n', "list.jsonl": b"[1]\n", "number.jsonl": b'{"text": 3}\n'}
    bad |= {"other.jsonl": b'{"body": "a", "kind": "b"}\n', "bad.parquet": b"PAR1", "bad.arrow": b"ARROW1"}
    bad |= {"bad.json": b"{", "blank.jsonl": b"\n"}
    for name, raw in bad.items():
        (tmp_path / name).write_bytes(raw)
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "d.txt").write_text(text)
    at = len(text) + 3
    expected = {
        "absent.txt": (FileNotFoundError, r"absent\.txt: there is no such file or folder"),
        "none": (ValueError, r"no file in a supported format .*; skipped: image\.png \(unsupported format\)"),
        "table.csv": (ValueError, r"\.csv files are not supported"),
        "bytes.txt": (ValueError, rf"bytes\.txt is not UTF-8 at byte {at}: convert it.*iconv"),
        "empty.txt": (ValueError, r"empty\.txt is empty: remove it"),
        "blank.jsonl": (ValueError, "has no text"),
        "test": (ValueError, "has no text outside a test split"),
        "short.txt": (ValueError, "make no window of model.context=16: give more text"),
        "torn.jsonl": (ValueError, r"torn\.jsonl:2 is not JSON"),
        "list.jsonl": (ValueError, r"list\.jsonl:1 is not a JSON object"),
        "number.jsonl": (ValueError, r"number\.jsonl:1: 'text' is int, not text: set data\.text_field"),
        "other.jsonl": (ValueError, r"other\.jsonl:1 has no 'text': set data\.text_field to one of 'body', 'kind'"),
        "other.parquet": (ValueError, r"other\.parquet has no 'text': set data\.text_field to one of 'body'"),
        "bad.parquet": (ValueError, r"bad\.parquet is not a readable parquet file"),
        "bad.arrow": (ValueError, r"bad\.arrow is not a readable arrow file"),
    }
    for name, (kind, message) in expected.items():
        with pytest.raises(kind, match=message):
            prepared(tmp_path / name, tmp_path / "cache")
    for tokenizer, kind, message in [
        (tmp_path / "no.json", FileNotFoundError, r"data\.tokenizer=.*no such file"),
        (tmp_path / "bad.json", ValueError, r"data\.tokenizer=.*not a tokenizer\.json"),
    ]:
        with pytest.raises(kind, match=message):
            prepared(tmp_path / "d.txt", tmp_path / "cache", f"data.tokenizer={tokenizer}")
    with pytest.raises(ValueError, match=r"has no 'topic': set data\.domain_field to one of 'text'"):
        prepared(jsonl(tmp_path / "d.jsonl", [text]), tmp_path / "cache", "data.domain_field=topic")
    assert not list((tmp_path / "cache").glob(".*")), "nothing half-made is left"


@pytest.mark.parametrize("path", ["./here", "~/no/such", "a/b/c", "gone.parquet", "/no such/text"])
def test_a_path_is_not_looked_up_on_the_hub(path: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"data.path={path}: there is no such file or folder here"):
        prepared(path, tmp_path)


def test_a_short_validation_split_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "d.train.txt").write_text(prose("abcdef", 300))
    (tmp_path / "text" / "d.valid.txt").write_text("")
    with pytest.raises(ValueError, match=r"d\.valid\.txt is empty"):
        prepared(tmp_path / "text", tmp_path / "cache")
    (tmp_path / "text" / "d.valid.txt").write_text("x")
    (tmp_path / "text" / "d.train.txt").write_text(prose("abcdef", 3))
    with pytest.raises(ValueError, match="make no window"):
        prepared(tmp_path / "text", tmp_path / "cache", "model.context=4096")


# The hub


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is unreachable."""

    def info(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "dataset_info", info)


@pytest.mark.usefixtures("no_hub")
def test_hub_data_brings_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, subset: str | None = None) -> datasets.DatasetDict:
        asked.append((name, subset, datasets.config.HF_HUB_OFFLINE))
        rows = {"train": ("abcdef", 40), "validation": ("uvwxyz", 4), "test": ("mnopqr", 40)}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_dict({"text": [prose(*kind)] * 20}) for split, kind in rows.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    before = datasets.config.HF_HUB_OFFLINE
    corpus = prepared("someone/letters:easy", tmp_path)
    assert asked[-1] == ("someone/letters", "easy", True), "without a network, what is cached is used at once"
    assert corpus.domains == ("letters",) and before == datasets.config.HF_HUB_OFFLINE
    assert set(decoded(corpus, "train", "letters").replace(END_OF_TEXT, "")) == set("abcdef \n")
    assert set(decoded(corpus, "validation", "letters").replace(END_OF_TEXT, "")) == set("uvwxyz \n")


@pytest.mark.usefixtures("no_hub")
def test_the_hubs_wikitext_is_the_original_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["", " = Title = \n", "", " one two <unk> . \n"] * 50
    sets = datasets.DatasetDict(
        {s: datasets.Dataset.from_dict({"text": rows}) for s in ("train", "validation", "test")}
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or sets)
    corpus = prepared("wikitext-103", tmp_path)
    assert asked[-1] == ("Salesforce/wikitext", "wikitext-103-raw-v1")
    assert decoded(corpus, "validation", "wikitext").removesuffix(END_OF_TEXT) == (
        " \n = Title = \n \n one two <unk> . \n" * 50
    )


def test_an_error_of_the_hub_is_one_sentence_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise ConnectionError("Config name is missing.\nPlease pick one among ['easy', 'hard']")

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ValueError, match=r"data\.path=some/set: .*pick one among \['easy', 'hard'\].*owner/name:subset"
    ):
        prepared("some/set", tmp_path)


@pytest.mark.usefixtures("no_hub")
def test_hub_data_without_the_column_names_those_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"body": ["a"], "kind": ["b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=rows))
    with pytest.raises(
        ValueError, match=r"some/set train has no 'text': set data\.text_field to one of 'body', 'kind'"
    ):
        prepared("some/set", tmp_path)
    labelled = datasets.Dataset.from_dict({"body": [prose("abc", 60), prose("xyz", 60)] * 10, "kind": ["a", "z"] * 10})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=labelled))
    corpus = prepared("some/set", tmp_path, "data.text_field=body", "data.domain_field=kind")
    assert corpus.domains == ("a", "z") and len(corpus.stream("validation", "z"))


@pytest.mark.usefixtures("no_hub")
def test_an_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path=no/such: .*Name or service not known.*HF_ENDPOINT.*builtin"):
        prepared("no/such", tmp_path)


# What is built in


def test_the_built_in_corpus_is_real_text_in_domains_that_share_none() -> None:
    sizes: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    sources, paragraphs = [], []
    for domain, text in builtin.documents():
        sizes[domain] += len(text.encode())
        texts[text] += 1
        if domain == "docstrings":
            paragraphs += [" ".join(part.split()) for part in text.split("\n\n") if len(part) > 100]
        elif domain in ("source", "packages"):
            sources.append(" ".join(text.split()))
    assert len(sizes) >= 4 and 8e6 <= sizes.total() <= 14e6
    assert max(sizes.values()) < sizes.total() / 2 and max(texts.values()) == 1
    source = "\n".join(sources)
    some = random.Random(0).sample(paragraphs, 100)
    assert sum(paragraph in source for paragraph in some) < 0.02 * len(some)


def test_a_built_in_corpus_that_is_too_small_is_refused_with_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_standard_library", lambda: ())
    monkeypatch.setattr(builtin, "PACKAGES", ())
    with pytest.raises(ValueError, match=r"only 0\.5 MB.*'source': 0.*data\.path"):
        list(builtin.documents())


def test_the_built_in_corpus_is_gathered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []

    def documents() -> list[tuple[str, str]]:
        gathered.append(1)
        return [("a", prose("abcdef", 300)), ("b", prose("uvwxyz", 300))]

    monkeypatch.setattr(builtin, "documents", documents)
    first = prepared("builtin", tmp_path)
    assert first.domains == ("a", "b") and prepared("builtin", tmp_path).folder == first.folder
    assert gathered == [1]
