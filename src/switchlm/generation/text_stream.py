"""Tokens to text as they come: whole characters only, and an end at the first stop string.

    stream = TextStream(tokenizer, stops=["\\n\\n"])
    for token in tokens:
        print(stream.push(token), end="")
        if stream.stopped:
            break
    print(stream.finish())

The pieces add up to `tokenizer.decode` of all tokens, cut before the stop string, wherever the
borders between tokens lie. Text is held back while the next token may still change it: half a
character, or what may become a stop string. Bytes that are no character show as U+FFFD, as there.

`token_texts` gives every token the text that a reader sees: a space where it was, and of a
character made of several byte tokens the first has the text, the others none.
"""

from collections.abc import Sequence

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import ConfigError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no whole character
LONGEST_CHARACTER = 4  # bytes
_LONGEST_RUN = 64  # tokens decoded again at every step, at most
_CONTEXT = 8  # of them kept when the run is cut, so that spaces and characters stay right


class TextStream:
    """The text of one output, token by token.

    stops: texts that end the output and stay out of it; the one that is complete first counts.
        stopped: whether one has come; nothing is given out from then on.

    Raises ConfigError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise ConfigError("A stop string is empty: it would stop every output at once.")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._silent = {tokenizer.pad_id, tokenizer.end_id}
        self._sentinels = set(tokenizer.sentinel_ids)
        self._run: list[int] = []  # ordinary tokens since the last sentinel, or the last of them
        self._taken = 0  # characters of the run's text that went on to the search for stops
        self._held = ""  # what may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain, which may be empty."""
        if self.stopped or token in self._silent:
            return ""
        if token in self._sentinels:
            # A run of ordinary tokens is decoded by itself, as Tokenizer.decode does it.
            new = self._end_run() + self._tokenizer.decode([token])
        else:
            self._run.append(token)
            text = self._tokenizer.decode(self._run)
            certain = len(text.rstrip(REPLACEMENT))
            new = text[self._taken : certain]
            self._taken = max(self._taken, certain)
            if len(self._run) > _LONGEST_RUN and self._taken == len(text):
                self._shorten(text)
        return self._release(new)

    def finish(self) -> str:
        """Return the rest, half characters included; call it when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._release(self._end_run())
        rest, self._held = rest + self._held, ""
        return rest

    def _end_run(self) -> str:
        text = self._tokenizer.decode(self._run)[self._taken :]
        self._run, self._taken = [], 0
        return text

    def _shorten(self, text: str) -> None:
        """Keep the fewest of the last tokens whose text by themselves is the end of the text."""
        for length in range(_CONTEXT, _LONGEST_RUN):
            context = self._tokenizer.decode(self._run[-length:])
            # A context that begins within a character, or a run of byte tokens, looks otherwise.
            if text.endswith(context):
                self._run, self._taken = self._run[-length:], len(context)
                return

    def _release(self, new: str) -> str:
        """Return the text up to a stop string, or up to what may become one."""
        text = self._held + new
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of the text are the first of the stop string."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def tokens_of_text(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[str]]:
    """Return (ids, texts) of a text; the texts joined are always exactly `text`.

    What a tokenizer passes over, such as the second of two spaces, goes to the token after it.
    Raises DataError for text that is not Unicode.
    """
    ids = tokenizer.encode(text)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    texts, seen = [], 0
    for _, end in encoding.offsets:
        end = max(seen, end)
        texts.append(text[seen:end])
        seen = end
    if texts:
        texts[-1] += text[seen:]
    return ids, texts


def texts_of_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token; joined they are `tokenizer.decode(ids)`.

    But for padding and end tokens: they are named, since otherwise they could not be seen.
    """
    named = {tokenizer.pad_id: "<pad>", tokenizer.end_id: "</s>"}
    named |= {number: tokenizer.decode([number]) for number in tokenizer.sentinel_ids}
    texts: list[str] = []
    plain: list[int] = []
    for number in ids:
        if number in named:
            texts += [*_plain_texts(plain, tokenizer), named[number]]
            plain = []
        else:
            plain.append(number)
    return texts + _plain_texts(plain, tokenizer)


def _plain_texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Decode ids a character at a time, each after what precedes it, as spaces depend on that."""
    texts: list[str] = []
    context = done = 0
    while done < len(ids):
        before = len(tokenizer.decode(ids[context:done]))
        new, length = "", 1
        for longer in range(1, min(LONGEST_CHARACTER, len(ids) - done) + 1):
            found = tokenizer.decode(ids[context : done + longer])[before:]
            if longer == 1:
                new = found
            if REPLACEMENT not in found:
                new, length = found, longer
                break
        texts += [new, *[""] * (length - 1)]
        # What follows half a character must not be read without it.
        if new and REPLACEMENT not in new:
            context = done
        done += length
    return texts
