"""FlashInfer's attention on NVIDIA GPUs, where it is installed (arXiv 2501.01005); the rest is Triton's.

    plan  pages, mask --checked, on the host--> where rows, pages and the last page end --FlashInfer's plan--> a wrapper
    run   queries, pool[layer] --the wrapper, once for each layer--> out, lse in log2 --> float32, natural log

FlashInfer knows no positions. A row's keys are its pages one behind the other, cut off inside the last one, and its
queries are those of the last of these keys; a window counts back from each query:

    position   32               48               64
               |................|.....###########|####QQQ.........|    # = seen by the first query, Q = this step's
               not listed        listed           listed, last_page_len 7

So a row must list consecutive pages, from its first query's or earlier, to its last query's. Rows that cannot be said
so are refused, never approximated. Rows without pages are not FlashInfer's: it gives them a finite lse.

It reads whole tiles between a row's first listed page and its last query, and multiplies what the window hides by zero:
that memory must be finite. Behind the last query nothing is read. Its products round to the dtype of the queries.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from kernels import checks
from kernels.triton_attention import Triton

if TYPE_CHECKING:
    from kernels.ops import Mask, PageList

KINDS = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
TENSOR_CORE_GROUP = 4  # query heads of a kv head: fewer decode as fast without; kernels without exist for 1, 2, 3, 4, 8
WORKSPACE = 256 << 20  # bytes for partial results
# The prefill wrapper's own buffers (0.5.3). It looks at no bound: on Hopper longer lists are written behind their end.
MAX_ROWS = (1 << 15) - 1
MAX_KEYS = 1 << 24

Ints = npt.NDArray[np.int32]


class Rows(NamedTuple):
    """Rows as FlashInfer takes them: those that have both tokens and pages.

    Attributes:
        query_start: int32 [R+1]
        start: int32 [R+1], into the entries that are left.
        last_page_len: int32 [R], keys in the last page, from 1 to block_size.
        entries: bool [N], which entries are left; None is all.
        tokens: int64, which tokens are left; None is all.
    """

    query_start: Ints
    start: Ints
    last_page_len: Ints
    entries: npt.NDArray[np.bool_] | None
    tokens: npt.NDArray[np.int64] | None


@dataclass(slots=True)
class Wrapper:
    """One of FlashInfer's wrappers: the buffers of one plan at a time.

    Attributes:
        copied: when its last plan has left the pinned buffer, which the next one writes from the host.
    """

    made: Any
    copied: torch.cuda.Event | None = None


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class FlashInferPlan:
    """A step's rows as FlashInfer dealt them; the same for all layers whose pages and windows are the same.

    Attributes:
        made: FlashInfer's wrapper, planned; None where no row is its.
        tokens: int64 on the device, those of its rows; None is all.
        window: the mask's.
    """

    made: Any
    tokens: torch.Tensor | None
    window: int


class FlashInfer(Triton):
    """The backend of `kernels.ops` that attends with FlashInfer, in bfloat16 and float16; one stream at a time.

    Holds WORKSPACE bytes of a GPU from the first plan on, and 72 MiB for each prefill plan that is alive or remembered
    (8 MiB for decodes). FlashInfer builds a kernel when a dtype, head_dim or window is first planned: about 20 s, once.
    """

    name = "flashinfer"

    def __init__(self) -> None:
        """Raises: ImportError without Triton or FlashInfer."""
        super().__init__()
        import flashinfer  # type: ignore[import-not-found, unused-ignore]

        self._flashinfer: Any = flashinfer
        self.takes = checks.Takes(KINDS, int8=False, device="cuda")
        self._workspaces: dict[torch.device, torch.Tensor] = {}
        self._idle: dict[tuple[object, ...], list[Wrapper]] = {}

    def _plan(
        self, q_heads: int, pool: torch.Tensor, query_start: torch.Tensor, pages: "PageList", mask: "Mask"
    ) -> Any:
        """A FlashInferPlan; what `Triton.plan` remembers."""
        kv_heads, size, dim = pool.shape[3:]
        if pool.dtype not in KINDS:
            _refuse("pools", str(pool.dtype), f"be {self.takes.pools}")
        if dim not in HEAD_DIMS:
            _refuse("pools", f"head_dim {dim}", "have one of 64, 128 or 256")
        if pages.pool is not None and bool(pages.pool.any()):
            _refuse("pages.pool", "pages of several pools", "list pages of the first")
        if mask.window and mask.sinks:
            _refuse("mask.sinks", str(mask.sinks), "be 0")
        starts, entries, positions, first = (
            x.cpu().numpy() for x in (query_start, pages.start, pages.position, mask.first_position)
        )
        rows = translate(starts, entries, positions, first, size)
        if not len(rows.last_page_len):
            return FlashInferPlan(None, None, mask.window)
        is_decode = bool((np.diff(rows.query_start) == 1).all())
        if not is_decode:
            _check_buffers(rows, size)
        block = pages.block if rows.entries is None else pages.block.cpu()[torch.from_numpy(rows.entries)]
        device = pool.device
        lists = [_staged(each, device) for each in (rows.query_start, rows.start, block, rows.last_page_len)]
        shape = (q_heads, kv_heads, dim, size)
        common = {
            "sm_scale": 1.0,  # `run` knows the scale
            "window_left": mask.window - 1 if mask.window else -1,
            "q_data_type": pool.dtype,
            "kv_data_type": pool.dtype,
        }
        key = (device, is_decode, is_decode and q_heads // kv_heads >= TENSOR_CORE_GROUP)
        idle = self._idle.setdefault(key, [])
        wrapper = idle.pop(0) if idle else Wrapper(self._wrapper(*key))
        if wrapper.copied is not None:
            wrapper.copied.synchronize()
        if is_decode:
            wrapper.made.plan(*lists[1:], *shape, **common)
        else:
            wrapper.made.plan(*lists, *shape, causal=True, **common)
        if device.type == "cuda":
            wrapper.copied = torch.cuda.Event()
            wrapper.copied.record(torch.cuda.current_stream(device))
        tokens = None if rows.tokens is None else _staged(rows.tokens, device).to(device, non_blocking=True)
        plan = FlashInferPlan(wrapper.made, tokens, mask.window)
        # A plan may outlive its place in Triton's memory: only when nobody holds it is its wrapper planned again.
        weakref.finalize(plan, idle.append, wrapper).atexit = False
        return plan

    def _wrapper(self, device: torch.device, is_decode: bool, tensor_cores: bool) -> Any:
        if device not in self._workspaces:
            self._workspaces[device] = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        workspace = self._workspaces[device]
        if is_decode:
            return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
        return self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")

    def run(
        self,
        plan: Any,
        q_THD: torch.Tensor,
        pools: Sequence[torch.Tensor],
        layer: int,
        mask: "Mask",
        scale: float,
        v_scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Triton.run`; `out` is float32 of what was rounded to the dtype of the queries."""
        assert mask.window == plan.window, "planned for another window"
        if plan.made is None:
            return _nothing(q_THD)
        q = q_THD if plan.tokens is None else q_THD[plan.tokens]
        # Their k_scale is a factor of the scores, as our scale is. Pages may have any stride of blocks.
        found, log2_lse = plan.made.run(q, pools[0][layer], k_scale=scale, return_lse=True)
        out, lse = found.to(torch.float32), log2_lse * math.log(2)
        if v_scale != 1:
            out *= v_scale
        if plan.tokens is None:
            return out, lse
        whole, whole_lse = _nothing(q_THD)
        return whole.index_copy_(0, plan.tokens, out), whole_lse.index_copy_(0, plan.tokens, lse)


def translate(starts: Ints, entries: Ints, positions: Ints, first: Ints, size: int) -> Rows:
    """Rows of `attend` as FlashInfer's.

    Args:
        starts, entries, positions, first: `query_start`, `PageList.start`, `PageList.position` and
            `Mask.first_position`.
        size: tokens of a page.

    Raises:
        ValueError: pages that are not consecutive, or not those from a row's first query or earlier to its last one.
    """
    lengths, counts = np.diff(starts), np.diff(entries)
    kept = (lengths > 0) & (counts > 0)
    left, tokens = None, None
    row = np.flatnonzero(kept)
    if len(row) < len(kept):
        left = np.repeat(kept, counts)
        positions = positions[left]
        if bool(lengths[~kept].any()):
            tokens = np.flatnonzero(np.repeat(kept, lengths))
    starts, entries = _offsets(lengths[kept]), _offsets(counts[kept])
    first = first[kept]
    last = first + lengths[kept] - 1
    jumps = np.diff(positions) != size
    jumps[entries[1:-1] - 1] = False  # from row to row
    if jumps.any():
        at = int(jumps.argmax())
        own = row[np.searchsorted(entries, at, side="right") - 1]
        _refuse(f"pages.position of row {own}", f"{positions[at + 1]} behind {positions[at]}", f"be {size} further on")
    opening, closing = positions[entries[:-1]], positions[entries[1:] - 1]
    keys = last - closing + 1
    late, wrong = opening > first, (keys < 1) | (keys > size)
    if late.any():
        at = int(late.argmax())
        _refuse(f"pages.position of row {row[at]}", f"{opening[at]} first", f"be at most {first[at]} (its first query)")
    if wrong.any():
        at = int(wrong.argmax())
        _refuse(
            f"pages.position of row {row[at]}", f"{closing[at]} last", f"be the page of {last[at]} (its last query)"
        )
    return Rows(starts, entries, keys.astype(np.int32), left, tokens)


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _check_buffers(rows: Rows, size: int) -> None:
    num_rows = len(rows.last_page_len)
    if num_rows > MAX_ROWS:
        _refuse("query_start", f"{num_rows} rows", f"be at most {MAX_ROWS} in a step with prefills")
    num_keys = (int(rows.start[-1]) - num_rows) * size + int(rows.last_page_len.sum())
    if num_keys > MAX_KEYS:
        _refuse("pages.start", f"{num_keys} keys of all rows", f"be at most {MAX_KEYS} in a step with prefills")


def _staged(values: npt.NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the host, where FlashInfer plans, and pinned, so that its copies to a GPU do not wait for it."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" and tensor.is_cpu else tensor


def _nothing(q_THD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of queries that see no key."""
    lse = torch.full(q_THD.shape[:2], -math.inf, dtype=torch.float32, device=q_THD.device)
    return torch.zeros(q_THD.shape, dtype=torch.float32, device=q_THD.device), lse


def _refuse(name: str, got: str, limit: str) -> NoReturn:
    raise ValueError(f"{name}: got {got}, must {limit} for FlashInfer; choose QUIRE_KERNELS=triton")
