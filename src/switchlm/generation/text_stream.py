"""Decode tokens to text one by one: only complete characters, up to the first stop string.

    stream = TextStream(tokenizer, stops=["\\n\\n"])
    for token in tokens:
        print(stream.push(token), end="")
        if stream.stopped:
            break
    print(stream.finish())

The pieces joined are `tokenizer.decode` of all tokens, up to the stop string, which may span
tokens. Text that the next token may change is withheld: an incomplete character, the beginning of
a stop string, or the last characters where decoding removes spaces. Invalid bytes decode to U+FFFD,
as in `tokenizer.decode`.

`tokens_of_text` and `texts_of_tokens` return the text of every token; of a character of several
byte tokens, the first has the text and the others are empty.
"""

from collections.abc import Sequence

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import ConfigError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what invalid or incomplete UTF-8 decodes to
LONGEST_CHARACTER = 4  # bytes
_LONGEST_RUN = 64  # tokens decoded again at every step, at most
_CONTEXT = 8  # tokens kept when the run is shortened, for correct spaces and characters


class TextStream:
    """The text of one output, token by token.

    stops: texts that end the output and are not part of it; the one that is complete first counts.
    stopped: whether a stop string was found; there is no more text from then on.

    Raises ConfigError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise ConfigError("A stop string is empty: it would stop every output at once.")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._run: list[int] = []  # the tokens, or the last of them
        self._taken = 0  # characters of the run's text already passed to _release
        # Each rewriting may change the end of what those before it made.
        self._rewritten = sum(len(found) - 1 for found in tokenizer.rewrites)
        self._held = ""  # the possible beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token; return the text that can no longer change, which may be empty."""
        if self.stopped or token in self._tokenizer.outer_ids:
            return ""
        self._run.append(token)
        text = self._tokenizer.decode(self._run)
        certain = min(len(text.rstrip(REPLACEMENT)), len(text) - self._rewritten)
        certain = max(self._taken, certain)
        new, self._taken = text[self._taken : certain], certain
        if len(self._run) > _LONGEST_RUN and self._taken == len(text):
            self._shorten(text)
        return self._release(new)

    def finish(self) -> str:
        """Return the rest, incomplete characters included; call it after the last token."""
        if self.stopped:
            return ""
        rest = self._release(self._tokenizer.decode(self._run)[self._taken :])
        rest, self._run, self._taken, self._held = rest + self._held, [], 0, ""
        return rest

    def _shorten(self, text: str) -> None:
        """Keep the fewest of the last tokens that decode to the end of the text."""
        for length in range(_CONTEXT, _LONGEST_RUN):
            context = self._tokenizer.decode(self._run[-length:])
            # A context that begins within a character or a run of byte tokens decodes differently.
            if text.endswith(context):
                self._run, self._taken = self._run[-length:], len(context)
                return

    def _release(self, new: str) -> str:
        """Return the text up to a stop string, or up to the beginning of one."""
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
    """Return the length of the longest end of the text that begins the stop string."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def tokens_of_text(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[str]]:
    """Return (ids, texts) of a text; the texts joined are exactly `text`.

    Characters that the tokenizer skips, such as the second of two spaces, are part of the next
    token's text. Raises DataError for text that is not valid Unicode.
    """
    ids = tokenizer.encode(text)
    texts, seen = [], 0
    for _, end in tokenizer.encoding(text).offsets:
        end = max(seen, end)
        texts.append(text[seen:end])
        seen = end
    if texts:
        texts[-1] += text[seen:]
    return ids, texts


def texts_of_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token; joined they are `tokenizer.decode(ids)`.

    Except for padding, the end token and others around a text, which are shown by their names.
    """
    plain = iter(_plain_texts([i for i in ids if i not in tokenizer.outer_ids], tokenizer))
    return [
        name_of(number, tokenizer) if number in tokenizer.outer_ids else next(plain)
        for number in ids
    ]


def name_of(number: int, tokenizer: Tokenizer) -> str:
    """Return the name by which a token that has no text is shown."""
    named = {tokenizer.pad_id: "<pad>", tokenizer.end_id: "</s>"}
    return named.get(number) or tokenizer.backend.id_to_token(number) or f"<id {number}>"


def _plain_texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Decode ids one character at a time, with the ids before it, on which spaces depend."""
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
        # Tokens after an incomplete character must be decoded with it.
        if new and REPLACEMENT not in new:
            context = done
        done += length
    return texts
