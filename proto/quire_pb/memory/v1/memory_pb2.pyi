# Made by proto/generate.py from proto/quire/memory/v1/memory.proto. Do not edit.
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PageEntry(_message.Message):
    __slots__ = ("device_id", "block_id")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    device_id: int
    block_id: int
    def __init__(self, device_id: _Optional[int] = ..., block_id: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("device_id", "shard_id", "block_size", "num_blocks", "free_blocks", "cached_blocks", "used_blocks")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    device_id: int
    shard_id: int
    block_size: int
    num_blocks: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    def __init__(self, device_id: _Optional[int] = ..., shard_id: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("request_id", "index", "shard_id", "prompt_tokens", "pages")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    index: int
    shard_id: int
    prompt_tokens: int
    pages: _containers.RepeatedCompositeFieldContainer[PageEntry]
    def __init__(self, request_id: _Optional[str] = ..., index: _Optional[int] = ..., shard_id: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., pages: _Optional[_Iterable[_Union[PageEntry, _Mapping]]] = ...) -> None: ...

class SharedPage(_message.Message):
    __slots__ = ("page", "users")
    PAGE_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    page: PageEntry
    users: int
    def __init__(self, page: _Optional[_Union[PageEntry, _Mapping]] = ..., users: _Optional[int] = ...) -> None: ...

class GetPageMapRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPageMapResponse(_message.Message):
    __slots__ = ("devices", "sequences", "shared_pages")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SHARED_PAGES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    shared_pages: _containers.RepeatedCompositeFieldContainer[SharedPage]
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ..., shared_pages: _Optional[_Iterable[_Union[SharedPage, _Mapping]]] = ...) -> None: ...

class GetSequencePagesRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetSequencePagesResponse(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    def __init__(self, sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ...) -> None: ...
