"""A character tokenizer for the built-in tasks: made on the spot, so that the quick start downloads nothing."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def char_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One character a token: ids 0 <pad>, 1 <eos>, then `alphabet` in order; the vocabulary is exactly that large.

    A character outside the alphabet is an error when text is encoded (there is no unknown token to hide it).
    `save_pretrained` writes an ordinary Hugging Face tokenizer folder.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet={alphabet!r}: must be non-empty and name each character once")
    vocab = {token: index for index, token in enumerate([PAD, EOS, *alphabet])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<no unknown token>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
