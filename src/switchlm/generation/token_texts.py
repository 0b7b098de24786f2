"""How tokens read to a human, so that all of them one after the other are the text.

A space stands where it was, and a character made of several byte tokens is the text of the first of
them; the others have none.
"""

from collections.abc import Sequence

from switchlm.data.tokenizer import Tokenizer

_CUT = "\ufffd"  # what bytes decode to that are no whole character
_LONGEST_CHARACTER = 4  # bytes


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
        for longer in range(1, min(_LONGEST_CHARACTER, len(ids) - done) + 1):
            found = tokenizer.decode(ids[context : done + longer])[before:]
            if longer == 1:
                new = found
            if _CUT not in found:
                new, length = found, longer
                break
        texts += [new, *[""] * (length - 1)]
        if new and _CUT not in new:  # what follows half a character must not be read without it
            context = done
        done += length
    return texts
