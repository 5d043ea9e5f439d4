"""vLLM on the CPU, its engine stepped in this process, compiled as by default, with its own token budget."""

from __future__ import annotations

import os
import time

from protocol import Job, Settings, serve


class VLLM:
    def __init__(self, settings: Settings) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": "0" if settings.threads == 1 else f"0-{settings.threads - 1}",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(settings.threads),
        }
        import vllm
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.version = vllm.__version__
        self._params = lambda count: SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine = LLM(
            model=settings.model,
            skip_tokenizer_init=True,
            dtype=settings.dtype,
            max_model_len=settings.max_len,
            max_num_seqs=settings.max_seqs,
            enable_prefix_caching=settings.prefix_cache,
            disable_log_stats=True,
        ).llm_engine
        self._served = 0

    def run(self, jobs: list[Job]) -> list[list[float]]:
        index: dict[str, int] = {}
        times: list[list[float]] = [[] for _ in jobs]
        for at, (prompt, count) in enumerate(jobs):
            name = f"r{self._served}"
            self._served += 1
            self._engine.add_request(name, {"prompt_token_ids": prompt}, self._params(count))
            index[name] = at
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                name = output.request_id if output.request_id in index else output.request_id.split("-")[0]
                times[index[name]].extend([now] * len(output.outputs[0].token_ids))
        return times


if __name__ == "__main__":  # vLLM may start children that import this file
    serve(VLLM)
