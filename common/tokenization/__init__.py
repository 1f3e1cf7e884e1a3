"""Text to tokens and back: encoding, chat templates, streaming text, stop strings. Free of torch."""

from common.tokenization.chat_template import ChatMessage, ChatTemplate
from common.tokenization.detokenizer import Detokenizer, TokenBytes
from common.tokenization.stop_strings import StopMatch, StopMatcher, StopStrings
from common.tokenization.tokenizer import Tokenizer

__all__ = [
    "ChatMessage",
    "ChatTemplate",
    "Detokenizer",
    "StopMatch",
    "StopMatcher",
    "StopStrings",
    "TokenBytes",
    "Tokenizer",
]
