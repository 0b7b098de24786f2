"""Read a spiece.model, the file of SentencePiece, for the tokenizer of T5.

Pieces keep their ids and scores, and the normalization is the map in the file. Words are cut in
T5's own way, as in transformers, whose conversion this equals.
"""

from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from switchlm.data.text.tokenizer_limits import check_vocabulary, longest_replacement
from switchlm.errors import DataError, require

_UNIGRAM, _CONTROL, _USER_DEFINED = 1, 3, 4
_UNKNOWN_ID = 2  # of T5's vocabularies
_LONGEST_REPLACEMENT = 256  # bytes; that of T5 has 33


class Pieces(NamedTuple):
    """The content of a spiece.model.

    vocabulary: (piece, score) by id.
    added: control symbols, which are special, and symbols that the user defined.
    charsmap: the normalization, empty for none.
    """

    vocabulary: list[tuple[str, float]]
    added: list[AddedToken]
    charsmap: bytes


def read_pieces(file: Path) -> Pieces:
    """Read a spiece.model. Raises DataError for a damaged one, and one that is no Unigram model."""
    require("google.protobuf", "sentencepiece", f"Reading {file.name}")
    library = "sentencepiece.sentencepiece_model_pb2"
    proto = require(library, "sentencepiece", f"Reading {file.name}")
    try:
        model = proto.ModelProto.FromString(file.read_bytes())
    except Exception as error:  # its class belongs to protobuf
        raise DataError(f"{file.name} is damaged: {str(error)[:200]}") from None
    if model.trainer_spec.model_type != _UNIGRAM:
        raise DataError(
            f"{file.name} is a SentencePiece model of another type than Unigram, which is not "
            "read. Save the tokenizer as tokenizer.json with transformers."
        )
    if len(model.pieces) <= _UNKNOWN_ID:
        raise DataError(f"{file.name} has {len(model.pieces)} pieces: it is empty or damaged.")
    vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    check_vocabulary(vocabulary)
    charsmap = model.normalizer_spec.precompiled_charsmap
    if charsmap and longest_replacement(charsmap) > _LONGEST_REPLACEMENT:
        raise DataError(f"{file.name} replaces single characters by texts that are absurdly long.")
    added = [
        AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
        for piece in model.pieces
        if piece.type in (_CONTROL, _USER_DEFINED)
    ]
    return Pieces(vocabulary, added, charsmap)


def t5_backend(vocabulary: list[tuple[str, float]], charsmap: bytes) -> tokenizers.Tokenizer:
    """Return the tokenizer of T5: words are cut at white space, each with a `▁` before it."""
    backend = tokenizers.Tokenizer(
        models.Unigram(vocabulary, unk_id=_UNKNOWN_ID, byte_fallback=False)
    )
    if charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    return backend
