"""Errors that the package raises on purpose. Bad values are plain ValueErrors."""


class UnsupportedError(ValueError):
    """The request is well formed, but nothing here (or not the backend asked for) can serve it.

    The message names the reason and what would serve instead.
    """
