"""The front door: what vLLM's users expect of generate and stream, token for token and character for character."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from minillm import LLM, SamplingParams
from minillm.course.training.checkpoint import save_checkpoint
from minillm.errors import ConfigError, RequestError
from minillm.generate import generate, prefill
from minillm.model.loader import load_model
from minillm.model.tokenizer import Tokenizer
from tests.model.test_loader import unpacked

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def byte_tokenizer() -> Tokenizer:
    """One token per byte: characters beyond ASCII take several, stop strings always do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_checkpoint(unpacked("qwen3", vocab_size=256), path, dtype=torch.float32)
    return path


@pytest.fixture
def llm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setattr("minillm.llm.load_tokenizer", lambda name: byte_tokenizer())
    llm = LLM(folder, device="cpu", dtype="float32", num_blocks=60, debug=True)
    yield llm
    assert not llm.engine.has_unfinished and not llm.processor._live
    assert llm.engine.pool.num_free == llm.engine.pool.num_usable


def test_generate_equals_the_plain_loop_for_every_prompt(llm: LLM) -> None:
    prompts = ["def f(x):", "import os", "a", [5, 6, 7], {"prompt_token_ids": [9] * 40}]
    outputs = llm.generate(prompts, GREEDY, progress=False)
    assert [o.prompt for o in outputs] == ["def f(x):", "import os", "a", None, None]
    for output in outputs:
        alone = list(generate(llm.engine.model, output.prompt_token_ids, GREEDY))
        completion = output.outputs[0]
        assert completion.token_ids == alone
        assert completion.text == llm.tokenizer.decode(alone)
        assert completion.finish_reason == "length" and completion.stop_reason is None and output.finished


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    assert len(llm.generate("a", GREEDY, progress=False)) == 1
    assert len(llm.generate([1, 2], GREEDY, progress=False)) == 1
    assert llm.generate([], GREEDY, progress=False) == []


def test_metrics_come_from_the_clock_of_the_run(llm: LLM) -> None:
    metrics = llm.generate("abc", GREEDY, progress=False)[0].metrics
    assert len(metrics.token_times[0]) == 12 and len(metrics.itl) == 11
    assert 0 < metrics.queue_time < metrics.ttft < metrics.e2el
    assert metrics.tpot == pytest.approx((metrics.e2el - metrics.ttft) / 11)


def test_stream_shows_every_character_once(llm: LLM) -> None:
    final = llm.generate("abc", GREEDY, progress=False)[0].outputs[0]
    deltas, lengths = [], []
    for output in llm.stream("abc", GREEDY):
        deltas.append(output.outputs[0].delta)
        lengths.append(len(output.outputs[0].token_ids))
    assert "".join(deltas) == final.text
    assert lengths == list(range(1, 13))


def test_streams_and_generate_share_one_engine(llm: LLM) -> None:
    """A stream that is half read, a second stream, and a generate call in between: nobody loses a token."""
    expected = [llm.generate(p, GREEDY, progress=False)[0].outputs[0].text for p in ("abc", "xyz", "123")]
    first, second = llm.stream("abc", GREEDY), llm.stream("xyz", GREEDY)
    shown = {"abc": next(first).outputs[0].delta, "xyz": next(second).outputs[0].delta}
    assert llm.generate("123", GREEDY, progress=False)[0].outputs[0].text == expected[2]
    for stream in (second, first):
        for output in stream:
            shown[output.prompt] += output.outputs[0].delta
    assert [shown["abc"], shown["xyz"]] == expected[:2]


def test_leaving_a_stream_frees_everything(llm: LLM) -> None:
    for output in llm.stream(["abc", "xyz"], replace(GREEDY, n=2)):
        assert not output.finished
        break
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_strings_end_the_text_before_them(llm: LLM, length: int) -> None:
    """Whatever part of the known text is made the stop string, the text is what stands before its first occurrence,
    and a stream never shows a part of it."""
    for seed in range(100):
        params = replace(GREEDY, temperature=5.0, seed=seed, max_tokens=40)
        full = llm.generate("q", params, progress=False)[0].outputs[0].text
        plain = [full[i : i + length] for i in range(5, len(full) - 5) if "\ufffd" not in full[i : i + length]]
        if plain:
            break
    stop = plain[0]
    params = replace(params, stop=["never seen", stop])
    shown = "".join(output.outputs[0].delta for output in llm.stream("q", params))
    result = llm.generate("q", params, progress=False)[0].outputs[0]
    assert shown == result.text == full[: full.index(stop)]
    assert result.finish_reason == "stop" and result.stop_reason == stop
    assert len(result.token_ids) < 40


def test_stop_token_is_reported(llm: LLM) -> None:
    plain = llm.generate("q", GREEDY, progress=False)[0].outputs[0].token_ids
    result = llm.generate("q", replace(GREEDY, stop_token_ids=[plain[4]]), progress=False)[0].outputs[0]
    cut = plain.index(plain[4]) + 1
    assert result.token_ids == plain[:cut] and result.finish_reason == "stop" and result.stop_reason == plain[4]


def test_several_completions_differ_and_repeat(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=10, ignore_eos=True, temperature=2.0)
    first, again = (llm.generate("abc", params, progress=False)[0] for _ in range(2))
    tokens = [output.token_ids for output in first.outputs]
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len({tuple(t) for t in tokens}) == 3
    assert tokens == [output.token_ids for output in again.outputs]
    for output in first.outputs:
        alone = generate(llm.engine.model, first.prompt_token_ids, params, sample_index=output.index)
        assert output.token_ids == list(alone)


def test_parameters_per_prompt(llm: LLM) -> None:
    outputs = llm.generate(["a", "b"], [replace(GREEDY, max_tokens=3), replace(GREEDY, max_tokens=5)], progress=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 5]
    with pytest.raises(RequestError, match="2 prompts, but 1 sampling_params"):
        llm.generate(["a", "b"], [GREEDY])


def test_logprobs_are_those_of_the_raw_logits(llm: LLM) -> None:
    params = SamplingParams(temperature=0.5, top_k=5, seed=3, max_tokens=4, logprobs=2, ignore_eos=True)
    output = llm.generate("abc", params, progress=False)[0]
    result = output.outputs[0]
    total, tokens = 0.0, list(output.prompt_token_ids)
    for token, candidates in zip(result.token_ids, result.logprobs, strict=True):
        logits, _ = prefill(llm.engine.model, tokens)
        expected = logits.log_softmax(-1)
        best = expected.topk(2).indices.tolist()
        assert set(candidates) == {token, *best}
        for candidate, entry in candidates.items():
            assert entry.logprob == pytest.approx(float(expected[candidate]), abs=1e-4)
            assert entry.rank == int((expected > expected[candidate]).sum()) + 1
            assert entry.decoded_token == llm.tokenizer.decode([candidate])
        total += float(expected[token])
        tokens.append(token)
    assert result.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_a_refused_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.generate(["fine", ""], GREEDY)
    with pytest.raises(RequestError, match=r"the model has 512 positions"):
        llm.generate("a" * 504, GREEDY)
    assert llm.generate("fine", GREEDY, progress=False)[0].finished


def test_a_stream_refuses_at_once(llm: LLM) -> None:
    """Not at the first `next`, when the caller may be somewhere else."""
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.stream(["fine", ""], GREEDY)


def test_requests_of_the_engine_itself_go_on_beside_generate(llm: LLM) -> None:
    mine = llm.engine.add([1, 2, 3], replace(GREEDY, max_tokens=40), request_id="mine")
    (request,) = llm.engine.requests[mine]
    assert llm.generate("abc", GREEDY, progress=False)[0].finished
    list(llm.engine.run())
    assert request.tokens[3:] == list(generate(llm.engine.model, [1, 2, 3], replace(GREEDY, max_tokens=40)))


def test_ids_of_callers_and_of_the_engine_never_meet(llm: LLM) -> None:
    engine = llm.engine
    names = [engine.add([1], GREEDY, request_id="0"), engine.add([1], GREEDY), engine.add([1], GREEDY, request_id="1")]
    assert len(set(names)) == 3
    for taken in ("0", names[1], "#999", "#x"):
        with pytest.raises(RequestError, match="request_id"):
            engine.add([1], GREEDY, request_id=taken)
    list(engine.run())


def test_a_request_that_is_aborted_by_another_ends(llm: LLM) -> None:
    stream = llm.stream(["a", "b"], GREEDY)
    first = next(stream)
    llm.engine.abort(first.request_id)
    reasons = {output.request_id: output.outputs[0].finish_reason for output in stream}
    assert sorted(reasons.values()) == ["abort", "length"] and reasons[first.request_id] == "abort"


def test_threads_take_turns(llm: LLM) -> None:
    """Every caller gets the tokens of being alone; whoever steps takes the others along."""
    prompts = ["def f", "class A:", "import os", "for i in", "x = [1,", "if a =="] * 3
    want = {p: list(generate(llm.engine.model, llm.tokenizer.encode(p), GREEDY)) for p in set(prompts)}

    def call(prompt: str) -> list[int]:
        return llm.generate(prompt, GREEDY, progress=False)[0].outputs[0].token_ids

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(call, prompts)) == [want[prompt] for prompt in prompts]


def test_prompt_logprobs_do_not_depend_on_chunks_hits_or_company(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one pass over the prompt: in chunks of three, with a cached prefix, preempted, two completions."""
    monkeypatch.setattr("minillm.llm.load_tokenizer", lambda name: byte_tokenizer())
    llm = LLM(folder, device="cpu", dtype="float32", num_blocks=9, block_size=4, max_num_batched_tokens=3, debug=True)
    prompts = ["def f(x)", "def f(y):", "def f(x"]
    params = replace(GREEDY, prompt_logprobs=3, max_tokens=9, n=2)
    llm.generate(prompts[0], GREEDY, progress=False)
    outputs = llm.generate(prompts, params, progress=False)
    assert any(record.preempted for record in llm.engine.trace)
    for output in outputs:
        ids = output.prompt_token_ids
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(ids)
        for place, told in enumerate(output.prompt_logprobs[1:], 1):
            want = prefill(llm.engine.model, ids[:place])[0].log_softmax(-1)
            assert told is not None and set(told) == {ids[place], *want.topk(3).indices.tolist()}
            assert all(one.logprob == pytest.approx(float(want[token]), abs=1e-4) for token, one in told.items())


def test_bad_words_are_never_written(llm: LLM) -> None:
    """Up to the word the draws are the same; only its last token is out of the question."""
    for seed in range(200):
        params = replace(GREEDY, temperature=5.0, seed=seed, max_tokens=20)
        plain = llm.generate("ab", params, progress=False)[0].outputs[0]
        word = plain.text[3:5]
        if len(word) == 2 and word.isascii() and word.isprintable() and " " not in word:
            break
    output = llm.generate("ab", replace(params, bad_words=[word]), progress=False)[0].outputs[0]
    assert word in plain.text and word not in output.text
    ids = llm.tokenizer.encode(word)
    place = next(i for i in range(len(plain.token_ids)) if plain.token_ids[i : i + 2] == ids)
    assert output.token_ids[: place + 1] == plain.token_ids[: place + 1]
    assert output.token_ids[place + 1] != ids[1]


def test_a_stop_string_can_stay_and_can_be_too_early(llm: LLM) -> None:
    plain = llm.generate("ab", replace(GREEDY, max_tokens=20), progress=False)[0].outputs[0].text
    stop = plain[3]
    kept = replace(GREEDY, max_tokens=20, stop=stop, include_stop_str_in_output=True)
    output = llm.generate("ab", kept, progress=False)[0].outputs[0]
    assert output.text == plain[: plain.index(stop) + 1] and output.stop_reason == stop
    late = llm.generate("ab", replace(kept, min_tokens=6), progress=False)[0].outputs[0]
    assert len(late.token_ids) > 6 and late.text.startswith(plain[:6])


def test_a_setting_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'max_num_sequences'.*max_num_seqs"):
        LLM("tiny", max_num_sequences=3)


def test_the_bar_of_loading_can_be_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr("minillm.llm.load_tokenizer", lambda name: byte_tokenizer())
    monkeypatch.setattr(
        "minillm.llm.load_model", lambda *a, **how: (told.append(how["progress"]), load_model(*a, **how))[1]
    )
    for options in ({}, {"progress": False}):
        LLM(folder, device="cpu", num_blocks=2, **options)  # type: ignore[arg-type]
    assert told == [True, False]


def test_a_trace_can_be_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.llm.load_tokenizer", lambda name: byte_tokenizer())
    llm = LLM(folder, device="cpu", dtype="float32", num_blocks=60, trace_bytes=0)
    llm.generate("abc", GREEDY, progress=False)
    assert len(llm.engine.trace) == 0
