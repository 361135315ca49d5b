"""Check a tree of guesses in one pass: several continuations that share their beginnings.

A chain of guesses is a bet on one continuation: where its first token is wrong, the others were for nothing. A tree
bets on several (SpecInfer: Miao et al. 2023, arXiv:2305.09781; Medusa, EAGLE). Its nodes are packed after the cached
text. Each stands at the position of its *depth* and sees the text, its ancestors and itself. So what the model says at
a node is what it would say after the path that leads there, and a tree without forks is a chain.

The guesses are certain: the likeliest tokens of a draft model, or what followed earlier. For such guesses nothing must
be rejected by chance (`minillm.engine.verify`): draw after the root as if nothing had been guessed, go to the child
that says the same, and draw there, until there is no such child. Every token is a draw from the target's distribution.

Loses: a fork adds rows to every matrix product, and all but one of its branches are thrown away. The engine checks
chains: n rows of a chain can bring n tokens, attention under the causal rule needs no mask, and what is accepted lies
in its blocks already, while here it must be moved together (`keep`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minillm.attention.reference import masked_attention
from minillm.cache.contiguous import ContiguousCache
from minillm.generate import choose
from minillm.model.decoder import Decoder, inference
from minillm.sampling import SamplingParams


@dataclass(frozen=True)
class TokenTree:
    """Guesses as a tree. Node 0 is its root: the last token of the text, which is not computed yet.

    tokens[i] is guessed after node parents[i], which stands before it: parents[i] < i. The root's parent is -1.
    """

    tokens: list[int]
    parents: list[int]

    @classmethod
    def of(cls, root: int, guesses: Iterable[Sequence[int]]) -> TokenTree:
        """The tree of the continuations in `guesses`; a beginning that several of them share is in it once."""
        tokens, parents, nodes = [root], [-1], dict[tuple[int, int], int]()
        for guess in guesses:
            node = 0
            for token in guess:
                if (node, token) not in nodes:
                    nodes[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = nodes[node, token]
        return cls(tokens, parents)

    @cached_property
    def children(self) -> dict[tuple[int, int], int]:
        """(node, token) -> the node after it that guesses this token."""
        return {(parent, self.tokens[node]): node for node, parent in enumerate(self.parents)}

    @cached_property
    def depths(self) -> Tensor:
        """Steps from the root to each node, [num_nodes] int64: its position after the root's."""
        return self.ancestors.sum(-1) - 1

    @cached_property
    def ancestors(self) -> Tensor:
        """[num_nodes, num_nodes] bool: True where the column's node is the row's node or one of its ancestors."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], 1):
            seen[node] |= seen[parent]
        return seen

    def visible(self, num_cached: int, sliding_window: int | None = None) -> Tensor:
        """Who sees what, [num_nodes, num_cached + num_nodes] bool: the cached text and the ancestors.

        A sliding window counts positions, and two nodes of one depth stand at the same one.
        """
        mask = torch.cat([torch.ones(len(self.tokens), num_cached, dtype=torch.bool), self.ancestors], dim=1)
        if sliding_window is None:
            return mask
        positions = num_cached + self.depths
        keys = torch.cat([torch.arange(num_cached), positions])
        return mask & (keys > positions[:, None] - sliding_window)

    def follow(self, draw: Callable[[int, list[int]], int]) -> tuple[list[int], list[int]]:
        """The accepted nodes, root first, and the new tokens: what the nodes after the root say, and one more.

        draw(node, said): a token from the target's distribution after a node, which these new tokens lead to.
        """
        path, said, node = list[int](), list[int](), 0
        while node >= 0:
            path.append(node)
            said.append(draw(node, said))
            node = self.children.get((node, said[-1]), -1)
        return path, said


def score_tree(model: Decoder, tree: TokenTree, cache: ContiguousCache) -> Tensor:
    """Run all nodes in one step: float32 logits [num_nodes, vocab_size] of what follows each of them.

    Their KV is written after the cached tokens, and not counted: `keep` the nodes that are accepted.
    """
    mask = tree.visible(cache.num_tokens, model.config.sliding_window).to(model.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.write(layer, k, v)
        return masked_attention(q, keys, values, mask, scale=model.config.head_dim**-0.5)[0]

    tokens, positions = torch.tensor(tree.tokens), cache.num_tokens + tree.depths
    with inference(model.device):
        return model.logits(model(tokens.to(model.device), positions.to(model.device), attend))


def keep(cache: ContiguousCache, path: Sequence[int]) -> None:
    """Count the nodes `path`, in ascending order, as cached: move their KV together right after the cached tokens."""
    rows = torch.tensor(path, device=cache.keys.device) + cache.num_tokens
    end = cache.num_tokens + len(path)
    with inference(cache.keys.device):
        for pool in (cache.keys, cache.values):
            pool[:, :, cache.num_tokens : end] = pool.index_select(2, rows)
    cache.num_tokens = end


def verify_tree(
    model: Decoder,
    tokens: list[int],
    guesses: Iterable[Sequence[int]],
    cache: ContiguousCache,
    params: SamplingParams,
    *,
    num_prompt: int,
    sample_index: int = 0,
) -> list[int]:
    """The next tokens after `tokens`, all but the last of which are cached: at least one, at most a guess and one.

    Distributed, and with the same numbers drawn, as by `minillm.generate.generate` one by one. The first `num_prompt`
    tokens are the prompt. Where a text ends is up to the caller.
    """
    tree = TokenTree.of(tokens[-1], guesses)
    logits = score_tree(model, tree, cache)
    prompt, output = tokens[:num_prompt], tokens[num_prompt:]
    path, said = tree.follow(
        lambda node, said: choose(logits[node], params, prompt, output + said, sample_index, model.config.eos_token_ids)
    )
    keep(cache, path)
    return said
