"""benchmarks/study.py from end to end on text of the test's own, and the words of its pages."""

import importlib.util
import json
import os
import random
import sys
from pathlib import Path

import pytest
from tests import commands

from switchlm.config import read_yaml
from switchlm.model import count

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "study.py"
WORDS = ["the", "a", "ship", "sea", "storm", "king", "queen", "sailed", "wept", "old", "good"]


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def data(tmp_path):
    """Ten books of random words, and two tasks in their usual layouts."""
    draw = random.Random(0)

    def sentence(words):
        return " ".join(draw.choices(WORDS, k=words))

    folder = tmp_path / "data"
    for name in ("english_novels", "sst2", "squad_v11"):
        (folder / name).mkdir(parents=True)
    for book in range(10):
        (folder / "english_novels" / f"{book}.txt").write_text(
            "\n".join(sentence(12) for _ in range(80))
        )
    for split, examples in (("train", 60), ("dev", 20), ("test", 20)):
        lines = [f"{sentence(6)}\t{draw.randrange(2)}" for _ in range(examples)]
        (folder / "sst2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    for split in ("train", "dev"):
        paragraphs = []
        for number in range(15):
            context = sentence(20)
            answer = {"text": context.split()[3], "answer_start": 0}
            question = {"question": f"{sentence(4)}?", "id": f"{number}", "answers": [answer]}
            paragraphs.append({"context": context, "qas": [question]})
        text = json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]})
        (folder / "squad_v11" / f"{split}.json").write_text(text)
    return folder


def run(tmp_path, *arguments):
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return commands.run(command, cwd=tmp_path, env=environment)


def test_all_parts_run_and_are_not_run_again(tmp_path, data):
    out = tmp_path / "runs"
    smoke = ["--data", data, "--scale", "smoke", "--seeds", "3", "--out", out, "--draft"]
    done = run(tmp_path, *smoke)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished:") == 2 + 2 * 2 + 4
    folder = out / "smoke" / "seed-3"
    dense, sparse = (
        json.loads((folder / f"pretrain-{model}.json").read_text()) for model in ("dense", "sparse")
    )
    assert [line["step"] for line in sparse["evaluations"]] == [2, 4, 6]
    assert dense["tokens"] == sparse["tokens"]
    assert dense["flops_per_token"] <= sparse["flops_per_token"] < 1.1 * dense["flops_per_token"]
    squad = json.loads((folder / "finetune-squad-sparse.json").read_text())
    assert squad["metric"] == "exact_match"
    assert squad["examples"] == 15
    rows = {
        row: json.loads((folder / f"distill-{row}.json").read_text())
        for row in ("only", "weights", "mixed", "control")
    }
    assert len({row["student_loss"] for row in rows.values()}) == 4
    for row in rows.values():
        for role, model in (("baseline", dense), ("teacher", sparse)):
            expected = pytest.approx(model["evaluations"][-1]["evaluation_loss"])
            assert row[f"{role}_loss"] == expected
    assert "too small to tell" in done.stdout

    again = run(tmp_path, *smoke, "--only", "pretrain", "distill")
    assert again.returncode == 0, again.stderr
    assert "finished:" not in again.stdout
    assert f"{-dense['evaluations'][-1]['evaluation_loss']:.3f}" in again.stdout


def test_without_the_text_it_says_so(tmp_path):
    done = run(tmp_path, "--data", tmp_path / "none")
    assert done.returncode == 0
    assert "nothing is measured" in done.stdout


@pytest.mark.parametrize("scale", ["laptop", "laptop-long", "gpu", "paper", "smoke"])
def test_the_twins_take_equal_flops_on_the_same_batches(study, scale, tmp_path):
    values = read_yaml(SCRIPT.with_suffix("") / f"{scale}.yaml")
    one = study.Study(scale=values, data=tmp_path, out=tmp_path, seed=5)
    sparse, dense = one.run_config("sparse"), one.run_config("dense")
    assert sparse.model.num_experts > 0
    assert dense.model.num_experts == 0
    flops = [count.flops_per_token(run.model, 64, 16) for run in (sparse, dense)]
    assert 1 <= flops[0] / flops[1] < 1.1
    assert sparse.data == dense.data
    assert (sparse.training.steps, sparse.training.seed) == (dense.training.steps, 5)
    assert dense.training.seed == 5


def test_the_papers_scale_is_that_of_table_6(study):
    values = read_yaml(SCRIPT.with_suffix("") / "paper.yaml")
    one = study.Study(scale=values, data=ROOT, out=ROOT, seed=0)
    sparse, dense = one.run_config("sparse"), one.run_config("dense")
    assert count.parameters(dense.model) == pytest.approx(223e6, rel=0.01)
    assert count.parameters(sparse.model) == pytest.approx(3.8e9, rel=0.02)
    assert sparse.data.batch_size * sparse.data.input_length == 2**20


@pytest.mark.parametrize(
    ("differences", "error", "word"),
    [
        ([0.1, 0.12, 0.11], 0.0, "reproduced"),
        ([-0.1, -0.12, -0.11], 0.0, "not reproduced"),
        ([0.1, 0.12, -0.01], 0.0, "too small to tell"),
        ([0.1, 0.12, 0.04], 0.0, "too small to tell"),  # twice the error would have been enough
        ([0.1, 0.12, 0.11], 0.1, "too small to tell"),
        ([0.1, 0.1], 0.0, "too small to tell"),
        ([0.0, 0.0, 0.0], 0.0, "too small to tell"),
    ],
)
def test_a_word_is_earned(study, differences, error, word):
    assert study.study_page.word(differences, error) == word


def test_what_is_not_finished_is_not_guessed(study):
    values = read_yaml(SCRIPT.with_suffix("") / "laptop.yaml")
    text = study.study_page.study("laptop", values, [{}, {}])
    assert text.count("not measured") + text.count("Not measured") == 3 + 3 * len(values["tasks"])
    assert "reproduced" not in text


def test_the_page_of_all_results_says_what_is_missing(study, monkeypatch, tmp_path):
    monkeypatch.setattr(study.study_page, "LANGUAGES", tmp_path / "languages.json")
    text = study.study_page.results({})
    assert "Scales that were not measured: `laptop`, `laptop-long`, `gpu`, `paper`." in text
    assert "Not measured: `python benchmarks/languages.py`." in text


def test_languages_are_taken_from_their_own_record(study, monkeypatch, tmp_path):
    runs = [
        {"steps": 50, "languages": 4, "better": better, "mean_speed_up": 1.5, "at_least_4": 0.1}
        for better in (4, 3, 4)
    ]
    path = tmp_path / "languages.json"
    path.write_text(json.dumps({"scale": "laptop", "runs": runs}))
    monkeypatch.setattr(study.study_page, "LANGUAGES", path)
    rows = [line for line in study.study_page.languages().splitlines() if line.startswith("| ")]
    words = [row.split("|")[-2].strip() for row in rows[1:] if "---" not in row]
    assert words == ["not reproduced", "reproduced", "not reproduced", "not reproduced"]
