"""Proposers: who guesses the next tokens. The engine checks the guesses (`minillm.engine.verify`)."""

from __future__ import annotations

from minillm.engine.engine import Engine
from minillm.engine.proposer import Proposer
from minillm.errors import ConfigError
from minillm.model.decoder import Decoder
from minillm.model.loader import load_model
from minillm.speculative.draft import DraftModelProposer
from minillm.speculative.ngram import NgramProposer
from minillm.speculative.stats import SpecDecodingStats

__all__ = ["DraftModelProposer", "NgramProposer", "SpecDecodingStats", "attach"]

EMBEDDED_DRAFT = "tiny-draft"  # what "draft" stands for


def attach(name: str, engine: Engine, *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> Proposer:
    """Let an engine speculate. name: "ngram", "draft" for the embedded draft model, or a model as in `load_model`.

    A draft model is loaded when the engine is there, so that its cache takes memory that the engine's left. Raises
    `ConfigError` if it speaks of other tokens than the engine's model, and what `load_model` raises.
    """
    engine.proposer = _proposer(name, engine, device=device, dtype=dtype, seed=seed)
    return engine.proposer


def _proposer(name: str, engine: Engine, *, device: str, dtype: str, seed: int) -> Proposer:
    if name == "ngram":
        return NgramProposer()
    model = load_model(EMBEDDED_DRAFT if name == "draft" else name, device=device, dtype=dtype, seed=seed)
    _check_vocabulary(name, model, engine)
    return DraftModelProposer(model, engine.config)


def _check_vocabulary(name: str, draft: Decoder, engine: Engine) -> None:
    own, wanted = draft.config.vocab_size, engine.model.config.vocab_size
    if own != wanted:
        raise ConfigError(
            f"The draft model {name!r} has {own} tokens in its vocabulary, the model it is to guess for has {wanted}. "
            "Choose one with the same tokenizer, or speculative='ngram', which needs none."
        )
