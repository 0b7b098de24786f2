"""The named tasks. To add one, add an entry to `TASKS`: see `Task` for what each field says.

Templates and labels are T5's (Raffel et al. 2020, appendix D): the input of a sub-task of GLUE or
SuperGLUE begins with its name. Splits and metrics are the benchmarks' own.
"""

from collections.abc import Iterator
from dataclasses import replace

from switchlm.data.tasks import task
from switchlm.data.tasks.task import Task

ENTAILMENT = ("entailment", "not_entailment")
THREE_WAY = ("entailment", "neutral", "contradiction")
TRUTH = ("False", "True")
TRUTH_VALUES = {"false": "False", "true": "True"}
SENTENCES = ("index", "sentence1", "sentence2", "label")
ANSWERS = ("exact_match", "f1")
ROUGE = ("rouge2", "rouge1", "rougeL")
# Where the hub keeps as Parquet what is else made by a script, which `datasets` no longer runs.
PARQUET = "@refs/convert/parquet"


def _glue() -> Iterator[Task]:
    yield Task(
        name="cola",
        input="cola sentence: {sentence}",
        labels=("unacceptable", "acceptable"),
        metrics=("matthews",),
        header=("source", "label", "notes", "sentence"),
        hub="nyu-mll/glue:cola",
    )
    yield Task(
        name="sst2",
        input="sst2 sentence: {sentence}",
        labels=("negative", "positive"),
        metrics=("accuracy",),
        hub="nyu-mll/glue:sst2",
    )
    yield Task(
        name="mrpc",
        input="mrpc sentence1: {sentence1} sentence2: {sentence2}",
        labels=("not_equivalent", "equivalent"),
        metrics=("binary_f1", "accuracy"),
        columns={"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"},
        hub="nyu-mll/glue:mrpc",
    )
    yield Task(
        name="qqp",
        input="qqp question1: {question1} question2: {question2}",
        labels=("not_duplicate", "duplicate"),
        metrics=("binary_f1", "accuracy"),
        columns={"is_duplicate": "label"},
        ragged=True,  # a few rows of its training file lack columns
        hub="nyu-mll/glue:qqp",
    )
    yield Task(
        name="stsb",
        input="stsb sentence1: {sentence1} sentence2: {sentence2}",
        target="{similarity}",
        metrics=("pearson", "spearman"),
        spread=task.similarity,
        hub="nyu-mll/glue:stsb",
    )
    mnli = Task(
        name="mnli",
        input="mnli hypothesis: {hypothesis} premise: {premise}",
        labels=THREE_WAY,
        metrics=("accuracy",),
        columns={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
        files={"validation": "dev_matched", "test": "test_matched"},
        hub="nyu-mll/glue:mnli",
        hub_splits={"validation": "validation_matched", "test": "test_matched"},
    )
    yield mnli
    yield replace(
        mnli,
        name="mnli_mismatched",
        folder="mnli",
        files={"validation": "dev_mismatched", "test": "test_mismatched"},
        hub_splits={"validation": "validation_mismatched", "test": "test_mismatched"},
    )
    yield Task(
        name="qnli",
        input="qnli question: {question} sentence: {sentence}",
        labels=ENTAILMENT,
        metrics=("accuracy",),
        header=("index", "question", "sentence", "label"),
        hub="nyu-mll/glue:qnli",
    )
    yield Task(
        name="rte",
        input="rte sentence1: {sentence1} sentence2: {sentence2}",
        labels=ENTAILMENT,
        metrics=("accuracy",),
        columns={"premise": "sentence1", "hypothesis": "sentence2"},
        header=SENTENCES,
        hub="nyu-mll/glue:rte",
    )
    yield Task(
        name="wnli",
        input="wnli sentence1: {sentence1} sentence2: {sentence2}",
        labels=("not_entailment", "entailment"),
        metrics=("accuracy",),
        header=SENTENCES,
        hub="nyu-mll/glue:wnli",
    )


def _superglue() -> Iterator[Task]:
    yield Task(
        name="boolq",
        input="boolq passage: {passage} question: {question}",
        labels=TRUTH,
        label_values=TRUTH_VALUES,
        metrics=("accuracy",),
        hub="aps/super_glue:boolq",
    )
    yield Task(
        name="cb",
        input="cb hypothesis: {hypothesis} premise: {premise}",
        labels=("entailment", "contradiction", "neutral"),
        metrics=("macro_f1", "accuracy"),
        hub="aps/super_glue:cb",
    )
    yield Task(
        name="copa",
        input="copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
        labels=("choice1", "choice2"),
        metrics=("accuracy",),
        hub="aps/super_glue:copa",
    )
    yield Task(
        name="multirc",
        input="multirc question: {question} answer: {answer} paragraph: {paragraph}",
        labels=TRUTH,
        label_values=TRUTH_VALUES,
        metrics=("binary_f1", "group_accuracy"),
        spread=task.multirc,
        hub="aps/super_glue:multirc",
    )
    yield Task(
        name="record",
        input="record query: {query} entities: {entities} passage: {passage}",
        target="{answers}",
        metrics=("f1", "exact_match"),
        spread=task.record,
        hub="aps/super_glue:record",
    )
    yield Task(
        name="superglue_rte",
        input="rte hypothesis: {hypothesis} premise: {premise}",
        labels=ENTAILMENT,
        metrics=("accuracy",),
        columns={"sentence1": "premise", "sentence2": "hypothesis"},
        header=SENTENCES,
        folder="rte",
        hub="aps/super_glue:rte",
    )
    yield Task(
        name="wic",
        input="wic sentence1: {sentence1} sentence2: {sentence2} word: {word}",
        labels=TRUTH,
        label_values=TRUTH_VALUES,
        metrics=("accuracy",),
        hub="aps/super_glue:wic",
    )
    yield Task(
        name="wsc",
        input="wsc text: {marked}",
        labels=TRUTH,
        label_values=TRUTH_VALUES,
        metrics=("accuracy",),
        spread=task.wsc,
        hub="aps/super_glue:wsc.fixed",
    )
    yield Task(
        name="axb",
        input="rte hypothesis: {sentence2} premise: {sentence1}",
        labels=ENTAILMENT,
        metrics=("matthews",),
        hub="aps/super_glue:axb",
        hub_splits={"validation": "test"},
        files={"validation": "ax-b"},
    )
    yield Task(
        name="axg",
        input="rte hypothesis: {hypothesis} premise: {premise}",
        labels=ENTAILMENT,
        metrics=("accuracy",),
        hub="aps/super_glue:axg",
        hub_splits={"validation": "test"},
        files={"validation": "ax-g"},
    )


def _reading() -> Iterator[Task]:
    yield Task(
        name="squad",
        input="question: {question} context: {context}",
        target="{answers.text}",
        metrics=ANSWERS,
        spread=task.squad,
        hub="rajpurkar/squad",
    )
    yield Task(
        name="cnn_dailymail",
        input="summarize: {article}",
        target="{highlights}",
        metrics=ROUGE,
        columns={"source": "article", "target": "highlights"},
        hub="abisee/cnn_dailymail:3.0.0",
    )
    yield Task(
        name="xsum",
        input="summarize: {document}",
        target="{summary}",
        metrics=ROUGE,
        columns={"source": "document", "target": "summary"},
        hub=f"EdinburghNLP/xsum:default{PARQUET}",
    )
    yield Task(
        name="scitldr",
        input="summarize: {source}",
        target="{target}",
        metrics=ROUGE,
        hub=f"allenai/scitldr:Abstract{PARQUET}",
    )


def _reasoning() -> Iterator[Task]:
    for round_ in ("r1", "r2", "r3"):
        yield Task(
            name=f"anli_{round_}",
            input=f"anli_{round_} hypothesis: {{hypothesis}} premise: {{premise}}",
            labels=THREE_WAY,
            label_values={"e": "entailment", "n": "neutral", "c": "contradiction"},
            metrics=("accuracy",),
            columns={"context": "premise"},
            folder=round_,
            hub="facebook/anli",
            hub_splits={
                "train": f"train_{round_}",
                "validation": f"dev_{round_}",
                "test": f"test_{round_}",
            },
        )
    for level in ("easy", "challenge"):
        yield Task(
            name=f"arc_{level}",
            input=f"arc_{level} question: {{question}} choices: {{choices}}",
            labels=("A", "B", "C", "D", "E"),
            metrics=("accuracy",),
            spread=task.multiple_choice,
            hub=f"allenai/ai2_arc:ARC-{level.title()}",
        )
    yield Task(
        name="winogrande",
        input="winogrande sentence: {sentence} option1: {option1} option2: {option2}",
        labels=("option1", "option2"),
        label_values={"1": "option1", "2": "option2"},
        metrics=("accuracy",),
        columns={"answer": "label"},
        files={"train": "train_xl"},
        hub="allenai/winogrande:winogrande_xl",
    )


def _closed_book() -> Iterator[Task]:
    """Questions without a text to find the answer in (Roberts et al. 2020)."""
    yield Task(
        name="natural_questions",
        input="nq question: {question}",
        target="{answer}",
        metrics=ANSWERS,
        hub="google-research-datasets/nq_open",
    )
    # Its authors made no validation split: the last tenth of the training questions serves.
    yield Task(
        name="web_questions",
        input="wq question: {question}",
        target="{answers}",
        metrics=ANSWERS,
        columns={"qText": "question"},
        hub="stanfordnlp/web_questions",
        hub_splits={"train": "train[:90%]", "validation": "train[90%:]"},
    )
    yield Task(
        name="trivia_qa",
        input="trivia_qa question: {question}",
        target="{answers}",
        metrics=ANSWERS,
        columns={"Question": "question"},
        spread=task.trivia_qa,
        hub="mandarjoshi/trivia_qa:unfiltered.nocontext",
    )


GROUPS = {
    "GLUE": tuple(_glue()),
    "SuperGLUE": tuple(_superglue()),
    "reading and summarising": tuple(_reading()),
    "reasoning": tuple(_reasoning()),
    "closed-book questions": tuple(_closed_book()),
}
TASKS = {task.name: task for tasks in GROUPS.values() for task in tasks}

# Several tasks as one, mixed in proportion to their tokens (paper, section 4.1).
MIXTURES = {
    "glue": ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"),
    "superglue": ("boolq", "cb", "copa", "multirc", "record", "superglue_rte", "wic", "wsc"),
    "anli": ("anli_r1", "anli_r2", "anli_r3"),
}
