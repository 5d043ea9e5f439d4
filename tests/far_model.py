"""`python -m tests.far_model`: a model, its pages and its sampler on a device of which the host can't read.

Its tokens must be those of torch's decoder on the CPU. Prints what a step moves, as one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from array import array
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

from kernels import checks, triton_attention, triton_fused, triton_sampling
from tests import far
from tests.cpu.test_gpu_model import admit, sampled, say
from tests.model_rig import Rig, prompts
from tests.models import make_model
from worker.gpu_model import GpuModel
from worker.runner import Runner
from worker.sampler import Sampler

LENGTHS = (1, 15, 40)


def main() -> int:
    modules = (triton_attention, triton_fused, triton_sampling)
    for module in modules:
        kernels = far.reached(module.kernels())
        module.kernels = lambda kernels=kernels: kernels  # type: ignore[attr-defined]
    Runner.carry_out = Runner._carry_out  # type: ignore[method-assign]  # wrappers know no inference mode
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name), seed=6)
        sequences = prompts(LENGTHS)
        kinds = ({}, {"temperature": 0.9, "top_p": 0.7, "repetition_penalty": 1.2, "logprobs": 2, "min_tokens": 1})
        expected = [say(Rig.make(folder), sequences, 3, **params) for params in kinds]
        with far.far() as counts:
            found = []
            for params in kinds:
                backend = triton_attention.Triton()
                backend.takes = checks.Takes(triton_attention.KINDS, int8=False, device="far")
                rig = Rig.make(folder, kind="gpu", device=far.DEVICE, backend=backend)
                found.append(say(rig, sequences, 3, **params))
            assert found == expected, (found, expected)
            model = rig.model
            assert isinstance(model, GpuModel)
            assert rig.cache.pool.stride(1) > rig.cache.pool.stride(0), "pages come first in memory"
            _score_and_copy(rig)
            runner = Runner(model, rig.cache, rig.tables, Sampler(331, 16, model.choose))
            last = [len(tokens) + 1 for tokens in sequences]
            plan = rig.plan([(slot, position, [5]) for slot, position in enumerate(last)])
            plan.admits = [admit(slot, tokens) for slot, tokens in enumerate(sequences)]
            before = dict(counts)
            assert runner.run(sampled(plan, [position + 1 for position in last])) is not None
            print(json.dumps({key: counts[key] - before[key] for key in counts}))
    return 0


def _score_and_copy(rig: Rig) -> None:
    """Scores of a prompt, and a page that is copied: they only have to run here."""
    assert isinstance(rig.model, GpuModel)
    runner = Runner(rig.model, rig.cache, rig.tables, Sampler(331, 16, rig.model.choose))
    tokens = prompts((20,))[0]
    plan = rig.plan([(7, 0, tokens)])
    plan.admits = [admit(7, tokens, prompt_logprobs=2)]
    plan.score_row, plan.score_slot = array("i", range(20)), array("i", [7] * 20)
    plan.score_token = array("i", tokens[1:21])
    plan.copy_from = plan.copy_to = array("i", [0])
    plan.copy_sources = [array("i", [int(rig.tables.tables[0, 0])])]
    plan.copy_targets = [array("i", [rig.free.pop()])]
    result = runner.run(plan)
    assert result is not None and len(result.scores) == 20
    pages = [rig.cache.pool[:, block[0][0]].cpu() for block in (plan.copy_sources, plan.copy_targets)]
    assert torch.equal(*(each.contiguous().view(torch.int32) for each in pages))


if __name__ == "__main__":
    sys.exit(main())
