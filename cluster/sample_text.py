"""One sample's text as its tokens come, and the stop string that may end it. Used by the front and by the engine."""

from __future__ import annotations

from cluster.detokenizer import Detokenizer, StopStrings
from cluster.tokenizer import Tokenizer
from pagetable.sampling import Request


class SampleText:
    """The text of one sample and the stop string that may end it.

    Args:
        tokenizer: None where the model serves token ids only; then there is no text and no stop string can match.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self._min_tokens, self._include = params.min_tokens, params.include_stop_str_in_output
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens) if tokenizer is not None else None
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._count = 0

    def push(self, token: int, ended_by_token: bool) -> tuple[str, str | None]:
        """(text that is final now, the stop string that it ends with or None). A token that ends the sample is no
        text."""
        self._count += 1
        if self._detokenizer is None or (ended_by_token and not self._include):
            return "", None
        text = self._detokenizer.push((token,))
        if self._count < self._min_tokens:
            return text, None
        return self._stops.push(text)

    def finish(self) -> str:
        """What was held back: an incomplete code point, the possible start of a stop string."""
        if self._detokenizer is None or self._stops.matched is not None:
            return ""
        text, _ = self._stops.push(self._detokenizer.finish())
        return text + self._stops.finish()
