"""Trains the tokenizer of the embedded model on its pre-training text and writes it in the Hugging Face layout.

    python scripts/make_nano_tokenizer.py [--corpus runs/nano_corpus/train.jsonl] [--out models/nano]

A SentencePiece BPE with byte fallback, so every text can be written and comes back unchanged. Two choices help a small
model to copy: digits stand alone, and so does the space, hence a word has the same tokens at the start of a text,
after a space and inside quotation marks. `tokenizer.model` is what SentencePiece trained; `tokenizer.json` is the same
vocabulary for transformers, with `tokenizer_config.json` and the chat template.
"""

import argparse
import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

VOCAB_SIZE, DOCUMENTS = 1024, 30_000
SPACE = "\u2581"  # what SentencePiece writes for a space
UNKNOWN, BEGIN, END, USER, SYSTEM, ASSISTANT = "<unk>", "<s>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The roles are system, user and assistant, not ' + message['role'] + '.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_sentencepiece(texts: list[str], vocab_size: int) -> bytes:
    """Returns the serialised SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        max_sentence_length=1 << 16,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_piece=UNKNOWN,
        bos_piece=BEGIN,
        eos_piece=END,
        control_symbols=[USER, SYSTEM, ASSISTANT],
        user_defined_symbols=[SPACE, "\n"],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def to_fast_tokenizer(model: bytes) -> Tokenizer:
    """Returns the same tokenizer for the `tokenizers` library: same pieces, same ids, merges in the order of the ids."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    special = [i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i)]
    learned = [piece for i, piece in enumerate(pieces) if i not in special and not processor.is_byte(i)]
    merges = []
    for piece in learned:
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += [(vocab[piece], *sorted(map(vocab.get, half)), half) for half in halves]
    merges = [half for *_, half in sorted(merges)]
    fast = Tokenizer(BPE(vocab, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", f"{BEGIN} $A {BEGIN} $B", [(BEGIN, vocab[BEGIN])])
    fast.add_special_tokens([AddedToken(pieces[i], normalized=False, special=True) for i in special])
    return fast


def write_tokenizer(model: bytes, folder: Path) -> None:
    """Writes tokenizer.model, tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    to_fast_tokenizer(model).save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "model_max_length": 512,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [USER, SYSTEM, ASSISTANT],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main() -> None:
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=root / "runs" / "nano_corpus" / "train.jsonl")
    parser.add_argument("--out", type=Path, default=root / "models" / "nano")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    args = parser.parse_args()
    with args.corpus.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(DOCUMENTS))]
    write_tokenizer(train_sentencepiece(texts, args.vocab_size), args.out)
    print(f"{args.out}: tokenizer of {args.vocab_size} pieces from {len(texts)} documents")


if __name__ == "__main__":
    main()
