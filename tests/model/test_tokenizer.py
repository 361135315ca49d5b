"""Text to ids and back, whole and token by token, for both ways of spelling bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from minillm.course.training.bpe import END_OF_TEXT, END_OF_TEXT_ID, save_tokenizer, train_tokenizer
from minillm.errors import CheckpointError, MinillmError, RequestError
from minillm.model.tokenizer import Detokenizer, Tokenizer, load_tokenizer

CODE = "def area(self, num_heads=12):\n    if num_heads:\n        return self.__init__\n\n\tx  =  'é😀 漢字'\n"
BACKEND = train_tokenizer([CODE * 3], vocab_size=320)
TOKENIZER = Tokenizer(BACKEND)


def sentencepiece() -> Backend:
    """A Llama-2-like tokenizer: "▁" for spaces, byte fallback, and one word."""
    words = ["▁", "a", "b", "▁a", "é"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return backend


def random_ids(seed: int, length: int, vocab_size: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(vocab_size) for i in range(length)]


def cut(ids: list[int], seed: int) -> list[list[int]]:
    """The ids in pieces of one to three, as steps with speculation deliver them."""
    rng, pieces = random.Random(seed), []
    while ids:
        size = rng.choice((1, 1, 2, 3))
        pieces.append(ids[:size])
        ids = ids[size:]
    return pieces


def deltas_of(pieces: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER)
    return [detokenizer.push(piece) for piece in pieces] + [detokenizer.flush()]


@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.binary(max_size=40))
def test_every_byte_string_has_tokens(data: bytes) -> None:
    """A token for every byte: even what is no UTF-8 can be written, so the model can never be stuck."""
    single = {TOKENIZER.token_bytes(i): i for i in range(1, 257)}
    assert len(single) == 256
    assert b"".join(TOKENIZER.token_bytes(single[bytes([byte])]) for byte in data) == data


@pytest.mark.parametrize("seed", range(20))
def test_decode_agrees_with_the_library(seed: int) -> None:
    ids = random_ids(seed, 60, len(TOKENIZER.vocabulary))
    assert TOKENIZER.decode(ids) == BACKEND.decode(ids, skip_special_tokens=True), f"seed {seed}"


@pytest.mark.parametrize("text", ["a b", "aé  a", "a\n漢😀a"])
def test_sentencepiece_decodes_as_the_library_but_keeps_the_first_space(text: str) -> None:
    backend = sentencepiece()
    ids = backend.encode(text).ids
    assert backend.decode(ids) == text
    assert Tokenizer(backend).decode([1, *ids, 2]) == " " + text


def test_an_indentation_of_any_depth_is_one_word() -> None:
    words = [word for word, _ in BACKEND.pre_tokenizer.pre_tokenize_str("if x:\n        return  y\n\n    z")]
    assert words == ["if", "Ġx", ":", "Ċ", "Ġ" * 8, "return", "Ġ", "Ġy", "Ċ", "Ċ", "Ġ" * 4, "z"]


@pytest.mark.parametrize("end", ["def area(self, num_heads=12):", "def area(self, num_heads=12):\n", "def area("])
def test_a_prompt_is_cut_as_the_text_it_begins(end: str) -> None:
    """No word runs across the end of a line, so a prompt that stops there meets the tokens of training."""
    whole, prompt = TOKENIZER.encode(CODE), TOKENIZER.encode(end)
    assert whole[: len(prompt)] == prompt


def check_detokenizer(decode_all: Callable[[list[list[int]]], list[str]], ids: list[int], seed: int) -> None:
    """The oracle: joined deltas are the text; each prefix is a prefix of it; nothing complete is held back."""
    pieces = cut(ids, seed)
    deltas = decode_all(pieces)
    text = TOKENIZER.decode(ids)
    assert "".join(deltas) == text, f"seed {seed}"
    shown, given_ids = "", []
    for piece, delta in zip(pieces, deltas, strict=False):
        shown, given_ids = shown + delta, given_ids + piece
        so_far = TOKENIZER.decode(given_ids)
        assert text.startswith(shown) and so_far.startswith(shown), f"seed {seed}: {shown!r} changed later"
        assert set(so_far[len(shown) :]) <= {"�"}, f"seed {seed}: held back what was complete"


@settings(max_examples=150)
@given(st.text(st.characters(codec="utf-8")), st.integers(0, 99))
def test_detokenizer_on_text(text: str, seed: int) -> None:
    check_detokenizer(deltas_of, TOKENIZER.encode(text), seed)


@pytest.mark.parametrize("seed", range(20))
def test_detokenizer_on_random_tokens(seed: int) -> None:
    check_detokenizer(deltas_of, random_ids(seed, 60, len(TOKENIZER.vocabulary)), seed)


def test_the_prompt_does_not_leak() -> None:
    """The prompt ends inside an emoji, the answer begins with the rest of it."""
    ids = TOKENIZER.encode("🙂 ok")
    inside = next(i for i in range(1, 4) if "�" in TOKENIZER.decode(ids[:i]))
    answer = ids[inside:]
    text = "".join(deltas_of(cut(answer, seed=0)))
    assert text == TOKENIZER.decode(answer)
    assert "🙂" not in text and text.endswith(" ok")


def test_flush_makes_ready_for_the_next_text() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    half = TOKENIZER.encode("漢")[:1]
    assert detokenizer.push(half) + detokenizer.flush() == "�"
    assert detokenizer.push(TOKENIZER.encode("ok")) == "ok"


def mutant_token_by_token(pieces: list[list[int]]) -> list[str]:
    """Decodes each step alone: splits characters."""
    return [TOKENIZER.decode(piece) for piece in pieces]


def mutant_without_flush(pieces: list[list[int]]) -> list[str]:
    """Forgets what it held back."""
    detokenizer = Detokenizer(TOKENIZER)
    return [detokenizer.push(piece) for piece in pieces]


def mutant_shows_replacements(pieces: list[list[int]]) -> list[str]:
    """Shows whatever is new in the whole text so far, unfinished characters too."""
    shown, ids, deltas = "", [], []
    for piece in pieces:
        ids = ids + piece
        text = TOKENIZER.decode(ids)
        deltas.append(text[len(shown) :])
        shown += deltas[-1]
    return deltas


def mutant_holds_a_word(pieces: list[list[int]]) -> list[str]:
    """Right in the end, but shows everything too late."""
    return [""] * len(pieces) + [TOKENIZER.decode([i for piece in pieces for i in piece])]


@pytest.mark.parametrize(
    "mutant", [mutant_token_by_token, mutant_without_flush, mutant_shows_replacements, mutant_holds_a_word]
)
def test_the_oracle_rejects(mutant: Callable[[list[list[int]]], list[str]]) -> None:
    ids = TOKENIZER.encode("x = '😀漢'") + TOKENIZER.encode("字")[:1]
    with pytest.raises(AssertionError):
        check_detokenizer(mutant, ids, seed=1)


def test_special_and_unknown_tokens_have_no_text() -> None:
    assert TOKENIZER.decode([END_OF_TEXT_ID, 10**6]) == ""
    assert TOKENIZER.encode(END_OF_TEXT) == [END_OF_TEXT_ID]


@pytest.mark.parametrize("wrong", ["half \ud800 pair", None, 3, b"bytes", ["list"]])
def test_what_is_no_text_is_refused(wrong: object) -> None:
    with pytest.raises(RequestError, match="must be a string"):
        TOKENIZER.encode(wrong)


def write_model_folder(folder: Path, backend: Backend, **settings: object) -> Path:
    save_tokenizer(backend, folder, max_length=64)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_a_folder_loads_as_auto_tokenizer_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_model_folder(tmp_path, BACKEND)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    assert ours is not None
    assert ours.encode(CODE) == theirs.encode(CODE)
    assert ours.decode(ours.encode(CODE)) == theirs.decode(theirs.encode(CODE)) == CODE
    assert ours.eos_token_id == theirs.eos_token_id == END_OF_TEXT_ID
    assert len(ours.vocabulary) == len(theirs)


def test_chat_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    chat = load_tokenizer(write_model_folder(tmp_path, BACKEND, chat_template=template))
    assert chat is not None
    assert chat.decode(chat.apply_chat_template([{"role": "user", "content": "hi"}])) == "[user]hi>"
    with pytest.raises(RequestError, match="no chat template"):
        TOKENIZER.apply_chat_template([{"role": "user", "content": "hi"}])


def test_random_models_have_no_tokenizer() -> None:
    assert load_tokenizer("random:smollm2-135m") is None


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(MinillmError, match="No model is called"):
        load_tokenizer("nothing-like-this")
    letters = Backend(models.BPE({"a": 0}, []))
    with pytest.raises(CheckpointError, match="spell"):
        Tokenizer(letters)


def edit_tokenizer(folder: Path, **changes: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_special_tokens_are_shown_to_who_asks() -> None:
    ids = [*TOKENIZER.encode("a"), END_OF_TEXT_ID, *TOKENIZER.encode("b")]
    assert TOKENIZER.decode(ids) == "ab"
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == BACKEND.decode(ids, skip_special_tokens=False)
    shown = Detokenizer(TOKENIZER, skip_special_tokens=False)
    assert shown.push(ids) + shown.flush() == f"a{END_OF_TEXT}b"
    assert TOKENIZER.token_bytes(END_OF_TEXT_ID) == b""
    assert TOKENIZER.token_bytes(END_OF_TEXT_ID, skip_special_tokens=False) == END_OF_TEXT.encode()


@pytest.mark.parametrize("seed", range(4))
def test_stored_truncation_and_padding_are_switched_off(tmp_path: Path, seed: int) -> None:
    """As in transformers, which decides both on each call; also if somebody switches them on for the same object."""
    from transformers import AutoTokenizer

    rng = random.Random(seed)
    sides = ("Left", "Right")
    truncation = dict(direction=rng.choice(sides), max_length=rng.randrange(1, 9), strategy="LongestFirst", stride=0)
    length = rng.choice(({"Fixed": rng.choice((64, 10**8))}, "BatchLongest"))
    padding = dict(strategy=length, direction=rng.choice(sides), pad_to_multiple_of=rng.choice((None, 8)))
    padding |= dict(pad_id=0, pad_type_id=0, pad_token=END_OF_TEXT)
    folder = write_model_folder(tmp_path, BACKEND)
    edit_tokenizer(folder, truncation=truncation if seed != 1 else None, padding=padding if seed != 2 else None)
    ours = load_tokenizer(folder)
    assert ours is not None
    assert ours.encode(CODE) == AutoTokenizer.from_pretrained(str(folder))(CODE)["input_ids"], f"seed {seed}"
    ours._backend.enable_truncation(3)
    ours._backend.enable_padding(length=100)
    assert ours.encode(CODE) == BACKEND.encode(CODE).ids


def test_a_panic_of_the_library_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its panic is no Exception. What ends a program passes."""

    class Panic(BaseException):
        pass

    class Backends:
        def __init__(self, error: type[BaseException]) -> None:
            self.error = error

        def __getattr__(self, name: str) -> object:
            return getattr(BACKEND, name)

        def encode(self, *args: object, **kwargs: object) -> object:
            raise self.error("called `Option::unwrap()` on a `None` value")

    for error, seen in [(Panic, CheckpointError), (KeyboardInterrupt, KeyboardInterrupt), (SystemExit, SystemExit)]:
        with pytest.raises(seen, match="unwrap"):
            Tokenizer(Backends(error)).encode("a")  # type: ignore[arg-type]


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}
HARMFUL: dict[str, tuple[dict[str, object], str]] = {
    "grows": ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 7}}, "times as long"),
    "grows within": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [REPLACE] * 2}]}},
        "times as long",
    ),
    "charsmap": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////" * 100}}, "Precompiled"),
    "entries": (
        {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(600_000)}, "merges": []}},
        "600000 entries",
    ),
    "no model": ({"model": None}, "vocabulary of 0 entries"),
    "odd model": ({"model": [1]}, "no tokenizer that transformers can load"),
    "odd normalizer": (
        {"normalizer": {"type": "Sequence", "normalizers": 5}},
        "no tokenizer that transformers can load",
    ),
    "added tokens": ({"added_tokens": 5}, "no tokenizer that transformers can load"),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_tokenizers_that_take_all_memory_are_refused(tmp_path: Path, case: str) -> None:
    change, message = HARMFUL[case]
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(edit_tokenizer(write_model_folder(tmp_path, BACKEND), **change))


def test_normalizers_of_published_models_are_read(tmp_path: Path) -> None:
    """Llama 2 writes "▁" for a space, three bytes for one."""
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    folder = write_model_folder(tmp_path, sentencepiece())
    tokenizer = load_tokenizer(edit_tokenizer(folder, normalizer={"type": "Sequence", "normalizers": steps}))
    assert tokenizer is not None and tokenizer.decode(tokenizer.encode("a b")) == " a b"


def test_letters_of_no_alphabet_are_text() -> None:
    """A byte-level vocabulary with one token that is spelled as text; the library reads it so."""
    backend = Backend.from_str(BACKEND.to_str())
    state = json.loads(backend.to_str())
    state["model"]["vocab"]["日本"] = len(state["model"]["vocab"])
    odd = Backend.from_str(json.dumps(state))
    index = odd.token_to_id("日本")
    assert Tokenizer(odd).decode([index]) == odd.decode([index]) == "日本"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["directory", "device", "huge"])
def test_tokenizer_files_are_regular_and_of_a_size(tmp_path: Path, file: str, kind: str) -> None:
    path = write_model_folder(tmp_path, BACKEND) / file
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b" " * (33 << 20))
    with pytest.raises(CheckpointError, match=f"{file} (is missing or no regular file|has \\d+ bytes)"):
        load_tokenizer(tmp_path)


def test_the_architecture_is_checked_before_anything_of_the_folder_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json is blamed for its own gap, though the tokenizer's files are fine; and no code is asked for."""
    folder = write_model_folder(tmp_path, BACKEND)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    evil = {"architectures": ["FooForCausalLM"], "model_type": "foo", "auto_map": {"AutoConfig": "x.Y"}}
    (folder / "x.py").write_text("print('ran')\nclass Y: pass\n")
    for config, message in [
        (evil, "FooForCausalLM is not supported"),
        ({"model_type": "llama", "vocab_size": "a"}, "vocab_size"),
    ]:
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(folder)
    assert capsys.readouterr().out == ""
