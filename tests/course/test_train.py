"""The parts of training: corpus, batches, schedule, loss, optimizer, and a run that stops and goes on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.config import ModelConfig
from minillm.course.training import batches, train
from minillm.course.training.batches import batch, pack, prepare
from minillm.course.training.bpe import END_OF_TEXT_ID, train_tokenizer
from minillm.course.training.loss import compiled, row_loss
from minillm.course.training.optimizer import Muon, make_optimizers, orthogonalize, tie_head_norms
from minillm.course.training.train import Run, TrainConfig, initialize, rate_factor
from minillm.errors import ConfigError
from minillm.measure import corpus
from minillm.model.decoder import Decoder
from minillm.model.loader import load_model

SHAPE = dict(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
LINES = [f"def f{i}(x):\n    return x + {i}\n" for i in range(300)]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run on a small model and a small corpus: everything but the size is real."""
    monkeypatch.setitem(train.SHAPES, "small", SHAPE)
    documents = [corpus.Document(f"lines/{i}.py", line) for i, line in enumerate(LINES)]
    monkeypatch.setattr(batches, "training_documents", lambda: documents)
    monkeypatch.setattr(batches, "held_out_texts", lambda max_bytes: LINES[:40])
    monkeypatch.setattr(batches, "VOCAB_SIZE", 300)
    return TrainConfig(
        shape="small",
        out=tmp_path / "out",
        work=tmp_path / "work",
        batch_tokens=256,
        length=32,
        long_length=64,
        warmup_steps=2,
        compile=False,
    )


def stepped_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every look at the clock take `seconds`, so that a run is the same on every machine."""
    now = iter(range(10**9))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(now) * seconds)


# ---------------------------------------------------------------- corpus


@pytest.fixture(scope="module")
def documents() -> Iterator[list[corpus.Document]]:
    """The corpus of this machine with two of its packages; reading all of them takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PACKAGES", ("numpy", "rich", "not_installed_here"))
        yield corpus.training_documents()


def test_held_out_texts_are_never_trained_on(documents: list[corpus.Document]) -> None:
    held_out = corpus.held_out_texts()
    assert sum(map(len, held_out)) > 100_000
    assert not set(held_out) & {document.text for document in documents}


def test_the_held_out_excerpt_is_a_prefix_in_whole_files() -> None:
    everything = corpus.held_out_texts()
    part = corpus.held_out_texts(30_000)
    assert part == everything[: len(part)]
    sizes = [len(text.encode()) for text in part]
    assert sum(sizes) >= 30_000 > sum(sizes[:-1])


def test_the_corpus_is_code_that_is_read_once(documents: list[corpus.Document]) -> None:
    others = [document.text for document in documents if not document.name.startswith("stdlib/")]
    assert len(others) == len(set(others))
    assert all("/test/" not in document.name and "_vendor/" not in document.name for document in documents)


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("def f(x):\n    return x\n", True),
        ("TABLE = (\n" + "    0x1F, 0x2A, 0x33,\n" * 20 + ")\n", False),
        ("# This file was automatically generated from x. Do NOT edit.\ndef f(x):\n    return x\n", False),
        ("data = '" + "a" * 500 + "'\n", False),
    ],
)
def test_tables_and_generated_files_are_no_code(text: str, readable: bool) -> None:
    assert corpus.is_readable_code(text) == readable


def test_only_a_licence_is_cut_from_the_top() -> None:
    assert (
        corpus.without_licence("# Copyright 2020\n# All rights\n\nimport os\n# Licence\n") == "import os\n# Licence\n"
    )
    assert corpus.without_licence("# Sorting\nimport os\n") == "# Sorting\nimport os\n"


# ---------------------------------------------------------------- batches


def check_pass(make_batch: Callable[..., Tensor]) -> None:
    """The oracle: one pass shows every window once, inputs and targets overlap by one, the next pass is shuffled."""
    tokens = np.arange(10 * 8 + 1, dtype=np.uint16)
    rows = [make_batch(tokens, step, 8, 2, seed=3) for step in range(10)]
    for row in torch.cat(rows):
        assert row.tolist() == list(range(int(row[0]), int(row[0]) + 9))
    first, second = (torch.cat(part)[:, 0].tolist() for part in (rows[:5], rows[5:]))
    assert sorted(first) == sorted(second) == list(range(0, 80, 8))
    assert first != second and first != sorted(first)


def test_each_pass_visits_every_window_once() -> None:
    check_pass(batch)


def mutant_same_order(tokens: np.ndarray, step: int, length: int, count: int, seed: int) -> Tensor:
    return batch(tokens, step % (len(tokens) // length // count), length, count, seed)


def mutant_random_windows(tokens: np.ndarray, step: int, length: int, count: int, seed: int) -> Tensor:
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - length, count)
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


def mutant_short_rows(tokens: np.ndarray, step: int, length: int, count: int, seed: int) -> Tensor:
    return batch(tokens, step, length, count, seed)[:, :-1]


@pytest.mark.parametrize("mutant", [mutant_same_order, mutant_random_windows, mutant_short_rows])
def test_the_batch_oracle_rejects(mutant: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_pass(mutant)


def test_texts_are_packed_with_an_end_between() -> None:
    tokenizer = train_tokenizer(LINES, 300)
    packed = pack(tokenizer, LINES[:2]).tolist()
    assert packed == [*tokenizer.encode(LINES[0]).ids, END_OF_TEXT_ID, *tokenizer.encode(LINES[1]).ids, END_OF_TEXT_ID]


def test_a_given_tokenizer_is_used(small: TrainConfig, tmp_path: Path) -> None:
    """A draft model needs the tokenizer of the model it drafts for."""
    first = prepare(small.work)
    second = prepare(tmp_path / "other", small.work / "tokenizer.json")
    assert first.tokenizer.to_str() == second.tokenizer.to_str() and np.array_equal(first.tokens, second.tokens)
    with pytest.raises(ConfigError, match="no tokenizer"):
        prepare(tmp_path / "third", tmp_path / "nothing.json")


# ---------------------------------------------------------------- schedule


def test_the_rate_warms_up_stays_and_falls(tmp_path: Path) -> None:
    config = TrainConfig(shape="tiny", out=tmp_path, work=tmp_path, warmup_steps=10, decay_share=0.4)
    assert rate_factor(0.0, 0, config) == pytest.approx(0.1)
    assert rate_factor(0.1, 9, config) == rate_factor(0.6, 500, config) == 1.0
    assert rate_factor(0.8, 500, config) == pytest.approx(0.5)
    assert rate_factor(1.0, 500, config) == 0.0


@pytest.mark.parametrize(
    ("change", "message"), [({"shape": "huge"}, "huge"), ({"minutes": 0}, "minutes"), ({"length": 500}, "multiple")]
)
def test_wrong_settings_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    config = TrainConfig(shape="tiny", out=tmp_path, work=tmp_path)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **change)


# ---------------------------------------------------------------- loss and gradients


def small_model(seed: int = 0) -> Decoder:
    config = ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=300,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        qk_norm=True,
        **SHAPE,
    )
    model = initialize(Decoder(config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # zeros at the start would hide a wrong attention
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
        for layer in model.layers:
            norm = layer.attention.qk_norm.weight
            norm.copy_(torch.cat([norm[:1].expand(4, -1), norm[4:5].expand(2, -1)]))
    return model


def reference_loss(model: Decoder, rows: Tensor, folder: Path) -> Tensor:
    """The same model in `transformers`, row by row."""
    from transformers import AutoModelForCausalLM

    train.save_checkpoint(model, folder, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = reference(rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def check_loss(model: Decoder, rows: Tensor, reference: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle: equal to `transformers` in float32, that is with autocast switched off."""
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    assert row_loss(model, rows).item() == pytest.approx(reference, abs=1e-5)


def test_loss_is_that_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    rows = torch.randint(300, (3, 33), generator=torch.Generator().manual_seed(1))
    reference = reference_loss(model, rows, tmp_path).item()
    assert row_loss(model, rows).item() == pytest.approx(reference, rel=0.01)  # bfloat16
    check_loss(model, rows, reference, monkeypatch)
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal: attention(q, k, v))
    with pytest.raises(AssertionError):  # a loss that sees the future
        check_loss(model, rows, reference, monkeypatch)


def test_gradient_of_a_shared_norm_is_the_sum_over_its_heads() -> None:
    model = small_model()
    weight = model.layers[0].attention.qk_norm.weight
    row_loss(model, torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(2))).backward()
    before = weight.grad.clone()
    tie_head_norms(model)
    expected = torch.cat([before[:4].sum(0).expand(4, -1), before[4:].sum(0).expand(2, -1)])
    torch.testing.assert_close(weight.grad, expected)


# ---------------------------------------------------------------- optimizer


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48)])
def test_orthogonalize_keeps_the_directions_and_levels_the_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    middle = u.T @ result @ v.T  # diagonal if the singular vectors are the same
    assert result.shape == matrix.shape
    assert (middle - middle.diag().diag()).abs().max() < 0.1
    sizes = torch.linalg.svdvals(result)
    assert sizes.min() > 0.5 and sizes.max() < 1.3


def test_parts_of_a_fused_weight_step_as_if_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(12, 8, generator=generator))
    parts = [torch.nn.Parameter(part.clone()) for part in fused.detach().split([8, 4])]
    together = Muon([(fused, [8, 4])], lr=0.1, weight_decay=0.1)
    apart = Muon([(part, [len(part)]) for part in parts], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        fused.grad = torch.randn(12, 8, generator=generator)
        for part, grad in zip(parts, fused.grad.split([8, 4]), strict=True):
            part.grad = grad.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(fused.detach(), torch.cat(parts).detach())


def test_every_weight_has_one_optimizer() -> None:
    model = small_model()
    optimizers = make_optimizers(model, matrix_rate=0.02, vector_rate=0.01, weight_decay=0.1)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    muon = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    assert id(model.embedding.weight) not in muon and id(model.layers[0].mlp.down.weight) in muon


# ---------------------------------------------------------------- whole runs


def test_training_learns_and_writes_a_loadable_folder(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stepped_clock(monkeypatch, seconds=15)
    history = train.train(small, command="the command", plot=tmp_path / "loss.png", progress=False)
    assert history.tokens == history.step * 256 > 0
    assert history.held_out_losses[-1][1] < 3.5 < history.train_losses[0][1]
    ids = AutoTokenizer.from_pretrained(small.out)("def f1(x):", return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(small.out, dtype=torch.float32)(ids).logits[0]
    ours = load_model(small.out, dtype="float32", progress=False)
    assert ours.config.eos_token_ids == (END_OF_TEXT_ID,)
    assert theirs.shape[-1] == ours.config.vocab_size
    card = (small.out / "README.md").read_text()
    loss = f"{history.held_out_losses[-1][1]:.3f} nats per token"
    assert all(fact in card for fact in ("the command", f"{history.step:,} steps", f"{history.tokens:,} tokens", loss))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_where_it_was(small: TrainConfig) -> None:
    """Ten steps in one go and six plus four in two processes leave the same weights."""
    tokens = prepare(small.work).tokens
    config = dataclasses.replace(small, minutes=10**9, checkpoint_seconds=10**9)
    whole = Run(config, 300)
    for _ in range(10):
        whole.train_step(tokens)
    first = Run(config, 300)
    for _ in range(6):
        first.train_step(tokens)
    first.save()
    second = Run(config, 300)
    second.resume()
    assert second.history.step == 6 and second.progress() > 0
    for _ in range(4):
        second.train_step(tokens)
    assert second.history.train_losses == whole.history.train_losses
    for name, weight in whole.model.named_parameters():
        torch.testing.assert_close(second.model.get_parameter(name), weight, msg=name)


def test_the_norms_of_all_heads_stay_one_weight(small: TrainConfig) -> None:
    tokens = prepare(small.work).tokens
    run = Run(small, 300)
    for _ in range(5):
        run.train_step(tokens)
    rows = run.model.layers[1].attention.qk_norm.weight
    assert not torch.equal(rows, torch.ones_like(rows))
    assert torch.equal(rows[:4], rows[:1].expand(4, -1)) and torch.equal(rows[4:], rows[4:5].expand(2, -1))


def test_training_goes_on_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object, **_: object) -> Callable[..., Tensor]:
        def fail(*args: object) -> Tensor:
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    model, rows = small_model(), torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(3))
    loss = compiled(row_loss)
    assert loss(model, rows) == loss(model, rows) == row_loss(model, rows)
