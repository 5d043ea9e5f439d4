"""One user's request in flight: what its shards have said, and what its client has not been told yet.

    frames -> push: outputs, text, logprobs, ends --changed--> serve: one message per sample that has news -> client

While a write is under way, what comes meanwhile gathers here and goes out in one message; nothing is queued message by
message. A client that does not read holds no more than that, and not for long. Where many streams run, tokens that come
soon after a message wait a little for others to go with: a message costs server and client a quarter of a millisecond,
which the shards' steps would miss on the same cores. First tokens and ends never wait.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterator
from typing import Any

from cluster.endpoint import Context
from cluster.metrics import Meter
from cluster.sample_text import SampleText
from cluster.tokenizer import Tokenizer
from pagetable.errors import QuireError, RequestFailed, ServiceError
from pagetable.sampling import Request, encode_params
from quire_pb.inference.v1 import inference_pb2 as public
from quire_pb.worker.v1 import worker_pb2 as pb

MOST_POSITIONS = 1024  # of logprobs in one message: about 400 KiB at 20 each
STALLED_SECONDS = 1.0  # a write that takes longer waits for its client
_END_BYTES = 64
_PUBLIC_REASON: dict[int, public.FinishReason] = {
    pb.FINISH_REASON_STOP: public.FINISH_REASON_STOP,
    pb.FINISH_REASON_LENGTH: public.FINISH_REASON_LENGTH,
    pb.FINISH_REASON_CANCELLED: public.FINISH_REASON_CANCELLED,
}


class Sample:
    """One sample of a request.

    Attributes:
        outputs: token ids, int32, each exactly once whatever shards it ran on.
        logprobs: one entry an output where the request asked for them.
        matched: the stop string that ended it here; its shard may not know yet.
        reason: of its end (pb.FinishReason); 0 while it runs.
    """

    __slots__ = (
        "cached_tokens",
        "index",
        "logprobs",
        "matched",
        "news",
        "outputs",
        "pages",
        "reason",
        "sent",
        "stop_token",
        "text",
        "told",
        "updated",
    )

    def __init__(self, index: int, text: SampleText, wants_logprobs: bool) -> None:
        self.index, self.text = index, text
        self.outputs: array[int] = array("i")
        self.logprobs: list[public.Logprobs] | None = [] if wants_logprobs else None
        self.matched: str | None = None
        self.reason = 0
        self.stop_token: int | None = None
        self.cached_tokens = 0
        self.pages: list[tuple[int, int]] = []
        self.news: list[str] = []  # text that the client has not had
        self.sent = 0  # outputs that it has had
        self.told = False  # it has been told of the end
        self.updated = 0.0  # when the last token came

    @property
    def runs(self) -> bool:
        return not self.reason and self.matched is None

    def end(self, reason: int) -> None:
        """Its text is complete now."""
        self.news.append(self.text.finish())
        self.reason = pb.FINISH_REASON_STOP if self.matched is not None else reason


class Stream:
    """A request of one caller.

    Args:
        request: as admitted; its request_id is the user's, its cache_salt the shards'.
        event: GenerateResponse or ForkGenerationResponse.
        arrived: when the call came, in the event loop's seconds.
        max_unsent: bytes that may wait for a client that does not read; about.
        write_seconds: how long it may leave one message unread.
        pace: gives the seconds between two messages of tokens, as things stand.

    Attributes:
        failure: why the whole request ended, where it did.
        cancelled: somebody asked for its end.
        placed: the dispatcher's: where it runs.
        deaths: the dispatcher's: shards that died while they ran it.
        refusers, refused_at: the dispatcher's: full shards that refused it, and when the first one did.
    """

    def __init__(
        self,
        request: Request,
        tenant: str,
        tokenizer: Tokenizer | None,
        event: type[public.GenerateResponse] | type[public.ForkGenerationResponse],
        meter: Meter,
        *,
        arrived: float,
        max_unsent: int,
        write_seconds: float,
        pace: Callable[[], float] = lambda: 0.0,
    ) -> None:
        params = request.params
        self.request, self.tenant = request, tenant
        wants = params.logprobs is not None
        self.samples = [Sample(index, SampleText(request, tokenizer), wants) for index in range(params.n)]
        self.failure: QuireError | None = None
        self.cancelled = False
        self.placed: Any = None
        self.deaths = 0
        self.refusers: set[int] = set()
        self.refused_at = 0.0
        self._event, self._meter, self._arrived = event, meter, arrived
        self._max_unsent, self._write_seconds = max_unsent, write_seconds
        self._changed = asyncio.Event()
        self._pace, self._taken, self._told = pace, 0.0, 0.0  # when news were last taken, and when the last ones came
        self._late: asyncio.TimerHandle | None = None  # tells of news where nothing more comes
        self._unsent = 0
        self._scores: list[public.Logprobs] = []
        self._num_scores = self._skipped_scores = 0
        self._patience: asyncio.Timeout | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._write_began = 0.0  # 0 while no write is under way
        self._has_token = False

    # From shards

    def push(self, delta: pb.Delta, now: float) -> str | None:
        """Take what a step says about one sample; the stop string that its shard must end the sample with, or None."""
        sample = self.samples[delta.sample]
        if sample.reason or self.failure is not None:
            return None
        if delta.scores:
            self._take_scores(delta)
        stop = None
        if delta.HasField("token") and sample.matched is None:
            stop = self._take_token(sample, delta, now)
        if delta.finish == pb.FINISH_REASON_ERROR:
            self.fail(RequestFailed(delta.failure or "the shard gave up on this request"))
        elif delta.finish:
            sample.cached_tokens = delta.cached_tokens
            sample.stop_token = delta.stop_token if delta.HasField("stop_token") else None
            sample.pages = list(zip(delta.page_devices, delta.page_blocks, strict=True))
            sample.end(delta.finish)
            self._unsent += _END_BYTES + 8 * len(sample.pages)
        self._tell(now)
        return stop if not sample.reason else None

    def fail(self, error: QuireError) -> None:
        """End the call with an error, behind what has come so far."""
        if self.failure is None:
            self.failure = error
            self._changed.set()

    def end_all(self, reason: int) -> None:
        """End what still runs, without a word from a shard; a sample that met its stop string ends by that."""
        for sample in self.samples:
            if not sample.reason:
                sample.end(reason)
        self._changed.set()

    def inherit(self, outputs: array[int], logprobs: list[public.Logprobs] | None) -> None:
        """A fork begins with its parent's outputs. Where its own stop string is among them it has ended there."""
        own = self.samples[0]
        for at, token in enumerate(outputs):
            own.outputs.append(token)
            if own.logprobs is not None and logprobs is not None:
                own.logprobs.append(logprobs[at])
            text, own.matched = own.text.push(token, ended_by_token=False)
            own.news.append(text)
            if own.matched is not None:
                own.end(pb.FINISH_REASON_STOP)
                break
        self._has_token = bool(outputs)
        self._changed.set()

    @property
    def has_begun(self) -> bool:
        """Whether outputs exist, so that starting over would repeat or change them."""
        return any(sample.outputs for sample in self.samples)

    @property
    def is_over(self) -> bool:
        """Nothing more will come."""
        return self.failure is not None or all(sample.reason for sample in self.samples)

    def unfinished(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.runs]

    def submission(self, handle: int) -> pb.Submit:
        """What makes a shard run all that is unfinished, from where it stands."""
        request, left = self.request, self.unfinished()
        submit = pb.Submit(
            handle=handle,
            request_id=request.request_id,
            owner=self.tenant,
            prompt=array("i", request.prompt).tobytes(),
            params=encode_params(request.params),
            eos_token_ids=array("i", request.eos_token_ids).tobytes(),
            cache_salt=request.cache_salt,
        )
        if self.has_begun or len(left) < len(self.samples):
            for sample in left:
                submit.samples.add(sample=sample.index, outputs=sample.outputs.tobytes())
        self._skipped_scores = self._num_scores  # they come again where sample 0 starts over, and never otherwise
        return submit

    # To the client

    async def serve(self, context: Context) -> None:
        """Accept, and write until the end. Raises the request's failure, and ServiceError where the client does not
        read."""
        try:
            async with asyncio.timeout(None) as self._patience:
                self._watch_writes()
                await self._write(context, self._accepted())
                await self._write_news(context)
        except TimeoutError:
            text = (
                f"the client did not read for {self._write_seconds:.0f} s, or left more than {self._max_unsent} bytes "
                "unread; read each message as it comes"
            )
            raise ServiceError("CANCELLED", text) from None
        finally:
            self._patience = None
            for timer in (self._watch, self._late):
                if timer is not None:
                    timer.cancel()

    def _accepted(self) -> Any:
        request = self.request
        accepted = public.Accepted(
            request_id=request.request_id, prompt_tokens=len(request.prompt), seed=request.params.seed
        )
        return self._event(accepted=accepted)

    async def _write_news(self, context: Context) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            for message in self._take():
                await self._write(context, message)
            if self._changed.is_set():
                continue
            if self.failure is not None:
                raise self.failure
            if self.is_over:
                return

    async def _write(self, context: Context, message: Any) -> None:
        self._write_began = asyncio.get_running_loop().time()
        await context.write(message)
        self._write_began = 0.0

    def _watch_writes(self) -> None:
        """End `serve` when a write has lasted for write_seconds. One timer for all writes: one for each would cost as
        much as half of a write."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        left = self._write_seconds - (now - self._write_began if self._write_began else 0.0)
        if left > 0:
            self._watch = loop.call_later(left, self._watch_writes)
        else:
            self._lose_patience(now)

    def _lose_patience(self, now: float) -> None:
        if self._patience is not None:
            self._patience.reschedule(now)
            self._patience = None

    def _take(self) -> Iterator[Any]:
        """Messages of all news."""
        self._unsent = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if self._has_token:
            self._taken = asyncio.get_running_loop().time()
        scores, self._scores = self._scores, []
        for at in range(0, len(scores), MOST_POSITIONS):
            chunk = scores[at : at + MOST_POSITIONS]
            yield self._event(delta=public.Delta(index=0, prompt_logprobs=chunk))
        for sample in self.samples:
            if sample.told:
                continue
            reason = sample.reason  # what comes while this is being written is for the next time
            yield from self._take_news(sample)
            if reason:
                sample.told = True
                yield self._event(finished=self._finished(sample))

    def _take_news(self, sample: Sample) -> Iterator[Any]:
        text = "".join(sample.news)
        sample.news.clear()
        start, end = sample.sent, len(sample.outputs)
        sample.sent = end
        if not text and start == end:
            return
        size = MOST_POSITIONS if sample.logprobs is not None else max(1, end - start)
        for at in range(start, max(end, start + 1), size):
            stop = min(end, at + size)
            message = self._event()
            delta = message.delta  # filled in place: a Delta that is passed in would be copied
            delta.index, delta.text = sample.index, text
            delta.token_ids.extend(sample.outputs[at:stop])
            if sample.logprobs is not None:
                delta.logprobs.extend(sample.logprobs[at:stop])
            text = ""
            yield message

    def _finished(self, sample: Sample) -> public.Finished:
        finished = public.Finished(index=sample.index, finish_reason=_PUBLIC_REASON[sample.reason])
        if sample.matched is not None:
            finished.stop_string = sample.matched
        elif sample.stop_token is not None:
            finished.stop_token_id = sample.stop_token
        usage = finished.usage
        usage.prompt_tokens, usage.output_tokens = len(self.request.prompt), len(sample.outputs)
        usage.cached_tokens = sample.cached_tokens
        for device, block in sample.pages:
            usage.pages.add(device_id=device, block_id=block)
        return finished

    # Parts of push

    def _take_token(self, sample: Sample, delta: pb.Delta, now: float) -> str | None:
        sample.outputs.append(delta.token)
        self._unsent += 4
        if sample.logprobs is not None:
            sample.logprobs.append(_logprobs(delta.logprobs))
            self._unsent += 32 + 16 * len(delta.logprobs.top_tokens)
        text, stop = sample.text.push(delta.token, delta.finish == pb.FINISH_REASON_STOP)
        if text:
            sample.news.append(text)
            self._unsent += len(text)
        sample.matched = stop
        if not self._has_token:
            self._has_token = True
            self._meter.first_token(now - self._arrived)
        elif sample.updated:
            self._meter.next_token(now - sample.updated)
        sample.updated = now
        return stop

    def _take_scores(self, delta: pb.Delta) -> None:
        for score in delta.scores:
            if self._skipped_scores:
                self._skipped_scores -= 1
                continue
            self._num_scores += 1
            self._scores.append(_logprobs(score))
            self._unsent += 32 + 16 * len(score.top_tokens)

    def _tell(self, now: float) -> None:
        """Wake the writer, now or later, or end the wait for a client that has stopped reading.

        Messages leave with the step that is nearest to the time when they are due, those of all streams together: a
        timer in the middle of a step would take its cores. Where no step comes for 1.5 paces, they leave then.
        """
        gap, self._told = now - self._told, now
        pace = self._pace()
        wait = self._taken + pace - now
        if self.is_over or not self._taken or wait <= gap / 2:
            self._changed.set()
        elif self._late is None:
            self._late = asyncio.get_running_loop().call_later(wait + pace / 2, self._changed.set)
        if self._unsent > self._max_unsent and self._write_began and now - self._write_began > STALLED_SECONDS:
            self._lose_patience(now)


def _logprobs(found: pb.Logprobs) -> public.Logprobs:
    """A copy: a part of a frame would keep the whole frame."""
    logprobs = public.Logprobs(logprob=found.logprob, rank=found.rank)
    for token, logprob in zip(found.top_tokens, found.top_logprobs, strict=True):
        logprobs.top.add(token_id=token, logprob=logprob)
    return logprobs
