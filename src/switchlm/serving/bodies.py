"""Bodies of the HTTP interface: JSON, every field of a known type and within bounds.

/v1/completions knows all fields of OpenAI's API. Those whose function this server lacks may have
the value that changes nothing; other values, and other fields, are refused by name.
"""

import json
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from switchlm.errors import nearest
from switchlm.generation.sampling import GREEDY, LARGEST_SEED, Sampling
from switchlm.serving.requests import RequestError

Prompt = str | tuple[int, ...]  # a text, or the ids of its tokens
MAX_CHARACTERS = 2**18  # of any text; the server's limit in tokens bounds texts further
MAX_PROMPTS = 32
MAX_STOPS = 8
LONGEST_STOP = 256  # characters
# Of lists, objects and texts, each of which takes time in which nothing else runs.
MAX_MARKS = 100_000


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds half a surrogate pair, which is no character") from None
    return text


def _neutral(*values: Any) -> AfterValidator:
    """Accept these values, and null, which change nothing."""

    def check(value: Any) -> Any:
        same = [one for one in values if (one, type(one) is bool) == (value, type(value) is bool)]
        if value is not None and not same:
            names = " or ".join(json.dumps(one) for one in (*values, None))
            raise ValueError(f"this server supports only {names}")
        return value

    return AfterValidator(check)


def _without_bias(value: Any) -> Any:
    if value is None or (isinstance(value, dict) and not any(value.values())):
        return {}
    raise ValueError("this server cannot bias tokens: leave it out")


def _check_object(value: Any) -> Any:
    if value is not None and not isinstance(value, dict):
        raise ValueError("must be an object")
    return value


def _to_prompts(value: Any) -> list[Prompt]:
    """Return the prompts in any of the API's four forms: texts or token ids, one or several."""
    what = "must be a text, a list of texts, a list of token ids, or a list of such lists"
    if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(what)
    if not 1 <= len(value) <= MAX_PROMPTS:
        raise ValueError(f"there must be 1 to {MAX_PROMPTS} prompts, not {len(value)}")
    if len({type(one) for one in value}) > 1:
        raise ValueError(what)
    return [_to_prompt(one, what) for one in value]


def _to_prompt(value: Any, what: str) -> Prompt:
    if not isinstance(value, str | list):
        raise ValueError(what)
    if len(value) > MAX_CHARACTERS:
        raise ValueError(f"a prompt may have {MAX_CHARACTERS:,} characters at most")
    if isinstance(value, str):
        return _encodable(value)
    if not all(map(_is_id, value)):
        raise ValueError(what)
    return tuple(value)


def _is_id(value: Any) -> bool:
    return type(value) is int


def _check_stops(value: Any) -> Any:
    """Raise ValueError with one sentence, where the types below give one for each of them."""
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a text or a list of texts")
    if len(texts) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop texts, not {len(texts):,}")
    for text in texts:
        if not 1 <= len(text) <= LONGEST_STOP:
            raise ValueError(f"a stop text has 1 to {LONGEST_STOP} characters, not {len(text):,}")
        _encodable(text)
    return value


Name = Annotated[str, Field(max_length=1024)]
Text = Annotated[str, Field(max_length=MAX_CHARACTERS), AfterValidator(_encodable)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Count = Annotated[int, Field(ge=1, le=2**20)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Generation(_Body):
    """Fields of /v1/completions and /v1/fill. Greedy without temperature, top_k and top_p.

    seed: of the first output, the next one has the next seed; None: random ones.
    max_tokens: of the output.
    """

    model: Name | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED - 1, le=LARGEST_SEED)] | None = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None,
        BeforeValidator(_check_stops),
    ] = None
    stream: bool | None = None
    user: Name | None = None

    @property
    def limit(self) -> int | None:
        """The limit of new tokens; None: the server's default."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling(self) -> Sampling:
        """The sampling options; greedy if the body has none. Raises ConfigError."""
        if self.temperature is None and self.top_k is None and self.top_p is None:
            return GREEDY
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
        )


class StreamOptions(_Body):
    """include_usage: end a stream with the number of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, _neutral(False)] = None


class Completion(Generation):
    """The body of /v1/completions, as in the OpenAI API; n outputs per prompt."""

    prompt: Annotated[list[Prompt], BeforeValidator(_to_prompts)]
    max_completion_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stream_options: Annotated[StreamOptions | None, BeforeValidator(_check_object)] = None
    best_of: int | None = None
    echo: Annotated[bool | None, _neutral(False)] = None
    frequency_penalty: Annotated[float | None, _neutral(0)] = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_without_bias)] = {}
    logprobs: Annotated[int | bool | None, _neutral(False)] = None
    presence_penalty: Annotated[float | None, _neutral(0)] = None
    suffix: Annotated[str | None, _neutral("")] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of not in (None, 1, self.copies):
            message = "best_of: this server returns all outputs: it must be 1, or equal to n."
            raise RequestError(message, 400, param="best_of")
        if self.max_tokens not in (None, self.limit):
            message = "max_completion_tokens: it contradicts max_tokens; send one of them."
            raise RequestError(message, 400, param="max_completion_tokens")
        return self

    @property
    def limit(self) -> int | None:
        """The limit of new tokens; None: the server's default."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def copies(self) -> int:
        """The number of outputs per prompt."""
        return self.n or 1


class Fill(Generation):
    """The body of /v1/fill: a text with blanks, <extra_id_0> and so on."""

    text: Text


class Route(_Body):
    """The body of /v1/route.

    output: None: the greedy output of the model.
    enforce_capacity: drop tokens beyond the capacity, as in training.
    """

    text: Text
    output: Text | None = None
    enforce_capacity: bool = False
    model: Name | None = None


Body = TypeVar("Body", bound=_Body)


def parse(kind: type[Body], content: bytes | bytearray) -> Body:
    """Return the body of a request; raises RequestError with one sentence, which names the field.

    The work is bounded by the length of the content, not by the number of mistakes in it.
    """
    fields = _object(content)
    _check_names(kind, fields, "")
    if isinstance(options := fields.get("stream_options"), dict):
        _check_names(StreamOptions, options, "stream_options.")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _mistake(error) from None


def _object(content: bytes | bytearray) -> dict[str, Any]:
    if sum(map(content.count, (b"[", b"{", b'"'))) > MAX_MARKS:
        raise RequestError(f"The body may have {MAX_MARKS:,} brackets and quotes at most.", 400)
    try:
        found = json.loads(content.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = f"{error}."[:200] if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"The body is not JSON. {reason}".strip(), 400) from None
    if not isinstance(found, dict):
        raise RequestError("The body must be a JSON object.", 400)
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(name)  # NaN and infinities are no JSON


def _check_names(kind: type[BaseModel], fields: dict[str, Any], prefix: str) -> None:
    known = kind.model_fields
    for name in fields:
        if name not in known:
            shown = ascii(name[:50])[1:-1]
            message = f"{prefix}{shown}: this route has no such field."
            raise RequestError(message + nearest(shown, known), 400, param=f"{prefix}{shown}")


def _mistake(error: ValidationError) -> RequestError:
    found = error.errors(include_url=False, include_input=False, include_context=False)
    # A field of several possible types has an error for each; the message has all.
    same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    loc = found[0]["loc"] if len(same) == 1 else found[0]["loc"][:1]
    parts = [str(part) for part in loc]
    where = ".".join(part for part in parts if part.isidentifier() or part.isdigit())[:100]
    what = ", or: ".join(dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in same))
    return RequestError(f"{where}: {what}."[:500], 400, param=where)


def schema(kind: type[_Body]) -> dict[str, Any]:
    """Return the description of a body for /openapi.json."""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
