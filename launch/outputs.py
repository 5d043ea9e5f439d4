"""What a caller gets back: vLLM's RequestOutput and CompletionOutput, filled token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.sample_text import SampleText
from cluster.tokenizer import Tokenizer
from pagetable.sampling import Request
from worker.plan import TokenLogprobs
from worker.sequence import FinishReason, TokenOutput


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request.

    Attributes:
        logprobs: one entry a token where the request asked for them.
        finish_reason: "stop", "length", "cancelled" or "error"; None while it runs.
        stop_reason: the stop string or stop token id that ended it; why it failed where it did.
        pages: (device_id, block_id) of each page of its block table when it ended.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    pages: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class RequestOutput:
    """All samples of one request.

    Attributes:
        prompt: the text, where the prompt was text.
        prompt_logprobs: one entry a prompt token where the request asked; the first is None, since nothing predicts it.
        prompt_token_ids: empty where a server tokenized the prompt.
        num_cached_tokens: prompt tokens whose pages were there (or being filled) when the request was admitted.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


class Collector:
    """Fills one RequestOutput from the engine's token outputs."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer | None) -> None:
        params = request.params
        wants = params.logprobs is not None
        outputs = [
            CompletionOutput(index, logprobs=[] if wants else None, cumulative_logprob=0.0 if wants else None)
            for index in range(params.n)
        ]
        self.output = RequestOutput(request.request_id, prompt, request.prompt, outputs)
        self.output.num_prompt_tokens = len(request.prompt)
        if params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]
        self._texts = [SampleText(request, tokenizer) for _ in range(params.n)]

    def inherit(self, other: CompletionOutput) -> None:
        """A fork begins with the tokens that the forked sample has emitted, and their logprobs where it has any."""
        own = self.output.outputs[0]
        if own.logprobs is not None and other.logprobs is not None:
            own.logprobs += other.logprobs
            own.cumulative_logprob = other.cumulative_logprob
        for token in other.token_ids:
            own.token_ids.append(token)
            own.text += self._texts[0].push(token, ended_by_token=False)[0]

    def push(self, found: TokenOutput) -> str | None:
        """Take one output; the stop string that the caller must end the sample with, or None.

        The sample's text is complete where its finish_reason is set.
        """
        own, text = self.output.outputs[found.sample_index], self._texts[found.sample_index]
        if found.scores and self.output.prompt_logprobs is not None:
            self.output.prompt_logprobs += found.scores
        matched = None
        if found.token is not None:
            own.token_ids.append(found.token)
            if own.logprobs is not None and own.cumulative_logprob is not None and found.logprobs is not None:
                own.logprobs.append(found.logprobs)
                own.cumulative_logprob += found.logprobs.logprob
            piece, matched = text.push(found.token, found.finish_reason is FinishReason.STOP)
            own.text += piece
        if found.finish_reason is not None:
            own.text += text.finish()
            own.finish_reason = FinishReason.STOP.value if matched is not None else found.finish_reason.value
            own.stop_reason = matched if matched is not None else found.failure or found.stop_reason
            own.pages = [(int(device), int(block)) for device, block in found.pages]
            if found.sample_index == 0:
                self.output.num_cached_tokens = found.cached_tokens
            return None
        return matched
