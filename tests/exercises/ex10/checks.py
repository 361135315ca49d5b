"""Checks of exercise 10. The oracles compare whole prefixes and walk through plain lists."""

from __future__ import annotations

import hashlib

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="prefix_caching",
    tasks=(
        Task(
            "hash_blocks",
            "Names that know their past",
            hints=(
                "Two blocks of equal tokens behind different beginnings: may they have the same name?",
                "Walk through the full blocks and keep the name of the one before; the first one's parent is the salt. "
                "What is left behind the last full block has no name.",
                "for end in range(block_size, len(tokens) + 1, block_size): block = ','.join(map(str, tokens[end - "
                "block_size:end])); parent = hashlib.sha256(f'{parent}|{block}'.encode()).hexdigest(); "
                "names.append(parent)",
            ),
        ),
        Task(
            "longest_match",
            "What a prompt can start with",
            hints=(
                "What is a known block worth if the one before it is not known? And what must always be computed?",
                "Collect blocks until the first name that is not in `cached`. The tokens saved are at most "
                "num_tokens - 1, because the last token's logits are wanted.",
                "for name in names: stop if name not in cached, else blocks.append(cached[name]); return blocks, "
                "max(0, min(len(blocks) * block_size, num_tokens - 1))",
            ),
        ),
        Task(
            "free_queue",
            "What is forgotten first",
            hints=(
                "Which end is taken from, and which end does something useful go to?",
                "An OrderedDict with blocks as keys: popitem(last=False) takes the head, a new key goes to the end, "
                "move_to_end(block, last=False) moves it to the head, del takes one out of the middle.",
                "popleft: block, _ = self.blocks.popitem(last=False); append: self.blocks[block] = None; prepend: the "
                "same, then move_to_end(block, last=False); remove: del self.blocks[block]",
            ),
        ),
        Task(
            "shared_blocks",
            "Share until somebody writes",
            hints=(
                "Who may write into a block without asking? How can you tell?",
                "A count of 1 means: mine alone. With more, take a free block, give up one count of the old one, put "
                "the new one into *your* table, and say what must be copied. A fork needs a list of its own.",
                "write: source = table[index]; None if ref_counts[source] == 1; ref_counts[source] -= 1; table[index], "
                "= self.new(1); return source, table[index]. release: count down every block, then table.clear()",
            ),
        ),
    ),
)


def text(case: Case, count: int) -> list[int]:
    """Token ids of one to three digits."""
    return case.randint(0, 300, count).tolist()


def name_of(tokens: list[int], block_size: int, salt: str) -> str:
    """The oracle: the name of the last block of a prefix, found by going back to its beginning."""
    if not tokens:
        return salt
    parent = name_of(tokens[:-block_size], block_size, salt)
    return hashlib.sha256((parent + "|" + ",".join(str(token) for token in tokens[-block_size:])).encode()).hexdigest()


def names_of(tokens: list[int], block_size: int, salt: str = "") -> list[str]:
    """The names of all full blocks."""
    return [name_of(tokens[:end], block_size, salt) for end in range(block_size, len(tokens) + 1, block_size)]


@check("hash_blocks", points=2)
def names_of_a_text(case: Case) -> None:
    """Full blocks have names, the rest has none"""
    block_size = case.integer(2, 4)
    for count in (3 * block_size, 3 * block_size - 1, 3 * block_size + 1):
        tokens = text(case, count)
        got = case.learner.hash_blocks(tokens, block_size)
        case.expect(got, names_of(tokens, block_size), f"{count} tokens in blocks of {block_size}")


@check("hash_blocks", points=2)
def the_past_counts(case: Case) -> None:
    """Equal blocks behind different beginnings have different names"""
    block = text(case, 4)
    for tokens in (block + block, text(case, 4) + block):
        case.expect(case.learner.hash_blocks(tokens, 4), names_of(tokens, 4), "the parent's name is in the hash")


@check("hash_blocks", points=1, hidden=True)
def salts_and_digits(case: Case) -> None:
    """Another salt, other names; 1, 23 is not 12, 3"""
    tokens = text(case, 6)
    for salt in ("", "tenant-7"):
        case.expect(case.learner.hash_blocks(tokens, 3, salt=salt), names_of(tokens, 3, salt), f"salt {salt!r}")
    for tokens in ([1, 23], [12, 3]):
        case.expect(case.learner.hash_blocks(tokens, 2), names_of(tokens, 2), "tokens are separated by commas")


@check("longest_match", points=2)
def up_to_the_first_gap(case: Case) -> None:
    """Known blocks count from the beginning, up to the first unknown one"""
    names = [f"block {i}" for i in range(6)]
    numbers = (10 + case.randint(0, 5, 6).cumsum(0) + case.integer(0, 5)).tolist()
    for known in range(6):
        cached = {name: number for i, (name, number) in enumerate(zip(names, numbers, strict=True)) if i != known}
        got = case.learner.longest_match(names, cached, num_tokens=20, block_size=3)
        case.expect(got, (numbers[:known], 3 * known), f"block {known} is unknown: behind it nothing counts")


@check("longest_match", points=1)
def the_last_token_is_computed(case: Case) -> None:
    """A prompt that is known entirely saves all tokens but one"""
    block_size, count = case.integer(2, 5), case.integer(1, 4)
    names = [f"block {i}" for i in range(count)]
    cached = {name: 7 + i for i, name in enumerate(names)}
    got = case.learner.longest_match(names, cached, num_tokens=count * block_size, block_size=block_size)
    expected = (list(range(7, 7 + count)), count * block_size - 1)
    case.expect(got, expected, "its logits are wanted, and only computing it brings them")


@check("longest_match", points=1, hidden=True)
def nothing_known(case: Case) -> None:
    """Unknown beginnings, short prompts, prompts that end inside a block"""
    case.expect(case.learner.longest_match(["a", "b"], {"b": 3}, 5, 2), ([], 0), "the beginning is unknown")
    case.expect(case.learner.longest_match([], {"b": 3}, 1, 2), ([], 0), "no full block")
    case.expect(case.learner.longest_match(["a"], {"a": 3}, 5, 4), ([3], 4), "one token behind the known block")


@check("free_queue", points=3)
def the_order_of_forgetting(case: Case) -> None:
    """What was useful last is forgotten last; what nobody can find again goes first"""
    oracle = list(range(5, 5 + case.integer(7, 9)))
    queue = case.learner.FreeQueue(list(oracle))
    used: list[int] = []
    for _ in range(12):
        move = case.integer(0, 3)
        if move == 0 and oracle:
            used.append(oracle.pop(0))
            case.expect(queue.popleft(), used[-1], f"the head of {[used[-1], *oracle]}")
        elif move == 1 and oracle:
            used.append(oracle.pop(case.integer(0, len(oracle) - 1)))
            queue.remove(used[-1])
        elif used:
            block = used.pop(0)
            queue.append(block) if move == 2 else queue.prepend(block)
            oracle.insert(len(oracle) if move == 2 else 0, block)
    for block in oracle:
        case.expect(queue.popleft(), block, "the blocks that are left, in order")


@check("free_queue", points=1)
def one_by_one(case: Case) -> None:
    """Append goes to the end, prepend to the head"""
    queue = case.learner.FreeQueue([1, 2, 3])
    queue.remove(2)
    queue.append(2)
    queue.remove(3)
    queue.prepend(3)
    for block in (3, 1, 2):
        case.expect(queue.popleft(), block, "3 was prepended, 1 was there, 2 was appended")


@check("shared_blocks", points=3)
def tables_part_when_written(case: Case) -> None:
    """Two tables share blocks until one of them writes"""
    blocks = case.learner.SharedBlocks(num_blocks=8)
    first = blocks.new(3)
    second = blocks.fork(first)
    case.expect(blocks.ref_counts, [2, 2, 2, 0, 0, 0, 0, 0], "two tables hold each block")
    case.expect(blocks.write(second, 1), (1, 3), "block 1 is shared: its content goes to the first free block")
    case.expect(second, [0, 3, 2], "the writer's table")
    case.expect(first, [0, 1, 2], "the other table")
    case.expect(blocks.ref_counts, [2, 1, 2, 1, 0, 0, 0, 0], "each lost what the other keeps")
    case.expect(blocks.write(first, 1), None, "nobody else holds block 1 any more")
    case.expect(blocks.ref_counts, [2, 1, 2, 1, 0, 0, 0, 0], "nothing changed")


@check("shared_blocks", points=2)
def blocks_come_back(case: Case) -> None:
    """A block is free when its last table lets go"""
    blocks = case.learner.SharedBlocks(num_blocks=5)
    first = blocks.new(2)
    second = blocks.fork(first)
    blocks.release(first)
    case.expect(blocks.ref_counts, [1, 1, 0, 0, 0], "the other table still holds both")
    case.expect(first, [], "a released table is empty")
    case.expect(blocks.new(2), [2, 3], "the free blocks with the smallest numbers")
    blocks.release(second)
    case.expect(blocks.new(2), [0, 1], "free again")
    case.expect(blocks.ref_counts, [1, 1, 1, 1, 0], "everything that is held, once")


@check("shared_blocks", points=1, hidden=True)
def three_readers(case: Case) -> None:
    """Three tables over the same blocks, one after the other writes"""
    blocks = case.learner.SharedBlocks(num_blocks=9)
    first = blocks.new(2)
    second, third = blocks.fork(first), blocks.fork(first)
    case.expect(blocks.write(first, 0), (0, 2), "shared by three")
    case.expect(blocks.write(second, 0), (0, 3), "shared by two")
    case.expect(blocks.write(third, 0), None, "the last one keeps the block")
    case.expect(blocks.ref_counts, [1, 3, 1, 1, 0, 0, 0, 0, 0], "block 1 was not written")
    case.expect(third, [0, 1], "never wrote into anything shared")
