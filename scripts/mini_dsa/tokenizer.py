"""The tokenizer of the small models: a token is a byte."""

from pathlib import Path

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 259


def write_tokenizer(out_dir: Path) -> None:
    """A tokenizer of bytes, where a byte's id is its value."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    vocab |= {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=163840,
    ).save_pretrained(out_dir)
