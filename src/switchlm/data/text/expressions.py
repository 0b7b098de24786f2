"""Refuse regular expressions that take time without bound.

Oniguruma, which `tokenizers` uses, goes back and tries again, so that `(a+)+b` takes 2**n steps on
n times `a`. `check_expression` refuses this by its form: nothing that repeats without bound within
something that does. The rest it times on runs of the characters that the expression names, alone
and in turns, and of the words that it spells, each a little longer than the one before, so that it
stops early. Quadratic time passes, as some tokenizers in use need it; the length of a prompt bounds
it. An expression may still be slow on a text that is not tried; a server bounds the time of texts.
"""

import time
from collections import Counter
from dataclasses import dataclass

from tokenizers import Regex, normalizers

from switchlm.errors import DataError

LONGEST_EXPRESSION = 4096  # characters
LARGEST_SIZE = 10_000  # characters that the expression matches when counted repeats are written out
SLOWEST = 0.03  # seconds of one run; a safe expression needs less than a millisecond
_LENGTHS = tuple(int(32 * 1.5**step) for step in range(8))  # to 546
_MOST_CHARACTERS = 24  # those that come most often in the expression
_MOST_IN_TURNS = 12
_MOST_WORDS = 16
_USUAL = " \na1.é中"
# Of other scripts and kinds, for an expression with properties or the complement of a class.
_OTHERS = "λжשعकกกა가あアԱதአ́٣€+_\u200d😀Ⅷ"


@dataclass
class _Group:
    """What a group, or a sequence of characters, holds so far."""

    repeats: bool = False  # without bound
    size: int = 0


def check_expression(pattern: str) -> None:
    """Raise DataError for an expression that is not valid, or takes time without bound."""
    if len(pattern) > LONGEST_EXPRESSION:
        raise _refused(pattern, f"has {len(pattern):,} characters")
    words = _check_form(pattern)
    try:
        replace = normalizers.Replace(Regex(pattern), "")
    except Exception as error:  # the library raises the base class
        raise _refused(pattern, f"is not valid ({str(error)[:100]})") from None
    often = [character for character, _ in Counter("".join(words)).most_common()]
    others = _OTHERS if "\\p" in pattern or "\\P" in pattern or "[^" in pattern else ""
    characters = list(dict.fromkeys([*often[:_MOST_CHARACTERS], *_USUAL, *others]))
    longer = [word for word in dict.fromkeys(words) if len(word) > 1][:_MOST_WORDS]
    # A run that is not followed by what the expression needs, which comes too late.
    late = "\0" + "".join(characters)
    for unit in (*characters, *longer):
        for length in _LENGTHS:
            for after in ("", late):
                _time(replace, (unit * length)[:length] + after, pattern)
    for character in characters[:_MOST_IN_TURNS]:
        for before in characters[:_MOST_IN_TURNS]:
            _time(replace, before + character * _LENGTHS[1] + late, pattern)
            _time(replace, (before + character) * _LENGTHS[1] + late, pattern)


def _time(replace: normalizers.Replace, text: str, pattern: str) -> None:
    for _ in range(2):  # a machine may be busy once
        start = time.thread_time()
        try:
            replace.normalize_str(text)
        except BaseException as error:  # a panic: the library gave up after too many steps
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise _refused(pattern, "takes time without bound") from None
        seconds = time.thread_time() - start
        if seconds < SLOWEST:
            return
        if seconds > 4 * SLOWEST:
            break
    raise _refused(pattern, "takes time without bound")


def _check_form(pattern: str) -> list[str]:
    """Return the words that an expression spells, and the characters that its classes name.

    Raises DataError for a refused form.
    """
    groups, words = [_Group()], [""]
    place = 0
    while place < len(pattern):
        character = pattern[place]
        if character in "()|":
            words.append("")
        if character == "(":
            groups.append(_Group())
            place = _after_prefix(pattern, place)
            continue
        if character == "|":
            place += 1
            continue
        if character == ")":
            atom = groups.pop()
            place += 1
            if not groups:
                raise _refused(pattern, "has a parenthesis without a partner")
        else:
            end = _end_of_atom(pattern, place)
            if pattern[place] == "[":
                words += [*_members(pattern[place + 1 : end - 1]), ""]
            else:
                words[-1] += pattern[end - 1]
            atom, place = _Group(size=1), end
        # `a{2}+` repeats what repeats.
        while (quantifier := _quantifier(pattern, place)) is not None:
            most, place = quantifier
            if most is None and atom.repeats:
                raise _refused(pattern, "repeats without bound what repeats without bound")
            atom = _Group(atom.repeats or most is None, atom.size * (most or 1))
        groups[-1].repeats |= atom.repeats
        groups[-1].size += atom.size
        if groups[-1].size > LARGEST_SIZE:
            raise _refused(pattern, f"repeats more than {LARGEST_SIZE:,} characters")
    if len(groups) != 1:
        raise _refused(pattern, "has a parenthesis without a partner")
    return words


def _members(inside: str) -> str:
    """Return the characters that a class names: also the ends of ranges, and letters of escapes."""
    return "".join(character for character in inside if character not in "^-[]&\\")


def _after_prefix(pattern: str, place: int) -> int:
    """Return the place after `(`, `(?:`, `(?<name>` and the like."""
    if not pattern.startswith("(?", place):
        return place + 1
    if pattern.startswith(("(?(", "(?~", "(?{"), place):
        raise _refused(pattern, f"has the form {pattern[place : place + 3]!r}")
    for ends in (":", "=", "!", ">", ")"):
        end = pattern.find(ends, place)
        head = pattern[place + 2 : end]
        if (
            end > 0
            and len(head) < 20
            and head.replace("<", "").replace("-", "").isalnum() | (head in ("", "<"))
        ):
            # `(?i)` is a group of its own, whose parenthesis is still to come.
            return end if ends == ")" else end + 1
    raise _refused(pattern, f"has the form {pattern[place : place + 3]!r}")


def _end_of_atom(pattern: str, place: int) -> int:
    """Return the end of a character, an escape, or a class of characters."""
    if pattern[place] == "\\":
        name = pattern[place + 1 : place + 2]
        if (name.isdigit() and name != "0") or name in ("k", "g"):
            raise _refused(pattern, "refers back to what it matched")
        if pattern[place + 2 : place + 3] == "{":
            return pattern.find("}", place) + 1 or len(pattern)
        return place + 2
    if pattern[place] != "[":
        return place + 1
    depth, end = 0, place
    while end < len(pattern):
        if pattern[end] == "\\":
            end += 1
        elif pattern[end] == "[":
            depth += 1
        elif pattern[end] == "]":
            depth -= 1
        end += 1
        if depth == 0:
            break
    return end


def _quantifier(pattern: str, place: int) -> tuple[int | None, int] | None:
    """Return (the most repeats or None for no bound, the end) of a quantifier, None without one."""
    character = pattern[place : place + 1]
    if character in ("*", "+", "?") and character:
        end = place + 1
        # Lazy and possessive forms are marked by one more character.
        end += pattern[end : end + 1] in ("?", "+") and bool(pattern[end : end + 1])
        return (1 if character == "?" else None), end
    if character != "{":
        return None
    end = pattern.find("}", place)
    bounds = pattern[place + 1 : end].split(",")
    if end < 0 or len(bounds) > 2 or not all(bound.isdecimal() or not bound for bound in bounds):
        return None
    if bounds[-1] == "":
        return None, end + 1
    return max(1, int(bounds[-1][:9])), end + 1 + (pattern[end + 1 : end + 2] == "?")


def _refused(pattern: str, why: str) -> DataError:
    return DataError(
        f"The regular expression {pattern[:60]!r} of the tokenizer file {why}, so it is not used. "
        "Take the expression of a well-known tokenizer."
    )
