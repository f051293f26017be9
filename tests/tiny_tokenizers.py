"""Small tokenizers of every decoding kind, built in memory, and a chat template."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from lory_router.chat_template import ChatTemplate
from lory_router.text import BYTE_OF_CHAR, TextModel

EOS = "</s>"
TEMPLATE = (
    "{% for message in messages %}"
    "<{{ message['role'] }}>{{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level(merges: tuple[tuple[str, str], ...] = (), template: str | None = TEMPLATE):
    """Ids 0..255 are the bytes themselves, 256 begins, 257 ends, then merged pairs."""
    char_of_byte = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    vocab = {char_of_byte[byte]: byte for byte in range(256)}
    for left, right in merges:
        vocab[left + right] = len(vocab) + 2
    tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _text_model(_with_specials(tokenizer), template)


def fused_bytes() -> TextModel:
    """Bytes behind a decoder that is none of the known kinds."""
    text = byte_level()
    text.tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return TextModel(text.tokenizer)


def byte_pairs(texts: tuple[str, ...]) -> TextModel:
    """A trained byte-level BPE, whose tokens may hold parts of characters."""
    from tokenizers import trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False, special_tokens=["<s>", EOS]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TextModel(tokenizer)


def words(num: int = 64) -> TextModel:
    """Whole words, split at spaces, without a decoder: the peers' benchmark tokenizer."""
    vocab = {"<unk>": 0, "<s>": 1, EOS: 2} | {f"t{i}": i for i in range(3, num)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", EOS])
    return TextModel(tokenizer)


def sentence_pieces() -> TextModel:
    """Llama 2's way: spaces are part of words, unknown characters fall back to bytes."""
    pieces = [
        "\u2581",
        "\u2581a",
        "\u2581the",
        "a",
        "b",
        "c",
        "he",
        "\u2581cat",
        "s",
        "\u2581\u2581",
        "\u00e9",
        ".",
    ]
    scored = [("<unk>", 0.0), ("<s>", 0.0), (EOS, 0.0)]
    scored += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    scored += [(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", EOS])
    return TextModel(tokenizer)


def metaspace() -> TextModel:
    """Unigram with the Metaspace decoder and no byte fallback."""
    pieces = [
        "<unk>",
        "<s>",
        EOS,
        "\u2581",
        "\u2581a",
        "\u2581the",
        "a",
        "b",
        "c",
        "\u2581cat",
        "\u00e9",
    ]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", EOS])
    return TextModel(tokenizer)


def _with_specials(tokenizer: Tokenizer) -> Tokenizer:
    specials = [AddedToken(content, special=True, normalized=False) for content in ("<s>", EOS)]
    tokenizer.add_special_tokens(specials)
    return tokenizer


def with_bos(text: TextModel) -> TextModel:
    """The same, but beginning each prompt with <s>."""
    bos = text.tokenizer.token_to_id("<s>")
    text.tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return text


def _text_model(tokenizer: Tokenizer, template: str | None) -> TextModel:
    return TextModel(tokenizer, ChatTemplate(template, {"eos_token": EOS}) if template else None)
