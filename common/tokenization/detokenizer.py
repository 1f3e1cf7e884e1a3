"""Token ids in, whole characters out, at a constant cost per token.

A byte-level token is a run of bytes, not of characters: one emoji may take four tokens. So bytes are decoded as a
stream, and a character comes out with the token that completes it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import tokenizers

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


def _printable_bytes() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF = _printable_bytes()


class TokenBytes(dict[int, bytes]):
    """Token id → the bytes it adds to the text, filled as tokens are met.

    Special tokens and ids without a token (the padding of the model's vocabulary) add none.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.update({token_id: b"" for token_id, token in added.items() if token.special})

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) or ""
        try:
            value = bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token, written as plain text
            value = token.encode()
        self[token_id] = value
        return value


class Detokenizer:
    """The text of one stream of tokens. What it puts out, joined, is what decoding all the tokens at once gives.

    Bytes that are no UTF-8 come out as U+FFFD; an incomplete character is held back until `flush`.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = _Utf8Decoder("replace")

    @property
    def has_partial_character(self) -> bool:
        """The tokens so far end inside a character."""
        return bool(self._decoder.getstate()[0])

    def feed(self, token_ids: Iterable[int]) -> str:
        """Text of the characters that `token_ids` complete."""
        return self._decoder.decode(b"".join(map(self._token_bytes.__getitem__, token_ids)))

    def flush(self) -> str:
        """The end of the stream: U+FFFD for a character that was left incomplete, otherwise nothing."""
        return self._decoder.decode(b"", final=True)
