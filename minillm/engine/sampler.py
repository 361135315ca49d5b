"""From the logits of a step to its tokens: process, draw, verify, report; all of it with one transfer to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.engine.request import Request
from minillm.engine.scheduler import StepPlan
from minillm.engine.verify import Draft, accept, given_draft, given_drafts, num_accepted
from minillm.model.decoder import inference
from minillm.outputs import Logprob
from minillm.sampling import adjust, probs_from_logits, sample

Row = tuple[Request, list[int]]  # a row of logits: whose it is, and the drafts that come before it


@dataclass(frozen=True)
class Rules:
    """What lies between logits and tokens. Each can be replaced, by a learner's for instance."""

    process: Callable[..., Tensor] = probs_from_logits
    given: Callable[..., Tensor] = given_draft
    draw: Callable[..., Tensor] = sample
    accepted: Callable[..., int] = num_accepted


def rows_of(samplers: Sequence[Request], drafts: Sequence[Draft]) -> list[Row]:
    """Whose each row of logits is: for a request with k drafts 1 + k rows, one after the other."""
    pairs = zip(samplers, drafts, strict=True)
    return [(request, draft.tokens[:count]) for request, draft in pairs for count in range(1 + len(draft))]


def distributions(
    logits: Tensor, rows: Sequence[Row], process: Callable[..., Tensor], end_ids: tuple[int, ...]
) -> Tensor:
    """What each row of logits [rows, vocab_size] is drawn from under its request's parameters; float32, as logits."""
    if any(request.params.adjusts for request, _ in rows):
        logits = torch.stack([_adjusted(row, *whose, end_ids) for row, whose in zip(logits, rows, strict=True)])
    return process(logits, [request.params for request, _ in rows])


def _adjusted(logits: Tensor, request: Request, drafts: list[int], end_ids: tuple[int, ...]) -> Tensor:
    if not request.params.adjusts:
        return logits
    prompt, output = request.tokens[: request.num_prompt], request.tokens[request.num_prompt :]
    return adjust(logits, request.params, prompt, output + drafts, end_ids)


def stream_numbers(rows: Sequence[Row], seed: int, device: torch.device) -> Tensor | None:
    """The random number of each row, float64 [rows], from its request's own stream; None if no row needs one.

    Number i of a stream belongs to output token i, whoever draws it: a rejected draft, a preemption or an interrupted
    step shifts nothing.
    """
    if all(request.params.greedy for request, _ in rows):
        return None
    numbers = [
        request.params.random(
            request.index, request.num_generated + len(drafts), engine_seed=seed, arrival=request.order[0]
        )
        for request, drafts in rows
    ]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


class Sampler:
    """Draws the tokens of a step and writes down the log-probabilities that are asked for.

    `rules` may be replaced. seed: of requests that bring none. end_ids: the model's own end tokens, for min_tokens.
    """

    def __init__(self, seed: int, end_ids: tuple[int, ...]) -> None:
        self.rules = Rules()
        self.seed, self.end_ids = seed, end_ids

    def sample(self, plan: StepPlan, logits: Tensor) -> list[list[int]]:
        """The new tokens of each of the plan's samplers: accepted drafts and one more. -1: no distribution.

        logits [num_rows, vocab_size]: a row for each sampler and each of its drafts, then one for each prompt token
        whose log-probability is asked for. `tolist` is the only point of the step that waits for the device.
        """
        rows, asked = rows_of(plan.samplers, plan.drafts), _asked(plan)
        if not rows and not asked:
            return []
        wanted = [place for place, (request, _) in enumerate(rows) if request.params.logprobs is not None]
        with inference(logits.device):
            tokens = self._draw(plan, logits[: len(rows)], rows)
            parts = [tokens.double()]
            if wanted or asked:
                known = torch.tensor([r.tokens[place + 1] for r, place in asked], dtype=torch.int64)
                told = torch.cat([tokens[wanted], known.to(tokens.device)])
                parts.append(candidates(logits[[*wanted, *range(len(rows), len(logits))]], told, _most(plan)).flatten())
            numbers = torch.cat(parts).tolist()
        said = accept(plan.drafts, [int(token) for token in numbers[: len(rows)]], self.rules.accepted)
        if wanted or asked:
            _report(plan, said, wanted, asked, numbers[len(rows) :])
        return said

    def _draw(self, plan: StepPlan, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """A token for each row, on the device: int64 [rows]. Those after a rejected draft are drawn in vain."""
        target = distributions(logits, rows, self.rules.process, self.end_ids)
        u = stream_numbers(rows, self.seed, logits.device)
        tokens: Tensor = self.rules.draw(given_drafts(target, plan.drafts, self.rules.given), u)
        return tokens


def candidates(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Log-probabilities under the raw logits [rows, vocab]: of `tokens` [rows], and the `count` most likely ones.

    float64 [rows, 2 + 2 count]: own log-probability, own rank, ids, log-probabilities. Ids are exact in float64, so
    that all of a step comes to the host in one transfer.
    """
    scores = logits.log_softmax(dim=-1)
    own = scores.gather(-1, tokens.clamp(min=0)[:, None])
    rank = (scores > own).sum(dim=-1, keepdim=True) + 1
    values, ids = scores.topk(min(count, scores.shape[-1]))
    return torch.cat([own.double(), rank.double(), ids.double(), values.double()], dim=1)


def _read(row: list[float], token: int, count: int) -> dict[int, Logprob]:
    """One row of `candidates` as vLLM gives it: the token itself, then the `count` most likely ones."""
    own, rank, *rest = row
    ids, values = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    ranked = zip(ids[:count], values[:count], strict=True)
    top = {int(i): Logprob(value, place) for place, (i, value) in enumerate(ranked, 1)}
    return {token: Logprob(own, int(rank))} | top


def _asked(plan: StepPlan) -> list[tuple[Request, int]]:
    """The positions after which a prompt token's log-probability is asked for, in the order of the batch's rows."""
    return [(part.request, place) for part in plan.scheduled.values() for place in part.prompt_rows]


def _most(plan: StepPlan) -> int:
    """The largest number of candidates that a request of this step asks for."""
    params = [part.request.params for part in plan.scheduled.values()]
    return max(max(p.logprobs or 0, p.prompt_logprobs or 0) for p in params)


def _report(
    plan: StepPlan, said: list[list[int]], wanted: list[int], asked: list[tuple[Request, int]], numbers: list[float]
) -> None:
    """Hand the rows of `candidates` to the requests: first those of new tokens, then those of prompt tokens."""
    width = len(numbers) // (len(wanted) + len(asked))
    told = [numbers[start : start + width] for start in range(0, len(numbers), width)]
    by_row, start = dict(zip(wanted, told, strict=False)), 0
    for request, draft, tokens in zip(plan.samplers, plan.drafts, said, strict=True):
        if (count := request.params.logprobs) is not None:
            request.logprobs += [_read(by_row[start + i], token, count) for i, token in enumerate(tokens)]
        start += 1 + len(draft)
    for (request, place), row in zip(asked, told[len(wanted) :], strict=True):
        request.prompt_logprobs.append(_read(row, request.tokens[place + 1], request.params.prompt_logprobs or 0))
