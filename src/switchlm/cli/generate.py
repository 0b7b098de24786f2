"""switchlm generate: fill the blanks of a text, or generate an output; also for files of texts."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchlm.cli import options
from switchlm.cli.progress import counting
from switchlm.cli.results import check_output, json_lines
from switchlm.errors import ConfigError, DataError
from switchlm.files import to_json

if TYPE_CHECKING:
    from switchlm.data.text.tokenizer import Tokenizer
    from switchlm.generation.answer import Answer
    from switchlm.generation.beam import Beams
    from switchlm.generation.sampling import Sampling
    from switchlm.model.transformer import SwitchTransformer

Record = dict[str, Any]
LONGEST_INPUT = 4096  # tokens; the memory of attention grows with its square


def generate(
    model: options.Model,
    text: Annotated[
        str | None, typer.Argument(help="Text with <extra_id_0> ...; standard input if left out.")
    ] = None,
    fill: Annotated[
        bool, typer.Option("--fill", help="Print the text with its blanks filled.")
    ] = False,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the most probable token (the default).")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Sample with this temperature; 1 if only the next two.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most probable.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the fewest that add up to p.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="Repeats a sample; each line of --input adds 1."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**20, help="The longest output; as in fine-tuning, or 32 per blank."
        ),
    ] = None,
    beams: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Number of beams; --json shows them all.")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Of --beams: above 0 favours long outputs; 1 if left out.")
    ] = None,
    early_stopping: Annotated[
        bool, typer.Option("--early-stopping", help="Of --beams: stop when that number has ended.")
    ] = False,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; may be repeated.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print text as it is generated.")
    ] = False,
    input_file: Annotated[
        str | None, typer.Option("--input", help="Texts: a .txt or .jsonl, one per line.")
    ] = None,
    output_file: Annotated[
        str | None, typer.Option("--output", help="Write JSON lines there; for --input.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=4096, help="Texts at a time; for --input.")
    ] = 16,
    max_input_tokens: Annotated[
        int, typer.Option(min=1, help="Refuse longer texts.")
    ] = LONGEST_INPUT,
    skip_special: options.SkipSpecial = False,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    expert_memory: options.ExpertMemory = None,
    as_json: options.Json = False,
) -> None:
    """Fill the blanks of a text, or generate an output for it."""
    many = input_file is not None
    if many and (text is not None or stream):
        raise ConfigError("--input cannot be used with a text argument or with --stream.")
    if output_file is not None and not many:
        raise ConfigError("--output is for the results of --input: give --input too.")
    if stream and (fill or as_json):
        raise ConfigError(
            "--stream prints the output as it comes; --fill and --json need all of it first."
        )
    if input_file is None:
        records = [{"text": options.read_text(text)}]
        if not records[0]["text"].strip():
            raise DataError("The text is empty: there is nothing to generate from.")
    else:
        if output_file is not None:
            check_output(Path(output_file), "output", "--output")
        records = read_texts(input_file)
    sampling = _sampling(greedy, temperature, top_k, top_p)
    search = _beams(beams, length_penalty, early_stopping)
    if search is not None and (stream or greedy or sampling.temperature):
        raise ConfigError(
            "--beams cannot be used with --greedy, sampling or --stream: its output is known only "
            "at the end."
        )
    if max_new_tokens is None and not fill:
        max_new_tokens = options.trained_output_length(model)
    loaded, tokenizer = options.open_model(model, device, expert_memory, dtype)
    if skip_special:
        tokenizer = tokenizer.without_special()
    stops = tuple(stop or ())
    generator = _Generator(
        loaded, tokenizer, sampling, search, seed, stops, max_new_tokens, max_input_tokens, fill
    )
    usage = options.Usage(loaded)
    with usage.timed():
        if stream:
            results = [generator.stream(records[0])]
        else:
            results = generator.generate(records, batch_size)
    num_tokens = sum(map(generator.num_tokens, results))
    unfinished = sum(not result["finished"] for result in results)
    if many:
        typer.echo(f"{len(results):,} texts done.", err=True)
        write_results(results, output_file)
        if unfinished:
            options.note(
                f"{unfinished:,} of {len(results):,} outputs were cut off; raise --max-new-tokens."
            )
        usage.print(num_tokens)
        return
    (result,) = results
    if as_json:
        if expert_memory is not None:
            result["experts"] = usage.metrics(num_tokens)
        typer.echo(to_json(result))
        return
    if not stream:
        typer.echo(result["filled"] if fill else result["output"])
    usage.print(num_tokens)
    if unfinished:
        options.note("The output was cut off; raise --max-new-tokens.")


def _sampling(
    greedy: bool, temperature: float | None, top_k: int | None, top_p: float | None
) -> "Sampling":
    from switchlm.generation.sampling import GREEDY, Sampling

    if (temperature, top_k, top_p) == (None, None, None):
        return GREEDY
    if greedy:
        raise ConfigError("--greedy cannot be used with --temperature, --top-k or --top-p.")
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=1.0 if top_p is None else top_p,
    )


def _beams(width: int | None, length_penalty: float | None, early_stopping: bool) -> "Beams | None":
    from switchlm.generation.beam import Beams

    if width is None:
        if length_penalty is not None or early_stopping:
            raise ConfigError("--length-penalty and --early-stopping are of --beams: give it too.")
        return None
    penalty = 1.0 if length_penalty is None else length_penalty
    return Beams(width=width, length_penalty=penalty, early_stopping=early_stopping)


@dataclass(frozen=True)
class _Generator:
    """A model with its generation settings."""

    model: "SwitchTransformer"
    tokenizer: "Tokenizer"
    sampling: "Sampling"
    beams: "Beams | None"
    seed: int | None
    stops: tuple[str, ...]
    max_new_tokens: int | None
    max_input_tokens: int
    fill: bool

    def limit(self, text: str, where: str = "") -> int:
        """Return the most tokens that the output may have, by the number of blanks to fill.

        Raises DataError for a text that is too long or without blanks.

        where: start of the error message.
        """
        from switchlm.generation import answer as filling

        try:
            num_blanks = filling.count_blanks(text, self.tokenizer) if self.fill else 1
        except DataError as error:
            raise DataError(f"{where}{error}") from None
        length = len(self.tokenizer.encode(text))
        if length > self.max_input_tokens:
            raise DataError(
                f"{where}The text has {length:,} tokens, more than {self.max_input_tokens:,}. "
                "The memory of attention grows with the square of it: shorten the text, or raise "
                "--max-input-tokens."
            )
        return self.max_new_tokens or filling.TOKENS_PER_BLANK * num_blanks

    def stream(self, record: Record) -> Record:
        """Print the output as it is generated."""
        from switchlm.generation.answer import stream

        text = record["text"]
        pieces = stream(
            self.model,
            self.tokenizer,
            text,
            max_new_tokens=self.limit(text),
            sampling=self.sampling,
            seed=self.seed,
            stops=self.stops,
        )
        while True:
            try:
                typer.echo(next(pieces), nl=False)
            except StopIteration as end:
                typer.echo()
                return self._result(record, end.value)

    def generate(self, records: list[Record], batch_size: int) -> list[Record]:
        """Return the results in the order of the records, with a progress bar."""
        from switchlm.generation.answer import answer_all, best_answers

        texts = [record["text"] for record in records]
        wheres = [
            f"Line {number}: " if len(texts) > 1 else "" for number in range(1, 1 + len(texts))
        ]
        settings: dict[str, Any] = {
            "max_new_tokens": list(map(self.limit, texts, wheres)),
            "batch_size": batch_size,
            "stops": self.stops,
        }
        found: Iterator[tuple[int, Sequence[Answer]]]
        if self.beams is None:
            settings |= {"sampling": self.sampling, "seed": self.seed}
            answered = answer_all(self.model, self.tokenizer, texts, **settings)
            found = ((place, [answer]) for place, answer in answered)
        else:
            found = best_answers(self.model, self.tokenizer, texts, beams=self.beams, **settings)
        results: list[Record] = [{} for _ in records]
        with counting("texts", len(records)) as show:
            for done, (place, answers) in enumerate(found, 1):
                results[place] = self._result(records[place], answers[0])
                if self.beams is not None:
                    results[place]["beams"] = [dataclasses.asdict(each) for each in answers]
                show(done)
        return results

    def num_tokens(self, result: Record) -> int:
        """Return the number of generated tokens, the end token included."""
        return len(self.tokenizer.encode(result["output"])) + result["finished"]

    def _result(self, record: Record, answer: "Answer") -> Record:
        from switchlm.generation.answer import put_into_blanks

        result = {
            **record,
            "output": answer.output,
            "spans": answer.spans,
            "finished": answer.finished,
        }
        if self.fill:
            result["filled"] = put_into_blanks(record["text"], answer.spans)
        return result


def read_texts(file: str) -> list[Record]:
    """Return one record with a "text" per line, of a .txt or of JSON lines.

    A line of JSON is a text, or an object with a "text", whose other fields are kept. Raises
    DataError, with the number of the line, for one that cannot be read.
    """
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"The file {file!r} is not valid UTF-8: {error}") from None
    except OSError as error:
        raise DataError(f"Cannot read {file!r}: {error.strerror}.") from None
    if lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"The file {file!r} is empty: it should have one text per line.")
    records = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        record = {"text": line} if path.suffix == ".txt" else _parse(line, file, number)
        if not record["text"].strip():
            raise DataError(f"Line {number} of {file!r} has no text: there is nothing to generate.")
        records.append(record)
    return records


def _parse(line: str, file: str, number: int) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"Line {number} of {file!r} is not JSON: {error}") from None
    record = {"text": value} if isinstance(value, str) else value
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(
            f'Line {number} of {file!r} should be a JSON string, or an object with a "text", '
            f"got {line[:60]!r}."
        )
    try:
        record["text"].encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"Line {number} of {file!r} holds half of a surrogate pair, which is not Unicode."
        ) from None
    return record


def write_results(records: Iterable[Record], file: str | None) -> None:
    """Write one JSON line per record, atomically to the file, or to standard output."""
    if file is None:
        for record in records:
            typer.echo(to_json(record, ensure_ascii=False))
        return
    with json_lines(Path(file), "output", "--output") as write:
        for record in records:
            write(record)
