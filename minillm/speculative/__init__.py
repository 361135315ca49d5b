"""Proposers: who guesses the next tokens. The engine checks the guesses (`minillm.engine.verify`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillm.engine.engine import Engine
from minillm.engine.verify import Proposer
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


def attach(name: str, engine: Engine, tokenizer: Tokenizer | None = None, **how: Any) -> Proposer:
    """Let an engine speculate. name: "ngram", "draft" for the embedded draft model, or a model as in `load_model`.

    tokenizer: of the engine's model; None for random weights, which have none. how: what `load_model` is told of the
    draft model (device, dtype, seed, kernels, progress). It is loaded when the engine is there, so that its cache takes
    memory that the engine's left. Raises `ConfigError` if it speaks of other tokens than the engine's model, and what
    `load_model` and `load_tokenizer` raise.
    """
    engine.proposer = NgramProposer() if name == "ngram" else _draft_model(name, engine, tokenizer, **how)
    return engine.proposer


def _draft_model(name: str, engine: Engine, tokenizer: Tokenizer | None, **how: Any) -> DraftModelProposer:
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
            f"The draft model {name!r} has {own} tokens in its vocabulary, but the model that it guesses for has "
            f"{wanted}. {_WAY_OUT}"
        )


def _check_tokens(name: str, own: Mapping[int, str], wanted: Mapping[int, str]) -> None:
    """Refuse a vocabulary of the right size in which a number means another token.

    With such a draft model every guess would be rejected: the text would still be right, but slow. Numbers that only
    one of the two uses (padding, the special tokens of a chat model) do no harm.
    """
    differ = [index for index in sorted(own.keys() & wanted.keys()) if own[index] != wanted[index]]
    if differ:
        index = differ[0]
        raise ConfigError(
            f"Token {index} is {own[index]!r} for the draft model {name!r}, but {wanted[index]!r} for the model that "
            f"it guesses for; {len(differ)} of {len(wanted)} tokens differ. {_WAY_OUT}"
        )
