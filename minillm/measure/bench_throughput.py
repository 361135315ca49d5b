"""`minillm bench throughput`: tokens per second when all requests are there at once, for minillm and for its rivals.

All of them serve the same requests in the same rounds; the speed-up is the ratio of the times of one round. Only tokens
that were asked for count: a static batch runs until its longest request is done, and the tokens that the shorter ones
get meanwhile are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Protocol

import torch

from minillm.engine.engine import Engine
from minillm.errors import MinillmError, RequestError
from minillm.measure.bench import Quartiles, Timing, interleaved, pair_ratio
from minillm.measure.bench_serve import ServeRun, serve
from minillm.measure.bench_subjects import TransformersSubject
from minillm.measure.summary import engine_summary
from minillm.measure.workloads import SampleRequest
from minillm.model.decoder import Decoder

OURS, GENERATE, CONTINUOUS = "minillm", "transformers generate", "transformers continuous"
PAGE = 256  # tokens per block of transformers' paged cache: its default


class Server(Protocol):
    """Something that serves requests, and returns when all their tokens are there."""

    def run(self, requests: Sequence[SampleRequest]) -> None:
        """Serve all requests. Raises `MinillmError` if a token is missing."""
        ...


class MinillmServer:
    """This project's engine. Each run has a `cache_salt` of its own, so that no run reuses the KV of another."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.runs: list[ServeRun] = []
        self._salts = count()

    def run(self, requests: Sequence[SampleRequest]) -> None:
        run = serve(self.engine, requests, cache_salt=str(next(self._salts)))
        if errors := [served.error for served in run.served if served.error]:
            raise RequestError(errors[0])
        self.runs.append(run)


class TransformersGenerate:
    """`model.generate` on static batches of `batch_size` requests, padded on the left, in the order given.

    A batch runs until its longest request is done, as it does for everybody who uses `generate`.
    """

    def __init__(self, model: Any, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size

    def run(self, requests: Sequence[SampleRequest]) -> None:
        for start in range(0, len(requests), self.batch_size):
            self._batch(requests[start : start + self.batch_size])

    @torch.inference_mode()
    def _batch(self, requests: Sequence[SampleRequest]) -> None:
        width = max(len(request.prompt) for request in requests)
        new = max(request.max_tokens for request in requests)
        padding = [[0] * (width - len(request.prompt)) for request in requests]
        rows = [pad + request.prompt for pad, request in zip(padding, requests, strict=True)]
        mask = [[0] * len(pad) + [1] * (width - len(pad)) for pad in padding]
        config = _generation_config(requests, max_new_tokens=new, min_new_tokens=new, eos_token_id=None)
        place = self.model.device
        tokens, mask_ = torch.tensor(rows, device=place), torch.tensor(mask, device=place)
        output = self.model.generate(tokens, attention_mask=mask_, generation_config=config)
        _check(GENERATE, requests, [min(request.max_tokens, output.shape[1] - width) for request in requests])


class TransformersContinuous:
    """The continuous batching of transformers: paged cache, packed batches, at most `max_tokens` tokens per step.

    The time includes starting and stopping its manager, as in `generate_batch`. By default its cache takes most of the
    machine's memory; here it has room for the `batch_size` longest requests.
    """

    def __init__(self, model: Any, batch_size: int, max_tokens: int) -> None:
        self.model, self.batch_size, self.max_tokens = model, batch_size, max_tokens

    def run(self, requests: Sequence[SampleRequest]) -> None:
        from transformers import ContinuousBatchingConfig

        pages = sorted(-(-(len(r.prompt) + r.max_tokens) // PAGE) for r in requests)[-self.batch_size :]
        batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=sum(pages) + len(pages),
            max_batch_tokens=self.max_tokens,
            max_requests_per_batch=self.batch_size,
        )
        config = _generation_config(requests, eos_token_id=-1)
        with self.model.continuous_batching_context_manager(config, continuous_batching_config=batching) as manager:
            ids = [manager.add_request(request.prompt, max_new_tokens=request.max_tokens) for request in requests]
            lengths = _collect(manager, len(ids))
        _check(CONTINUOUS, requests, [lengths.get(request_id, 0) for request_id in ids])


def _collect(manager: Any, number: int) -> dict[str, int]:
    """Tokens by request, when all have ended; fewer requests if the manager's thread dies."""
    lengths: dict[str, int] = {}
    while len(lengths) < number and manager.is_running():
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            lengths[result.request_id] = len(result.generated_tokens)
    return lengths


def _generation_config(requests: Sequence[SampleRequest], **settings: Any) -> Any:
    """Greedy, or sampling from the plain distribution at the temperature that the requests share."""
    from transformers import GenerationConfig

    temperature = requests[0].temperature
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    return GenerationConfig(pad_token_id=0, use_cache=True, **sampling, **settings)


def _check(server: str, requests: Sequence[SampleRequest], lengths: Sequence[int]) -> None:
    wanted = [request.max_tokens for request in requests]
    if list(lengths) != wanted:
        raise MinillmError(f"{server} returned {sum(lengths)} of {sum(wanted)} tokens, so its time cannot be compared.")


def transformers_servers(decoder: Decoder, *, batch_size: int, max_tokens: int) -> dict[str, Server]:
    """Both ways in which transformers serves many requests, on one model of the same shape with random weights."""
    model = TransformersSubject(decoder.config, decoder.device, decoder.dtype).model
    model.generation_config.eos_token_id = None  # every request wants all its tokens
    return {
        GENERATE: TransformersGenerate(model, batch_size),
        CONTINUOUS: TransformersContinuous(model, batch_size, max_tokens),
    }


@dataclass(frozen=True)
class Throughput:
    """How long each server took for the same requests, round by round."""

    prompt_tokens: int
    new_tokens: int
    timings: dict[str, Timing]
    runs: list[ServeRun]  # minillm's, one per round

    def tokens_per_second(self, name: str) -> float:
        """New tokens per second in the median round."""
        return self.new_tokens / self.timings[name].median

    def speedup(self, rival: str) -> Quartiles:
        """How many times as long as minillm the rival takes, round by round."""
        return pair_ratio(self.timings[rival], self.timings[OURS])

    def to_json(self) -> dict[str, Any]:
        """All rounds of all servers, and a summary of minillm's last round from the records of its engine."""
        subjects = {
            name: {"times_s": timing.times, "output_throughput": self.tokens_per_second(name)}
            | ({} if name == OURS else {"speedup": self.speedup(name)._asdict()})
            for name, timing in self.timings.items()
        }
        return {
            "total_input_tokens": self.prompt_tokens,
            "total_output_tokens": self.new_tokens,
            "subjects": subjects,
            "engine": engine_summary(self.runs[-1]),
        }


def bench_throughput(
    engine: Engine,
    requests: Sequence[SampleRequest],
    rivals: Mapping[str, Server] | None = None,
    *,
    repeats: int = 1,
    progress: Callable[[str], object] = lambda turn: None,
) -> Throughput:
    """Let all servers serve the requests in turns, `repeats` times, after a short turn each that does not count.

    progress: called with the name of each turn when it begins. Raises `MinillmError` if a server does not return all
    tokens.
    """
    ours = MinillmServer(engine)
    servers: dict[str, Server] = {OURS: ours, **(rivals or {})}
    short = [SampleRequest(request.prompt[:32], 4, request.temperature) for request in requests[:4]]
    for name, server in servers.items():
        progress(f"{name}, warm-up")
        server.run(short)
    rounds = count()

    def turn(name: str) -> None:
        progress(f"{name}, round {next(rounds) // len(servers) + 1} of {repeats}")
        servers[name].run(requests)

    sync = torch.cuda.synchronize if engine.model.device.type == "cuda" else None
    timings = interleaved({name: partial(turn, name) for name in servers}, repeats=repeats, warmup=0, sync=sync)
    prompt_tokens = sum(len(request.prompt) for request in requests)
    return Throughput(prompt_tokens, sum(r.max_tokens for r in requests), timings, ours.runs[1:])
