"""Small vocabularies of others, made with the libraries themselves, in the files that their users have."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

ENGLISH = "The quick brown fox jumps over the lazy dog; it's 12:30, and GLM fills [MASK] (or [gMASK]) with words."
CHINESE = "话说天下大势，分久必合，合久必分。凯旋门位于意大利米兰市。"
WORDS = ["Fox", "dog", "it's", "café", "12:30", "[MASK]", "<mask>", "[gMASK]", "</s>", "<|endoftext|>", "天下",
         "米兰市", "ＡＢ", "。", "，", "😀", "é", "\t", "  ", "<n>", "##s", "x" * 120, "\u00a0"]  # fmt: skip


def lines(count: int, seed: int = 0) -> list[str]:
    """Return random lines in two languages, with what tokenizers trip over."""
    draw = random.Random(seed)
    return [" ".join(draw.choices([*ENGLISH.split(), *CHINESE, *WORDS], k=draw.randint(0, 12))) for _ in range(count)]


def word_piece(folder: Path) -> Path:
    """Write a vocab.txt of BERT's form, lowercased; its first pieces are [PAD] [UNK] [CLS] [SEP] [MASK]."""
    made = tokenizers.Tokenizer(models.WordPiece({}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    made.train_from_iterator([ENGLISH, CHINESE] * 5, trainer)
    ids = made.get_vocab()
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in sorted(ids, key=ids.__getitem__)), "utf-8")
    return folder / "vocab.txt"


def byte_level(folder: Path, specials: list[str], prefix: str = "") -> Path:
    """Write a vocab.json and the merges.txt beside it; the special pieces come first."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([ENGLISH, CHINESE] * 5, trainer)
    vocabulary, merges = made.model.save(str(folder), prefix or None)
    text = Path(merges).read_text("utf-8")
    assert text.startswith("#version")
    return Path(vocabulary)


def gpt2(folder: Path) -> Path:
    return byte_level(folder, ["<|endoftext|>"], "gpt2")


def roberta(folder: Path) -> Path:
    return byte_level(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"])


def library_file(folder: Path, *absent: str, **changes: object) -> Path:
    """Write a tokenizer.json with GLM's special tokens but the `absent` ones; `changes` replace parts of it."""
    made = tokenizers.Tokenizer.from_file(str(folder / "plain.json")) if (folder / "plain.json").exists() else _plain()
    names = ["<|endoftext|>", "[CLS]", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "[PAD]", "[UNK]"]
    made.add_special_tokens([name for name in names if name not in absent])
    content = json.loads(made.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return folder / "tokenizer.json"


def _plain() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [ENGLISH, CHINESE], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def chinese() -> bytes:
    """Return a model of cog-pretrain.model's form: BPE, nmt_nfkc, no bytes; unk 0, bos 1, eos 2, <n> 3."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([ENGLISH, CHINESE] * 20), model_writer=model, model_type="bpe", vocab_size=220,
        hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, user_defined_symbols=["<n>"],
        normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    return model.getvalue()
