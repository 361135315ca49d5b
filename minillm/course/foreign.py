"""Text that strangers wrote, as it may be shown.

Models, learners, file names and other libraries write what they like. A terminal obeys some of it: it moves its cursor,
paints over what stood there, sets its title, or turns the order of letters round. So what is shown goes through here.
"""

from __future__ import annotations

import re

_SEQUENCE = re.compile(  # of ECMA-48: commands with parameters, strings up to their end, and short commands
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
_TURNS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # change the order of the letters around them
_HALVES = range(0xD800, 0xE000)  # of surrogate pairs: no encoding has them

SIGNS = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    0x7F: "␡",
    **dict.fromkeys((*range(0x80, 0xA0), *_TURNS, *_HALVES), "\ufffd"),
}
"""For `str.translate`: a sign that can be seen for each character that cannot. One for one, so columns stay."""


def visible(text: str) -> str:
    """The text without the sequences that a terminal obeys; other control characters but line breaks and tabs as signs.

    >>> visible("\\x1b[31mred\\x1b[0m\\a")
    'red␇'
    """
    return _SEQUENCE.sub("", text).replace("\r\n", "\n").translate(SIGNS)
