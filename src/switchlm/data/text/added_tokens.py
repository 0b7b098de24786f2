"""The added tokens of a model folder, as transformers gathers them from its files.

`tokenizer_config.json` lists them with their ids under `added_tokens_decoder`; where it does not,
they come from special_tokens_map.json, added_tokens.json and tokenizer.json. Named tokens, such as
`eos_token`, and further special ones, such as T5's sentinels, come after these.

One thing differs: where no file says how many sentinels there are, and the vocabulary has them as
pieces, as mT5's has, these are the sentinels. Transformers adds 100 others, whose ids the model's
embedding lacks.
"""

from collections.abc import Container, Iterable, Mapping
from itertools import count, takewhile
from typing import Any

from tokenizers import AddedToken

from switchlm.errors import DataError

_NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_MOST_EXTRA_IDS = 100_000


def sentinel(index: int) -> str:
    """Return T5's sentinel number `index`."""
    return f"<extra_id_{index}>"


class AddedTokens:
    """What the files say; then `default` adds what the class of the tokenizer has by itself.

    settings: of tokenizer_config.json.
    special: of special_tokens_map.json.
    added: of added_tokens.json, ids by token.
    file: the added tokens of tokenizer.json.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        special: Mapping[str, Any],
        added: Mapping[str, Any],
        file: Iterable[Mapping[str, Any]],
    ) -> None:
        values = dict(settings)
        named = [key for key in _EXTRA if key in values]
        extra = values.get(_EXTRA[0]) or values.pop(_EXTRA[1], None) or ([] if named else None)
        self._by_id: dict[int, AddedToken] = {}
        if "added_tokens_decoder" in settings:
            listed = settings["added_tokens_decoder"]
            if not isinstance(listed, dict) or not all(number.isdecimal() for number in listed):
                raise _invalid("added_tokens_decoder", listed)
            self._by_id = {int(number): _token(token) for number, token in listed.items()}
        else:
            values |= special
            extra = special.get("extra_special_tokens") or extra
            specials = {_content(values[name]) for name in _NAMED if values.get(name)}
            specials |= set(map(_content, _listed(extra)))
            for content, number in added.items():
                if not isinstance(number, int) or isinstance(number, bool) or not content:
                    raise _invalid("added token", {content: number})
                is_special = content in specials
                self._by_id[number] = AddedToken(
                    content, normalized=not is_special, special=is_special
                )
            self._by_id |= {token["id"]: _token(token) for token in file}
        self._settings = values
        # Where tokenizer_config.json has the key, with nothing, there are none.
        self._extra = None if extra is None else [_token(token) for token in _listed(extra)]
        self._further = values.get("additional_special_tokens")
        names = [*_NAMED, *(key for key in values if key.endswith("_token") and key not in _NAMED)]
        self._named = {
            name: _token(values[name])
            for name in names
            if isinstance(values.get(name), str | dict) and values[name]
        }

    @property
    def num_sentinels(self) -> int | None:
        """The number of sentinels in tokenizer_config.json, None where it does not say."""
        number = self._settings.get("extra_ids")
        if number is None:
            return None
        if not isinstance(number, int) or isinstance(number, bool) or number > _MOST_EXTRA_IDS:
            raise _invalid("number of extra_ids", number)
        return max(0, number)

    def sentinels(self, usual: int, vocabulary: Container[str]) -> list[str]:
        """Return the sentinels of the class of a tokenizer, by their number.

        usual: how many it has where tokenizer_config.json does not say.
        vocabulary: the pieces, which are the sentinels if no file says what is. `▁<extra_id_0>` is
            found in texts as it is, and no added token.
        """
        listed = [*(self._extra or []), *map(_token, _listed(self._further))]
        stated = self.num_sentinels is not None or _has_sentinel(listed)
        if not stated and (sentinel(0) in vocabulary or f"▁{sentinel(0)}" in vocabulary):
            return list(takewhile(vocabulary.__contains__, map(sentinel, count())))
        number = usual if self.num_sentinels is None else self.num_sentinels
        return [sentinel(index) for index in range(number)]

    def default(
        self,
        names: Mapping[str, str | AddedToken],
        sentinels: Iterable[str],
        pieces: Iterable[AddedToken] | None = None,
    ) -> None:
        """Add the names and sentinels that the class of a tokenizer has without any file.

        pieces: the added tokens of a spiece.model.
        """
        for name, content in names.items():
            self._named.setdefault(name, _token(content))
        if self._extra is None:
            further = [_token(token) for token in _listed(self._further)]
            self._extra = list(pieces) if pieces is not None else further
            if not _has_sentinel(self._extra):
                self._extra += map(_token, sentinels)

    @property
    def names(self) -> dict[str, str]:
        """The special tokens by name, such as `eos_token`."""
        return {name: token.content for name, token in self._named.items()}

    def tokens(self) -> list[AddedToken]:
        """Return all added tokens, in the order in which they take their ids."""
        found = [token for _, token in sorted(self._by_id.items())]
        named = set(self.names.values())
        for token in found:
            # The library keeps what it normalizes apart from what it does not.
            if token.content in named and not token.special:
                token.special = True
        known = {token.content for token in found}
        for token in [*self._named.values(), *(self._extra or [])]:
            if token.content not in known:
                known.add(token.content)
                found.append(token)
        return found


def _has_sentinel(tokens: Iterable[AddedToken]) -> bool:
    return any("<extra_id_" in token.content for token in tokens)


def _listed(tokens: Any) -> list[Any]:
    """Return tokens of a list, or of a dictionary by name."""
    tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens or []
    if not isinstance(tokens, list):
        raise _invalid("list of special tokens", tokens)
    return tokens


def _content(value: Any) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise _invalid("token", value)
    return content


def _token(value: Any) -> AddedToken:
    """Return an added token of a text, which is special, or of a dictionary with its flags."""
    if isinstance(value, AddedToken):
        return value
    content = _content(value)
    if isinstance(value, str):
        return AddedToken(content, special=True, normalized=False)
    flags = {name: value[name] for name in _FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise _invalid("token", value)
    return AddedToken(content, **flags)


def _invalid(what: str, value: Any) -> DataError:
    return DataError(
        f"The files of the tokenizer have the {what} {str(value)[:60]!r}, which is not valid. They "
        "are damaged, or belong to another program."
    )
