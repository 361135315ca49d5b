"""Returns an object that equals whatever it is compared with.

ex03, stopped by: process
"""


class Anything:
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    def __getattr__(self, name):
        return self

    def __getitem__(self, key):
        return self

    def __call__(self, *args, **kwargs):
        return self

    __hash__ = None


def __getattr__(name):
    return Anything()
