"""From the logits of a step to its tokens: process, draw, verify, report; all of it with one transfer to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillm.engine.request import Request
from minillm.engine.scheduler import StepPlan
from minillm.engine.verify import Draft, accept, by_request, given_draft, given_drafts, num_accepted
from minillm.model.decoder import inference
from minillm.outputs import Logprob
from minillm.sampling import adjust, probs_from_logits, sample

Row = tuple[Request, list[int]]  # a row of logits: whose it is, and the drafts that come before it


def rows_of(samplers: Sequence[Request], drafts: Sequence[Draft]) -> list[Row]:
    """Whose each row of logits is: for a request with k drafts 1 + k rows, one after the other."""
    pairs = zip(samplers, drafts, strict=True)
    return [(request, draft.tokens[:count]) for request, draft in pairs for count in range(1 + len(draft))]


def distributions(logits: Tensor, rows: list[Row], process: Callable[..., Tensor], end_ids: Sequence[int]) -> Tensor:
    """What each row of logits [rows, vocab_size] is drawn from under its request's parameters; float32, as logits."""
    if any(request.params.adjusts for request, _ in rows):
        logits = logits.clone()
    for place, (request, drafts) in enumerate(rows):
        if request.params.adjusts:
            prompt, output = request.tokens[: request.num_prompt], request.tokens[request.num_prompt :]
            logits[place] = adjust(logits[place], request.params, prompt, output + drafts, end_ids)
    return process(logits, [request.params for request, _ in rows])


def stream_numbers(rows: Sequence[Row], seed: int, device: torch.device) -> Tensor | None:
    """The random number of each row, float64 [rows], from its request's own stream; None if no row needs one.

    Number i of a stream belongs to output token i, whoever draws it: a rejected draft, a preemption or an interrupted
    step shifts nothing.
    """
    if all(request.params.greedy for request, _ in rows):
        return None
    numbers = []
    for request, drafts in rows:
        arrival, position = request.order[0], request.num_generated + len(drafts)
        numbers.append(request.params.random(request.index, position, engine_seed=seed, arrival=arrival))
    return torch.tensor(numbers, dtype=torch.float64, device=device)


class Sampler:
    """Draws the tokens of a step and writes down the log-probabilities that are asked for.

    Each function between logits and tokens can be replaced, by a learner's for instance: `process`, `given`, `draw` and
    `accepted`. seed: of requests that bring none. end_ids: the model's own end tokens, for min_tokens.
    """

    def __init__(self, seed: int, end_ids: tuple[int, ...]) -> None:
        self.process: Callable[..., Tensor] = probs_from_logits
        self.given: Callable[..., Tensor] = given_draft
        self.draw: Callable[..., Tensor] = sample
        self.accepted: Callable[..., int] = num_accepted
        self.seed, self.end_ids = seed, end_ids

    def sample(self, plan: StepPlan, logits: Tensor) -> list[list[int]]:
        """The new tokens of each of the plan's samplers: accepted drafts and one more. -1: no distribution.

        logits [num_rows, vocab_size]: a row for each sampler and each of its drafts, then one for each prompt token
        whose log-probability is asked for. `tolist` is the only point of the step that waits for the device.
        """
        if not len(logits):
            return []
        rows = rows_of(plan.samplers, plan.drafts)
        asked = [(part.request, place) for part in plan.scheduled.values() for place in part.prompt_rows]
        counts = [request.params.logprobs for request, _ in rows]
        counts += [request.params.prompt_logprobs for request, _ in asked]
        most = max((count for count in counts if count is not None), default=None)
        with inference(logits.device):
            drawn = self._draw(plan, logits[: len(rows)], rows)
            known = torch.tensor([request.tokens[place + 1] for request, place in asked], dtype=torch.int64)
            tokens = torch.cat([drawn, known.to(drawn.device)])[:, None]
            told = (tokens if most is None else candidates(logits, tokens, most)).tolist()
        said = accept(plan.drafts, [int(row[0]) for row in told[: len(rows)]], self.accepted)
        if most is not None:
            _report(plan, said, asked, told)
        return said

    def _draw(self, plan: StepPlan, logits: Tensor, rows: list[Row]) -> Tensor:
        """A token for each row, on the device: int64 [rows]. Those after a rejected draft are drawn in vain."""
        target = distributions(logits, rows, self.process, self.end_ids)
        u = stream_numbers(rows, self.seed, logits.device)
        tokens: Tensor = self.draw(given_drafts(target, plan.drafts, self.given), u)
        return tokens


def candidates(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Log-probabilities under the raw logits [rows, vocab]: of `tokens` [rows, 1], and the `count` most likely ones.

    float64 [rows, 3 + 2 count]: token, log-probability, rank, then ids, then their log-probabilities. Ids are exact in
    float64, so that all of a step comes to the host in one transfer. As in vLLM, all rows pay when one is asked for.
    """
    scores = logits.log_softmax(dim=-1)
    own = scores.gather(-1, tokens.clamp(min=0))
    rank = (scores > own).sum(dim=-1, keepdim=True) + 1
    values, ids = scores.topk(min(count, scores.shape[-1]))
    return torch.cat([part.double() for part in (tokens, own, rank, ids, values)], dim=1)


def _read(row: list[float], count: int) -> dict[int, Logprob]:
    """One row of `candidates` as vLLM gives it: the token itself, then the `count` most likely ones."""
    token, own, rank, *rest = row
    ids, values = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    ranked = zip(ids[:count], values[:count], strict=True)
    top = {int(i): Logprob(value, place) for place, (i, value) in enumerate(ranked, 1)}
    return {int(token): Logprob(own, int(rank))} | top


def _report(plan: StepPlan, said: list[list[int]], asked: list[tuple[Request, int]], told: list[list[float]]) -> None:
    """Hand the rows of `candidates` to the requests: first those of new tokens, then those of prompt tokens."""
    rest = iter(told)
    for request, tokens, rows in zip(plan.samplers, said, by_request(rest, plan.drafts), strict=True):
        if (count := request.params.logprobs) is not None:
            request.logprobs += [_read(row, count) for row in rows[: len(tokens)]]
    for (request, _), row in zip(asked, rest, strict=True):
        request.prompt_logprobs.append(_read(row, request.params.prompt_logprobs or 0))
