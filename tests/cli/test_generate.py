import json
import re

import pytest

TEXT = "def <extra_id_0>(self): return <extra_id_1>"


def test_fill_prints_the_filled_text_and_json_all_fields(run, run_json, nano):
    result = run("generate", "--model", nano, TEXT, "--fill")
    assert result.exit_code == 0
    data = run_json("generate", "--model", nano, TEXT, "--fill")
    assert result.stdout == data["filled"] + "\n"
    assert data["text"] == TEXT
    assert set(data) == {"text", "output", "spans", "finished", "filled"}


def test_a_text_may_come_from_standard_input(run_json, nano):
    assert run_json("generate", "--model", nano, input="größe\n")["text"] == "größe"
    assert run_json("generate", "--model", nano, "-", input="a\n")["text"] == "a"


def test_greedy_is_the_default_and_seeds_decide_samples(run_json, nano):
    def output(*options):
        line = ("generate", "--model", nano, TEXT, "--max-new-tokens", 20, *options)
        return run_json(*line)["output"]

    assert output() == output("--greedy") == output("--temperature", 0, "--seed", 7)
    assert output("--top-k", 1) == output()
    sampled = ("--temperature", 2, "--top-k", 200, "--top-p", 0.9, "--seed")
    assert output(*sampled, 1) == output(*sampled, 1)
    assert output(*sampled, 1) != output(*sampled, 2)
    assert output(*sampled[:-1]) != output(*sampled[:-1])


def test_an_output_that_is_cut_off_is_reported(run, nano):
    result = run("generate", "--model", nano, TEXT, "--max-new-tokens", 1)
    assert "--max-new-tokens" in result.stderr


def test_streaming_prints_the_same(run, nano):
    line = ("generate", "--model", nano, TEXT, "--max-new-tokens", 20)
    assert run(*line, "--stream").stdout == run(*line).stdout


def test_stop_strings_end_the_output(run_json, nano):
    sampled = ("--temperature", 2, "--seed", 0)
    line = ("generate", "--model", nano, TEXT, "--max-new-tokens", 40, *sampled)
    whole = run_json(*line)["output"]
    stop, early = whole[6:8], whole[2]
    assert run_json(*line, "--stop", stop)["output"] == whole[: whole.index(stop)]
    cut = run_json(*line, "--stop", stop, "--stop", early)
    assert cut["output"] == whole[: whole.index(early)]
    assert cut["finished"]


def test_special_tokens_are_left_out_if_asked(run, run_json, nano):
    line = ("generate", "--model", nano, TEXT, "--max-new-tokens", 60, "--temperature", 5)
    line += ("--seed", 2)
    whole = run_json(*line)
    plain = run_json(*line, "--skip-special")
    assert "<extra_id_" in whole["output"]
    # Bytes on both sides of a sentinel may become one character, but ASCII stays as it is.
    without = re.sub("<extra_id_[0-9]+>", "", whole["output"])
    assert list(filter(str.isascii, plain["output"])) == list(filter(str.isascii, without))
    assert plain["spans"] == whole["spans"]
    assert run(*line, "--skip-special", "--stream").stdout == plain["output"] + "\n"


def test_beams_are_all_in_the_json_and_the_best_is_printed(run, run_json, nano, tmp_path):
    line = ("generate", "--model", nano, TEXT, "--max-new-tokens", 8, "--beams", 3)
    found = run_json(*line, "--length-penalty", 0.5)
    assert len(found["beams"]) == 3
    assert found["output"] == found["beams"][0]["output"]
    scores = [each["score"] for each in found["beams"]]
    assert scores == sorted(scores, reverse=True)
    assert run(*line, "--length-penalty", 0.5).stdout == found["output"] + "\n"
    greedy = run_json("generate", "--model", nano, TEXT, "--max-new-tokens", 8)
    assert run_json(*line, "--beams", 1)["output"] == greedy["output"]
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    many = run("generate", "--model", nano, "--input", tmp_path / "a.txt", *line[4:])
    assert json.loads(many.stdout)["output"] == run_json(*line)["output"]


LINES = ["a <extra_id_0> b", "größe <extra_id_0>", "x <extra_id_0> <extra_id_1> and much more"]


def test_a_file_of_texts_gives_the_same_as_each_text_alone(run, run_json, nano, tmp_path):
    source, results = tmp_path / "texts.txt", tmp_path / "results.jsonl"
    source.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    options = ("--fill", "--temperature", 1, "--stop", "e", "--seed")
    line = ("generate", "--model", nano, "--input", source, *options, 4, "--batch-size", 2)
    result = run(*line, "--output", results)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "3 texts done" in result.stderr
    found = [json.loads(each) for each in results.read_text(encoding="utf-8").splitlines()]
    alone = ("generate", "--model", nano, *options)
    assert found == [run_json(*alone, seed, text) for seed, text in enumerate(LINES, 4)]
    assert run(*line).stdout == results.read_text(encoding="utf-8")
    assert sorted(tmp_path.glob("*results*")) == [results]


def test_json_lines_keep_their_other_fields(run, nano, tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text('"one"\n{"text": "two", "id": 7}\n', encoding="utf-8")
    result = run("generate", "--model", nano, "--input", source, "--max-new-tokens", 2)
    found = [json.loads(each) for each in result.stdout.splitlines()]
    assert [each["text"] for each in found] == ["one", "two"]
    assert found[1]["id"] == 7
    assert "2 of 2 outputs were cut off" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"", [], "is empty"),
        ("a.txt", b"one\n\ntwo\n", [], "Line 2 of"),
        ("a.txt", b"\xff\n", [], "not valid UTF-8"),
        ("a.jsonl", b'"one"\n{"text"\n', [], "is not JSON"),
        ("a.jsonl", b'{"txt": "one"}\n', [], 'an object with a "text"'),
        ("a.jsonl", b'"\\ud800"\n', [], "half of a surrogate pair"),
        ("a.txt", b"one\nno blank\n", ["--fill"], "Line 1: The text has no blank"),
        ("a.txt", b"one\nmuch longer\n", ["--max-input-tokens", "5"], "Line 2: The text has 11"),
        ("a.txt", b"one\n", ["text"], "--input cannot be used"),
        ("a.txt", b"one\n", ["--stream"], "--input cannot be used"),
        ("a.txt", b"one\n", ["--output", "/nowhere/at/all.jsonl"], "Cannot write"),
    ],
)
def test_mistakes_in_files_are_errors(refuse, nano, tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    line = ("generate", "--model", nano, "--input", tmp_path / name)
    assert message in refuse(*line, *options)


def test_a_missing_file_is_an_error(refuse, nano, tmp_path):
    line = ("generate", "--model", nano, "--input", tmp_path / "none.txt")
    assert "Cannot read" in refuse(*line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "The text is empty"),
        (["  \n "], "The text is empty"),
        (["no blank", "--fill"], "no blank to fill"),
        (["<extra_id_4711>", "--fill"], "has only <extra_id_0> to <extra_id_99>"),
        (["text", "--temperature", "-1"], "temperature must be 0"),
        (["text", "--temperature", "nan"], "temperature must be 0"),
        (["text", "--top-p", "0"], "top-p must be"),
        (["text", "--top-k", "0"], "top-k must be at least 1"),
        (["text", "--greedy", "--top-k", "5"], "--greedy cannot be used"),
        (["a long text", "--max-input-tokens", "3"], "11 tokens, more than 3"),
        (["text", "--beams", "2", "--top-k", "3"], "--beams cannot be used"),
        (["text", "--beams", "2", "--stream"], "--beams cannot be used"),
        (["text", "--length-penalty", "2"], "are of --beams"),
        (["text", "--beams", "999"], "999 beams are too many"),
        (["text", "--stop", ""], "stop string is empty"),
        (["text", "--stream", "--json"], "--stream prints the output as it comes"),
        (["text", "--output", "a.jsonl"], "give --input too"),
        (["text", "--device", "abacus"], "device 'abacus'"),
        (["text", "--device", "cuda:99"], "device 'cuda:99'"),
        (["bad \udcff"], "not valid UTF-8"),
        (["text", "--expert-memory", "4 apples"], "'4 apples' is not a size"),
        (["text", "--expert-memory", "0.2B"], "is less than a byte"),
        (["text", "--expert-memory", "1kB"], "one expert takes 16,384"),
        (["text", "--expert-memory", "1GB", "--device", "cuda"], "works on CPUs"),
    ],
)
def test_mistakes_are_errors(refuse, nano, arguments, message):
    assert message in refuse("generate", "--model", nano, *arguments)


def test_bad_bytes_on_standard_input_are_an_error(refuse, nano):
    assert "not valid UTF-8" in refuse("generate", "--model", nano, input=b"\xff\xfe")


def test_wrong_folders_are_errors(refuse, tmp_path, nano):
    assert "There is no folder" in refuse("generate", "--model", tmp_path / "nowhere", "text")
    assert "neither a model folder" in refuse("generate", "--model", tmp_path, "text")
    tmp_path.joinpath("config.json").write_text("{")
    assert "config.json" in refuse("generate", "--model", tmp_path, "text")


def test_a_model_without_a_tokenizer_is_an_error(refuse, tmp_path, nano):
    from switchlm.huggingface import load

    model, _ = load.load(nano)
    load.save(model, None, tmp_path / "bare")
    assert "no tokenizer.json" in refuse("generate", "--model", tmp_path / "bare", "text")


def test_the_config_of_a_saved_model_is_json(nano):
    with open(f"{nano}/config.json") as file:
        assert json.load(file)["vocab_size"] == 384


def test_experts_may_stay_on_disk(run, run_json, nano):
    line = ("generate", "--model", nano, TEXT, "--max-new-tokens", 8)
    result = run(*line, "--expert-memory", "20KB")
    assert result.stdout == run(*line).stdout
    assert "Experts on disk" in result.stderr
    assert "tokens per second" in result.stderr
    metrics = run_json(*line, "--expert-memory", "1 MiB")["experts"]
    assert metrics["hits"] + metrics["misses"] > 0
    assert metrics["bytes_read"] > 0
    assert metrics["expert_bytes_held"] <= 2**20
