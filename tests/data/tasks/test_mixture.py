import json
from pathlib import Path

import pytest
import yaml

from switchlm.data.tasks import mixture
from switchlm.data.tasks.mixture import (
    TaskOptions,
    find_task,
    find_tasks,
    read_examples,
    read_splits,
)
from switchlm.data.tasks.registry import MIXTURES, TASKS
from switchlm.errors import ConfigError, DataError


@pytest.fixture
def write(tmp_path):
    """Return a function that writes files by name, text or records per line, into one folder."""

    def write(**files):
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not isinstance(content, str):
                content = "".join(json.dumps(record) + "\n" for record in content)
            path.write_text(content, encoding="utf-8")
        return tmp_path

    return write


def only(name, folder, split="validation"):
    examples = read_examples(find_task(name), split, folder)
    assert len(examples) == 1
    return examples[0]


def test_every_task_is_found_by_its_name():
    for name, task in TASKS.items():
        assert find_task(name) is task
        assert task.name == name
        assert task.metrics
        assert task.hub
    assert all(name in TASKS for names in MIXTURES.values() for name in names)


def test_mixtures_are_expanded_once():
    found = [task.name for task in find_tasks(["glue", "rte", "squad"])]
    assert found == [*MIXTURES["glue"], "squad"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sst", "Did you mean 'sst2'"),
        ("super-glue", "Did you mean 'superglue'"),
        ("no/such.jsonl", "no task, file or folder 'no/such.jsonl'"),
        ("glue", "is a mixture of cola"),
    ],
)
def test_an_unknown_task_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_task(name)


def test_options_for_a_named_task_are_refused():
    with pytest.raises(ConfigError, match="its own columns"):
        find_task("rte", TaskOptions(input_column="text"))


LAYOUTS = yaml.safe_load(Path(__file__).with_name("task_layouts.yaml").read_text("utf-8"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout['task']}-{layout['file']}")
def test_files_are_read_as_they_are_distributed(tmp_path, layout):
    path = tmp_path / layout["file"]
    path.parent.mkdir(exist_ok=True)
    path.write_text(layout["text"], encoding="utf-8")
    path.with_suffix(".target").write_text("Short.\n", encoding="utf-8")
    example = only(layout["task"], tmp_path)
    assert (example.input, example.target) == (layout["input"], layout["target"])
    assert example.references == (example.target,)


def test_squad_is_unnested_and_keeps_every_answer(write):
    answers = [{"text": "two", "answer_start": 0}, {"text": "2", "answer_start": 9}] * 2
    questions = [{"question": f"q{n}", "answers": answers} for n in (1, 2)]
    article = {
        "title": "T",
        "paragraphs": [
            {
                "context": "Two 2.",
                "qas": questions,
            }
        ],
    }
    folder = write(**{"dev-v1.1_dot_json": json.dumps({"version": "1.1", "data": [article]})})
    first, second = read_examples(find_task("squad"), "validation", folder)
    assert first.input == "question: q1 context: Two 2."
    assert first.references == ("two", "2")
    assert first.identity == second.identity, "questions about one paragraph belong together"


def test_squad_of_the_hub_gives_the_same_examples(write):
    record = {
        "question": "q",
        "context": "c",
        "answers": {"text": ["a", "b"], "answer_start": [0, 1]},
    }
    example = only("squad", write(validation_dot_jsonl=[record]))
    assert (example.input, example.references) == ("question: q context: c", ("a", "b"))


def test_answers_of_multirc_belong_to_their_question(write):
    answers = [{"text": "x", "label": 1}, {"text": "y", "label": 0}]
    questions = [{"question": f"q{n}", "idx": n, "answers": answers} for n in range(2)]
    passage = {"text": "p", "questions": questions}
    folder = write(MultiRC__val_dot_jsonl=[{"idx": 3, "passage": passage}])
    examples = read_examples(find_task("multirc"), "validation", folder)
    assert [example.target for example in examples] == ["True", "False"] * 2
    assert examples[0].input == "multirc question: q0 answer: x paragraph: p"
    assert len({example.identity for example in examples}) == 2
    flat = {"question": "q0", "answer": "x", "paragraph": "p", "label": 1}
    flat["idx"] = {"paragraph": 3, "question": 0}
    hub = only("multirc", write(hub__val_dot_jsonl=[flat]) / "hub")
    assert (hub.input, hub.identity) == (examples[0].input, examples[0].identity)


def test_record_lists_entities_and_answers_once(write):
    spans = [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 24, "end": 26}]
    passage = {"text": "Ann met Bob.\n@highlight\nBob", "entities": spans}
    query = {"query": "@placeholder met Bob", "answers": [{"text": "Ann"}, {"text": "Ann"}]}
    example = only("record", write(ReCoRD__val_dot_jsonl=[{"passage": passage, "qas": [query]}]))
    assert example.input == (
        "record query: @placeholder met Bob entities: Ann, Bob passage: Ann met Bob. Bob"
    )
    assert example.references == ("Ann",)


def test_trivia_qa_trains_on_the_answer_and_takes_its_aliases(write):
    record = {"Question": "q?", "Answer": {"Value": "UK", "Aliases": ["Britain", "UK"]}}
    data = json.dumps({"Data": [record], "Version": 1})
    example = only("trivia_qa", write(**{"unfiltered-web-dev_dot_json": data}))
    assert (example.input, example.references) == ("trivia_qa question: q?", ("UK", "Britain"))


def test_web_questions_has_unusual_names(write):
    record = {"qId": "1", "qText": "q?", "answers": ["a", "b"]}
    folder = write(
        trainmodel_dot_json=json.dumps([record]), devtest_dot_json="[]", val_dot_json="[]"
    )
    assert only("web_questions", folder, "train").references == ("a", "b")


def test_a_file_of_the_users_is_read_by_its_columns(write):
    folder = write(mine_dot_csv='q,c,a\n"Who, me?",Text,"Yes, you"\n')
    options = TaskOptions(
        template="question: {q} context: {c}", target_template="<{a}>", metrics=("f1",)
    )
    task = find_task(str(folder / "mine.csv"), options)
    (example,) = read_examples(task, "all")
    assert (task.name, task.metrics) == ("mine", ("f1",))
    assert (example.input, example.target) == ("question: Who, me? context: Text", "<Yes, you>")


def test_one_file_is_split_by_the_identity_of_its_examples(write):
    records = [{"input": f"say {n}", "target": str(n)} for n in range(300)]
    folder = write(a_dot_jsonl=records, b_dot_jsonl=records[::-1] + records[:5])
    parts = {
        split: read_examples(find_task(str(folder / "a.jsonl")), split)
        for split in ("train", "validation", "all")
    }
    assert len(parts["train"]) + len(parts["validation"]) == len(parts["all"]) == 300
    assert 15 < len(parts["validation"]) < 50
    lines = []
    found = read_splits(find_task(str(folder / "a.jsonl")), parts, report=lines.append)
    assert (found, lines) == (parts, [])
    again = read_examples(find_task(str(folder / "b.jsonl")), "validation")
    assert set(again) == set(parts["validation"]), "order and repetition change nothing"


@pytest.mark.parametrize("different", [2, 3, 20])
def test_a_file_of_few_different_examples_has_both_splits(write, different):
    for start in range(8):
        records = [{"input": f"say {start} {n % different}", "target": f"{n}"} for n in range(40)]
        place = write(few_dot_jsonl=records) / "few.jsonl"
        splits = read_splits(find_task(str(place)), ("train", "validation"), place)
        train, validation = ({one.input for one in part} for part in splits.values())
        assert min(len(train), len(validation)) > 0
        assert not train & validation
        assert len(train | validation) == different
        assert sum(map(len, splits.values())) == 40


def test_a_file_of_one_example_has_no_validation_split(write):
    place = write(one_dot_jsonl=[{"input": "a", "target": "b"}] * 5) / "one.jsonl"
    with pytest.raises(DataError, match=r"no example in '.*one\.jsonl' but 5 times the same"):
        read_splits(find_task(str(place)), ("train", "validation"), place)


def test_a_single_file_has_no_other_splits(write):
    place = (
        write(some_dot_jsonl=[{"input": f"{n}", "target": "b"} for n in range(9)]) / "some.jsonl"
    )
    with pytest.raises(
        DataError, match=r"test split .* a single file has train, validation and all"
    ):
        read_examples(find_task(str(place)), "test", place)


def test_what_is_odd_in_a_file_is_said_once_and_of_a_folder_by_split(write, monkeypatch):
    odd = [{"input": f"{n}", "target": "" if n % 3 else "b"} for n in range(60)]
    folder = write(own_dot_jsonl=odd, train_dot_jsonl=odd, dev_dot_jsonl=odd[:3])
    opened, lines = [], []
    read_records = mixture.read_records
    monkeypatch.setattr(
        mixture, "read_records", lambda *given: opened.append(given[1]) or read_records(*given)
    )
    single = read_splits(
        find_task(str(folder / "own.jsonl")), ("train", "validation"), report=lines.append
    )
    assert len(single["train"]) + len(single["validation"]) == 60
    assert opened == [folder / "own.jsonl"]
    assert [line.partition(",")[0] for line in lines] == [
        f"{folder / 'own.jsonl'}: Empty targets: 40"
    ]
    lines.clear()
    read_splits(find_task(str(folder)), ("train", "validation"), report=lines.append)
    assert [line.partition(": the")[0].rpartition(",")[0] for line in lines] == [
        f"{folder.name}, train: Empty targets: 40",
        f"{folder.name}, validation: Empty targets: 2",
    ]


def test_a_folder_of_the_users_has_splits(write):
    folder = write(
        train_dot_jsonl=[{"input": "a", "target": "b"}], dev_dot_tsv="input\ttarget\nc\td\n"
    )
    task = find_task(str(folder))
    assert read_examples(task, "train")[0].target == "b"
    assert read_examples(task, "validation")[0].target == "d"


def test_shards_are_one_split(write):
    shards = {
        f"train-0000{n}-of-00002_dot_jsonl": [{"sentence": f"s{n}", "label": n}] for n in (0, 1)
    }
    examples = read_examples(find_task("sst2"), "train", write(**shards))
    assert [example.target for example in examples] == ["negative", "positive"]


def test_parquet_and_compressed_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    table = pyarrow.table({"source": [["One.", "Two."]], "target": [["S.", "T."]]})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    line = json.dumps({"source": ["One."], "target": ["S."]}).encode()
    (tmp_path / "dev.jsonl.zst").write_bytes(zstandard.compress(line))
    assert only("scitldr", tmp_path, "train").references == ("S.", "T.")
    assert only("scitldr", tmp_path).input == "summarize: One."


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "dev.tsv",
            "sentence\tpolarity\nfine\t1\n",
            "no column 'label'; it has: sentence, polarity",
        ),
        ("dev.tsv", "sentense\tlabel\nfine\t1\n", "no column 'sentence'.*Did you mean 'sentense'"),
        ("dev.tsv", "sentence\tlabel\nfine\tpositve\n", "label 'positve'.*Did you mean 'positive'"),
        ("dev.tsv", "sentence\tlabel\nfine\t7\n", "Record 1 of .* has the label '7'"),
        ("dev.tsv", "sentence\tlabel\nfine\t-1\n", "has no label"),
        ("dev.tsv", "sentence\tlabel\n", "The validation split of 'sst2' is empty"),
        ("dev.tsv", "", "The validation split of 'sst2' is empty"),
        ("dev.tsv", "sentence\tlabel\nfine\t1\tmore\n", "row 2 of .* has 3 columns"),
        ("dev.json", "1" * 5000, "is not JSON"),
        ("dev.jsonl", "{broken\n", "line 1 of .* is not JSON"),
        ("dev.jsonl", "[1]\n", "is not a JSON object"),
        ("dev.json", "{broken", "is not JSON"),
        ("dev.jsonl", '{"sentence": "\\ud800", "label": 1}', "1 of 1 .* is not UTF-8"),
        ("dev.source", "one\ntwo\n", "no 'dev.target'"),
        ("train.tsv", "sentence\tlabel\nfine\t1\n", "no validation split.*has: train.tsv"),
        ("README.md", "", "has: no file of a known kind"),
    ],
)
def test_unusable_records_are_errors(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_examples(find_task("sst2"), "validation", tmp_path)


@pytest.mark.parametrize(
    ("task", "record"),
    [
        ("squad", {"paragraphs": [{"context": "c"}]}),
        ("squad", {"paragraphs": [7]}),
        ("multirc", {"passage": {"text": "p"}}),
        ("multirc", {"question": "q", "idx": 3}),
        ("record", {"passage": {"text": "p", "entities": [3]}, "qas": []}),
        ("wsc", {"text": "t", "span1_index": "first", "label": True}),
        ("arc_easy", {"question": "q", "choices": {"text": ["a"], "label": []}}),
        ("trivia_qa", {"question": "q", "answer": "bare"}),
    ],
)
def test_records_of_another_structure_are_errors(write, task, record):
    with pytest.raises(DataError, match=f"Record 1 of .* does not have the structure of '{task}'"):
        read_examples(find_task(task), "train", write(train_dot_jsonl=[record]))


def test_rows_of_another_length_are_refused_or_left_out(write):
    pairs = "id\tquestion1\tquestion2\tis_duplicate\n1\tA?\tB?\t1\n2\tA?\n3\tA?\tB?\tC?\t0\n"
    folder = write(train_dot_tsv=pairs)
    assert len(read_examples(find_task("qqp"), "train", folder)) == 1
    columns = TaskOptions(template="{question1}", target_column="is_duplicate")
    with pytest.raises(DataError, match=r"2 of 3 .*row 3 of .* has 2 columns, and there are names"):
        read_examples(find_task(str(folder), columns), "train")


def test_lines_end_at_line_ends_alone(write):
    text = "a\u2028b\x0bc"
    folder = write(train_dot_source=f"{text}\r\nd\n", train_dot_target="one\ntwo\n")
    examples = read_examples(find_task("xsum"), "train", folder)
    assert [example.input for example in examples] == [f"summarize: {text}", "summarize: d"]


def test_files_of_one_name_stay_apart(write):
    folder = write(a__mine_dot_jsonl=[], b__mine_dot_jsonl=[])
    paths = [str(folder / name / "mine.jsonl") for name in "aba"]
    found = find_tasks(paths)
    assert [(task.name, str(task.path)) for task in found] == [
        ("mine", paths[0]),
        ("mine-2", paths[1]),
    ]


def test_ambiguous_files_are_errors(write):
    folder = write(**{"train-v1.1_dot_json": "[]", "train-v2.0_dot_json": "[]"})
    with pytest.raises(DataError, match=r"Several files.*train-v1\.1\.json, train-v2\.0\.json"):
        read_examples(find_task("squad"), "train", folder)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input": None, "target": " "}, "no example in .*Empty records that are left out: 1"),
        ({"inputs": "a", "target": "b"}, "no column 'input'.*Did you mean 'inputs'"),
    ],
)
def test_bad_records_of_a_users_file_are_errors(write, record, message):
    folder = write(mine_dot_jsonl=[record])
    with pytest.raises(DataError, match=message):
        read_examples(find_task(str(folder / "mine.jsonl")), "all")


def test_unreadable_places_are_errors(tmp_path):
    (tmp_path / "task.pdf").write_bytes(b"%PDF")
    (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    sst2 = find_task("sst2")
    with pytest.raises(DataError, match="Unknown format of"):
        read_examples(sst2, "all", tmp_path / "task.pdf")
    with pytest.raises(DataError, match="no file or folder"):
        read_examples(sst2, "all", tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_examples(sst2, "validation", tmp_path)
