"""Counted equals predicted, as integers: every family, prefill, chunk, decode, verify, packed layers and plain ones."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.attention.paged import REFERENCE, Backend, paged_attention, write_kv
from minillm.attention.reference import naive_attention
from minillm.attention.tiled import tiled_attention
from minillm.cache.contiguous import ContiguousCache
from minillm.cache.paged import PagedCache
from minillm.config import EngineConfig, ModelConfig
from minillm.costs import formulas
from minillm.costs.formulas import Bytes
from minillm.costs.steps import Step, chunk_steps, decode_step, prefill_step, verify_step
from minillm.course.lessons.tiles import tiled_keys, tiled_pairs
from minillm.engine.engine import Engine
from minillm.generate import extend, prefill
from minillm.kernels.sdpa import attention as fused
from minillm.measure.counters import Counter
from minillm.measure.hf_shape import hf_shape
from minillm.measure.operators import flops_of
from minillm.measure.stepper import StepRunner, weightless
from minillm.model.decoder import Decoder
from minillm.model.linear import Linear
from minillm.sampling import SamplingParams
from minillm.shapes import named_shape
from tests.families import FAMILIES, random_model

STEPS: dict[str, Step] = {
    "prefill": prefill_step(13),
    "chunk": [(5, 17)],
    "decode": decode_step(18),
    "verify": verify_step(21, drafts=4),
    "batch": decode_step(11, batch=3),
    "mixed": [(1, 18), (12, 12), (5, 7), (1, 1)],
}


@cache
def whole(family: str) -> Decoder:
    return random_model(family)


@cache
def two_layers(family: str) -> Decoder:
    return random_model(family, num_hidden_layers=2)


def one_by_one(kernel: Callable[..., Tensor]) -> Backend:
    """Paged attention request by request with this kernel."""
    return Backend(partial(paged_attention, kernel=kernel), write_kv)


def tiled(q_tile: int) -> Backend:
    """Paged attention in tiles of `q_tile` queries."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return tiled_attention(q, k, v, q_tile=q_tile, **options)[0]

    return one_by_one(kernel)


def tiled_flops(config: ModelConfig, step: Step, q_tile: int) -> formulas.Flops:
    """FLOPs of a step whose attention computes whole tiles of `q_tile` queries."""
    pairs = sum(tiled_pairs(*sequence, config.sliding_window, q_tile) for sequence in step)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return formulas.step_flops(config, step)._replace(attention=attention)


FUSED, NAIVE = one_by_one(fused), one_by_one(naive_attention)


def count(model: Decoder, step: Step, backend: Backend = FUSED) -> Counter:
    run = StepRunner(model, step, backend=backend)
    with Counter(model, kv=run.cache) as counted:
        run()
    return counted


def flops_by_part(counted: Counter) -> formulas.Flops:
    """As the formulas have them; FLOPs anywhere else raise TypeError."""
    spent = {part: cost.flops for part, cost in counted.by_part().items() if cost.flops}
    return formulas.Flops(**dict.fromkeys(formulas.Flops._fields, 0) | spent)


# The identity of the instrument: what is counted is what is predicted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_counted_is_predicted(family: str, step: Step) -> None:
    """Attention in tiles of one query computes exactly what the causal rule asks for: nothing is left to explain."""
    model = two_layers(family)
    counted = count(model, step, tiled(q_tile=1))
    assert flops_by_part(counted) == formulas.step_flops(model.config, step)
    moved, predicted = counted.total.bytes, formulas.step_bytes(model.config, step, 4)
    assert (moved.weights, moved.kv_write) == (predicted.weights, predicted.kv_write)
    keys = sum(tiled_keys(*sequence, model.config.sliding_window, 1) for sequence in step)
    assert moved.kv_read == keys * formulas.kv_bytes_per_token(model.config, 4)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3"])
@pytest.mark.parametrize("backend, q_tile", [(tiled(3), 3), (REFERENCE, 100)], ids=["tiles of 3", "the definition"])
def test_tiles_compute_and_read_what_they_touch(family: str, backend: Backend, q_tile: int) -> None:
    """The definition's own tiles are higher than any of these steps."""
    model = two_layers(family)
    for step in STEPS.values():
        counted = count(model, step, backend)
        assert flops_by_part(counted) == tiled_flops(model.config, step, q_tile)
        keys = sum(tiled_keys(*sequence, model.config.sliding_window, q_tile) for sequence in step)
        assert counted.total.bytes.kv_read == keys * formulas.kv_bytes_per_token(model.config, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engines_own_attention_reads_each_key_once(family: str) -> None:
    """The fused kernel: bytes as predicted for all steps; FLOPs of a prompt and of a decode, too.

    A chunk or a verification needs a mask, and with a mask the kernel computes the whole rectangle.
    """
    model = two_layers(family)
    for name, step in STEPS.items():
        counted = count(model, step)
        assert counted.total.bytes._replace(activations=0) == formulas.step_bytes(model.config, step, 4)
        masked = name in ("chunk", "verify") or (name == "prefill" and model.config.sliding_window)
        if name != "mixed":
            assert flops_by_part(counted) == tiled_flops(model.config, step, 100 if masked else 1)


@pytest.mark.parametrize("family", ["llama2", "qwen3"])
def test_naive_attention_computes_the_square(family: str) -> None:
    model = two_layers(family)
    for step in STEPS.values():
        counted = count(model, step, NAIVE)
        assert flops_by_part(counted) == tiled_flops(model.config, step, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("packed", [True, False])
def test_packed_and_plain_layers_count_alike(dtype: torch.dtype, packed: bool) -> None:
    model = random_model("qwen2", dtype=dtype)
    if not packed:
        model = plain(model)
    step = STEPS["mixed"]
    cost = count(model, step, tiled(q_tile=1)).total
    assert cost.flops == formulas.step_flops(model.config, step).total
    assert cost.bytes.weights == formulas.step_bytes(model.config, step, dtype.itemsize).weights


def plain(model: Decoder) -> Decoder:
    """The same shape without packed layers."""
    unpacked = Decoder(model.config).requires_grad_(False)
    for module in unpacked.modules():
        if isinstance(module, (Linear, nn.Embedding)):
            module.to(model.dtype)
    if model.dtype == torch.float64:
        unpacked.double()
    return unpacked


def test_chunks_read_the_weights_again_and_again() -> None:
    model = whole("qwen3")
    steps = chunk_steps(30, 8)
    total = sum(count(model, step).total.bytes.weights for step in steps)
    assert total == sum(formulas.step_bytes(model.config, step, 4).weights for step in steps)
    assert len(steps) == 4 and total > 3.9 * formulas.weight_bytes(model.config, 4, 8)


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "mistral-7b"])
def test_large_models_are_counted_without_their_memory(shape: str) -> None:
    model = weightless(replace(named_shape(shape), num_layers=4))
    for step in (decode_step(5000), prefill_step(300)):
        cost = count(model, step).total
        assert cost.flops == formulas.step_flops(model.config, step).total
        assert cost.bytes._replace(activations=0) == formulas.step_bytes(model.config, step, 2)


def test_grouped_decodes_pay_for_their_padding() -> None:
    """The engine's groups gather keys to a common width: never less than predicted, and reported as it is."""
    model = whole("qwen3")
    step: Step = [(1, 400), (1, 390), (1, 300)]
    run = StepRunner(model, step)
    with Counter(model, kv=run.cache) as counted:
        run()
    predicted = formulas.step_bytes(model.config, step, 4)
    assert predicted.kv_read <= counted.total.bytes.kv_read <= 1.5 * predicted.kv_read
    assert counted.total.bytes.kv_write == predicted.kv_write


@pytest.mark.parametrize("policy", ["mixed", "prefill_first"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_an_engines_steps_cost_what_their_records_say(policy: str, block_size: int) -> None:
    """From the trace alone: chunks, decodes and mixed steps of several requests, priced, against what was counted.

    Blocks that are not adjacent are gathered whole: in blocks of 1 token that is what the formula says, in blocks of 16
    up to 15 tokens more for each request.
    """
    model = two_layers("llama3")
    config = EngineConfig(policy=policy, max_num_batched_tokens=16, block_size=block_size, num_blocks=256)
    engine = Engine(model, config)
    assert isinstance(engine.runner.cache, PagedCache)
    engine.runner.cache.backend = FUSED  # the CPU's groups gather more than they need
    rng = random.Random(seed := random.randrange(2**32))
    for _ in range(3):
        engine.add(rng.choices(range(100), k=rng.randint(5, 40)), SamplingParams(max_tokens=rng.randint(1, 6)))
    while engine.requests:
        with Counter(model, kv=engine.runner.cache) as counted:
            engine.step()
        record = engine.trace[-1]
        rows = sum(part.num_samples for part in record.requests)
        head = formulas.head_parameters(model.config)
        predicted = formulas.step_bytes(model.config, record.shape, 4)
        if rows == 0:  # a chunk in the middle of a prompt: nobody wants its logits
            predicted = predicted._replace(weights=predicted.weights - 4 * head)
        counted_bytes, per_token = counted.total.bytes, formulas.kv_bytes_per_token(model.config, 4)
        whole = per_token * sum(-(-kv_len // block_size) * block_size for _, kv_len in record.shape)
        assert predicted.kv_read <= counted_bytes.kv_read <= whole, f"{seed=}"
        assert counted_bytes._replace(activations=0, kv_read=predicted.kv_read) == predicted, f"{seed=}"
        linear = formulas.step_flops(model.config, record.shape)._replace(attention=0, head=2 * rows * head)
        assert flops_by_part(counted)._replace(attention=0) == linear, f"{seed=}"


# Mutants of the prediction: the counter tells each from the truth


@pytest.mark.parametrize(
    "mutant",
    [
        lambda c, s: tiled_flops(c, s, 10**6),  # causal half forgotten
        lambda c, s: formulas.step_flops(c, s)._replace(head=0),  # head forgotten
        lambda c, s: formulas.step_flops(c, s)._replace(head=2 * s[0][0] * formulas.head_parameters(c)),  # every row
        lambda c, s: formulas.step_flops(replace(c, head_dim=c.hidden_size // c.num_heads), s),  # heads · d = hidden
        lambda c, s: formulas.step_flops(replace(c, num_heads=c.num_kv_heads), s),  # attention at the KV heads
    ],
)
def test_wrong_flops_are_noticed(mutant: Callable[..., formulas.Flops]) -> None:
    model = whole("qwen3")
    step = prefill_step(13)
    assert mutant(model.config, step) != flops_by_part(count(model, step, tiled(q_tile=1)))


@pytest.mark.parametrize(
    "mutant",
    [
        lambda c, s: formulas.step_bytes(replace(c, num_kv_heads=c.num_heads), s, 4),  # grouped queries forgotten
        lambda c, s: formulas.step_bytes(c, s, 2),  # another dtype
        lambda c, s: formulas.step_bytes(c, s[:1], 4),  # KV shared by the batch
        lambda c, s: formulas.step_bytes(c, [(q, kv - q) if kv > q else (q, kv) for q, kv in s], 4),  # itself unseen
    ],
)
def test_wrong_bytes_are_noticed(mutant: Callable[..., Bytes]) -> None:
    model = whole("qwen3")
    step = decode_step(18, batch=3)
    counted, wrong = count(model, step).total.bytes, mutant(model.config, step)
    assert (counted.weights, counted.kv_read) != (wrong.weights, wrong.kv_read)
    assert counted._replace(activations=0) == formulas.step_bytes(model.config, step, 4)


# Where it went


def test_layers_and_parts_add_up() -> None:
    model = whole("qwen3")
    counted = count(model, STEPS["mixed"])
    for groups in (counted.by_part(), counted.by_layer()):
        assert sum(cost.flops for cost in groups.values()) == counted.total.flops
        assert Bytes(*map(sum, zip(*(cost.bytes for cost in groups.values()), strict=True))) == counted.total.bytes
    layers = counted.by_layer()
    assert set(layers) == {None, 0, 1, 2} and layers[0] == layers[1] == layers[2]
    layer = formulas.step_flops(replace(model.config, num_layers=1), STEPS["decode"])
    assert count(model, STEPS["decode"]).by_layer()[1].flops == layer.total - layer.head


def test_parts_are_where_the_weights_are() -> None:
    model = whole("qwen3")
    weights = {part: cost.bytes.weights for part, cost in count(model, decode_step(5)).by_part().items()}
    config = model.config
    assert weights["projections"] == 4 * config.num_layers * formulas.attention_parameters(config)
    assert weights["mlp"] == 4 * config.num_layers * formulas.mlp_parameters(config)
    assert weights["head"] == 4 * formulas.head_parameters(config)
    assert weights["embedding"] == 4 * config.hidden_size
    assert weights["attention"] == weights["other"] == 0


def test_transformers_models_count_too() -> None:
    """Another library's code: other module names, a cache that concatenates, attention on repeated keys."""
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    torch.manual_seed(0)
    shape = random_model("qwen3").config
    hf = AutoConfig.for_model(**hf_shape(shape, "float32"))
    model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager").eval()
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.arange(12)[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        with Counter(model, kv=cache) as counted:
            model(input_ids=torch.tensor([[3]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    assert flops_by_part(counted) == formulas.step_flops(shape, decode_step(13))
    per_token = formulas.kv_bytes_per_token(shape, 4)
    assert counted.total.bytes.kv_write == 13 * per_token, "concatenation writes the whole cache anew"
    assert counted.total.bytes.kv_read == (12 + 13) * per_token, "it reads the old one, then attention reads the new"


def test_a_cache_can_be_named_afterwards() -> None:
    """`prefill` makes its own cache: what was written to it is found when it is named."""
    model = whole("llama3")
    with Counter(model) as counted:
        _, cache = prefill(model, range(9))
    assert counted.total.bytes.kv_write == 0
    unnamed = counted.total.bytes.total
    counted.mark_kv(cache)
    assert counted.total.bytes.kv_write == 9 * formulas.kv_bytes_per_token(model.config, 4)
    assert counted.total.bytes.total == unnamed


def test_code_without_modules_can_name_places() -> None:
    w, x = torch.ones(4, 6), torch.ones(6)
    with Counter() as counted:
        with counted.within("layers.0.mlp"):
            y = w @ x
        torch.dot(y, y)
    assert {part: cost.flops for part, cost in counted.by_part().items()} == {"mlp": 48, "other": 8}


# Single operators


@pytest.mark.parametrize(
    "operator, reads, writes",
    [
        (lambda x: x + 1, 96, 96),
        (lambda x: x.add_(1), 96, 96),
        (lambda x: x.t().unsqueeze(0)[:, 1:].detach(), 0, 0),
        (lambda x: x.reshape(24), 0, 0),
        (lambda x: x.fill_(3), 0, 96),
        (lambda x: x[1:3].copy_(torch.ones(6).expand(2, 6)), 24, 48 + 24),
        (lambda x: x.index_select(0, torch.tensor([2, 0])), 48 + 16, 48),
        (lambda x: x.index_copy_(0, torch.tensor([1]), torch.ones(1, 6)), 24 + 8, 24 + 24),
        (lambda x: x * x, 96, 96),
        (lambda x: torch.empty(100), 0, 0),
        (lambda x: x.new_zeros(2), 0, 8),
        (lambda x: torch.full_like(x, 3), 0, 96),
        (lambda x: torch.tensor([1, 2]), 0, 0),
        (lambda x: torch.mul(x, 2, out=torch.empty(4, 6)), 96, 96),
        (lambda x: x.expand(5, 4, 6).sum(), 96, 4),
    ],
)
def test_operators_move_what_they_touch(operator: Callable[[Tensor], Tensor], reads: int, writes: int) -> None:
    x = torch.ones(4, 6)
    with torch.inference_mode(), Counter() as counted:
        operator(x)
    moved = [access for operation in counted.operations for access in operation.accesses]
    assert sum(a.num_bytes for a in moved if not a.write) == reads
    assert sum(a.num_bytes for a in moved if a.write) == writes


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_len, kv_len, kv_heads", [(6, 6, 2), (3, 8, 2), (8, 3, 2), (5, 5, 1)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_attention_counts_its_pairs(causal: bool, q_len: int, kv_len: int, kv_heads: int, device: str) -> None:
    q = torch.ones(1, 2, q_len, 8, device=device)
    k = torch.ones(1, kv_heads, kv_len, 8, device=device)
    with torch.inference_mode(), Counter() as counted:
        F.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=kv_heads < 2)
    pairs = int(torch.ones(q_len, kv_len).tril().sum()) if causal else q_len * kv_len
    assert counted.total.flops == 4 * 2 * 8 * pairs


def test_flops_of_products() -> None:
    a, b, v = torch.ones(3, 4), torch.ones(4, 5), torch.ones(4)
    cases: list[tuple[Callable[[], Tensor], int]] = [
        (lambda: a @ b, 2 * 3 * 4 * 5),
        (lambda: a @ v, 2 * 3 * 4),
        (lambda: v @ v, 2 * 4),
        (lambda: F.linear(a, b.t(), torch.ones(5)), 2 * 3 * 4 * 5),
        (lambda: torch.einsum("ij,jk->ik", a, b), 2 * 3 * 4 * 5),
        (lambda: torch.bmm(a[None], b[None]), 2 * 3 * 4 * 5),
        (lambda: torch.addmv(torch.ones(3), a, v), 2 * 3 * 4),
        (lambda: a.softmax(-1), 0),
    ]
    for grad in (True, False):
        for product, expected in cases:
            with torch.inference_mode(not grad), Counter() as counted:
                product()
            assert counted.total.flops == expected


# Memory


def test_peak_is_what_lives_at_the_same_time() -> None:
    with Counter() as counted:
        a = torch.zeros(100)  # 400 bytes
        b = a + 1  # 800
        del a  # 400
        c = torch.zeros(50)  # 600
        del b, c
        torch.zeros(10)
    assert counted.peak_bytes == 800
    assert counted.largest[0] == 400


def test_memory_that_is_used_again_is_counted_as_new() -> None:
    """Freed addresses come back at once: a counter that goes by the address would take them for old acquaintances."""
    cache = torch.zeros(1000)
    with Counter(kv=cache) as counted:
        for _ in range(20):
            torch.ones(1000).sum()
    assert counted.peak_bytes <= 4000 + 4
    assert counted.total.bytes.kv_read == 0


def test_naive_attention_holds_the_square_and_tiles_do_not() -> None:
    heads, n, d = 4, 256, 8
    q, k = torch.ones(n, heads, d), torch.ones(heads, n, d)
    with Counter() as naive:
        naive_attention(q, k, k, scale=1.0)
    with Counter() as tiles:
        tiled_attention(q, k, k, scale=1.0, q_tile=32, kv_tile=32)
    assert naive.largest[0] == 4 * heads * n * n
    assert tiles.largest[0] <= 4 * heads * n * 32 and tiles.peak_bytes < naive.peak_bytes / 4


def test_the_counter_leaves_no_trace() -> None:
    """It changes no result, and an error inside leaves no hook behind."""
    model = whole("qwen3")
    plainly, counted_logits = (StepRunner(model, decode_step(9)) for _ in range(2))
    with Counter(model):
        inside = counted_logits()
    assert torch.equal(inside, plainly())
    with pytest.raises(RuntimeError, match="stop"), Counter(model) as counted:
        model(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), _fail)
    before = len(counted.operations)
    plainly()
    assert len(counted.operations) == before and counted._stack == [""]


def test_a_model_does_not_keep_its_counters() -> None:
    """The mutant lets the weights' finalizers hold the counter, with every operator of every step."""
    model = whole("qwen3")
    counted = count(model, decode_step(9))
    gone = weakref.ref(counted)
    del counted
    gc.collect()
    assert gone() is None


def _fail(*_: object) -> Tensor:
    raise RuntimeError("stop")


def test_extend_over_a_contiguous_cache() -> None:
    """Phase by phase through the simplest code: prefill, then decodes; random lengths."""
    rng = random.Random(seed := random.randrange(2**32))
    model = whole("llama3")
    prompt = rng.randint(2, 30)
    cache = ContiguousCache(model.config, capacity=64, device=model.device, dtype=model.dtype)
    for step in (prefill_step(prompt), decode_step(prompt + 1), decode_step(prompt + 2)):
        with Counter(model, kv=cache) as counted:
            extend(model, torch.zeros(step[0][0], dtype=torch.int64), cache)
        assert counted.total.flops == formulas.step_flops(model.config, step).total, f"{seed=}"
        assert counted.total.bytes._replace(activations=0) == formulas.step_bytes(model.config, step, 4), f"{seed=}"


def test_unknown_operators_have_no_flops() -> None:
    assert flops_of(torch.ops.aten.add.Tensor, (torch.ones(2), torch.ones(2)), {}, torch.ones(2)) == 0
