"""llama.cpp through llama-cpp-python's bindings, with the loop of its server's slots: a step decodes one token of each
running request and fills the batch with prompt tokens. A prefix that all jobs have is computed once and copied."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from protocol import Job, Settings, serve

BATCH, MICRO_BATCH = 2048, 512
F16 = 1  # of keys and values, llama.cpp's default


@dataclass
class Slot:
    job: int
    sequence: int
    position: int
    token: int | None = None  # the next one, once the prompt is done


class LlamaCpp:
    def __init__(self, settings: Settings) -> None:
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(f"{settings.model}/model.gguf".encode(), params)
        if not self._model:
            raise SystemExit(f"{settings.model} does not load")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = settings.max_len * settings.max_seqs
        context.n_batch, context.n_ubatch, context.n_seq_max = BATCH, MICRO_BATCH, settings.max_seqs
        context.n_threads = context.n_threads_batch = settings.threads
        context.kv_unified = settings.prefix_cache
        context.type_k = context.type_v = F16
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise SystemExit("no memory for llama.cpp's context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._slots, self._shares = settings.max_seqs, settings.prefix_cache
        self._batch = batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        as_array = np.ctypeslib.as_array
        self._token, self._position = as_array(batch.token, (BATCH,)), as_array(batch.pos, (BATCH,))
        self._wanted = as_array(batch.logits, (BATCH,))
        as_array(batch.n_seq_id, (BATCH,))[:] = 1
        addresses = [ctypes.addressof(batch.seq_id[i].contents) for i in range(BATCH)]
        self._sequence = [ctypes.c_int32.from_address(address) for address in addresses]
        self.version = llama_cpp.__version__

    def run(self, jobs: list[Job]) -> list[list[float]]:
        llama_cpp.llama_memory_clear(self._memory, False)
        times: list[list[float]] = [[] for _ in jobs]
        waiting, free = list(range(len(jobs))), list(range(self._slots))
        running: list[Slot] = []
        shared = _shared([prompt for prompt, _ in jobs]) if self._shares and len(jobs) > 1 else 0
        source: int | None = None  # the sequence that has the prefix
        while waiting or running:
            while waiting and free and not (shared and source is None and running):
                slot = Slot(waiting.pop(0), free.pop(0), 0)
                if source is not None:
                    llama_cpp.llama_memory_seq_cp(self._memory, source, slot.sequence, 0, shared)
                    slot.position = shared
                running.append(slot)
            asked = self._fill(jobs, running)
            if llama_cpp.llama_decode(self._context, self._batch):
                raise RuntimeError("llama_decode failed")
            if shared and source is None and running[0].position >= shared:
                source = running[0].sequence
            for at, slot in asked:
                logits: Any = llama_cpp.llama_get_logits_ith(self._context, at)
                slot.token = int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())
            now = time.perf_counter()
            for _, slot in asked:
                times[slot.job].append(now)
                if len(times[slot.job]) == jobs[slot.job][1]:
                    running.remove(slot)
                    if slot.sequence != source:
                        llama_cpp.llama_memory_seq_rm(self._memory, slot.sequence, -1, -1)
                        free.append(slot.sequence)
        return times

    def _fill(self, jobs: list[Job], running: list[Slot]) -> list[tuple[int, Slot]]:
        """The next batch: decodes, then prompts; where in it logits are asked for."""
        count, asked = 0, []
        for slot in running:
            if slot.token is not None:
                self._token[count], self._position[count], self._wanted[count] = slot.token, slot.position, 1
                self._sequence[count].value = slot.sequence
                asked.append((count, slot))
                slot.position += 1
                count += 1
        for slot in running:
            prompt = jobs[slot.job][0]
            some = min(len(prompt) - slot.position, BATCH - count) if slot.token is None else 0
            if some <= 0:
                continue
            end = count + some
            self._token[count:end] = prompt[slot.position : slot.position + some]
            self._position[count:end] = np.arange(slot.position, slot.position + some)
            self._wanted[count:end] = 0
            for at in range(count, end):
                self._sequence[at].value = slot.sequence
            slot.position += some
            count = end
            if slot.position == len(prompt):
                self._wanted[end - 1] = 1
                asked.append((end - 1, slot))
        self._batch.n_tokens = count
        return asked


def _shared(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with, and none consists of."""
    count = 0
    while count < min(map(len, prompts)) - 1 and all(prompt[count] == prompts[0][count] for prompt in prompts):
        count += 1
    return count


serve(LlamaCpp)
