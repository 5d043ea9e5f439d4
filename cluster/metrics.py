"""What a service tells Prometheus, on a port of its own: GET /metrics.

The seeds' seven, with a `quire_` prefix, a `device` label and a shape that Prometheus can add up:

    quire_num_free_blocks    gauge      blocks that hold nothing
    quire_alloc_rate         gauge      blocks allocated a second, over the last second or so (and as a counter:
                                        quire_block_allocations_total)
    quire_reuse_rate         gauge      part of the prompt tokens that were found in pages, since the shard began
                                        (counters: quire_prefix_hit_tokens_total / quire_prompt_tokens_total)
    quire_fragmentation      gauge      part of the token places in running sequences' pages that holds no token; pages
                                        are counted once for each sequence that uses them
    quire_refcount_hist      histogram  sequences per page that is in use, as of this scrape
    quire_gpu_mem_used       gauge      bytes of the pool's blocks that hold pages, whatever the device is; absent
                                        where a shard does not say how many bytes a block has
    quire_kv_gather_latency  gauge      seconds that the last step took: pages are read inside attention, never
                                        gathered before it, so this is the upper bound that is known

Shards' figures come from the scheduler and begin at 0 with a shard's life; the front's own are those of its calls.
Labels are shard and device ids, codes and reasons: never what a user can make up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Multiset
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from quire_pb.cluster.v1 import cluster_pb2
from quire_pb.memory.v1 import memory_pb2
from quire_pb.worker.v1 import worker_pb2 as pb

_FIRST_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_NEXT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.5, 5.0, 15.0)
_CALL_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_USERS = (1, 2, 4, 8, 16, 32, 64)  # buckets of quire_refcount_hist


class Meter:
    """What the front itself counts and times. May be used from its event loop.

    Args:
        model: the served model's name, for vLLM's labels.
        vllm: whether to count under vLLM's names, too.
    """

    def __init__(self, registry: CollectorRegistry, model: str, vllm: bool = False) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each of ours, which nobody reads
        more: dict[str, Any] = {"registry": registry}
        self._first = [
            _histogram("quire_time_to_first_token_seconds", "From a call to its first token", _FIRST_BUCKETS, more)
        ]
        self._next = [_histogram("quire_inter_token_latency_seconds", "Between a sample's tokens", _NEXT_BUCKETS, more)]
        self._whole = [_histogram("quire_request_seconds", "From a generating call to its end", _CALL_BUCKETS, more)]
        self._requests = Counter(
            "quire_requests", "Generating calls by their end: ok or the status", ["outcome"], **more
        )
        self._streams = Gauge("quire_requests_in_flight", "Generating calls that run or wait", **more)
        self._deaths = Counter("quire_request_failovers", "Times that a request's shard died under it", **more)
        if vllm:
            self._first.append(_vllm("time_to_first_token_seconds", _FIRST_BUCKETS, model, more))
            self._next.append(_vllm("inter_token_latency_seconds", _NEXT_BUCKETS, model, more))
            self._next.append(_vllm("time_per_output_token_seconds", _NEXT_BUCKETS, model, more))
            self._whole.append(_vllm("e2e_request_latency_seconds", _CALL_BUCKETS, model, more))

    def first_token(self, seconds: float) -> None:
        for histogram in self._first:
            histogram.observe(seconds)

    def next_token(self, seconds: float) -> None:
        for histogram in self._next:
            histogram.observe(seconds)

    def began(self) -> None:
        self._streams.inc()

    def ended(self, outcome: str, seconds: float) -> None:
        """`outcome` is "ok" or a gRPC status name in lower case."""
        self._streams.dec()
        self._requests.labels(outcome).inc()
        for histogram in self._whole:
            histogram.observe(seconds)

    def failed_over(self) -> None:
        self._deaths.inc()


class ClusterFigures(Collector):
    """The shards' figures as of the last answers, written out at each scrape.

    Args:
        model: the served model's name where vLLM's names are wanted, else None.
    """

    def __init__(self, registry: CollectorRegistry, model: str | None = None) -> None:
        self._model = model
        self._infos: dict[int, pb.ShardInfo] = {}
        self._loads: dict[int, cluster_pb2.Load] = {}
        self._rates: dict[int, float] = {}
        self._slots: dict[int, tuple[int, int]] = {}
        self._users: dict[int, Multiset[int]] = {}
        self._is_up = False
        self._taken = 0.0
        registry.register(self)

    def take_loads(self, infos: Sequence[pb.ShardInfo], loads: Iterable[cluster_pb2.Load], now: float) -> None:
        """Replace what is known of the shards; one that has no load any more is gone."""
        fresh = {load.shard_id: load for load in loads}
        seconds = now - self._taken
        rates = {}
        for shard_id, load in fresh.items():
            before = self._loads.get(shard_id)
            if before is not None and before.epoch == load.epoch and seconds > 0:
                rates[shard_id] = (load.allocations - before.allocations) / seconds
        self._infos = {info.shard_id: info for info in infos}
        self._loads, self._rates, self._taken, self._is_up = fresh, rates, now, True

    def lose_scheduler(self) -> None:
        """It does not answer: the figures are old."""
        self._is_up = False

    def take_slots(self, slots: Mapping[int, tuple[int, int]]) -> None:
        """By shard: tokens of running sequences, and token places in their pages."""
        self._slots = dict(slots)

    def take_page_map(self, pages: memory_pb2.GetPageMapResponse) -> None:
        """Count each page's users, by device."""
        users: dict[int, Multiset[int]] = {}
        shared: Multiset[int] = Multiset()
        for each in pages.shared_pages:
            users.setdefault(each.page.device_id, Multiset())[each.users] += 1
            shared[each.page.device_id] += each.users
        entries: Multiset[int] = Multiset()
        for sequence in pages.sequences:
            entries.update(page.device_id for page in sequence.pages)
        for device, count in entries.items():
            users.setdefault(device, Multiset())[1] += count - shared[device]
        self._users = users

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("quire_scheduler_up", "Whether the global scheduler answers", value=float(self._is_up))
        yield up
        yield from self._devices()
        yield from self._shards()
        yield self._refcounts()
        if self._model is not None:
            yield from self._vllm(self._model)

    def _devices(self) -> Iterator[Metric]:
        free = GaugeMetricFamily("quire_num_free_blocks", "Blocks that hold nothing", labels=["device"])
        cached = GaugeMetricFamily("quire_num_cached_blocks", "Blocks kept for prompts to come", labels=["device"])
        used = GaugeMetricFamily("quire_num_used_blocks", "Blocks that sequences use", labels=["device"])
        rate = GaugeMetricFamily("quire_alloc_rate", "Blocks allocated a second", labels=["device"])
        total = CounterMetricFamily("quire_block_allocations", "Blocks allocated", labels=["device"])
        evictions = CounterMetricFamily("quire_block_evictions", "Cached blocks given up", labels=["device"])
        reuse = GaugeMetricFamily("quire_reuse_rate", "Part of the prompt tokens found in pages", labels=["device"])
        waste = GaugeMetricFamily(
            "quire_fragmentation", "Part of running sequences' token places unused", labels=["device"]
        )
        memory = GaugeMetricFamily(
            "quire_gpu_mem_used", "Bytes of the pool's blocks that hold pages", labels=["device"]
        )
        gather = GaugeMetricFamily(
            "quire_kv_gather_latency", "Seconds of the last step, an upper bound", labels=["device"]
        )
        for shard_id, load in self._loads.items():
            info = self._infos.get(shard_id, pb.ShardInfo())
            tokens, places = self._slots.get(shard_id, (0, 0))
            sizes = dict(zip(info.device_ids, info.block_bytes, strict=False))
            for pool in load.pools:
                label = [str(pool.device_id)]
                free.add_metric(label, pool.free_blocks)
                cached.add_metric(label, pool.cached_blocks)
                used.add_metric(label, pool.used_blocks)
                if pool.device_id in sizes:
                    memory.add_metric(label, (pool.used_blocks + pool.cached_blocks) * sizes[pool.device_id])
            for device in info.device_ids[:1]:  # what a shard counts as one stands under its first
                label = [str(device)]
                rate.add_metric(label, self._rates.get(shard_id, 0.0))
                total.add_metric(label, load.allocations)
                evictions.add_metric(label, load.evictions)
                reuse.add_metric(label, load.cached_tokens / load.prompt_tokens if load.prompt_tokens else 0.0)
                waste.add_metric(label, 1 - tokens / places if places else 0.0)
                gather.add_metric(label, load.last_step_seconds)
        yield from (free, cached, used, rate, total, evictions, reuse, waste, memory, gather)

    def _shards(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("quire_sequences_running", "Sequences in steps", labels=["shard"])
        waiting = GaugeMetricFamily("quire_sequences_waiting", "Sequences in the queue", labels=["shard"])
        steps = SummaryMetricFamily("quire_step_seconds", "Time in steps, and steps", labels=["shard"])
        counters = {
            "preemptions": CounterMetricFamily(
                "quire_preemptions", "Sequences that gave up their pages", labels=["shard"]
            ),
            "prompt_tokens": CounterMetricFamily("quire_prompt_tokens", "Of admitted requests", labels=["shard"]),
            "cached_tokens": CounterMetricFamily(
                "quire_prefix_hit_tokens", "Prompt tokens found in pages", labels=["shard"]
            ),
            "output_tokens": CounterMetricFamily("quire_output_tokens", "Generated tokens", labels=["shard"]),
        }
        parts = CounterMetricFamily(
            "quire_step_part_seconds", "Time in parts of steps: schedule, run, retire", labels=["shard", "part"]
        )
        for shard_id, load in self._loads.items():
            label = [str(shard_id)]
            for part in ("schedule", "run", "retire"):
                parts.add_metric([*label, part], getattr(load, f"{part}_seconds"))
            running.add_metric(label, load.running)
            waiting.add_metric(label, load.waiting)
            steps.add_metric(label, load.steps, load.busy_seconds)
            for name, counter in counters.items():
                counter.add_metric(label, getattr(load, name))
        yield from (running, waiting, steps, parts, *counters.values())

    def _refcounts(self) -> Metric:
        family = HistogramMetricFamily("quire_refcount_hist", "Sequences per page in use", labels=["device"])
        devices = {device for shard, info in self._infos.items() if shard in self._loads for device in info.device_ids}
        for device in sorted(devices | self._users.keys()):
            users: Mapping[int, int] = self._users.get(device, {})
            counts = [0] * (len(_USERS) + 1)
            for number, pages in users.items():
                counts[bisect_left(_USERS, number)] += pages
            buckets, running = [], 0
            for bound, count in zip([*map(str, map(float, _USERS)), "+Inf"], counts, strict=True):
                running += count
                buckets.append((bound, float(running)))
            family.add_metric([str(device)], buckets, sum(number * pages for number, pages in users.items()))
        return family

    def _vllm(self, model: str) -> Iterator[Metric]:
        """The sums over all shards, under vLLM's names."""
        loads = list(self._loads.values())
        blocks = sum(load.free_blocks + load.cached_blocks + load.used_blocks for load in loads)
        gauges = {
            "vllm:num_requests_running": sum(load.running for load in loads),
            "vllm:num_requests_waiting": sum(load.waiting for load in loads),
            "vllm:kv_cache_usage_perc": sum(load.used_blocks for load in loads) / blocks if blocks else 0.0,
        }
        counters = {
            "vllm:num_preemptions": sum(load.preemptions for load in loads),
            "vllm:prompt_tokens": sum(load.prompt_tokens for load in loads),
            "vllm:generation_tokens": sum(load.output_tokens for load in loads),
            "vllm:prefix_cache_queries": sum(load.prompt_tokens for load in loads),
            "vllm:prefix_cache_hits": sum(load.cached_tokens for load in loads),
        }
        for name, value in gauges.items():
            gauge = GaugeMetricFamily(name, "As vLLM's", labels=["model_name"])
            gauge.add_metric([model], value)
            yield gauge
        for name, value in counters.items():
            counter = CounterMetricFamily(name, "As vLLM's", labels=["model_name"])
            counter.add_metric([model], value)
            yield counter


def _histogram(name: str, text: str, buckets: Sequence[float], more: Mapping[str, Any]) -> Histogram:
    return Histogram(name, text, buckets=buckets, **more)


def _vllm(name: str, buckets: Sequence[float], model: str, more: Mapping[str, Any]) -> Histogram:
    return Histogram(f"vllm:{name}", "As vLLM's", ["model_name"], buckets=buckets, **more).labels(model)
