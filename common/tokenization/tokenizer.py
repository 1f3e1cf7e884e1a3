"""A model folder's tokenizer: text to token ids, conversations to text, and the bytes of each token."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders

from common.errors import FailedPrecondition
from common.tokenization.chat_template import ChatTemplate
from common.tokenization.detokenizer import Detokenizer, TokenBytes


class Tokenizer:
    """`tokenizer.json` with byte-level decoding (GPT-2, Qwen, Llama 3), plus the chat template when the folder has one.

    Encoding is thread-safe and releases the interpreter lock.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        """Raises FailedPrecondition when tokens do not decode byte by byte."""
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise FailedPrecondition(
                f"the tokenizer decodes with {type(tokenizer.decoder).__name__}; only ByteLevel can be streamed. "
                "Choose a model with a byte-level BPE tokenizer"
            )
        self._tokenizer = tokenizer
        self._token_bytes = TokenBytes(tokenizer)
        self.chat_template = chat_template

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer | None:
        """The tokenizer of a Hugging Face folder; None when it has no `tokenizer.json`.

        Raises FailedPrecondition, naming the file, when something there cannot be used.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise FailedPrecondition(f"{path} cannot be used: {error}") from error
        # A folder may carry the limits of its training; those of serving are the router's.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, ChatTemplate.load(folder))

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text, added ones included. The model's vocabulary may be padded beyond."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens` puts in what the model wants around a bare prompt (such as BOS)."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for; of a special token, which has no text, its name. Empty for an id without a token."""
        return self._token_bytes[token_id] or (self._tokenizer.id_to_token(token_id) or "").encode()

    def detokenizer(self) -> Detokenizer:
        """A new stream of text, for one completion."""
        return Detokenizer(self._token_bytes)
