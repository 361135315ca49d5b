"""Proposers: who guesses the next tokens. The engine checks the guesses (`minillm.engine.verify`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillm.engine.engine import Engine
from minillm.engine.proposer import Proposer
from minillm.errors import ConfigError
from minillm.model.decoder import Decoder
from minillm.model.loader import load_model
from minillm.model.tokenizer import Tokenizer, load_tokenizer
from minillm.speculative.draft import DraftModelProposer
from minillm.speculative.ngram import NgramProposer
from minillm.speculative.stats import SpecDecodingStats

__all__ = ["DraftModelProposer", "NgramProposer", "SpecDecodingStats", "attach"]

EMBEDDED_DRAFT = "tiny-draft"  # what "draft" stands for
_WAY_OUT = "Choose one with the same tokenizer, or speculative='ngram', which needs none."


def attach(
    name: str,
    engine: Engine,
    tokenizer: Tokenizer | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Proposer:
    """Let an engine speculate. name: "ngram", "draft" for the embedded draft model, or a model as in `load_model`.

    device, dtype, seed, progress: of the draft model, as there. tokenizer: of the engine's model; None for random
    weights, which have none. A draft model is loaded when the engine is there, so that its cache takes memory that the
    engine's left. Raises `ConfigError` if it speaks of other tokens than the engine's model, and what `load_model` and
    `load_tokenizer` raise.
    """
    engine.proposer = _proposer(name, engine, tokenizer, device=device, dtype=dtype, seed=seed, progress=progress)
    return engine.proposer


def _proposer(name: str, engine: Engine, tokenizer: Tokenizer | None, **how: Any) -> Proposer:
    if name == "ngram":
        return NgramProposer()
    source = EMBEDDED_DRAFT if name == "draft" else name
    model = load_model(source, **how)
    _check_sizes(name, model, engine)
    own = load_tokenizer(source)
    if own and tokenizer:
        _check_tokens(name, own.vocabulary, tokenizer.vocabulary)
    return DraftModelProposer(model, engine.config)


def _check_sizes(name: str, draft: Decoder, engine: Engine) -> None:
    own, wanted = draft.config.vocab_size, engine.model.config.vocab_size
    if own != wanted:
        raise ConfigError(
            f"The draft model {name!r} has {own} tokens in its vocabulary, the model it is to guess for has {wanted}. "
            f"{_WAY_OUT}"
        )


def _check_tokens(name: str, own: Mapping[int, str], wanted: Mapping[int, str]) -> None:
    """Refuse a vocabulary of the right size in which a number means another token.

    Every guess would be checked and rejected: nothing would come out wrong, and all of it late. Numbers that only one
    of the two uses (padding, the special tokens of a chat model) do no harm.
    """
    differ = [index for index in sorted(own.keys() & wanted.keys()) if own[index] != wanted[index]]
    if differ:
        index = differ[0]
        raise ConfigError(
            f"Token {index} is {own[index]!r} to the draft model {name!r} and {wanted[index]!r} to the model it is to "
            f"guess for; {len(differ)} of {len(wanted)} tokens differ. {_WAY_OUT}"
        )
