"""Adapters' own tokenizers through the HTTP front: text in, text out, as with transformers + PEFT,
which load the tokenizer from the adapter's folder."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

import tiny_tokenizers
from clients.server_process import serving
from lory_router.errors import AdapterInvalid, AdapterReplaced
from lory_router.own_texts import OwnTexts
from lory_server.adapters.tokenizer_files import COMPANIONS, TOKENIZER_NAME, tokenizer_of
from lory_server.messages import Manner
from own_tokenizers_world import ADDED, BASE_TOKENS, OwnReference, World, make_world
from scripted_engine import BASE, Answer, Front, ScriptedEngine
from trainer_world import char_tokenizer

NUM_TOKENS = 14
NAMES = ("", "plain", "same", "grown", "saved", "team/wide", "shrunk", "swapped")
TEXTS = ("abc", "b a", "<tool>ab", "x<note>y<note>", "za<tool>")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    flags = ("--dtype", "float32", "--device", "cpu", "--full-weights-memory", "1MiB")
    folder = world.adapters_dir.parent
    flags += ("--adapter-cache", str(folder / "cache"), "--adapter-uploads")
    with serving(folder / "log", *flags, adapters=world.adapters_dir, model=world.base) as url:
        yield url


def tokenizer_of_name(world: World, name: str) -> Any:
    """What AutoTokenizer makes of the adapter's folder, if it brings a tokenizer."""
    made = world.adapters.get(name)
    return AutoTokenizer.from_pretrained(made.folder if made and made.brings else world.base)


def body(text: str, name: str, **more: Any) -> dict[str, Any]:
    parameters = {"max_new_tokens": NUM_TOKENS, "details": True, **more}
    return {"inputs": text, "parameters": parameters | ({"adapter_id": name} if name else {})}


def all_at_once(url: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            return await asyncio.gather(*(client.post("/generate", json=one) for one in bodies))

    return asyncio.run(main())


def expected(world: World, reference: OwnReference, name: str, text: str) -> tuple[list[int], str]:
    tokenizer = tokenizer_of_name(world, name)
    prompt = tokenizer(text)["input_ids"]
    ends = {1, tokenizer.eos_token_id}
    ids = reference.answer(prompt, world.folders().get(name), NUM_TOKENS, ends)
    return ids, tokenizer.decode(ids, skip_special_tokens=True)


def test_text_in_and_text_out_are_peft_s_whatever_is_in_the_batch(world: World, url: str) -> None:
    reference, asked = OwnReference(world), [(n, text) for text in TEXTS for n in NAMES]
    replies = all_at_once(url, [body(text, name) for name, text in asked])
    seen: set[int] = set()
    for (name, text), reply in zip(asked, replies, strict=True):
        assert reply.status_code == 200, reply.text
        ids, said = expected(world, reference, name, text)
        details = reply.json()["details"]
        assert [token["id"] for token in details["tokens"]] == ids, (name, text)
        assert reply.json()["generated_text"].split() == said.split(), (name, text)
        seen.update(ids)
    assert {31, 32}.intersection(seen), "no answer shows a token that was added"


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
def test_a_stream_shows_the_text_of_added_tokens(world: World, url: str, path: str) -> None:
    bias = {"31": 50.0, "4": 49.0}
    asked: dict[str, Any] = {"model": "grown", "prompt": "ab", "max_tokens": 6, "stream": True}
    asked |= {"temperature": 0, "logit_bias": bias}
    if path == "/generate_stream":
        asked = body("x<note>y<note>", "grown")
    said = ""
    with httpx.stream("POST", url + path, json=asked, timeout=60, trust_env=False) as reply:
        for line in reply.iter_lines():
            if line.startswith("data:") and not line.endswith("[DONE]"):
                event = json.loads(line[5:])
                token = event.get("token")
                shown = token or event["choices"][0]
                said += "" if shown.get("special") else shown["text"]
    if path == "/v1/completions":
        assert "<tool>" in said
        return
    _, wanted = expected(world, OwnReference(world), "grown", "x<note>y<note>")
    assert said.split() == wanted.split()


def test_the_adapter_s_own_end_ends_an_answer(url: str) -> None:
    asked = {"model": "grown", "prompt": "ab", "max_tokens": 6, "temperature": 0}
    reply = httpx.post(
        f"{url}/v1/completions", json=asked | {"logit_bias": {"33": 100}}, trust_env=False
    ).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 1
    assert ADDED[2] not in reply["choices"][0]["text"]


@pytest.mark.parametrize(
    ("model", "token", "status"),
    [
        ("base", BASE_TOKENS, 400),
        ("plain", BASE_TOKENS, 400),
        ("grown", 33, 200),
        ("grown", 34, 400),
        ("shrunk", 31, 400),
        ("shrunk", 30, 200),
    ],
)
def test_ids_are_those_of_the_vocabulary_that_is_asked(
    world: World, url: str, model: str, token: int, status: int
) -> None:
    model = (
        httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
        if (model == "base")
        else model
    )
    sent = {"model": model, "prompt": [0, token], "max_tokens": 2, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=sent, trust_env=False)
    assert reply.status_code == status, reply.text
    if status == 400:
        assert "holds a token id outside" in reply.json()["error"]["message"]


def test_a_chat_is_made_by_the_adapter_s_own_template(world: World, url: str) -> None:
    messages = [{"role": "user", "content": "ab"}]
    sent = {"model": "grown", "messages": messages, "max_tokens": 4, "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json=sent, trust_env=False).json()
    tokenizer = tokenizer_of_name(world, "grown")
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<note>ab<tool>"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert reply["usage"]["prompt_tokens"] == len(ids)
    ends = {1, tokenizer.eos_token_id}
    wanted = OwnReference(world).answer(ids, world.folders()["grown"], 4, ends)
    said = tokenizer.decode(wanted, skip_special_tokens=True)
    assert reply["choices"][0]["message"]["content"].split() == said.split()


CHAT = {"messages": [{"role": "user", "content": "<note>"}]}


def test_a_token_that_has_no_row_fails_the_text_that_needs_it_alone(world: World, url: str) -> None:
    folder = world.adapters_dir / "beyond"
    shutil.copytree(world.adapters["plain"].folder, folder)
    shutil.copy(world.adapters["grown"].folder / "tokenizer.json", folder)
    sent = [body("ab", "beyond"), body("a<note>b", "beyond"), body("ab", "plain")]
    reply = all_at_once(url, sent)
    assert [one.status_code for one in reply] == [200, 422, 200]
    assert "`inputs` holds a token id outside 0..31" in reply[1].json()["error"]
    for path, ask in (("completions", {"prompt": "a<note>"}), ("chat/completions", CHAT)):
        told = httpx.post(f"{url}/v1/{path}", json={"model": "beyond", **ask}, trust_env=False)
        assert told.status_code == 400, told.text


def test_a_replaced_tokenizer_is_used_at_once(world: World, url: str) -> None:
    folder, other = world.adapters_dir / "moving", world.adapters_dir.parent / "other"
    shutil.copytree(world.adapters["grown"].folder, folder)
    assert all_at_once(url, [body("<note>a", "moving")])[0].status_code == 200
    shutil.copytree(folder, other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace("<note>", "<memo>"))
    shutil.rmtree(folder)
    other.rename(folder)
    replies = all_at_once(url, [body("<memo>a", "moving"), body("<note>a", "grown")])
    assert [reply.status_code for reply in replies] == [200, 200]
    tokens = [[t["id"] for t in reply.json()["details"]["tokens"]] for reply in replies]
    assert tokens[0] == tokens[1]


def test_an_uploaded_adapter_is_the_very_one_that_lies_in_the_folder(
    world: World, url: str
) -> None:
    files = [(path.name, (path.name, path.read_bytes())) for path in _parts(world, "grown")]
    sent = httpx.put(f"{url}/v1/adapters/grown/files", files=files, trust_env=False)
    assert sent.status_code == 201, sent.text
    bodies = [body("x<note>y", name) for name in ("grown", "upload:grown")]
    local, uploaded = all_at_once(url, bodies)
    assert uploaded.status_code == 200, uploaded.text
    assert uploaded.json() == local.json()
    assert uploaded.headers["x-adapter-revision"] == local.headers["x-adapter-revision"]


def _parts(world: World, name: str) -> list[Path]:
    named = ("adapter_config.json", "adapter_model.safetensors", TOKENIZER_NAME, *COMPANIONS)
    paths = [world.adapters[name].folder / file for file in named]
    return [path for path in paths if path.is_file()]


def test_a_merge_is_asked_by_the_tokenizer_that_its_sources_share(url: str) -> None:
    """Two halves of one adapter are that adapter, whose tokenizer is not the base's."""

    def merged(*names: str) -> dict[str, Any]:
        asked = body("ab", "")
        asked["parameters"]["merged_adapters"] = {"ids": names, "weights": [0.5] * len(names)}
        return asked

    sent = [body("ab", "swapped"), merged("swapped", "swapped"), merged("plain", "swapped")]
    alone, halves, mixed = all_at_once(url, sent)
    assert halves.status_code == 200, halves.text
    ids = [[t["id"] for t in one.json()["details"]["tokens"]] for one in (alone, halves)]
    assert ids[0] == ids[1]
    assert halves.json()["generated_text"] == alone.json()["generated_text"]
    assert mixed.status_code == 422
    assert "source 2 ('swapped'): the adapter is asked by a tokenizer" in mixed.json()["error"]


def test_a_text_is_cut_as_the_named_adapters_tokenizer_cuts_it(world: World, url: str) -> None:
    for name in ("", "grown", "swapped", "plain"):
        sent = {"inputs": "a<note>b", "adapter_id": name}
        told = httpx.post(f"{url}/tokenize", json=sent, trust_env=False).json()
        wanted = tokenizer_of_name(world, name)("a<note>b")["input_ids"]
        assert [token["id"] for token in told] == wanted


# -- what is kept ---------------------------------------------------------------------------

TEXT = tiny_tokenizers.byte_level()


def folder_with(root: Path, name: str, file: str) -> Manner:
    """An adapter's folder; and the manner that the engine would tell of it."""
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "tokenizer.json").write_text(file)
    return Manner(digest=name, tokenizer=tokenizer_of({"tokenizer.json": file.encode()}).digest)


def file_with(word: str) -> str:
    tokenizer = char_tokenizer()
    tokenizer.add_tokens([word])
    return tokenizer.backend_tokenizer.to_str()


def test_tokenizers_are_shared_by_digest_and_let_go_of_when_there_are_many(tmp_path: Path) -> None:
    file = file_with("<one>")
    one, twin = (folder_with(tmp_path, name, file) for name in ("one", "twin"))
    two = folder_with(tmp_path, "two", file_with("<two>"))
    texts = OwnTexts(TEXT, str(tmp_path), 2, max_kept_bytes=len(file) + 10)

    async def story() -> None:
        assert await texts.of("plain", Manner()) is TEXT
        first = await texts.of("one", one)
        assert first.tokenizer.token_to_id("<one>") == 31
        assert await texts.of("twin", twin) is first
        second = await texts.of("two", two)
        assert await texts.of("two", two) is second
        assert await texts.of("one", one) is not first

    asyncio.run(story())


def test_a_tokenizer_that_is_there_no_more_is_a_replaced_adapter(tmp_path: Path) -> None:
    manner = folder_with(tmp_path, "one", file_with("<one>"))
    folder_with(tmp_path, "one", file_with("<two>"))
    texts = OwnTexts(TEXT, str(tmp_path), 2)
    for name in ("one", "gone"):
        with pytest.raises(AdapterReplaced, match="not in its folder any more"):
            asyncio.run(texts.of(name, manner))


@pytest.mark.parametrize(
    "file",
    [
        '{"model": {"type": "Unknown", "vocab": {"a": 0}}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "z"]]}}',
    ],
)
def test_a_file_that_no_tokenizer_can_be_made_of_is_refused_by_name(
    tmp_path: Path, file: str
) -> None:
    manner = folder_with(tmp_path, "one", file)
    texts = OwnTexts(TEXT, str(tmp_path), 2)
    with pytest.raises(AdapterInvalid, match="'one': its tokenizer cannot be used"):
        asyncio.run(texts.of("one", manner))


def test_a_broken_file_is_read_once_for_many_requests_and_told_of_its_adapter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = '{"model": {"type": "Unknown", "vocab": {"a": 0}}}'
    manner = folder_with(tmp_path, "one", broken)
    folder_with(tmp_path, "two", broken)
    texts, read = OwnTexts(TEXT, str(tmp_path), 2), []
    made = texts._made
    monkeypatch.setattr(texts, "_made", lambda name, of: read.append(name) or made(name, of))

    async def story() -> None:
        names = ["one", "two"] * 5
        told = await asyncio.gather(
            *(texts.of(name, manner) for name in names), return_exceptions=True
        )
        for name, error in zip(names, told, strict=True):
            assert isinstance(error, AdapterInvalid)
            assert repr(name) in error.message
        with pytest.raises(AdapterInvalid, match="'two'"):
            await texts.of("two", manner)

    asyncio.run(story())
    assert sorted(read) == ["one", "two"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 10**(10**10) }}", "chat_template: takes more than 1 s"),
        ("{% for %}", "chat_template: .*does not compile"),
    ],
)
def test_a_template_that_never_ends_refuses_its_adapter_and_stops_nobody(
    tmp_path: Path, template: str, says: str
) -> None:
    folder_with(tmp_path, "one", file_with("<one>"))
    (tmp_path / "one" / "chat_template.jinja").write_text(template)
    files = {
        name: (tmp_path / "one" / name).read_bytes()
        for name in ("tokenizer.json", "chat_template.jinja")
    }
    manner = Manner(digest="one", tokenizer=tokenizer_of(files).digest)
    texts, ticks = OwnTexts(TEXT, str(tmp_path), 2), []

    async def story() -> None:
        asked = asyncio.ensure_future(texts.of("one", manner))
        while not asked.done():
            await asyncio.sleep(0.01)
            ticks.append(time.monotonic())
        with pytest.raises(AdapterInvalid, match=says):
            await asked

    asyncio.run(story())
    assert max((after - before for before, after in pairwise(ticks)), default=0) < 0.5


def test_a_request_is_made_by_the_adapter_s_tokenizer(tmp_path: Path) -> None:
    manner = folder_with(tmp_path, "one", file_with("<one>"))
    engine = ScriptedEngine([Answer()], adapters=("one",), manners={"one": manner})
    front = Front(engine=engine, adapters_dir=str(tmp_path))
    sent = {"inputs": "a<one>", "parameters": {"adapter_id": "one"}}
    assert front.post("/generate", sent).status_code == 200
    assert engine.last.prompt_ids == (0, 3, 31)
    assert engine.last.manner == manner.digest
    assert front.post("/generate", {"inputs": "a<one>"}).status_code == 200
    assert engine.last.prompt_ids == TEXT.encode("a<one>")
    assert BASE
