"""Small tokenizers in the folders of T5, FLAN, mT5, UMT5, ByT5 and CodeT5.

`make_folder(kind, path)` writes one. The pieces come from a SentencePiece model trained here.
"""

import functools
import io
import json

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog.", "Größe über alles; naïve café.",
    "translate English to German: That is good!", "def f(x): return x + 1 # 3.14",
    "Чебурашка и крокодил Гена.", "שלום עולם", "مرحبا بالعالم", "日本語の文章です。",
] * 20  # fmt: skip
SENTINELS = [f"<extra_id_{number}>" for number in range(100)]
NAMES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
MODEL = {"d_model": 8, "num_layers": 1, "d_kv": 4, "d_ff": 8, "num_heads": 2, "vocab_size": 256}
NORMAL, USER_DEFINED = 1, 4


@functools.cache
def spiece(user_defined=(), kind=USER_DEFINED):
    """Return a spiece.model, with further pieces of that kind at its end."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=200, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto.FromString(file.getvalue())
    for piece in user_defined:
        model.pieces.add(piece=piece, score=0.0, type=kind)
    return model.SerializeToString()


MT5_PIECES = tuple(f"▁{name}" for name in reversed(SENTINELS))


@functools.cache
def num_pieces():
    return len(sentencepiece_model_pb2.ModelProto.FromString(spiece()).pieces)


def token(content, **flags):
    usual = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return usual | {"content": content, "special": True} | flags


def t5_json():
    """Return the tokenizer.json that transformers makes of the spiece.model."""
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    pieces = sentencepiece_model_pb2.ModelProto.FromString(spiece())
    vocabulary = [(piece.piece, piece.score) for piece in pieces.pieces]
    vocabulary += [(name, 0.0) for name in reversed(SENTINELS)]
    charsmap = pieces.normalizer_spec.precompiled_charsmap
    made = T5Tokenizer(vocabulary, _spm_precompiled_charsmap=charsmap)
    return json.loads(made.backend_tokenizer.to_str())


def bpe_json(post_processor):
    """Return the tokenizer.json of a byte-level BPE."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>", *SENTINELS[:10]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = post_processor
    return json.loads(backend.to_str())


def legacy_decoder():
    """Return the added tokens as a slow tokenizer saves them: sentinels take the spaces around."""
    found = {str(number): token(name) for number, name in enumerate(["<pad>", "</s>", "<unk>"])}
    for number, name in enumerate(SENTINELS):
        found[str(num_pieces() + 99 - number)] = token(name, lstrip=True, rstrip=True)
    return found


def nonlegacy(values):
    """Change a tokenizer.json to the way in which `legacy: false` is saved."""
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    values["normalizer"] = {"type": "Sequence", "normalizers": [values["normalizer"], spaces]}
    values["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    return values


def with_added(values):
    values["added_tokens"] += [
        token("<sep>", normalized=True, special=False) | {"id": num_pieces() + 100},
        token("<ORG>", single_word=True) | {"id": num_pieces() + 101},
    ]
    return values


def _byt5_name(content):
    return token(content, lstrip=True, rstrip=True) | {"__type": "AddedToken"}


BYT5 = {name: _byt5_name(content) for name, content in NAMES.items()} | {
    "extra_ids": 125,
    "additional_special_tokens": [f"<extra_id_{number}>" for number in range(125)],
}
TEMPLATE = processors.TemplateProcessing(
    single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
)
# (config.json, then the other files by name)
KINDS = {
    "t5 of spiece.model": lambda: ({}, {"spiece.model": spiece()}),
    "t5 of spiece.model, legacy": lambda: (
        {},
        {
            "spiece.model": spiece(),
            "tokenizer_config.json": {
                "tokenizer_class": "T5Tokenizer",
                "added_tokens_decoder": legacy_decoder(),
                "additional_special_tokens": SENTINELS,
                "legacy": True,
                "clean_up_tokenization_spaces": True,
            },
        },
    ),
    "t5 with added_tokens.json": lambda: (
        {},
        {
            "spiece.model": spiece(),
            "added_tokens.json": {"<sep>": num_pieces() + 100, "<ORG>": num_pieces() + 101},
            "special_tokens_map.json": NAMES | {"additional_special_tokens": [*SENTINELS, "<ORG>"]},
        },
    ),
    "flan of tokenizer.json": lambda: (
        {},
        {
            "tokenizer.json": t5_json(),
            "spiece.model": spiece(),
            "special_tokens_map.json": NAMES | {"additional_special_tokens": SENTINELS},
            "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "extra_ids": 100},
        },
    ),
    "switch, not legacy": lambda: (
        {"model_type": "switch_transformers"},
        {
            "tokenizer.json": nonlegacy(t5_json()),
            "tokenizer_config.json": {"tokenizer_class": "T5TokenizerFast", "legacy": False},
        },
    ),
    "tokenizer.json as it is": lambda: (
        {},
        {
            "tokenizer.json": nonlegacy(with_added(t5_json())),
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"} | NAMES,
        },
    ),
    "t5 with added tokens": lambda: ({}, {"tokenizer.json": with_added(t5_json())}),
    "mt5": lambda: (
        {"model_type": "mt5"},
        {
            "spiece.model": spiece(MT5_PIECES, NORMAL),
            "tokenizer_config.json": NAMES
            | {"extra_ids": 0, "tokenizer_class": "T5Tokenizer", "additional_special_tokens": None},
        },
    ),
    "mt5, user-defined pieces": lambda: (
        {"model_type": "mt5"},
        {
            "spiece.model": spiece(MT5_PIECES, USER_DEFINED),
            "tokenizer_config.json": {"extra_ids": 0, "tokenizer_class": "T5Tokenizer"},
        },
    ),
    "umt5": lambda: (
        {"model_type": "umt5"},
        {
            "tokenizer.json": t5_json(),
            "tokenizer_config.json": NAMES
            | {"tokenizer_class": "T5Tokenizer", "additional_special_tokens": SENTINELS},
        },
    ),
    "byt5 of config.json": lambda: (
        {"tokenizer_class": "ByT5Tokenizer", "vocab_size": 384},
        {},
    ),
    "byt5": lambda: (
        {"vocab_size": 384},
        {"tokenizer_config.json": BYT5 | {"tokenizer_class": "ByT5Tokenizer"}},
    ),
    "codet5": lambda: (
        {},
        {
            "tokenizer.json": bpe_json(processors.RobertaProcessing(("</s>", 2), ("<s>", 0))),
            "tokenizer_config.json": NAMES
            | {
                "tokenizer_class": "RobertaTokenizer",
                "bos_token": "<s>",
                "additional_special_tokens": SENTINELS[:10],
            },
        },
    ),
    "byte-level bpe with a template": lambda: (
        {},
        {
            "tokenizer.json": bpe_json(TEMPLATE),
            "tokenizer_config.json": NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"},
        },
    ),
}


def make_folder(kind, folder):
    """Write config.json and the files of a tokenizer."""
    config, files = KINDS[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config.json": {"model_type": "t5"} | MODEL | config} | files
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)
    return folder
