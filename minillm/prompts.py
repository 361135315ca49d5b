"""What may be handed in as prompts, and what the engine gets from it. All is read once, before anything is queued.

One prompt is a string, token ids, or one of vLLM's mappings, {"prompt": "text"} or {"prompt_token_ids": ids}, both with
an optional "cache_salt". Token ids are a list, a tuple, or an array of NumPy or PyTorch with one dimension. An iterable
of prompts is several prompts. So a list of integers is one prompt and a list of lists is several; an empty list is no
prompt at all, and an empty list inside a list is an empty prompt, which the engine refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from minillm.errors import RequestError, shown
from minillm.sampling import SamplingParams, is_text, plain

PROMPT = (
    'Give a string, token ids, {"prompt": "text"} or {"prompt_token_ids": ids}, both with "cache_salt" if you like.'
)
Params = SamplingParams | Iterable[SamplingParams] | None  # one for all, one for each, or the defaults
SINGLE = (str, bytes, bytearray, memoryview, Mapping, Set)  # iterable, but no series of prompts or parameters


@dataclass(frozen=True)
class Prompt:
    """One prompt: its text, its token ids, or both; then the ids count. Salts that differ share no cached KV."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    cache_salt: str | None = None


Wish = tuple[Prompt, SamplingParams]  # one prompt, and how its tokens are wanted


def read_prompts(prompts: Any, params: Any = None) -> list[Wish]:
    """Each prompt with its parameters. `params`: one for all, one for each, or None for the defaults.

    Raises RequestError for anything else, naming the prompt ("prompt 3 of 5").
    """
    several = _series(prompts)
    if several is None or (several and isinstance(plain(several[0]), (int, float))):
        several = [prompts if several is None else several]  # one thing, or the ids of one prompt
    read = [_read(given, f"Prompt {i} of {len(several)}") for i, given in enumerate(several, 1)]
    wishes = [params or SamplingParams()] * len(read) if isinstance(params, SamplingParams | None) else _series(params)
    if wishes is None or not all(isinstance(wish, SamplingParams) for wish in wishes):
        raise RequestError(f"sampling_params={shown(params)} is not possible: give one for all, one for each, or None.")
    if len(wishes) != len(read):
        raise RequestError(f"{len(read)} prompts, but {len(wishes)} sampling_params. Give one for all or one for each.")
    return list(zip(read, wishes, strict=True))


def _series(given: Any) -> list[Any] | None:
    """The elements of an iterable that can be a series; None if it can only be one thing, be that right or wrong."""
    single = isinstance(given, SINGLE) or hasattr(given, "tolist") or not isinstance(given, Iterable)
    return None if single else list(given)


def _read(given: Any, which: str) -> Prompt:
    """One prompt, in one of its forms; `which` names it in an error."""
    form = given if isinstance(given, Mapping) else {"prompt" if isinstance(given, str) else "prompt_token_ids": given}
    text, ids, salt = (form.get(key) for key in ("prompt", "prompt_token_ids", "cache_salt"))
    if not form.keys() <= {"prompt", "prompt_token_ids", "cache_salt"} or (text is None and ids is None):
        raise RequestError(f"{which} is {shown(given)}, which is no prompt. {PROMPT}")
    if not all(value is None or is_text(value) for value in (text, salt)):
        raise RequestError(f"{which} is {shown(given)}: text and cache_salt must be strings without half characters.")
    return Prompt(text, None if ids is None else _token_ids(ids, which), salt or None)


def _token_ids(given: Any, which: str) -> tuple[int, ...]:
    ids = plain(given)
    if not isinstance(ids, (list, tuple)):
        raise RequestError(f"{which} is {shown(given)}, which is no prompt. {PROMPT}")
    ids = tuple(map(plain, ids))
    if strange := [token for token in ids if type(token) is not int]:
        raise RequestError(f"{which}: {shown(strange[0])} is no token id. {PROMPT}")
    return ids
