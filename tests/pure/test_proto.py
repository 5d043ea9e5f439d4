"""The contracts: fresh stubs that protobuf 6 and 7 both load, buf's rules, and what the public API promises."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import grpc
import pytest
from google.protobuf import descriptor_pb2, text_format
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto
from google.protobuf.message import Message

import generate
from pagetable.ids import MAX_BLOCKS, MAX_DEVICES
from pagetable.sampling import SamplingParams
from quire_pb.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from quire_pb.inference.v1 import inference_pb2, inference_pb2_grpc
from quire_pb.memory.v1 import memory_pb2, memory_pb2_grpc
from quire_pb.worker.v1 import worker_pb2

STUBS = generate.ROOT / generate.PACKAGE
MODULES = (cluster_pb2, inference_pb2, memory_pb2, worker_pb2)


def shape(module: ModuleType) -> FileDescriptorProto:
    found = FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(found)
    return found


# The stubs are what the sources say.


def test_the_committed_stubs_are_fresh() -> None:
    assert generate.differences(generate.stubs(), STUBS) == {}
    assert generate.main(["--check"]) == 0


def test_check_names_each_stale_missing_and_foreign_stub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quire_pb"
    shutil.copytree(STUBS, out, ignore=shutil.ignore_patterns("__pycache__"))
    stale = out / "cluster" / "v1" / "cluster_pb2.py"
    stale.write_bytes(stale.read_bytes() + b"\n")
    (out / "memory" / "v1" / "memory_pb2_grpc.py").unlink()
    (out / "memory" / "v2").mkdir()
    (out / "memory" / "v2" / "memory_pb2.py").write_text(generate.BANNER)
    (out / "notes.txt").write_text("mine")
    assert generate.main(["--check", "--out", str(out)]) == 1
    cure = "run python proto/generate.py"
    assert capsys.readouterr().err.splitlines() == [
        f"generate.py: {stale}: is stale; {cure}",
        f"generate.py: {out / 'memory/v1/memory_pb2_grpc.py'}: is missing; {cure}",
        f"generate.py: {out / 'memory/v2/memory_pb2.py'}: has no source; {cure}",
        f"generate.py: {out / 'notes.txt'}: has no source; {cure}",
    ]
    # making them again cures all but the file that is not ours
    assert generate.main(["--out", str(out)]) == 0
    assert generate.differences(generate.stubs(), out) == {"notes.txt": "has no source"}


def test_another_grpcio_tools_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(generate, "TOOLS_VERSION", "1.82.1")
    assert generate.main([]) == 2
    assert capsys.readouterr().err == (
        "generate.py: grpcio-tools: got 1.80.1, must be 1.82.1; pip install grpcio-tools==1.82.1\n"
    )


@pytest.mark.parametrize("path", sorted(STUBS.rglob("*.py*")), ids=lambda path: path.relative_to(STUBS).as_posix())
def test_a_stub_imports_and_names_quire_pb_only(path: Path) -> None:
    if "__pycache__" in path.parts:
        return
    text = path.read_text(encoding="utf-8")
    assert text.startswith(generate.BANNER)
    assert re.findall(r"^\s*(?:from|import) quire(?:\.| import).*", text, re.MULTILINE) == []
    assert "Missing associated documentation comment" not in text


def test_stubs_load_under_protobuf_6_and_7() -> None:
    """A runtime takes code of its own and of the last major version, but none that is newer than itself."""
    versions = {}
    for path in sorted(STUBS.rglob("*_pb2.py")):
        found = re.search(r"ValidateProtobufRuntimeVersion\(\s*\S+PUBLIC,\s*(\d+),\s*(\d+),", path.read_text())
        assert found is not None, path
        versions[path.name] = (int(found[1]), int(found[2]))
    assert versions.keys() == {"cluster_pb2.py", "inference_pb2.py", "memory_pb2.py", "worker_pb2.py"}
    assert all((6, 0) <= version <= (6, 33) for version in versions.values())


def test_proto_is_no_package() -> None:
    """proto-plus, which Ray brings, is imported as `proto`."""
    assert not (generate.ROOT / "__init__.py").exists()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_messages_know_the_module_that_holds_them(module: ModuleType) -> None:
    for name in module.DESCRIPTOR.message_types_by_name:
        message = getattr(module, name)
        assert message.__module__ == module.__name__
        assert importlib.import_module(message.__module__) is module
        assert pickle.loads(pickle.dumps(message())) == message()  # noqa: S301


# buf's STANDARD rules, as far as these files can break them. (`buf lint` itself agreed when they were written.)

PACKAGE_NAME = re.compile(r"quire(\.[a-z][a-z0-9_]*)+\.v[1-9][0-9]*")
SNAKE, PASCAL, UPPER = (
    re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*"),
    re.compile(r"([A-Z][a-z0-9]*)+"),
    re.compile("[A-Z_0-9]+"),
)


def lint(file: FileDescriptorProto) -> list[str]:
    """Every rule that a file breaks."""
    faults = []
    folder = file.name.rpartition("/")[0]
    if not PACKAGE_NAME.fullmatch(file.package):
        faults.append(f"package {file.package}: must be quire.<name>.v<number>")
    if folder != file.package.replace(".", "/"):
        faults.append(f"package {file.package}: must lie in the folder of its name, not in {folder}")
    if not SNAKE.fullmatch(file.name.rpartition("/")[2].removesuffix(".proto")):
        faults.append(f"file {file.name}: must be lower_snake_case")
    if file.syntax != "proto3":
        faults.append(f"file {file.name}: must be proto3")
    for message in file.message_type:
        faults += _lint_message(message)
    for enum in file.enum_type:
        faults += _lint_enum(enum)
    return faults + list(_lint_services(file))


def _lint_message(message: DescriptorProto) -> Iterator[str]:
    if message.options.map_entry:
        return
    if not PASCAL.fullmatch(message.name):
        yield f"message {message.name}: must be PascalCase"
    named = [*message.field, *(one for one in message.oneof_decl if not one.name.startswith("_"))]
    for each in named:
        if not SNAKE.fullmatch(each.name):
            yield f"{message.name}.{each.name}: must be lower_snake_case"
    for nested in message.nested_type:
        yield from _lint_message(nested)
    for enum in message.enum_type:
        yield from _lint_enum(enum)


def _lint_enum(enum: EnumDescriptorProto) -> Iterator[str]:
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    if not PASCAL.fullmatch(enum.name):
        yield f"enum {enum.name}: must be PascalCase"
    if enum.options.allow_alias:
        yield f"enum {enum.name}: must not allow aliases"
    for value in enum.value:
        if not (value.name.startswith(prefix) and UPPER.fullmatch(value.name)):
            yield f"{enum.name}.{value.name}: must be UPPER_SNAKE_CASE and begin with {prefix}"
        if (value.number == 0) != (value.name == prefix + "UNSPECIFIED"):
            yield f"{enum.name}.{value.name}: 0, and only 0, must be {prefix}UNSPECIFIED"


def _lint_services(file: FileDescriptorProto) -> Iterator[str]:
    used: dict[str, str] = {}
    for service in file.service:
        if not (PASCAL.fullmatch(service.name) and service.name.endswith("Service")):
            yield f"service {service.name}: must be PascalCase and end in Service"
        for rpc in service.method:
            if not PASCAL.fullmatch(rpc.name):
                yield f"rpc {rpc.name}: must be PascalCase"
            for kind, got in (("Request", rpc.input_type), ("Response", rpc.output_type)):
                names = [f".{file.package}.{prefix}{rpc.name}{kind}" for prefix in ("", service.name)]
                if got not in names:
                    yield f"rpc {rpc.name}: its {kind.lower()} is {got}, must be {names[0]}"
                if got in used:
                    yield f"rpc {rpc.name}: {got} is {used[got]}'s already"
                used[got] = rpc.name


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_contract_keeps_bufs_rules(module: ModuleType) -> None:
    assert lint(shape(module)) == []


GOOD = """
name: "quire/some/v1/some.proto" package: "quire.some.v1" syntax: "proto3"
message_type { name: "GetRequest" field { name: "block_id" } }
message_type { name: "GetResponse" }
enum_type { name: "PageState"
  value { name: "PAGE_STATE_UNSPECIFIED" number: 0 } value { name: "PAGE_STATE_FREE" number: 1 } }
service { name: "SomeService"
  method { name: "Get" input_type: ".quire.some.v1.GetRequest" output_type: ".quire.some.v1.GetResponse" } }
"""


@pytest.mark.parametrize(
    ("good", "bad", "fault"),
    [
        ('package: "quire.some.v1"', 'package: "quire.some"', "package quire.some: must be quire.<name>.v<number>"),
        ("quire/some/v1/some", "quire/some/some", "must lie in the folder of its name, not in quire/some"),
        ("some.proto", "Some.proto", "file quire/some/v1/Some.proto: must be lower_snake_case"),
        ("proto3", "proto2", "file quire/some/v1/some.proto: must be proto3"),
        ('message_type { name: "GetResponse"', 'message_type { name: "getResponse"', "message getResponse"),
        ('"block_id"', '"blockId"', "GetRequest.blockId: must be lower_snake_case"),
        ('"block_id" }', '"id" } oneof_decl { name: "Kind" }', "GetRequest.Kind: must be lower_snake_case"),
        ('name: "PageState"', 'name: "State"', "State.PAGE_STATE_FREE: must be UPPER_SNAKE_CASE and begin with STATE_"),
        ("PAGE_STATE_UNSPECIFIED", "PAGE_STATE_NONE", "PageState.PAGE_STATE_NONE: 0, and only 0, must be"),
        ("PAGE_STATE_FREE", "PAGE_STATE_UNSPECIFIED", "PageState.PAGE_STATE_UNSPECIFIED: 0, and only 0, must be"),
        ('"SomeService"', '"Some"', "service Some: must be PascalCase and end in Service"),
        ('"Get"', '"get"', "rpc get: must be PascalCase"),
        (".GetRequest", ".Nothing", "its request is .quire.some.v1.Nothing, must be .quire.some.v1.GetRequest"),
        (".GetResponse", ".GetRequest", "rpc Get: .quire.some.v1.GetRequest is Get's already"),
    ],
)
def test_the_linter_finds_a_fault(good: str, bad: str, fault: str) -> None:
    assert lint(text_format.Parse(GOOD, FileDescriptorProto())) == []
    assert GOOD.count(good) == 1
    assert any(fault in found for found in lint(text_format.Parse(GOOD.replace(good, bad), FileDescriptorProto())))


# What the public API promises.


def methods(module: ModuleType) -> dict[str, dict[str, bool]]:
    """service -> rpc -> whether the answer is a stream."""
    return {
        service.name: {rpc.name: rpc.server_streaming for rpc in service.method} for service in shape(module).service
    }


def test_the_services() -> None:
    assert methods(inference_pb2) == {
        "InferenceService": {
            "Generate": True,
            "ForkGeneration": True,
            "CancelGeneration": False,
            "Tokenize": False,
            "Detokenize": False,
            "ListModels": False,
        }
    }
    assert methods(memory_pb2) == {"MemoryService": {"GetPageMap": False, "GetSequencePages": False}}
    assert methods(cluster_pb2) == {
        "AdminService": {"Stop": False},
        "ClusterService": {"GetCluster": False, "GetLoads": False},
    }
    assert methods(cluster_pb2) == {
        "AdminService": {"Stop": False},
        "ClusterService": {"GetCluster": False, "GetLoads": False},
    }
    assert methods(worker_pb2) == {}
    assert not (STUBS / "worker" / "v1" / "worker_pb2_grpc.py").exists()


def test_sampling_has_the_engines_fields() -> None:
    """Each scalar can be told from its zero, and is as wide as Python's, so that no value changes on the way."""
    proto = inference_pb2.SamplingParams.DESCRIPTOR
    kinds: dict[str, str | tuple[str, str]] = {}
    for each in proto.fields:
        one = next(name for name in ("int32", "int64", "double", "bool", "string", "message") if _is(each, name))
        kinds[each.name] = (one, "optional" if each.has_presence else "repeated")
    wanted: dict[str, tuple[str, str]] = {}
    for name, annotation in ((each.name, str(each.type)) for each in dataclasses.fields(SamplingParams)):
        scalar = annotation.removesuffix(" | None")
        wanted[name] = ({"int": "int32", "float": "double", "bool": "bool"}.get(scalar, ""), "optional")
    wanted |= {"seed": ("int64", "optional"), "logit_bias": ("message", "repeated")}
    wanted |= {"stop": ("string", "repeated"), "stop_token_ids": ("int32", "repeated")}
    assert kinds == wanted
    entry = inference_pb2.SamplingParams(logit_bias={-1: 0.1}, temperature=0.7, seed=2**63 - 1, top_k=-1)
    back = inference_pb2.SamplingParams.FromString(entry.SerializeToString())
    assert (back.logit_bias[-1], back.temperature, back.seed, back.top_k) == (0.1, 0.7, 2**63 - 1, -1)
    assert not back.HasField("top_p")


def _is(field: object, kind: str) -> bool:
    return getattr(field, "type") == getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.upper()}")  # noqa: B009


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (inference_pb2.GenerateRequest, "model"),
        (inference_pb2.GenerateRequest, "request_id"),
        (inference_pb2.GenerateRequest, "cache_salt"),
        (inference_pb2.ForkGenerationRequest, "request_id"),
        (inference_pb2.TokenizeRequest, "add_special_tokens"),
        (inference_pb2.DetokenizeRequest, "skip_special_tokens"),
        (worker_pb2.Delta, "token"),
    ],
)
def test_left_out_is_not_empty(message: type[Message], field: str) -> None:
    """An empty salt that meant "none" would share a tenant's pages with everyone."""
    zero = {"token": 0}.get(field, False if field.endswith("tokens") else "")
    there, absent = message(**{field: zero}), message()
    assert (there.HasField(field), absent.HasField(field)) == (True, False)
    assert message.FromString(there.SerializeToString()).HasField(field)


def test_a_prompt_is_one_of_four() -> None:
    request = inference_pb2.GenerateRequest(text="a")
    request.token_ids_le = b"\x01\x00\x00\x00"
    assert request.WhichOneof("prompt") == "token_ids_le"
    prompt = inference_pb2.GenerateRequest.DESCRIPTOR.oneofs_by_name["prompt"]
    assert [field.name for field in prompt.fields] == ["text", "token_ids", "token_ids_le", "chat"]


def test_a_forks_stream_has_the_bytes_of_a_generation() -> None:
    """Two messages, since each rpc has its own, but one encoder serves both."""
    pages = [memory_pb2.PageEntry(device_id=MAX_DEVICES - 1, block_id=MAX_BLOCKS - 1)]
    events = [
        inference_pb2.GenerateResponse(accepted=inference_pb2.Accepted(request_id="r", prompt_tokens=3, seed=7)),
        inference_pb2.GenerateResponse(delta=inference_pb2.Delta(index=1, text="ab", token_ids=[5, 6])),
        inference_pb2.GenerateResponse(
            finished=inference_pb2.Finished(
                finish_reason=inference_pb2.FINISH_REASON_STOP,
                stop_token_id=0,
                usage=inference_pb2.Usage(prompt_tokens=3, cached_tokens=0, output_tokens=2, pages=pages),
            )
        ),
    ]
    for event in events:
        fork = inference_pb2.ForkGenerationResponse.FromString(event.SerializeToString())
        kind = event.WhichOneof("event")
        assert fork.WhichOneof("event") == kind
        assert getattr(fork, kind) == getattr(event, kind)
        assert fork.SerializeToString() == event.SerializeToString()
    assert events[2].finished.WhichOneof("stop_reason") == "stop_token_id"


def test_no_address_and_no_error_reaches_a_user() -> None:
    """Errors are statuses; where shards listen stays inside."""
    names = {
        field.name
        for module in (inference_pb2, memory_pb2, cluster_pb2)
        for message in module.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if message.name != "StopResponse"  # on the admin socket, to the service's own user
    }
    assert names & {"address", "host", "port", "pid", "error", "error_message", "failure", "owner", "identity"} == set()
    assert inference_pb2.FinishReason.keys() == [
        f"FINISH_REASON_{name}" for name in ("UNSPECIFIED", "STOP", "LENGTH", "CANCELLED")
    ]


def test_public_conditions_are_the_internal_ones() -> None:
    assert cluster_pb2.Condition.items() == worker_pb2.Condition.items()


async def _call_all() -> list[object]:
    class Inference(inference_pb2_grpc.InferenceServiceServicer):
        async def Generate(self, request, context):  # type: ignore[no-untyped-def]
            yield inference_pb2.GenerateResponse(accepted=inference_pb2.Accepted(request_id=request.request_id))
            yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text=request.text))

    class Memory(memory_pb2_grpc.MemoryServiceServicer):
        async def GetSequencePages(self, request, context):  # type: ignore[no-untyped-def]
            sequence = memory_pb2.Sequence(request_id=request.request_id)
            return memory_pb2.GetSequencePagesResponse(sequences=[sequence])

    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(), server)
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(Memory(), server)
    cluster_pb2_grpc.add_ClusterServiceServicer_to_server(cluster_pb2_grpc.ClusterServiceServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = inference_pb2.GenerateRequest(request_id="r", text="ab")
            stream = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60)
            found: list[object] = [event async for event in stream]
            asked = memory_pb2.GetSequencePagesRequest(request_id="r")
            found.append(await memory_pb2_grpc.MemoryServiceStub(channel).GetSequencePages(asked, timeout=60))
            try:
                await cluster_pb2_grpc.ClusterServiceStub(channel).GetLoads(cluster_pb2.GetLoadsRequest(), timeout=60)
            except grpc.aio.AioRpcError as error:
                found.append(error.code())
            return found
    finally:
        await server.stop(None)


def test_stubs_serve_and_call_over_grpc() -> None:
    accepted = inference_pb2.GenerateResponse(accepted=inference_pb2.Accepted(request_id="r"))
    delta = inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="ab"))
    pages = memory_pb2.GetSequencePagesResponse(sequences=[memory_pb2.Sequence(request_id="r")])
    assert asyncio.run(_call_all()) == [accepted, delta, pages, grpc.StatusCode.UNIMPLEMENTED]
