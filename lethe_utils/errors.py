"""The one exception a user is meant to read."""


class LetheError(Exception):
    """One clear message: what is wrong, where, and the fix."""


def reason(error: Exception) -> str:
    """The first line of what another library raised."""
    return (str(error).splitlines() or [type(error).__name__])[0]
