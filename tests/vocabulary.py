"""Small tokenizers of several kinds, made alike with every version of transformers."""

import json
from collections.abc import Sequence
from typing import Any

import tokenizers
import transformers
from packaging.version import Version


def bert_tokenizer(vocabulary: dict[str, int]) -> Any:
    """A WordPiece tokenizer with BERT's rules. ``[CLS]``, ``[SEP]`` and ``[UNK]`` are among its words."""
    if Version(transformers.__version__) >= Version("5.0"):
        return transformers.BertTokenizer(vocab=vocabulary)
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    backend.decoder = tokenizers.decoders.WordPiece()
    return transformers.BertTokenizerFast(tokenizer_object=backend)


def byte_level_tokenizer(texts: Sequence[str], size: int = 320, word_end: str = "", decodes: bool = True) -> Any:
    """A byte-level BPE with GPT-2's letters for bytes.

    Args:
        texts: what its merges are learnt from.
        size: of the vocabulary; 258 and fewer leave single bytes.
        word_end: what marks the last token of a word, as CLIP's ``</w>``; words begin with a space without it.
        decodes: whether it has a decoder; those who train their own forget it.
    """
    model = tokenizers.models.BPE(end_of_word_suffix=word_end) if word_end else tokenizers.models.BPE()
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if word_end:
        words = tokenizers.pre_tokenizers.WhitespaceSplit()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, backend.pre_tokenizer])
    if decodes:
        backend.decoder = tokenizers.decoders.ByteLevel()
    suffix = {"end_of_word_suffix": word_end} if word_end else {}
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **suffix,
    )
    backend.train_from_iterator([*texts] * 20, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>")


def sentencepiece_tokenizer(texts: Sequence[str], size: int = 330) -> Any:
    """A BPE with a mark for spaces, which spells letters that it does not know in bytes, as Llama 2's."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytewise = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", *bytewise], show_progress=False
    )
    backend.train_from_iterator([*texts] * 20, trainer)
    # The trainer takes nothing but special tokens as given; bytes are ordinary ones.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] not in bytewise]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
