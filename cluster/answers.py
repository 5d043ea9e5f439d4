"""What the global scheduler answers to those who look: the public messages, made from the view.

A tenant sees its own sequences only. What belongs to others appears in a device's counts and nowhere else; another
tenant's request is as unknown as one that never was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from google.protobuf.message import Message

from cluster.view import ClusterView, SequenceView, unpack
from pagetable.errors import NotFound, Overloaded, QuireError, shown
from quire_pb.cluster.v1 import cluster_pb2
from quire_pb.memory.v1 import memory_pb2
from quire_pb.worker.v1 import worker_pb2 as pb

MAX_ANSWER_PAGES = 1 << 20  # about 9 MB of answer, under the 32 MiB of a gRPC message


def answer_query(query: pb.Query, shards: Sequence[pb.ShardState], view: ClusterView) -> pb.Answer:
    """Answer with a serialized public response; what cannot be answered says so by code and message.

    Args:
        shards: all that are known, dead ones too.
    """
    what = query.WhichOneof("what")
    try:
        body: Message
        if what == "cluster":
            body = cluster_pb2.GetClusterResponse(shards=map(_shard, _by_id(shards)))
        elif what == "loads":
            body = _loads(shards, view)
        elif what == "page_map":
            body = _page_map(shards, view, query.owner)
        elif what == "sequence_pages":
            body = _sequence_pages(view, query.owner, query.sequence_pages)
        else:
            raise NotFound("the query names nothing that this scheduler answers")
    except QuireError as error:
        return pb.Answer(ticket=query.ticket, code=error.code, message=str(error))
    return pb.Answer(ticket=query.ticket, body=body.SerializeToString())


def _by_id(shards: Iterable[pb.ShardState]) -> list[pb.ShardState]:
    return sorted(shards, key=lambda state: state.info.shard_id)


def _shard(state: pb.ShardState) -> cluster_pb2.Shard:
    info = state.info
    return cluster_pb2.Shard(
        shard_id=info.shard_id,
        epoch=info.epoch,
        condition=cluster_pb2.Condition.Name(state.condition),  # the two enums have the same names
        model=info.model,
        dtype=info.dtype,
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        vocab_size=info.vocab_size,
        device_ids=info.device_ids,
    )


def _loads(shards: Sequence[pb.ShardState], view: ClusterView) -> cluster_pb2.GetLoadsResponse:
    answer = cluster_pb2.GetLoadsResponse()
    for state in _by_id(shards):
        shard = view.shards.get(state.info.shard_id)
        if shard is not None and shard.number:
            load = answer.loads.add(shard_id=state.info.shard_id, epoch=shard.epoch)
            for field, value in shard.load.ListFields():  # the public fields have the internal names
                if field.name != "pools":
                    setattr(load, field.name, value)
            for pool in shard.load.pools:
                load.pools.add().ParseFromString(pool.SerializeToString())  # of the same numbers
    return answer


def _page_map(shards: Sequence[pb.ShardState], view: ClusterView, owner: str) -> memory_pb2.GetPageMapResponse:
    answer = memory_pb2.GetPageMapResponse()
    found = view.sequences(owner)
    _refuse_too_many(found, "ask for one request's pages")
    for state in _by_id(shards):
        shard = view.shards.get(state.info.shard_id)
        if shard is not None and shard.number:
            for pool in shard.load.pools:
                answer.devices.add(
                    device_id=pool.device_id,
                    shard_id=state.info.shard_id,
                    block_size=state.info.block_size,
                    num_blocks=pool.num_blocks,
                    free_blocks=pool.free_blocks,
                    cached_blocks=pool.cached_blocks,
                    used_blocks=pool.used_blocks,
                )
    answer.devices.sort(key=lambda device: device.device_id)
    users: Counter[int] = Counter()
    for shard_id, sequence in found:
        _fill(answer.sequences.add(), shard_id, sequence)
        users.update(sequence.entries)
    for entry in sorted(entry for entry, count in users.items() if count > 1):
        device, block = unpack(entry)
        shared = answer.shared_pages.add(users=users[entry])
        shared.page.device_id, shared.page.block_id = device, block
    return answer


def _sequence_pages(view: ClusterView, owner: str, request_id: str) -> memory_pb2.GetSequencePagesResponse:
    found = view.sequences(owner, request_id) if request_id else []
    if not found:
        raise NotFound(f"request_id: no sequence of {shown(request_id)} has pages now; it may wait, or have ended")
    _refuse_too_many(found, "it has more than one answer holds")
    answer = memory_pb2.GetSequencePagesResponse()
    for shard_id, sequence in sorted(found, key=lambda item: (item[1].sample, item[0])):
        _fill(answer.sequences.add(), shard_id, sequence)
    return answer


def _fill(target: memory_pb2.Sequence, shard_id: int, sequence: SequenceView) -> None:
    target.request_id, target.index = sequence.request_id, sequence.sample
    target.shard_id, target.prompt_tokens = shard_id, sequence.prompt_tokens
    add = target.pages.add
    for device, block in sequence.pages():
        add(device_id=device, block_id=block)


def _refuse_too_many(found: Iterable[tuple[int, SequenceView]], cure: str) -> None:
    total = sum(len(sequence.entries) for _, sequence in found)
    if total > MAX_ANSWER_PAGES:
        raise Overloaded(f"page map: {total} entries, must be at most {MAX_ANSWER_PAGES}; {cure}")
