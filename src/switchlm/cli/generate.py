"""switchlm generate: fill the blanks of a text, or show what the model answers."""

import dataclasses
import json
from typing import Annotated

import typer

from switchlm.cli.expert_memory import ExpertMemorySize, Usage
from switchlm.cli.options import (
    LONGEST_INPUT,
    Device,
    Json,
    Model,
    note,
    open_model,
    read_text,
)
from switchlm.errors import ConfigError, DataError


def generate(
    model: Model,
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
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of sampling.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop there; 32 a blank if left out.")
    ] = None,
    max_input_tokens: Annotated[
        int, typer.Option(min=1, help="Refuse longer texts.")
    ] = LONGEST_INPUT,
    device: Device = "auto",
    expert_memory: ExpertMemorySize = None,
    as_json: Json = False,
) -> None:
    """Fill the blanks of a text, or show what the model answers to it."""
    from switchlm.generation import fill as filling
    from switchlm.generation.sampling import GREEDY, Sampling

    prompt = read_text(text)
    if not prompt.strip():
        raise DataError("The text is empty: there is nothing to generate from.")
    sampling = GREEDY
    if (temperature, top_k, top_p) != (None, None, None):
        if greedy:
            raise ConfigError("--greedy leaves no room for --temperature, --top-k and --top-p.")
        sampling = Sampling(
            temperature=1.0 if temperature is None else temperature,
            top_k=top_k,
            top_p=1.0 if top_p is None else top_p,
        )

    loaded, tokenizer = open_model(model, device, expert_memory)
    usage = Usage(loaded)
    num_blanks = filling.count_blanks(prompt, tokenizer) if fill else 1
    length = len(tokenizer.encode(prompt))
    if length > max_input_tokens:
        raise DataError(
            f"The text has {length:,} tokens, more than {max_input_tokens:,}. Attention takes "
            "memory with the square of the length: shorten the text, or raise --max-input-tokens."
        )
    with usage.timed():
        answer = filling.answer(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens or filling.TOKENS_A_BLANK * num_blanks,
            sampling=sampling,
            seed=seed,
        )
    num_tokens = len(tokenizer.encode(answer.output)) + answer.finished
    filled = filling.put_into_blanks(prompt, answer.spans)
    if as_json:
        result = {"text": prompt, **dataclasses.asdict(answer)}
        if expert_memory is not None:
            result["experts"] = usage.figures(num_tokens)
        typer.echo(json.dumps({**result, "filled": filled} if fill else result))
        return
    typer.echo(filled if fill else answer.output)
    usage.tell(num_tokens)
    if not answer.finished:
        note("The model had more to say; raise --max-new-tokens.")
