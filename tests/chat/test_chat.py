"""Chat templates: as transformers renders them, under limits, and every refusal by name."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from minillm.chat import ChatTemplate, plain_messages
from minillm.course.training.bpe import train_tokenizer
from minillm.errors import RequestError
from minillm.model.tokenizer import load_tokenizer
from tests.model.test_tokenizer import CODE, write_model_folder

HELLO = [{"role": "user", "content": "hello"}]
TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Größe <b> & 'so'?\n"},
    {"role": "assistant", "content": "😀"},
    {"role": "user", "content": "And\tnow?"},
]
# The ways in which published templates are written: whitespace control, namespaces, loop controls, filters, a default
# system prompt, tests of `tools`, special tokens, the mark for training.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "qwen": "{%- if tools %}tools{%- else %}{%- if messages[0].role != 'system' %}You are a model.\n{%- endif %}\n"
    "{%- endif %}\n{%- set ns = namespace(last=0) %}\n{%- for m in messages[::-1] %}\n"
    "{%- set index = (messages|length - 1) - loop.index0 %}\n{%- if m.role == 'user' %}{%- set ns.last = index %}"
    "{%- break %}\n{%- endif %}\n{%- endfor %}\n{{ ns.last }} {{ messages | tojson(indent=1) }}",
    "llama": "{{ bos_token }}{% if tools is not none %}T{% endif %}{% for m in messages %}\n"
    "    {% if m.role == 'system' %}\n<<SYS>>{{ m.content | trim }}<</SYS>>\n    {% else %}\n"
    "[{{ m['content'].strip() | upper | replace('O', '0') }}]{{ eos_token }}\n    {% endif %}\n{% endfor %}",
    "training": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content | e }}{% endif %}{{ loop.cycle('-', '+') }}{% endfor %}",
}
BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion that ends": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "repetition": "{{ 'ab' * 20000000000 }}",
    "list": "{{ ([0] * 4000000000) | length }}",
    "width": "{{ 'a'.rjust(20000000000) }}",
    "format": "{{ '%020000000000d' % 1 }}",
    "filter": "{{ 'a' | indent(2000000000, true) }}",
    "squaring": "{% set ns = namespace(s='abcdefgh') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    "{{ ns.s | length }}",
    "power": "{{ (9 ** (9 ** 9)) % 7 }}",
    "output": "{% for i in range(99999) %}{% for j in range(9) %}aaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "syntax": "{% endfor %}",
    "undefined": "{{ messages[0].nothing.at_all }}",
    "raise": "{{ raise_exception('roles must alternate') }}",
    "sandbox": "{{ messages.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "include": "{% include '/etc/hostname' %}",
    "import": "{% import 'os' as os %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "change": "{{ messages.append(1) }}",
    "exit": "{{ [].__class__.__base__.__subclasses__() }}",
}


def folder_with(tmp_path: Path, template: Any) -> Path:
    return write_model_folder(tmp_path, train_tokenizer([CODE], vocab_size=300), chat_template=template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    theirs = AutoTokenizer.from_pretrained(str(folder_with(tmp_path, TEMPLATES[name])))
    own = {name: text for name, text in theirs.special_tokens_map.items() if isinstance(text, str)}
    ours = ChatTemplate(TEMPLATES[name], own)
    for talk in (HELLO, TALK, TALK[1:]):
        assert ours.render(talk) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("bomb", BOMBS)
def test_templates_end_in_a_named_error(bomb: str) -> None:
    with pytest.raises(RequestError, match=r"chat template refuses this conversation, or is damaged: \S"):
        ChatTemplate(BOMBS[bomb], {}).render(HELLO)


def test_the_next_conversation_works_after_a_bomb_and_in_any_thread() -> None:
    """Five threads at one template: it never ends for whoever says "bomb", and answers the others."""
    chat = ChatTemplate(
        "{% if messages[0].content == 'bomb' %}" + BOMBS["loops"] + "{% endif %}{{ messages[0].content }}", {}
    )
    said: dict[int, str] = {}

    def ask(index: int) -> None:
        content = "bomb" if index % 2 else f"text {index}"
        try:
            said[index] = chat.render([{"role": "user", "content": content}])
        except RequestError as error:
            said[index] = str(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said[i] for i in (0, 2, 4)] == ["text 0", "text 2", "text 4"]
    assert all("took too long" in said[i] for i in (1, 3))


def test_an_interrupt_leaves_no_answer_for_the_next_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = ChatTemplate("{{ messages[0].content }}", {})
    assert chat.render(HELLO) == "hello"
    child = chat._child
    assert child is not None and child.stdout is not None

    class Interrupted:
        def readline(self) -> str:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(child, "stdout", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            chat.render([{"role": "user", "content": "first"}])
    assert chat.render([{"role": "user", "content": "second"}]) == "second"


def test_contents_may_be_parts_of_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, TEMPLATES["chatml"]))
    assert tokenizer is not None
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    whole = tokenizer.apply_chat_template(HELLO)
    assert tokenizer.apply_chat_template([{"role": "user", "content": parts}]) == whole
    assert tokenizer.decode(whole) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ("hello", "list"),
        (HELLO[0], "list"),
        (None, "list"),
        ([*HELLO, "hello"], r"messages\[1\]"),
        ([{"content": "no role"}], r"messages\[0\]"),
        ([{"role": 3, "content": "a"}], r"messages\[0\]"),
        ([*HELLO, {"role": "user"}], r"messages\[1\] has content=None"),
        ([{"role": "user", "content": b"bytes"}], r"messages\[0\] has content=b'bytes'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "image_url.*not supported"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], r"messages\[0\]"),
        ([{"role": "user", "content": "a", "extra": {1, 2}}], "no chat template can take"),
    ],
)
def test_what_is_no_message_is_refused_by_name(messages: Any, place: str) -> None:
    with pytest.raises(RequestError, match=place):
        ChatTemplate("{{ messages }}", {}).render(messages)


@pytest.mark.parametrize("seed", range(3))
def test_random_values_are_messages_or_refused(seed: int) -> None:
    """Any mixture of values either comes out as texts, or is a RequestError."""
    rng = random.Random(seed)
    atoms = [None, 3, "text", b"b", 1.5, {"type": "text", "text": "t"}, {"type": "text"}, {"type": "audio"}, [], {}]

    def value(depth: int = 0) -> Any:
        kind = rng.random()
        if depth < 3 and kind < 0.3:
            return [value(depth + 1) for _ in range(rng.randrange(3))]
        if depth < 3 and kind < 0.7:
            return {"role": rng.choice(["user", "system", *atoms[:2]]), "content": value(depth + 1)}
        return rng.choice(atoms)

    for _ in range(500):
        messages = [value() for _ in range(rng.randrange(3))]
        try:
            plain = plain_messages(messages)
        except RequestError:
            continue
        assert all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in plain), f"seed {seed}"
        assert len(plain) == len(messages)
