"""Small fused kernels on NVIDIA GPUs, in Triton: RMSNorm with residual, SiLU-and-multiply, rotation and writing of keys
and values. Arithmetic is float32 with one rounding at the end.

Sharp edges: Triton's interpreter truncates float32 to bfloat16, so there it is rounded by hand (BY_HAND). It also runs
a kernel without its closure, so helpers are globals of this module.

Shapes in names: T tokens, H query heads, K kv heads, D head_dim, C columns.
"""

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kernels.triton_build import Variant

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
MAX_COLUMNS = 1 << 15  # of a row of rms_norm: it stays in registers
MAX_HEAD_DIM = 512
SILU_BLOCK = 1024
HEADS = 8  # of one token in a program that rotates

triton: Any = None
tl: Any = None
rounded: Any = None
as_fp8: Any = None
turned: Any = None


@functools.cache
def kernels() -> SimpleNamespace:
    """The kernels. Triton is imported here, where they are wanted; they look its names up in the module."""
    global triton, tl, rounded, as_fp8, turned
    import triton
    import triton.language as tl

    @triton.jit
    def rounded(x, KIND: tl.constexpr, BY_HAND: tl.constexpr):
        # float32 to KIND, to the nearest, ties to even
        if BY_HAND and tl.bfloat16 == KIND:
            bits = x.to(tl.int32, bitcast=True)
            up = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
            kept = tl.where(x == x, up, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            kept = x.to(KIND)
        return kept

    @triton.jit
    def as_fp8(x):
        # float32 to the bits of float8_e4m3fn, to the nearest, ties to even, held to +-448. By hand, because sm_80 and
        # the interpreter have no such type.
        size = tl.where(tl.abs(x) > 448.0, 448.0, tl.abs(x))
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6 steps are 2^-9, the last bit of a number between 2^14 and 2^15
        small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0.015625, small, normal)
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return tl.where(x == x, code | sign, 0x7F).to(tl.uint8)

    @triton.jit
    def rms_norm(
        x_ptr,
        weight_ptr,
        residual_ptr,
        out_ptr,
        x_stride,
        residual_stride,
        columns,
        eps,
        ADD: tl.constexpr,
        PAD: tl.constexpr,
        BY_HAND: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, PAD)
        inside = at < columns
        x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            stream = residual_ptr + row * residual_stride + at
            x += tl.load(stream, mask=inside, other=0.0).to(tl.float32)
            kept = rounded(x, residual_ptr.dtype.element_ty, BY_HAND)
            tl.store(stream, kept, mask=inside)
            x = kept.to(tl.float32)  # what the next layer will read
        factor = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / columns + eps)
        y = x * factor * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * columns + at, rounded(y, out_ptr.dtype.element_ty, BY_HAND), mask=inside)

    @triton.jit
    def silu_mul(
        gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, columns, BLOCK: tl.constexpr, BY_HAND: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < columns
        gate = tl.load(gate_ptr + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out_ptr + row * columns + at, rounded(y, out_ptr.dtype.element_ty, BY_HAND), mask=inside)

    @triton.jit
    def turned(x_ptr, weight_ptr, cos, sin, inside, at, eps, DIM: tl.constexpr, NORMED: tl.constexpr):
        # Heads of one token, [heads, D/2] twice: x / rms(x) * weight if NORMED, then the pairs (i, i + D/2) rotated.
        half: tl.constexpr = DIM // 2
        a = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + half, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            factor = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / DIM + eps)
            a = a * factor[:, None] * tl.load(weight_ptr + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
            b = b * factor[:, None] * tl.load(weight_ptr + half + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
        return a * cos - b * sin, b * cos + a * sin

    @triton.jit
    def write_kv(
        q_ptr,
        k_ptr,
        v_ptr,
        cos_ptr,
        sin_ptr,
        q_weight_ptr,
        k_weight_ptr,
        out_ptr,
        pool_ptr,
        slots_ptr,
        q_stride,
        k_stride,
        v_stride,
        block_stride,
        num_slots,
        eps,
        k_scale,
        v_scale,
        Q_HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        DIM: tl.constexpr,
        SIZE: tl.constexpr,
        HEADS: tl.constexpr,
        HALF_PAD: tl.constexpr,
        NORM_Q: tl.constexpr,
        NORM_K: tl.constexpr,
        NARROW: tl.constexpr,
        BY_HAND: tl.constexpr,
    ):
        # programs (token, part); parts are HEADS of q, then of k, then of v. NARROW: the pool is fp8.
        half: tl.constexpr = DIM // 2
        q_parts: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
        k_parts: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
        token = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)
        at = tl.arange(0, HALF_PAD)
        if part < q_parts:
            head = part * HEADS + tl.arange(0, HEADS)
            inside = (head < Q_HEADS)[:, None] & (at < half)[None, :]
            cos = tl.load(cos_ptr + token * half + at, mask=at < half, other=0.0)[None, :]
            sin = tl.load(sin_ptr + token * half + at, mask=at < half, other=0.0)[None, :]
            where = head[:, None] * DIM + at[None, :]
            first, second = turned(
                q_ptr + token * q_stride + where, q_weight_ptr, cos, sin, inside, at, eps, DIM, NORM_Q
            )
            target = out_ptr + token * (Q_HEADS * DIM) + where
            tl.store(target, rounded(first, out_ptr.dtype.element_ty, BY_HAND), mask=inside)
            tl.store(target + half, rounded(second, out_ptr.dtype.element_ty, BY_HAND), mask=inside)
        else:
            slot = tl.load(slots_ptr + token)
            if (slot >= 0) & (slot < num_slots):
                is_key = part < q_parts + k_parts
                head = (part - q_parts) % k_parts * HEADS + tl.arange(0, HEADS)
                inside = (head < KV_HEADS)[:, None] & (at < half)[None, :]
                where = head[:, None] * DIM + at[None, :]
                target = pool_ptr + (slot // SIZE) * block_stride + (slot % SIZE) * DIM
                target = target + (head * (SIZE * DIM))[:, None] + at[None, :]
                if is_key:
                    cos = tl.load(cos_ptr + token * half + at, mask=at < half, other=0.0)[None, :]
                    sin = tl.load(sin_ptr + token * half + at, mask=at < half, other=0.0)[None, :]
                    first, second = turned(
                        k_ptr + token * k_stride + where, k_weight_ptr, cos, sin, inside, at, eps, DIM, NORM_K
                    )
                    if NARROW:
                        tl.store(target, as_fp8(tl.div_rn(first, k_scale)), mask=inside)
                        tl.store(target + half, as_fp8(tl.div_rn(second, k_scale)), mask=inside)
                    else:
                        tl.store(target, rounded(first, pool_ptr.dtype.element_ty, BY_HAND), mask=inside)
                        tl.store(target + half, rounded(second, pool_ptr.dtype.element_ty, BY_HAND), mask=inside)
                else:
                    target += KV_HEADS * SIZE * DIM
                    low = tl.load(v_ptr + token * v_stride + where, mask=inside, other=0.0)
                    high = tl.load(v_ptr + token * v_stride + where + half, mask=inside, other=0.0)
                    if NARROW:
                        tl.store(target, as_fp8(tl.div_rn(low.to(tl.float32), v_scale)), mask=inside)
                        tl.store(target + half, as_fp8(tl.div_rn(high.to(tl.float32), v_scale)), mask=inside)
                    else:
                        tl.store(target, low, mask=inside)
                        tl.store(target + half, high, mask=inside)

    return SimpleNamespace(
        rms_norm=rms_norm,
        silu_mul=silu_mul,
        write_kv=write_kv,
    )


@functools.cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU: for tests."""
    kernels()
    return bool(triton.knobs.runtime.interpret)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension; with `residual`, of residual + x.

    Args:
        x: [T, C], float32, bfloat16 or float16; the stride of rows is free. C is 1 to MAX_COLUMNS.
        weight: [C], any of these types.
        eps: added to the mean square.
        residual: [T, C], any of these types, the stride of rows is free; changed: residual += x, rounded to its type.
            The norm is of what was stored.

    Returns:
        [T, C] in x's dtype. Arithmetic is float32, rounded once.

    Raises:
        ValueError: a dtype, shape or stride that may not be.
    """
    check_rows(x, "x", None)
    columns = x.shape[1]
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"x: got {columns} columns, must be 1 to {MAX_COLUMNS}")
    check_vector(weight, "weight", columns, FLOATS, x.device)
    if residual is not None:
        check_rows(residual, "residual", x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        pad = padded(columns)
        stream = x if residual is None else residual
        kernels().rms_norm[(len(x),)](
            x,
            weight,
            stream,
            out,
            x.stride(0),
            stream.stride(0),
            columns,
            eps,
            ADD=residual is not None,
            PAD=pad,
            BY_HAND=is_interpreted(),
            num_warps=_warps(pad),
        )
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [gate, up] side by side.

    Args:
        gate_up: [T, 2 * C], float32, bfloat16 or float16; the stride of rows is free.

    Returns:
        [T, C] in the same dtype. Arithmetic is float32, rounded once.

    Raises:
        ValueError: a dtype, shape or stride that may not be.
    """
    check_rows(gate_up, "gate_up", None)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: got {gate_up.shape[1]} columns, must be a multiple of 2")
    gate, up = gate_up.chunk(2, dim=1)
    return silu_mul_pair(gate, up)


def silu_mul_pair(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both [T, C] of one dtype: as `silu_mul`."""
    check_rows(gate, "gate", None)
    check_rows(up, "up", gate)
    if up.dtype != gate.dtype:
        raise ValueError(f"up: got {up.dtype}, must be gate's {gate.dtype}")
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        columns = gate.shape[1]
        block = min(SILU_BLOCK, padded(columns))
        kernels().silu_mul[(len(gate), -(-columns // block))](
            gate,
            up,
            out,
            gate.stride(0),
            up.stride(0),
            columns,
            BLOCK=block,
            BY_HAND=is_interpreted(),
            num_warps=_warps(block),
        )
    return out


def write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Norm and rotate the queries and keys of some tokens, and write keys and values into their slots.

    Per head: x / rms(x) * weight where there is a weight, then the pairs (i, i + D/2) rotated, in float32 with one
    rounding at the end. Nothing waits for the device, so slots are not checked here: one beyond the pool is skipped.

    Args:
        q: [T, H, D]; k, v: [T, K, D]; one dtype of float32, bfloat16 and float16; heads and dims contiguous, the
            stride of tokens is free (slices of one matrix). D is even, 2 to MAX_HEAD_DIM.
        cos, sin: float32 [T, D/2], contiguous.
        pool: [layers, blocks, 2, K, block_size, D], inner four dimensions contiguous, of q's dtype or float8_e4m3fn;
            changed in one layer.
        slots: int64 [T], block * block_size + offset; negative is skipped. Equal slots are a mistake of the caller.
        q_weight, k_weight: [D] of float32, bfloat16 or float16, or None for no norm.
        eps: of the norms.
        k_scale, v_scale: stored is value / scale, held to +-448, in a float8 pool; 1 in any other.

    Returns:
        The rotated queries, [T, H, D] in q's dtype; of skipped tokens too.

    Raises:
        ValueError: a dtype, shape, stride, layer or scale that may not be; nothing was written.
    """
    num_tokens, q_heads, dim = _heads(q, "q", None, None)
    _, blocks, _, kv_heads, size, _ = _pool(pool, dim, q.dtype, q.device)
    _heads(k, "k", q, kv_heads)
    _heads(v, "v", q, kv_heads)
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.dtype != torch.float32 or angles.shape != (num_tokens, dim // 2) or not angles.is_contiguous():
            raise ValueError(
                f"{name}: got {angles.dtype} {tuple(angles.shape)}, must be contiguous float32 {(num_tokens, dim // 2)}"
            )
        _device(angles, name, q.device)
    if not 0 <= layer < pool.shape[0]:
        raise ValueError(f"layer: got {layer}, must be from 0 to {pool.shape[0] - 1}")
    check_vector(slots, "slots", num_tokens, (torch.int64,), q.device)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_vector(weight, name, dim, FLOATS, q.device)
    narrow = pool.dtype == FP8
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not 0 < scale < float("inf") or (scale != 1.0 and not narrow):
            raise ValueError(f"{name}: got {scale}, must be positive and finite, and 1 unless the pool is {FP8}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens:
        target = pool[layer]
        heads = min(HEADS, padded(max(q_heads, kv_heads)))
        parts = -(-q_heads // heads) + 2 * -(-kv_heads // heads)
        kernels().write_kv[(num_tokens, parts)](
            q,
            k,
            v,
            cos,
            sin,
            q if q_weight is None else q_weight,
            k if k_weight is None else k_weight,
            out,
            target.view(torch.uint8) if narrow else target,
            slots,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            pool.stride(1),
            blocks * size,
            eps,
            k_scale,
            v_scale,
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            SIZE=size,
            HEADS=heads,
            HALF_PAD=padded(dim // 2),
            NORM_Q=q_weight is not None,
            NORM_K=k_weight is not None,
            NARROW=narrow,
            BY_HAND=is_interpreted(),
            num_warps=4 if heads * dim >= 512 else 1,
        )
    return out


def padded(width: int) -> int:
    """The power of two that a block's dimension needs."""
    return 1 << (width - 1).bit_length()


def _warps(block: int) -> int:
    """Of a program over one row of `block` elements: up to 16 elements a thread, then more."""
    return min(max(block // 512, 1), 16)


def _device(tensor: torch.Tensor, name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, must be on {device} with the others")


def check_rows(tensor: torch.Tensor, name: str, like: torch.Tensor | None) -> None:
    """[T, C] with contiguous columns; of the shape and device of `like`."""
    if tensor.dtype not in FLOATS or tensor.dim() != 2:
        raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be [T, C] of {_names(FLOATS)}")
    if like is not None:
        if tensor.shape != like.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, must be {tuple(like.shape)}")
        _device(tensor, name, like.device)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, must have contiguous columns")


def check_vector(
    tensor: torch.Tensor, name: str, length: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tensor.dtype not in dtypes or tensor.shape != (length,):
        raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be [{length}] of {_names(dtypes)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()}, must be contiguous")
    _device(tensor, name, device)


def _heads(tensor: torch.Tensor, name: str, q: torch.Tensor | None, heads: int | None) -> tuple[int, int, int]:
    """[T, heads, D] with contiguous heads and dims; as many tokens, of the same D and dtype, as `q`."""
    if tensor.dtype not in FLOATS or tensor.dim() != 3 or 0 in tensor.shape[1:]:
        raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be [T, heads, D] of {_names(FLOATS)}")
    num_tokens, own_heads, dim = tensor.shape
    if dim % 2 or dim > MAX_HEAD_DIM:
        raise ValueError(f"{name}: got head_dim {dim}, must be even and at most {MAX_HEAD_DIM}")
    if q is not None:
        if tensor.dtype != q.dtype or tensor.shape != (len(q), heads, q.shape[2]):
            raise ValueError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be {q.dtype} {(len(q), heads, q.shape[2])}"
            )
        _device(tensor, name, q.device)
    if tensor.stride(2) != 1 or (own_heads > 1 and tensor.stride(1) != dim):
        raise ValueError(f"{name}: got strides {tensor.stride()}, must have contiguous heads and dims")
    return num_tokens, own_heads, dim


def _pool(pool: torch.Tensor, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Size:
    if pool.dtype not in (dtype, FP8):
        raise ValueError(f"pool: got {pool.dtype}, must be q's {dtype} or {FP8}")
    if pool.dim() != 6 or pool.shape[2] != 2 or pool.shape[5] != dim or 0 in pool.shape[3:]:
        raise ValueError(
            f"pool: got shape {tuple(pool.shape)}, must be [layers, blocks, 2, kv_heads, block_size, {dim}]"
        )
    heads, size = pool.shape[3:5]
    # A dimension of length one may report any stride, so only those that matter are compared.
    for axis, wanted in ((2, heads * size * dim), (3, size * dim), (4, dim), (5, 1)):
        if pool.shape[axis] > 1 and pool.stride(axis) != wanted:
            raise ValueError(f"pool: got strides {pool.stride()}, must have contiguous inner four dimensions")
    _device(pool, "pool", device)
    return pool.shape


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(each).removeprefix("torch.") for each in dtypes)


def variants() -> "list[Variant]":
    """What is built ahead of time, to see that it fits the chips: see `kernels.triton_build`."""
    from kernels.triton_build import Variant

    made = kernels()
    found = []

    def add(*what: Any) -> None:
        found.append(Variant.plain(*what))

    for kind in ("bf16", "fp32"):
        ints = dict.fromkeys(("x_stride", "residual_stride", "columns"), "i32:16")
        for is_added in (False, True):
            pointers = dict.fromkeys(("x_ptr", "weight_ptr", "residual_ptr", "out_ptr"), f"*{kind}")
            constants: dict[str, Any] = {"ADD": is_added, "PAD": 4096, "BY_HAND": False}
            name = f"rms_norm {kind} c4096" + " residual" * is_added
            add(name, made.rms_norm, pointers | ints | {"eps": "fp32"}, constants, _warps(4096))
        pointers = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), f"*{kind}")
        ints = dict.fromkeys(("gate_stride", "up_stride", "columns"), "i32:16")
        constants = {"BLOCK": SILU_BLOCK, "BY_HAND": False}
        add(f"silu_mul {kind}", made.silu_mul, pointers | ints, constants, _warps(SILU_BLOCK))
        for dim, is_normed, is_narrow in ((64, False, False), (128, True, False), (128, True, True)):
            name = f"write_kv {kind} d{dim}" + " normed" * is_normed + " fp8" * is_narrow
            arguments, constants = _write_variant(kind, dim, is_normed, is_narrow)
            add(name, made.write_kv, arguments, constants, 4)
    return found


def _write_variant(kind: str, dim: int, is_normed: bool, is_narrow: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Arguments and constants of one build of `write_kv`."""
    arguments = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{kind}"),
        **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
        **dict.fromkeys(("q_weight_ptr", "k_weight_ptr", "out_ptr"), f"*{kind}"),
        "pool_ptr": "*u8" if is_narrow else f"*{kind}",
        "slots_ptr": "*i64",
        **dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32:16"),
        **dict.fromkeys(("block_stride", "num_slots"), "i64:16"),
        **dict.fromkeys(("eps", "k_scale", "v_scale"), "fp32"),
    }
    constants = {
        "Q_HEADS": 32,
        "KV_HEADS": 8,
        "DIM": dim,
        "SIZE": 16,
        "HEADS": HEADS,
        "HALF_PAD": dim // 2,
        "NORM_Q": is_normed,
        "NORM_K": is_normed,
        "NARROW": is_narrow,
        "BY_HAND": False,
    }
    return arguments, constants
