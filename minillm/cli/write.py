"""The commands that write text: `demo`, `generate` and `chat`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm.cli.console import Device, Dtype, Model, Seed, Threads, facts, quantity, use_threads
from minillm.cli.screen import PICTURES, check_destination, err, out, plain
from minillm.cli.settings import engine_options
from minillm.errors import MinillmError, RequestError

if TYPE_CHECKING:
    from rich.table import Table

    from minillm.course.use import Used
    from minillm.llm import LLM
    from minillm.outputs import RequestOutput
    from minillm.sampling import SamplingParams

MaxTokens = Annotated[int, typer.Option(help="New tokens at most.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the most likely token.")]
Use = Annotated[
    Path | None,
    typer.Option(help="An exercise or a folder of them: their functions run in place of the engine's.", metavar="PATH"),
]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability mass.")]

DEMO_PROMPT = "def fibonacci(n):\n"
FORGETTING = {"/new": 1 << 30, "/forget": 2}  # messages that are dropped
WAY_ON = "This question was not kept. /forget drops the oldest question and its answer, /new begins anew."
PROMPT_STYLE, TOKEN_STYLE = "bold #3f90da", "#ffa90e"  # prefill is blue and decode amber, here as in every figure


@engine_options("kv_format", "kernels")
def demo(
    prompt: Annotated[str, typer.Option(help="What to continue.")] = DEMO_PROMPT,
    max_tokens: MaxTokens = 64,
    model: Model = "tiny",
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    use: Use = None,
    picture: Annotated[Path, typer.Option(help="Where to save the timeline.")] = Path("minillm-demo.png"),
    **settings: Any,
) -> None:
    """Watch a model write, and see how long each of the two phases took."""
    from minillm.course.figures.timeline import request_timeline
    from minillm.sampling import SamplingParams

    picture = check_destination(picture, endings=PICTURES)
    use_threads(threads)
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    llm = _load(use, model, device=device, dtype=dtype, seed=seed, **settings)
    _warm_up(llm, prompt)
    _show(prompt, PROMPT_STYLE)
    texts, request = _stream(llm, prompt, params)
    out.print()
    out.print(_measured(llm, request))
    prompt_tokens = len(request.prompt_token_ids)
    request_timeline(request.metrics, prompt_tokens=prompt_tokens, texts=texts).savefig(picture)
    out.print("Timeline:", plain(str(picture.resolve())), soft_wrap=True)


@engine_options("kv_format", "kernels")
def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    max_tokens: MaxTokens = 128,
    model: Model = "tiny",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be given again.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    use: Use = None,
    **settings: Any,
) -> None:
    """Continue a prompt. The text goes to stdout, its timing to stderr."""
    from minillm.sampling import SamplingParams

    use_threads(threads)
    params = SamplingParams(temperature=temperature, top_p=top_p, stop=stop or None, max_tokens=max_tokens, seed=seed)
    llm = _load(use, model, device=device, dtype=dtype, seed=seed, **settings)
    _, request = _stream(llm, prompt, params)
    err.print(_timing(request), style="dim")


@engine_options("kv_format", "kernels")
def chat(
    model: Annotated[str, typer.Option(help="A model with a chat template: a folder or a hub name.")],
    system: Annotated[str, typer.Option(help="Instructions that come before the conversation.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    **settings: Any,
) -> None:
    """Talk with a model that was taught to answer. /new begins anew, /forget drops the oldest question and its answer.

    An empty line or Ctrl-D ends the conversation.
    """
    from minillm.llm import LLM
    from minillm.model.tokenizer import load_tokenizer
    from minillm.sampling import SamplingParams

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise RequestError("A random model has no tokenizer and nothing to say. Choose an instruction-tuned model.")
    messages = [{"role": "system", "content": system}] if system else []
    tokenizer.apply_chat_template([*messages, {"role": "user", "content": "?"}])  # refuse before loading the weights
    use_threads(threads)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, stop_token_ids=end)
    llm = LLM(model, device=device, dtype=dtype, seed=seed, **settings)
    first = len(messages)  # of the dialogue; the instructions stay
    while question := _ask():
        if question in FORGETTING:
            del messages[first : first + FORGETTING[question]]
            err.print(f"The model now sees {(len(messages) - first) // 2} earlier questions.", style="dim")
            continue
        asked = [*messages, {"role": "user", "content": question}]
        try:
            _, request = _stream(llm, {"prompt_token_ids": tokenizer.apply_chat_template(asked)}, params)
        except MinillmError as error:  # such as a context that is full: the next question may be served
            err.print(plain(f"{error}\n{WAY_ON}", "red"))
            continue
        messages = [*asked, {"role": "assistant", "content": request.outputs[0].text}]
        err.print(_timing(request), style="dim")


def _ask() -> str:
    """The next line of the user; empty at the end of the input."""
    try:
        return out.ask("> ").strip()
    except EOFError:
        return ""


def _stream(llm: LLM, prompt: str | dict[str, list[int]], params: SamplingParams) -> tuple[list[str], RequestOutput]:
    """Print a completion as it grows; returns what each token added to the text, and the finished request."""
    texts = []
    for request in llm.stream(prompt, params):
        texts.append(request.outputs[0].delta)
        _show(texts[-1], TOKEN_STYLE)
    out.print()
    return texts, request


def _show(text: str, style: str) -> None:
    """Print text of a model or a user: on a terminal with colour and without control characters, in a pipe as it is."""
    if out.is_terminal:
        out.print(plain(text, style=style), end="", soft_wrap=True)
    else:
        out.write(text)


def _load(use: Path | None, model: str, *, dtype: str, **settings: Any) -> LLM:
    """A model that is ready to write, with a learner's functions in their places if there are any: in float32 then.

    In 16 bits two right ways to compute attention may write different tokens.
    """
    from minillm.llm import LLM

    if use is None:
        return LLM(model, dtype=dtype, **settings)
    from minillm.course.use import plug_in

    llm = LLM(model, dtype="float32" if dtype == "auto" else dtype, cuda_graphs=False, **settings)
    _show_used(plug_in(llm, use))
    return llm


def _show_used(used: list[Used]) -> None:
    """Which of a learner's functions are in the engine's place, and which are not and why."""
    rows = [(f"{row.exercise} {', '.join(row.tasks)}", row) for row in used]
    for title, placed in (("In place of the engine's own", True), ("Left as it is", False)):
        shown = [(name, row.why_not or row.place) for name, row in rows if placed == (row.why_not is None)]
        if shown:
            err.print(facts(title, shown))


def _warm_up(llm: LLM, prompt: str) -> None:
    """Run other tokens of the same length once: the first use of a kernel takes longer, and must not be timed."""
    from minillm.sampling import SamplingParams

    if llm.tokenizer is not None and (tokens := llm.tokenizer.encode(prompt)):
        size = len(llm.tokenizer.vocabulary)
        other = [(token + 1) % size for token in tokens]
        llm.generate({"prompt_token_ids": other}, SamplingParams(max_tokens=4, ignore_eos=True), progress=False)


def _measured(llm: LLM, request: RequestOutput) -> Table:
    """The times of the request and the bytes that it moved, for each of the two phases."""
    from minillm.costs import formulas
    from minillm.measure.hardware import dtype_name

    model = llm.engine.model
    element_bytes = model.dtype.itemsize
    prompt, new = len(request.prompt_token_ids), len(request.outputs[0].token_ids)
    per_token = llm.engine.runner.cache.bytes_per_token
    weights = element_bytes * formulas.matmul_parameters(model.config)
    ttft, tpot = request.metrics.ttft, request.metrics.tpot
    rows = [
        ("prompt tokens", str(prompt), "read by prefill in one step"),
        ("new tokens", str(new), f"one from prefill, {new - 1} from decode steps"),
        ("TTFT", quantity(ttft or 0.0, "s"), "time to first token: prefill"),
    ]
    if tpot is not None:
        rows.append(("TPOT", quantity(tpot, "s"), "time per output token: one decode step"))
        rows.append(("speed", f"{1 / tpot:.0f} tokens/s", "of decode"))
    rows.append(("weights", quantity(weights, "B"), f"in {dtype_name(model.dtype)}, read by every step"))
    rows.append(("KV cache", quantity(per_token * (prompt + new - 1), "B"), f"{quantity(per_token, 'B')} per token"))
    return facts(f"Measured on this {model.device.type.upper()}", rows)


def _timing(request: RequestOutput) -> str:
    """One line: how many tokens, how fast."""
    metrics, new = request.metrics, len(request.outputs[0].token_ids)
    parts = [f"{len(request.prompt_token_ids)} prompt tokens, {new} new"]
    parts += [f"TTFT {quantity(metrics.ttft, 's')}"] if metrics.ttft is not None else []
    parts += [f"TPOT {quantity(metrics.tpot, 's')}"] if metrics.tpot is not None else []
    return " · ".join(parts)
