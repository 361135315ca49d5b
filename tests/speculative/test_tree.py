"""Trees of guesses: a chain is the linear case, any tree writes what plain decoding writes, and wrong trees do not."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from minillm.attention.reference import visible
from minillm.cache.contiguous import ContiguousCache
from minillm.engine.verify import Draft, accept
from minillm.generate import extend, generate, prefill
from minillm.model.decoder import Decoder
from minillm.sampling import SamplingParams, probs_from_logits, sample
from minillm.speculative import tree as module
from minillm.speculative.tree import TokenTree, keep, score_tree, verify_tree
from tests.families import random_model
from tests.speculative.chance import joint, random_probs

PROMPT = [5, 6, 7, 8, 9, 5, 6]
MODELS = ["qwen3", "mistral", "qwen2"]
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    "sampled": SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=24, ignore_eos=True),
    "penalised": SamplingParams(temperature=0.7, repetition_penalty=1.4, seed=4, max_tokens=24, ignore_eos=True),
    "by output": SamplingParams(temperature=0.7, frequency_penalty=1.5, seed=6, max_tokens=24, ignore_eos=True),
}


def random_tree(rng: random.Random, size: int, vocab: int) -> TokenTree:
    """Any parents; siblings say different things."""
    guesses = list[list[int]]()
    while len(TokenTree.of(0, guesses).tokens) < size:
        stem = rng.choice(guesses) if guesses else []
        guesses.append([*stem[: rng.randint(0, len(stem))], rng.randrange(vocab)])
    return TokenTree.of(rng.randrange(vocab), guesses)


def path_to(tree: TokenTree, node: int) -> list[int]:
    """The tokens from the root to a node."""
    return ([] if node == 0 else path_to(tree, tree.parents[node])) + [tree.tokens[node]]


# --- one pass equals one pass per path -------------------------------------------------------------------------------


def stray(model: Decoder, seed: int) -> float:
    """How far the logits of a random tree are from those of its paths, each run alone after the same prompt."""
    tree = random_tree(random.Random(seed), 9, model.config.vocab_size)
    _, cache = prefill(model, PROMPT)
    scores = score_tree(model, tree, cache)
    paths = [path_to(tree, node) for node in range(len(tree.tokens))]
    alone = torch.stack([extend(model, torch.tensor(path), prefill(model, PROMPT)[1]) for path in paths])
    return float((scores - alone).abs().max())


@pytest.mark.parametrize("family", MODELS)
def test_a_node_hears_its_path_and_nothing_else(family: str) -> None:
    """With a window that is shorter than the prompt, too."""
    for seed in range(5):
        assert stray(random_model(family), seed) < 1e-4, seed


def _order_as_depth(self: TokenTree) -> Tensor:
    return torch.arange(len(self.tokens))


def _siblings_visible(self: TokenTree) -> Tensor:
    return torch.ones(len(self.tokens), len(self.tokens)).tril().bool()


def _root_unseen(self: TokenTree) -> Tensor:
    return _ancestors.func(self) & (torch.arange(len(self.tokens)) > 0) | torch.eye(len(self.tokens)).bool()


def _parent_only(self: TokenTree) -> Tensor:
    seen = torch.eye(len(self.tokens)).bool()
    seen[torch.arange(1, len(self.tokens)), torch.tensor(self.parents[1:])] = True
    return seen


_ancestors = TokenTree.__dict__["ancestors"]
WRONG_TREES: dict[str, tuple[str, Callable[[TokenTree], Tensor]]] = {
    "position = order": ("depths", _order_as_depth),
    "siblings are seen": ("ancestors", _siblings_visible),
    "the root is not seen": ("ancestors", _root_unseen),
    "grandparents are not seen": ("ancestors", _parent_only),
}


@pytest.mark.parametrize("name", WRONG_TREES)
def test_wrong_trees_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, wrong = WRONG_TREES[name]
    monkeypatch.setattr(TokenTree, "depths", property(lambda self: _ancestors.func(self).sum(-1) - 1))
    monkeypatch.setattr(TokenTree, what, property(wrong))
    assert stray(random_model(), 0) > 1e-2


def test_a_tree_without_forks_is_the_causal_rule() -> None:
    chain = TokenTree.of(1, [[2, 3, 4]])
    assert (chain.tokens, chain.parents) == ([1, 2, 3, 4], [-1, 0, 1, 2])
    assert chain.depths.tolist() == [0, 1, 2, 3]
    for window in (None, 3):
        assert torch.equal(chain.visible(5, window), visible(4, 9, window))


def test_common_beginnings_are_there_once() -> None:
    tree = TokenTree.of(9, [[1, 2], [1, 3], [1, 2, 4], [], [5]])
    assert tree.tokens == [9, 1, 2, 3, 4, 5] and tree.parents == [-1, 0, 1, 1, 2, 0]
    assert tree.depths.tolist() == [0, 1, 2, 2, 3, 1]


# --- the same text as without ----------------------------------------------------------------------------------------

Guess = Callable[[list[int], random.Random], list[list[int]]]


def write(model: Decoder, params: SamplingParams, guess: Guess, seed: int = 0) -> list[list[int]]:
    """What each round brings, until there are `max_tokens`; `guess` gets what has been said."""
    rng = random.Random(seed)
    cache = ContiguousCache(model.config, capacity=4, device=model.device, dtype=model.dtype)
    extend(model, torch.tensor(PROMPT[:-1]), cache)
    said, rounds = list[int](), list[list[int]]()
    while len(said) < params.max_tokens:
        guesses = guess(said, rng)
        rounds.append(verify_tree(model, PROMPT + said, guesses, cache, params, num_prompt=len(PROMPT)))
        said += rounds[-1]
    return rounds


def guesses_around(truth: list[int], vocab: int) -> Guess:
    """Four guesses: parts of what will be said, some of it spoiled."""

    def guess(said: list[int], rng: random.Random) -> list[list[int]]:
        right, ahead = rng.choice([0.1, 0.6, 0.9]), truth[len(said) :][:4]
        return [[t if rng.random() < right else rng.randrange(vocab) for t in ahead] for _ in range(4)]

    return guess


def text(model: Decoder, params: SamplingParams) -> list[int]:
    return list(generate(model, PROMPT, params))


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("family", MODELS)
def test_whatever_is_guessed_the_text_is_the_same(family: str, kind: str) -> None:
    """Token for token, draws included: what was guessed shifts no random stream."""
    model, params = random_model(family), PARAMS[kind]
    want = text(model, params)
    lengths = set[int]()
    for seed in range(3):
        rounds = write(model, params, guesses_around(want, model.config.vocab_size), seed)
        assert [token for said in rounds for token in said][:24] == want, seed
        lengths |= {len(said) for said in rounds}
    assert {1, 2, 3, 4, 5} <= lengths, "ragged"


def test_a_chain_accepts_what_the_engine_accepts() -> None:
    """The same rows, the same numbers, the same drafts: as `accept` says of a batch of one."""
    model, params = random_model(), PARAMS["sampled"]
    want = text(model, params)
    for seed in range(20):
        rng = random.Random(seed)
        (chain,) = [[token if rng.random() < 0.6 else 0 for token in want[:5]]]
        caches = [prefill(model, PROMPT[:-1])[1] for _ in range(2)]
        tree = verify_tree(model, PROMPT, [chain], caches[0], params, num_prompt=len(PROMPT))
        logits = score_tree(model, TokenTree.of(PROMPT[-1], [chain]), caches[1])
        rows = probs_from_logits(logits, [params] * len(logits))
        u = torch.tensor([params.random(0, place) for place in range(len(rows))], dtype=torch.float64)
        assert tree == accept([Draft(chain)], sample(rows, u).tolist())[0], seed


def test_each_completion_draws_from_its_own_stream() -> None:
    model, params = random_model(), PARAMS["sampled"]
    want = list(generate(model, PROMPT, params, sample_index=3))[:2]
    cache = prefill(model, PROMPT[:-1])[1]
    said = verify_tree(model, PROMPT, [want[:1], [0]], cache, params, num_prompt=len(PROMPT), sample_index=3)
    assert said == want


@pytest.mark.parametrize("path", [[0], [0, 1, 4], [0, 3, 5, 6], list(range(8))])
def test_kept_nodes_lie_together_after_the_text(path: list[int]) -> None:
    """Row by row, in all layers: the text, then the nodes of the path; the counter says so."""
    model = random_model()
    _, cache = prefill(model, PROMPT)
    score_tree(model, random_tree(random.Random(1), 8, model.config.vocab_size), cache)
    before = [pool.tolist() for pool in (cache.keys, cache.values)]
    keep(cache, path)
    assert cache.num_tokens == len(PROMPT) + len(path)
    rows = [*range(len(PROMPT)), *(len(PROMPT) + node for node in path)]
    for pool, old in zip((cache.keys, cache.values), before, strict=True):
        assert pool[:, :, : len(rows)].tolist() == [[[head[row] for row in rows] for head in layer] for layer in old]


def _no_move(cache: ContiguousCache, path: list[int]) -> None:
    cache.num_tokens += len(path)


def _keys_only(cache: ContiguousCache, path: list[int]) -> None:
    values = cache.values.clone()
    keep(cache, path)
    cache.values = values


def _keeps_all(self: TokenTree, draw: Callable[[int, list[int]], int]) -> tuple[list[int], list[int]]:
    path, said = _follow(self, draw)
    return list(range(len(path))), said


def _first_child(self: TokenTree, draw: Callable[[int, list[int]], int]) -> tuple[list[int], list[int]]:
    """The first guess is taken without asking."""
    path, said = _follow(self, draw)
    first = self.children.get((0, self.tokens[1])) if len(self.tokens) > 1 else None
    return (path, said) if first is None else ([0, first], [self.tokens[1], draw(first, [self.tokens[1]])])


def _asks_again(self: TokenTree, draw: Callable[[int, list[int]], int]) -> tuple[list[int], list[int]]:
    """Trap 41: each child is compared with a draw of its own; whoever fails leaves the next one a chance."""
    path, said, node = [0], list[int](), 0
    while True:
        mine = [child for child, parent in enumerate(self.parents) if parent == node]
        lucky = [child for child in mine if draw(node, said) == self.tokens[child]]
        if not lucky:
            return path, [*said, draw(node, said)]
        node = lucky[0]
        path.append(node)
        said.append(self.tokens[node])


_follow = TokenTree.follow
WRONG_WALKS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "accepted KV stays where it was": (module, "keep", _no_move),
    "accepted values stay where they were": (module, "keep", _keys_only),
    "the first rows are kept": (TokenTree, "follow", _keeps_all),
    "a guess is taken without asking": (TokenTree, "follow", _first_child),
}


@pytest.mark.parametrize("name", WRONG_WALKS)
def test_wrong_walks_change_the_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = random_model(), PARAMS["greedy"]
    want = text(model, params)
    owner, what, wrong = WRONG_WALKS[name]
    monkeypatch.setattr(owner, what, wrong)
    rounds = write(model, params, guesses_around(want, model.config.vocab_size))
    assert [token for said in rounds for token in said][:24] != want


# --- exact enumeration -----------------------------------------------------------------------------------------------


def enumerated(tree: TokenTree, target: Tensor) -> dict[tuple[int, ...], float]:
    """Chance of each run of 1 + depth tokens, summed over all draws; what a walk leaves open is the target's.

    target [vocab, vocab]: what follows each token.
    """
    vocab, length = len(target), int(tree.depths.max()) + 1
    chances = dict.fromkeys(product(range(vocab), repeat=length), 0.0)
    for draws in product(range(vocab), repeat=len(tree.tokens)):
        weight = 1.0
        for node, token in enumerate(draws):
            weight *= float(target[tree.tokens[node], token])
        _, said = tree.follow(lambda node, said, draws=draws: draws[node])  # type: ignore[misc]
        for rest in product(range(vocab), repeat=length - len(said)):
            chances[tuple(said) + rest] += weight * joint(target, rest, said[-1])
    return chances


def worst(tree: TokenTree, target: Tensor) -> float:
    chances = enumerated(tree, target)
    return max(abs(chance - joint(target, run, tree.tokens[0])) for run, chance in chances.items())


@pytest.mark.parametrize("guesses", [[[1]], [[0], [1], [2]], [[0, 1], [1]], [[2, 2], [2, 0], [1]], [[0, 1, 2], [1]]])
def test_the_sum_over_all_draws_is_the_target(guesses: list[list[int]]) -> None:
    for seed in range(3):
        target = random_probs(3, 3, seed=seed, zeros=0.2)
        assert worst(TokenTree.of(0, guesses), target) < 1e-12, seed


def test_enumeration_rejects_a_guess_that_is_taken_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenTree, "follow", _first_child)
    assert worst(TokenTree.of(0, [[0, 1], [1]]), random_probs(3, 3, seed=0)) > 1e-2


def test_siblings_that_each_get_a_draw_are_favoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two guesses of three equal tokens, each compared with a draw of its own: the third gets (2/3)² · 1/3 = 0.15."""
    tree, rng = TokenTree.of(0, [[0], [1]]), random.Random(0)
    monkeypatch.setattr(TokenTree, "follow", _asks_again)
    said = [tree.follow(lambda node, said: rng.randrange(3))[1][0] for _ in range(3000)]
    assert said.count(2) < 3000 / 5
