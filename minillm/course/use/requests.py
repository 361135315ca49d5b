"""A learner's metrics of a request (exercise 01), and scheduler (exercise 11), in the engine's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minillm.course.use.beside import Beside, known
from minillm.engine.scheduler import StepPlan
from minillm.outputs import RequestMetrics, RequestOutput

if TYPE_CHECKING:
    from minillm.llm import LLM

ROUNDING = 1e-12


def put_metrics(module: Any, llm: LLM) -> None:
    """The result of each request tells its times through the learner's functions."""
    ttft = Beside("ex01 ttft", module.ttft, lambda arrival, times: RequestMetrics(arrival, [times]).ttft, ROUNDING)
    tpot = Beside("ex01 tpot", module.tpot, lambda times: RequestMetrics(0.0, [times]).tpot, ROUNDING)
    itl = Beside("ex01 itl", module.itl, lambda lists: RequestMetrics(0.0, lists).itl, ROUNDING)

    class LearnerMetrics(RequestMetrics):
        """Completions of a request are joined as the engine does: the first of all, their mean, all gaps."""

        @property
        def ttft(self) -> float | None:
            return min((ttft(self.arrival_time, times) for times in self.token_times if times), default=None)

        @property
        def tpot(self) -> float | None:
            rates = [rate for times in self.token_times if times and (rate := tpot(times)) is not None]
            return sum(rates) / len(rates) if rates else None

        @property
        def itl(self) -> list[float]:
            return list(itl(self.token_times))

    add = llm.processor.add

    def add_with_metrics(*request: Any) -> RequestOutput:
        result = add(*request)
        result.metrics = LearnerMetrics(**vars(result.metrics))
        return result

    setattr(llm.processor, "add", add_with_metrics)  # noqa: B010 (a method of this one object)


def put_schedule(module: Any, llm: LLM) -> str | None:
    """Each step is planned by both; the plans must be the same. Blocks stay the engine's business."""
    scheduler = llm.engine.scheduler
    config, own = scheduler.config, scheduler.schedule
    if config.policy != "mixed":
        return f"the exercise's order is that of policy='mixed', not {config.policy!r}"
    beside = Beside("ex11 schedule", module.schedule, known)

    def schedule() -> StepPlan:
        running = {request: request.num_remaining for request in scheduler.running}
        plan = own()
        if not plan.preempted:  # where blocks are lacking, the best order cannot be kept
            tokens = {request: part.num_tokens for request, part in plan.scheduled.items()}
            want = [tokens.get(request, 0) for request in running], [tokens[request] for request in plan.admitted]
            new = [request.num_remaining for request in plan.admitted]
            beside.check(want, list(running.values()), new, config.max_num_batched_tokens, config.max_num_seqs)
        return plan

    setattr(scheduler, "schedule", schedule)  # noqa: B010 (a method of this one object)
    return None
