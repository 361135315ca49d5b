"""Text that is never taken back: property tests against the whole text at once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.outputs import CompletionOutput
from minillm.sampling import SamplingParams
from minillm.text import TextStream
from tests.test_llm import byte_tokenizer

TOKENIZER = byte_tokenizer()


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab\n é€🙂", max_size=30),
    stops=st.lists(st.text(alphabet="ab\n é€🙂", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_stop_string_that_completes_first(text: str, stops: list[str]) -> None:
    """Fed byte by byte, the stream shows exactly what a search through the growing text would leave."""
    output = CompletionOutput(0)
    stream = TextStream(output, TOKENIZER, SamplingParams(stop=stops))
    hit, shown = None, [""]
    for token in TOKENIZER.encode(text):
        output.token_ids.append(token)
        hit = stream.push(token)
        shown.append(output.text)
        if hit is not None:
            break
    else:
        stream.close()
    ends = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert hit is None and output.text == text
    else:
        first_complete = min(end for end, _, _ in ends)
        start, stop = min((s, name) for end, s, name in ends if end == first_complete)
        assert hit == stop and output.text == text[:start]
    assert all(later.startswith(earlier) for earlier, later in pairwise([*shown, output.text])), "text was taken back"


def test_half_a_character_becomes_a_replacement_only_at_the_end() -> None:
    output = CompletionOutput(0)
    stream = TextStream(output, TOKENIZER, SamplingParams())
    (token, _) = output.token_ids = TOKENIZER.encode("é")
    stream.push(token)
    assert output.text == ""
    stream.close()
    assert output.text == "\ufffd"
