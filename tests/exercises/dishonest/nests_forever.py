"""Returns lists in lists in lists, for the parser to choke on.

ex03, stopped by: process
"""


def __getattr__(name):
    def nested(*args, **kwargs):
        value = []
        for _ in range(900):
            value = [value, value]
        return value

    return nested
