"""Latency metrics on a trace whose answers are known."""

from __future__ import annotations

import pytest

from minillm.outputs import CompletionOutput, RequestMetrics, RequestOutput


def test_known_answer_trace() -> None:
    first = RequestMetrics(arrival_time=0.0, token_times=[[1.0, 1.1, 1.3, 1.6]])
    assert first.ttft == 1.0 and first.e2el == 1.6
    assert first.tpot == pytest.approx(0.2, abs=1e-12)  # dividing by n = 4 instead of n - 1 would give 0.15
    assert first.itl == pytest.approx([0.1, 0.2, 0.3], abs=1e-12)
    second = RequestMetrics(arrival_time=0.5, token_times=[[2.0, 2.1]])
    assert second.ttft == 1.5 and second.e2el == pytest.approx(1.6) and second.tpot == pytest.approx(0.1)


def test_one_token_has_no_tpot_and_nothing_has_no_ttft() -> None:
    assert RequestMetrics(1.0, [[2.0]]).tpot is None
    assert RequestMetrics(1.0, [[2.0]]).itl == []
    empty = RequestMetrics(1.0, [[]])
    assert empty.ttft is None and empty.e2el is None and empty.queue_time is None


def test_several_completions() -> None:
    metrics = RequestMetrics(0.0, [[1.0, 2.0], [1.0, 1.5, 4.0]], first_scheduled_time=0.25)
    assert metrics.ttft == 1.0 and metrics.e2el == 4.0 and metrics.queue_time == 0.25
    assert metrics.tpot == pytest.approx((1.0 + 1.5) / 2)
    assert metrics.itl == [1.0, 0.5, 2.5]


def test_a_request_is_finished_when_all_its_completions_are() -> None:
    outputs = [CompletionOutput(0, finish_reason="stop"), CompletionOutput(1)]
    request = RequestOutput("0", None, [1], outputs, RequestMetrics(0.0))
    assert not request.finished
    outputs[1].finish_reason = "length"
    assert request.finished
