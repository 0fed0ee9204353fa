"""The one exception a user is meant to read."""


class LetheError(Exception):
    """One clear message: what is wrong, where, and the fix."""
