"""A process of its own that renders chat templates: started by `minillm.chat`, imports nothing of minillm.

A template is a program that came with a model's files. jinja2's sandbox keeps it from files and from Python itself, but
not from running for ever or from writing 20 GB, and neither can be stopped from within a process. This one may have
`MAX_MEMORY` bytes, and whoever started it ends it when it takes too long. The environment is that of transformers:
the same whitespace rules, `tojson`, `raise_exception`, `strftime_now`, loop controls and the `generation` tag.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

MAX_MEMORY = 256 << 20
EXTRA_CHARACTERS, FACTOR = 1 << 18, 4  # a conversation of n characters may become so many plus n times so many


def environment() -> Any:
    """jinja2 as templates expect it, without loaders, so that there is nothing to include or import."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what training learns; for rendering it is transparent."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return made


def render(jinja: Any, template: str, variables: dict[str, Any]) -> str:
    """The text of a template; raises whatever the template raises, and ValueError for too much text."""
    room = EXTRA_CHARACTERS + FACTOR * len(json.dumps(variables))
    parts = []
    for part in jinja.from_string(template).generate(**variables):
        room -= len(part)
        if room < 0:
            raise ValueError("the text grows far beyond the conversation")
        parts.append(part)
    return "".join(parts)


def main() -> None:
    """Answer each line of stdin, a JSON object with `render`'s arguments, by a line with a text or an error."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    except (ImportError, OSError, ValueError):  # not every system has limits; the one of time is held from outside
        pass
    jinja = environment()
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = {"text": render(jinja, **json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error) or 'too much'}"[:500]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its module names are not meant for jinja2
    main()
