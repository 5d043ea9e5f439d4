# Made by proto/generate.py from proto/quire/worker/v1/worker.proto. Do not edit.
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_FRONT: _ClassVar[Role]
    ROLE_SCHEDULER: _ClassVar[Role]
    ROLE_KEEPER: _ClassVar[Role]
    ROLE_ADMIN: _ClassVar[Role]
    ROLE_RANK: _ClassVar[Role]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]

class Condition(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONDITION_UNSPECIFIED: _ClassVar[Condition]
    CONDITION_READY: _ClassVar[Condition]
    CONDITION_DRAINING: _ClassVar[Condition]
    CONDITION_DEAD: _ClassVar[Condition]
ROLE_UNSPECIFIED: Role
ROLE_FRONT: Role
ROLE_SCHEDULER: Role
ROLE_KEEPER: Role
ROLE_ADMIN: Role
ROLE_RANK: Role
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason
CONDITION_UNSPECIFIED: Condition
CONDITION_READY: Condition
CONDITION_DRAINING: Condition
CONDITION_DEAD: Condition

class Challenge(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("role", "name", "proof")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    role: Role
    name: str
    proof: bytes
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., name: _Optional[str] = ..., proof: _Optional[bytes] = ...) -> None: ...

class ShardInfo(_message.Message):
    __slots__ = ("shard_id", "epoch", "address", "pid", "block_size", "num_blocks", "max_model_len", "max_num_seqs", "vocab_size", "identity", "dtype", "device_ids", "model", "eos_token_ids", "block_bytes")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_IDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    epoch: int
    address: str
    pid: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    identity: bytes
    dtype: str
    device_ids: _containers.RepeatedScalarFieldContainer[int]
    model: str
    eos_token_ids: bytes
    block_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shard_id: _Optional[int] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., vocab_size: _Optional[int] = ..., identity: _Optional[bytes] = ..., dtype: _Optional[str] = ..., device_ids: _Optional[_Iterable[int]] = ..., model: _Optional[str] = ..., eos_token_ids: _Optional[bytes] = ..., block_bytes: _Optional[_Iterable[int]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("shard",)
    SHARD_FIELD_NUMBER: _ClassVar[int]
    shard: ShardInfo
    def __init__(self, shard: _Optional[_Union[ShardInfo, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "request_id", "owner", "prompt", "params", "eos_token_ids", "cache_salt", "samples")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    owner: str
    prompt: bytes
    params: bytes
    eos_token_ids: bytes
    cache_salt: str
    samples: _containers.RepeatedCompositeFieldContainer[Resumed]
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., owner: _Optional[str] = ..., prompt: _Optional[bytes] = ..., params: _Optional[bytes] = ..., eos_token_ids: _Optional[bytes] = ..., cache_salt: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[Resumed, _Mapping]]] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("sample", "outputs")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    sample: int
    outputs: bytes
    def __init__(self, sample: _Optional[int] = ..., outputs: _Optional[bytes] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("handle", "sample", "stop_reason")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    handle: int
    sample: int
    stop_reason: str
    def __init__(self, handle: _Optional[int] = ..., sample: _Optional[int] = ..., stop_reason: _Optional[str] = ...) -> None: ...

class Fork(_message.Message):
    __slots__ = ("handle", "parent_handle", "parent_sample", "num_outputs", "request")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    PARENT_HANDLE_FIELD_NUMBER: _ClassVar[int]
    PARENT_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    handle: int
    parent_handle: int
    parent_sample: int
    num_outputs: int
    request: Submit
    def __init__(self, handle: _Optional[int] = ..., parent_handle: _Optional[int] = ..., parent_sample: _Optional[int] = ..., num_outputs: _Optional[int] = ..., request: _Optional[_Union[Submit, _Mapping]] = ...) -> None: ...

class Begun(_message.Message):
    __slots__ = ("epoch", "handles")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., handles: _Optional[_Iterable[int]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("step", "epoch", "deltas")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    deltas: _containers.RepeatedCompositeFieldContainer[Delta]
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., deltas: _Optional[_Iterable[_Union[Delta, _Mapping]]] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("handle", "sample", "token", "finish", "stop_token", "failure", "logprobs", "scores", "cached_tokens", "page_devices", "page_blocks")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_DEVICES_FIELD_NUMBER: _ClassVar[int]
    PAGE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    sample: int
    token: int
    finish: FinishReason
    stop_token: int
    failure: str
    logprobs: Logprobs
    scores: _containers.RepeatedCompositeFieldContainer[Logprobs]
    cached_tokens: int
    page_devices: _containers.RepeatedScalarFieldContainer[int]
    page_blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handle: _Optional[int] = ..., sample: _Optional[int] = ..., token: _Optional[int] = ..., finish: _Optional[_Union[FinishReason, str]] = ..., stop_token: _Optional[int] = ..., failure: _Optional[str] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., scores: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ..., cached_tokens: _Optional[int] = ..., page_devices: _Optional[_Iterable[int]] = ..., page_blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("logprob", "rank", "top_tokens", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top_tokens: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_tokens: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("handle", "code", "field", "message")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    code: str
    field: str
    message: str
    def __init__(self, handle: _Optional[int] = ..., code: _Optional[str] = ..., field: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Events(_message.Message):
    __slots__ = ("epoch", "number", "whole", "started", "ended", "released", "entry_sequence", "entry_index", "entry_device", "entry_block", "sealed", "forgotten", "load")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    ENTRY_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ENTRY_INDEX_FIELD_NUMBER: _ClassVar[int]
    ENTRY_DEVICE_FIELD_NUMBER: _ClassVar[int]
    ENTRY_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    number: int
    whole: bool
    started: _containers.RepeatedCompositeFieldContainer[Started]
    ended: _containers.RepeatedScalarFieldContainer[int]
    released: _containers.RepeatedScalarFieldContainer[int]
    entry_sequence: _containers.RepeatedScalarFieldContainer[int]
    entry_index: _containers.RepeatedScalarFieldContainer[int]
    entry_device: _containers.RepeatedScalarFieldContainer[int]
    entry_block: _containers.RepeatedScalarFieldContainer[int]
    sealed: _containers.RepeatedScalarFieldContainer[int]
    forgotten: _containers.RepeatedScalarFieldContainer[int]
    load: Load
    def __init__(self, epoch: _Optional[int] = ..., number: _Optional[int] = ..., whole: bool = ..., started: _Optional[_Iterable[_Union[Started, _Mapping]]] = ..., ended: _Optional[_Iterable[int]] = ..., released: _Optional[_Iterable[int]] = ..., entry_sequence: _Optional[_Iterable[int]] = ..., entry_index: _Optional[_Iterable[int]] = ..., entry_device: _Optional[_Iterable[int]] = ..., entry_block: _Optional[_Iterable[int]] = ..., sealed: _Optional[_Iterable[int]] = ..., forgotten: _Optional[_Iterable[int]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("sequence", "request_id", "owner", "sample", "prompt_tokens")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    request_id: str
    owner: str
    sample: int
    prompt_tokens: int
    def __init__(self, sequence: _Optional[int] = ..., request_id: _Optional[str] = ..., owner: _Optional[str] = ..., sample: _Optional[int] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("free_blocks", "cached_blocks", "used_blocks", "running", "waiting", "steps", "preemptions", "output_tokens", "prompt_tokens", "cached_tokens", "allocations", "evictions", "busy_seconds", "last_step_seconds", "schedule_seconds", "run_seconds", "retire_seconds", "pools")
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ALLOCATIONS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RUN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RETIRE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    running: int
    waiting: int
    steps: int
    preemptions: int
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    allocations: int
    evictions: int
    busy_seconds: float
    last_step_seconds: float
    schedule_seconds: float
    run_seconds: float
    retire_seconds: float
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    def __init__(self, free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., steps: _Optional[int] = ..., preemptions: _Optional[int] = ..., output_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., allocations: _Optional[int] = ..., evictions: _Optional[int] = ..., busy_seconds: _Optional[float] = ..., last_step_seconds: _Optional[float] = ..., schedule_seconds: _Optional[float] = ..., run_seconds: _Optional[float] = ..., retire_seconds: _Optional[float] = ..., pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("device_id", "num_blocks", "free_blocks", "cached_blocks", "used_blocks")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    device_id: int
    num_blocks: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    def __init__(self, device_id: _Optional[int] = ..., num_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("number", "epoch", "steps", "has_work", "step_age_seconds")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    HAS_WORK_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    number: int
    epoch: int
    steps: int
    has_work: bool
    step_age_seconds: float
    def __init__(self, number: _Optional[int] = ..., epoch: _Optional[int] = ..., steps: _Optional[int] = ..., has_work: bool = ..., step_age_seconds: _Optional[float] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("ticket", "prompt", "cache_salt", "samples", "max_tokens", "exclude")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    prompt: bytes
    cache_salt: str
    samples: int
    max_tokens: int
    exclude: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ticket: _Optional[int] = ..., prompt: _Optional[bytes] = ..., cache_salt: _Optional[str] = ..., samples: _Optional[int] = ..., max_tokens: _Optional[int] = ..., exclude: _Optional[_Iterable[int]] = ...) -> None: ...

class Placed(_message.Message):
    __slots__ = ("ticket", "placed", "shard_id", "epoch", "address", "code", "message")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    placed: bool
    shard_id: int
    epoch: int
    address: str
    code: str
    message: str
    def __init__(self, ticket: _Optional[int] = ..., placed: bool = ..., shard_id: _Optional[int] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Shards(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedCompositeFieldContainer[ShardState]
    def __init__(self, shards: _Optional[_Iterable[_Union[ShardState, _Mapping]]] = ...) -> None: ...

class ShardState(_message.Message):
    __slots__ = ("info", "condition")
    INFO_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    info: ShardInfo
    condition: Condition
    def __init__(self, info: _Optional[_Union[ShardInfo, _Mapping]] = ..., condition: _Optional[_Union[Condition, str]] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("shard_id", "epoch", "why")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    epoch: int
    why: str
    def __init__(self, shard_id: _Optional[int] = ..., epoch: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class Query(_message.Message):
    __slots__ = ("ticket", "cluster", "loads", "page_map", "sequence_pages", "owner")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    PAGE_MAP_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_PAGES_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    cluster: bool
    loads: bool
    page_map: bool
    sequence_pages: str
    owner: str
    def __init__(self, ticket: _Optional[int] = ..., cluster: bool = ..., loads: bool = ..., page_map: bool = ..., sequence_pages: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("ticket", "code", "message", "body")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    code: str
    message: str
    body: bytes
    def __init__(self, ticket: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., body: _Optional[bytes] = ...) -> None: ...

class Register(_message.Message):
    __slots__ = ("info", "condition")
    INFO_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    info: ShardInfo
    condition: Condition
    def __init__(self, info: _Optional[_Union[ShardInfo, _Mapping]] = ..., condition: _Optional[_Union[Condition, str]] = ...) -> None: ...

class Fence(_message.Message):
    __slots__ = ("shard_id", "epoch", "why")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    shard_id: int
    epoch: int
    why: str
    def __init__(self, shard_id: _Optional[int] = ..., epoch: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class RankReady(_message.Message):
    __slots__ = ("rank", "pid", "host", "segment", "identity", "address")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    pid: int
    host: str
    segment: str
    identity: bytes
    address: str
    def __init__(self, rank: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., segment: _Optional[str] = ..., identity: _Optional[bytes] = ..., address: _Optional[str] = ...) -> None: ...

class Form(_message.Message):
    __slots__ = ("epoch", "members", "store")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    members: _containers.RepeatedCompositeFieldContainer[RankReady]
    store: str
    def __init__(self, epoch: _Optional[int] = ..., members: _Optional[_Iterable[_Union[RankReady, _Mapping]]] = ..., store: _Optional[str] = ...) -> None: ...

class Formed(_message.Message):
    __slots__ = ("epoch", "rank")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    rank: int
    def __init__(self, epoch: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class Broken(_message.Message):
    __slots__ = ("epoch", "rank", "why")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    rank: int
    why: str
    def __init__(self, epoch: _Optional[int] = ..., rank: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("epoch", "why")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    why: str
    def __init__(self, epoch: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class ReadPages(_message.Message):
    __slots__ = ("number", "layer", "blocks")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    number: int
    layer: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, number: _Optional[int] = ..., layer: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class PagesRead(_message.Message):
    __slots__ = ("number", "k", "v", "refused")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    number: int
    k: bytes
    v: bytes
    refused: str
    def __init__(self, number: _Optional[int] = ..., k: _Optional[bytes] = ..., v: _Optional[bytes] = ..., refused: _Optional[str] = ...) -> None: ...
