"""OpenVINO GenAI's ContinuousBatchingPipeline: bfloat16 or float32 throughout, split prompts, steps of 512 tokens (its
default is 256, and slower)."""

from __future__ import annotations

import time

import numpy as np
import openvino
import openvino_genai as genai
from protocol import Job, Settings, serve


class OpenVINO:
    def __init__(self, settings: Settings) -> None:
        scheduling = genai.SchedulerConfig()
        scheduling.cache_size = 4
        scheduling.max_num_seqs = settings.max_seqs
        scheduling.dynamic_split_fuse = True
        scheduling.max_num_batched_tokens = 512
        scheduling.enable_prefix_caching = settings.prefix_cache
        kind = {"bfloat16": "bf16", "float32": "f32"}[settings.dtype]
        properties = {
            "INFERENCE_PRECISION_HINT": kind,
            "KV_CACHE_PRECISION": kind,
            "INFERENCE_NUM_THREADS": settings.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._pipe = genai.ContinuousBatchingPipeline(
            settings.model, scheduler_config=scheduling, device="CPU", properties=properties
        )
        self._served = 0
        self.version = genai.__version__

    def run(self, jobs: list[Job]) -> list[list[float]]:
        handles, times = [], [[] for _ in jobs]
        for prompt, count in jobs:
            config = genai.GenerationConfig()
            config.max_new_tokens = count
            config.ignore_eos = True
            config.do_sample = False
            tokens = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipe.add_request(self._served, tokens, config))
            self._served += 1
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
            now = time.perf_counter()
            for handle, stamps in zip(handles, times, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        stamps.extend([now] * len(output.generated_ids))
        return times


serve(OpenVINO)
