"""What Prometheus gets: the names, the shapes, the figures, and who may ask."""

from __future__ import annotations

import asyncio
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import ClusterFigures, Meter
from launch.models.tiny_llama import make_tiny_llama
from pagetable.frames import Kind
from quire_pb.cluster.v1 import cluster_pb2
from quire_pb.memory.v1 import memory_pb2
from quire_pb.worker.v1 import worker_pb2 as pb
from tests.front_lab import FakeShard, hear, lab, refusal, until

SEVEN = (
    *("quire_num_free_blocks", "quire_alloc_rate", "quire_reuse_rate", "quire_fragmentation", "quire_refcount_hist"),
    *("quire_gpu_mem_used", "quire_kv_gather_latency"),
)
VLLM = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:num_preemptions"),
    *("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits"),
    *("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    *("vllm:e2e_request_latency_seconds",),
)


def load(shard: int, device: int | None = None, **fields: Any) -> cluster_pb2.Load:
    """Of a shard with one pool, whose device has the shard's number where no other is given."""
    blocks = {name: fields.get(name, 0) for name in ("free_blocks", "cached_blocks", "used_blocks")}
    pool = cluster_pb2.Pool(device_id=shard if device is None else device, num_blocks=sum(blocks.values()), **blocks)
    return cluster_pb2.Load(shard_id=shard, epoch=1, pools=[pool], **fields)


def info(shard: int, device: int) -> pb.ShardInfo:
    return pb.ShardInfo(shard_id=shard, epoch=1, device_ids=[device], block_size=16, block_bytes=[1000])


def values(text: str) -> dict[str, float]:
    """By name and labels, as they stand."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def lint(text: str) -> list[str]:
    """What `promtool check metrics` refuses, as far as our names could do it."""
    faults = []
    helped = set(re.findall(r"^# HELP (\S+)", text, re.MULTILINE))
    for family in text_string_to_metric_families(text):
        name = family.name
        full = f"{name}_total" if family.type == "counter" else name
        if full not in helped and name not in helped:
            faults.append(f"{name}: no help")
        if family.type != "counter" and name.endswith(("_total", "_count", "_sum", "_bucket")):
            faults.append(f"{name}: a counter's ending")
        if re.search(r"_(ms|us|ns|milliseconds|kb|mb|kilobytes|min|minutes|hours|percent)(_|$)", name):
            faults.append(f"{name}: no base unit")
        if ":" in name or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            faults.append(f"{name}: not snake case")
        if family.type in ("unknown", "untyped"):
            faults.append(f"{name}: no type")
    return faults


def figures(model: str | None = None) -> tuple[CollectorRegistry, ClusterFigures]:
    registry = CollectorRegistry()
    return registry, ClusterFigures(registry, model)


def shown(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def test_the_seeds_seven_have_names_and_device_labels() -> None:
    registry, found = figures()
    infos = [info(0, 4), info(1, 5)]
    blocks = {"free_blocks": 7, "cached_blocks": 2, "used_blocks": 1}
    first = [load(0, 4, **blocks, allocations=10, prompt_tokens=8, cached_tokens=2)]
    found.take_loads(infos, [*first, load(1, 5, free_blocks=10)], now=100.0)
    second = load(0, 4, free_blocks=6, cached_blocks=1, used_blocks=3, allocations=40, prompt_tokens=8, cached_tokens=2)
    second.last_step_seconds = 0.25
    found.take_loads(infos, [second, load(1, 5, free_blocks=10)], now=110.0)
    found.take_slots({0: (36, 48)})
    pages = memory_pb2.GetPageMapResponse()
    for blocks in ((1, 2, 3), (1, 2), (1,)):
        sequence = pages.sequences.add()
        for block in blocks:
            sequence.pages.add(device_id=4, block_id=block)
    for block, users in ((1, 3), (2, 2)):
        shared = pages.shared_pages.add(users=users)
        shared.page.device_id, shared.page.block_id = 4, block
    found.take_page_map(pages)
    got = values(shown(registry))
    assert got["quire_num_free_blocks{device=4}"] == 6 and got["quire_num_free_blocks{device=5}"] == 10
    assert got["quire_alloc_rate{device=4}"] == 3.0
    assert got["quire_block_allocations_total{device=4}"] == 40
    assert got["quire_reuse_rate{device=4}"] == 0.25
    assert got["quire_fragmentation{device=4}"] == 0.25
    assert got["quire_gpu_mem_used{device=4}"] == 4000
    assert got["quire_kv_gather_latency{device=4}"] == 0.25
    buckets = [got[f"quire_refcount_hist_bucket{{device=4,le={bound}}}"] for bound in ("1.0", "2.0", "4.0", "+Inf")]
    assert buckets == [1, 2, 3, 3]
    assert (got["quire_refcount_hist_count{device=4}"], got["quire_refcount_hist_sum{device=4}"]) == (3, 6)


def test_shards_have_queues_steps_and_counters() -> None:
    registry, found = figures()
    told = load(2, running=3, waiting=4, steps=10, busy_seconds=0.5, preemptions=6, prompt_tokens=70, output_tokens=80)
    told.schedule_seconds, told.run_seconds, told.retire_seconds = 0.125, 0.25, 0.0625
    found.take_loads([info(2, 2)], [told], now=1.0)
    got = values(shown(registry))
    assert got["quire_sequences_running{shard=2}"] == 3 and got["quire_sequences_waiting{shard=2}"] == 4
    assert (got["quire_step_seconds_count{shard=2}"], got["quire_step_seconds_sum{shard=2}"]) == (10, 0.5)
    parts = [got[f"quire_step_part_seconds_total{{part={part},shard=2}}"] for part in ("schedule", "run", "retire")]
    assert parts == [0.125, 0.25, 0.0625]
    assert got["quire_refcount_hist_count{device=2}"] == 0
    assert got["quire_preemptions_total{shard=2}"] == 6
    assert got["quire_prompt_tokens_total{shard=2}"] == 70 and got["quire_output_tokens_total{shard=2}"] == 80
    assert got["quire_prefix_hit_tokens_total{shard=2}"] == 0
    assert got["quire_scheduler_up"] == 1
    found.lose_scheduler()
    assert values(shown(registry))["quire_scheduler_up"] == 0


def test_a_shards_next_life_has_no_rate_yet_and_a_lost_shard_is_gone() -> None:
    registry, found = figures()
    found.take_loads([info(0, 0)], [load(0, allocations=100)], now=1.0)
    reborn = load(0, allocations=3)
    reborn.epoch = 2
    found.take_loads([info(0, 0)], [reborn], now=2.0)
    assert values(shown(registry))["quire_alloc_rate{device=0}"] == 0
    found.take_loads([info(0, 0)], [], now=3.0)
    assert "quire_num_free_blocks{device=0}" not in values(shown(registry))


def test_a_block_of_unknown_size_has_no_bytes() -> None:
    registry, found = figures()
    found.take_loads([pb.ShardInfo(shard_id=0, device_ids=[0])], [load(0, used_blocks=1)], now=1.0)
    assert "quire_gpu_mem_used{device=0}" not in values(shown(registry))


def test_the_names_pass_the_linter() -> None:
    registry, found = figures()
    Meter(registry, "m").ended("ok", 1.0)
    found.take_loads([info(0, 0)], [load(0, used_blocks=1)], now=1.0)
    found.take_page_map(memory_pb2.GetPageMapResponse())
    text = shown(registry)
    assert lint(text) == []
    assert {name for name in SEVEN if f"# TYPE {name} " not in text} == set()
    assert lint("# TYPE a_ms gauge\na_ms 1\n") == ["a_ms: no help", "a_ms: no base unit"]


def test_vllms_names_come_when_asked_for() -> None:
    registry, found = figures("m")
    meter = Meter(registry, "m", vllm=True)
    meter.first_token(0.5)
    meter.next_token(0.1)
    loads = [load(0, free_blocks=1, used_blocks=3, running=2, output_tokens=5), load(1, free_blocks=4, running=1)]
    found.take_loads([], loads, now=1.0)
    text = shown(registry)
    got = values(text)
    assert {name for name in VLLM if f"# TYPE {name}" not in text} == set()
    assert got["vllm:num_requests_running{model_name=m}"] == 3
    assert got["vllm:kv_cache_usage_perc{model_name=m}"] == 3 / 8
    assert got["vllm:generation_tokens_total{model_name=m}"] == 5
    assert got["vllm:time_to_first_token_seconds_count{model_name=m}"] == 1
    assert got["vllm:time_per_output_token_seconds_sum{model_name=m}"] == 0.1
    assert got["quire_time_to_first_token_seconds_sum"] == 0.5
    registry, _ = figures()
    Meter(registry, "m")
    assert "vllm" not in shown(registry)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("metrics") / "fake"
    make_tiny_llama(path)
    return path


def get(port: int, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_front_answers_scrapes_on_a_port_of_its_own(folder: Path) -> None:
    async def body() -> None:
        shard = FakeShard(0)
        async with lab(folder, [shard], metrics_compat="vllm") as it:
            loads = cluster_pb2.GetLoadsResponse(loads=[load(0, free_blocks=9)])
            page_map = memory_pb2.GetPageMapResponse()
            page_map.sequences.add().pages.add(device_id=0, block_id=3)
            it.scheduler.answers = {"loads": loads.SerializeToString(), "page_map": page_map.SerializeToString()}
            await until(lambda: it.server._figures._loads)
            call = it.generate(list(range(3, 12)), max_tokens=4)
            await until(lambda: shard.runs)
            shard.step(3)
            stream = next(iter(it.server.front._streams.values()))
            await until(lambda: len(stream.samples[0].outputs) == 3)
            got = values((await asyncio.to_thread(get, it.metrics_port))[1])
            assert got["quire_num_free_blocks{device=0}"] == 9
            assert got["quire_fragmentation{device=0}"] == 0.25  # 12 tokens in a page of 16
            assert got["quire_refcount_hist_count{device=0}"] == 1
            assert got["quire_requests_in_flight"] == 1
            assert it.scheduler.queries[-1].owner == ""
            shard.step()
            await hear(call)
            assert (await refusal(it.generate([-1]))).code == "INVALID_ARGUMENT"
            for name in ("a", "b"):
                assert (await refusal(it.generate([3], model=name))).code == "NOT_FOUND"
            got = values((await asyncio.to_thread(get, it.metrics_port))[1])
            outcomes = {key: value for key, value in got.items() if key.startswith("quire_requests_total")}
            assert outcomes == {
                "quire_requests_total{outcome=ok}": 1,
                "quire_requests_total{outcome=invalid_argument}": 1,
                "quire_requests_total{outcome=not_found}": 2,
            }
            assert got["quire_time_to_first_token_seconds_count"] == 1
            assert got["quire_inter_token_latency_seconds_count"] == 3
            assert got["vllm:inter_token_latency_seconds_count{model_name=fake}"] == 3
            assert shard.of(Kind.CANCEL) == []

    asyncio.run(body())


def test_a_scrape_reads_and_nothing_else(folder: Path) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
                status, _ = await asyncio.to_thread(get, it.metrics_port, method=method)
                assert status == 405
            for path in ("/", "/metrics/", "/metrics/../x", "/admin", "/favicon.ico"):
                status, text = await asyncio.to_thread(get, it.metrics_port, path)
                assert (status, text) == (404, "Not Found: GET /metrics is all there is\n")

    asyncio.run(body())


def test_a_scrape_needs_no_scheduler(folder: Path) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            await it.scheduler.stop()
            status, text = await asyncio.to_thread(get, it.metrics_port)
            assert status == 200 and "quire_requests_in_flight 0.0" in text

    asyncio.run(body())
