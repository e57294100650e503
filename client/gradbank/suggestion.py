"""What a user may have meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses `word`: the closest known word, or all of them."""
    words = sorted(known)
    plain = {each.lower(): each for each in words}
    close = difflib.get_close_matches(word.lower(), plain, n=1)
    return f"; did you mean {plain[close[0]]!r}?" if close else f"; known are {', '.join(words)}"
