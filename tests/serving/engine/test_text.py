"""Incremental detokenization against the text of all tokens, and stop strings against `str.find`."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.serving.engine.text import Detokenizer, StopStrings
from tests.support.served import MODEL, TEXT, tokenizer

TOKENIZER = tokenizer()

TOKENS = st.one_of(
    st.lists(st.integers(1, MODEL.vocabulary - 21), max_size=60),
    st.text(max_size=40).map(lambda text: TOKENIZER.encode(text).ids),
    st.text(alphabet="🙂日é a", max_size=40).map(lambda text: TOKENIZER.encode(text).ids),
)


@settings(max_examples=200, deadline=None)
@given(TOKENS, TOKENS)
def test_pieces_join_to_the_text_of_all_tokens(context: list[int], tokens: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert "".join(map(detokenizer.push, tokens)) + detokenizer.flush() == TOKENIZER.decode(tokens)
    before = TOKENIZER.encode(TEXT).ids + context
    detokenizer = Detokenizer(TOKENIZER, before)
    text = "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
    shown = TOKENIZER.decode(before)
    assert shown.removesuffix("\ufffd") + text == TOKENIZER.decode(before + tokens)


def test_a_character_comes_whole() -> None:
    tokens = TOKENIZER.encode("🛰").ids
    assert len(tokens) > 2
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(t) for t in tokens] == [""] * (len(tokens) - 1) + ["🛰"]
    cut = Detokenizer(TOKENIZER)
    assert cut.push(tokens[0]) == "" and cut.flush() == "\ufffd" and cut.flush() == ""


def plain_stop(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, int | None]:
    """The text up to the first stop that is in it after some piece, and after how many pieces that was."""
    text = ""
    for i, piece in enumerate(pieces):
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], i + 1
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_end_the_text_where_find_does(pieces: list[str], stops: list[str]) -> None:
    expected, at = plain_stop(pieces, stops)
    matcher, out = StopStrings(stops), ""
    for i, piece in enumerate(pieces):
        out += matcher.push(piece)
        assert expected.startswith(out)
        assert matcher.found == (at == i + 1)
        if matcher.found:
            break
        text = "".join(pieces[: i + 1])
        held = text[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stops)  # nothing is held back without a reason
    assert out + ("" if matcher.found else matcher.flush()) == expected
