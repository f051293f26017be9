"""Merges of adapters that bring tokenizers: by the one that all have, or refused by name."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny_tokenizers
from adapter_files import BASE, write_adapter
from lory_server.adapters.blob import AdapterBlob, with_manner
from lory_server.adapters.errors import AdapterInvalidError, RevisionNotFoundError
from lory_server.adapters.manner import MANIFEST_NAME, read_manner, with_tokenizer
from lory_server.adapters.merge_sources import locate
from lory_server.adapters.reader import Reader, ThreadReader
from lory_server.adapters.reader_process import MAX_FILES, ProcessReader, can_read_apart
from lory_server.adapters.store import AdapterStore
from lory_server.adapters.tokenizer_files import COMPANIONS, TOKENIZER_NAME, tokenizer_of
from lory_server.merge_folder import write_folder
from lory_server.messages import NO_MANNER, Manner
from lory_server.recipes import MAX_SOURCES, MergeSource, Recipe, merged_id, read_recipe
from scripted_engine import Answer, Front, ScriptedEngine

MANIFEST = b'{"manifest_version": 1, "template": "{text} ->"}'


def file_with(*words: str) -> bytes:
    tokenizer = tiny_tokenizers.byte_level().tokenizer
    tokenizer.add_tokens(list(words))
    return tokenizer.to_str().encode()


ONE, OTHER = file_with("<one>"), file_with("<other>")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b` share a tokenizer, `c` has another, `d` none; `a` has a manifest."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, tokenizer) in enumerate({"a": ONE, "b": ONE, "c": OTHER, "d": b""}.items()):
        write_adapter(root / name, seed=seed)
        if tokenizer:
            (root / name / TOKENIZER_NAME).write_bytes(tokenizer)
    (root / "a" / MANIFEST_NAME).write_bytes(MANIFEST)
    return root


@pytest.fixture(scope="module", params=["thread", "process"])
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    if request.param == "thread":
        yield ThreadReader(BASE, torch.float32)
        return
    if not can_read_apart():
        pytest.skip("needs Linux: no shared memory here")
    apart = ProcessReader(BASE, torch.float32)
    yield apart
    apart.close()


def merge_of(*names: str, revision: str = "") -> str:
    sources = tuple(MergeSource(name, 0.5, revision) for name in names)
    return merged_id(Recipe(sources=sources))


def load(reader: Reader, root: Path, name: str) -> AdapterBlob:
    with locate(AdapterStore(root), name) as files:
        return reader.blob(files, reader.manifest(files))


def test_a_merge_has_the_tokenizer_that_all_its_sources_have(reader: Reader, root: Path) -> None:
    digest = tokenizer_of({TOKENIZER_NAME: ONE}).digest
    assert load(reader, root, merge_of("a", "b")).manifest.tokenizer == digest
    assert load(reader, root, merge_of("d", "d")).manifest.tokenizer == ""


@pytest.mark.parametrize(
    ("names", "blamed", "says"),
    [
        (("a", "c"), "c", "by a tokenizer of its own, source 1 by another"),
        (("b", "a", "d"), "d", "by the base's tokenizer, source 1 by a tokenizer of its own"),
        (("d", "b"), "b", "by a tokenizer of its own, source 1 by the base's tokenizer"),
    ],
)
def test_adapters_that_are_asked_by_other_tokenizers_are_not_merged(
    reader: Reader, root: Path, names: tuple[str, ...], blamed: str, says: str
) -> None:
    with pytest.raises(AdapterInvalidError) as caught:
        load(reader, root, merge_of(*names))
    assert caught.value.source == blamed
    assert f"({blamed!r})" in str(caught.value)
    assert says in str(caught.value)
    assert f"take {TOKENIZER_NAME} out" in str(caught.value)


def test_a_source_is_found_at_the_revision_that_it_has_by_itself(
    reader: Reader, root: Path
) -> None:
    """That of an adapter with a manifest or a tokenizer was never found: it is of those, too."""
    for name in "abd":
        with locate(AdapterStore(root), name) as files:
            manifest = reader.manifest(files)
            manner = read_manner(MANIFEST) if name == "a" else NO_MANNER
            manner = with_tokenizer(manner, manifest.tokenizer, 0)
            revision = with_manner(reader.blob(files, manifest), manner).revision
        assert load(reader, root, merge_of(name, revision=revision[:12])).revision
        with pytest.raises(RevisionNotFoundError, match=revision):
            load(reader, root, merge_of(name, revision="0" * 12))


def test_as_many_files_as_a_merge_may_have_go_over(reader: Reader, tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(MAX_SOURCES)]
    write_adapter(tmp_path / names[0], rank=1)
    for name, body in {MANIFEST_NAME: MANIFEST, TOKENIZER_NAME: ONE}.items():
        (tmp_path / names[0] / name).write_bytes(body)
    for name in COMPANIONS:
        (tmp_path / names[0] / name).write_bytes(b"{}")
    assert len(list((tmp_path / names[0]).iterdir())) == MAX_FILES
    for name in names[1:]:
        shutil.copytree(tmp_path / names[0], tmp_path / name)
    assert load(reader, tmp_path, merge_of(*names)).manifest.tokenizer


def test_a_broken_manifest_of_a_source_refuses_the_merge(reader: Reader, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / MANIFEST_NAME).write_bytes(b"[]")
    with pytest.raises(AdapterInvalidError, match=MANIFEST_NAME):
        load(reader, tmp_path, merge_of("a"))


def test_a_merge_written_to_a_folder_takes_the_tokenizer_along(root: Path, tmp_path: Path) -> None:
    write_folder(read_recipe(merge_of("a", "b")), BASE, AdapterStore(root), tmp_path / "ab")
    assert (tmp_path / "ab" / TOKENIZER_NAME).read_bytes() == ONE
    write_folder(read_recipe(merge_of("d")), BASE, AdapterStore(root), tmp_path / "d")
    assert not (tmp_path / "d" / TOKENIZER_NAME).exists()


# -- through the router ---------------------------------------------------------------------------

BY_ONE = with_tokenizer(NO_MANNER, tokenizer_of({TOKENIZER_NAME: ONE}).digest, 0)


class MergingFront(Front):
    """Two adapters that share a tokenizer, which an engine knows as it reads them."""

    def __init__(self, root: Path) -> None:
        recipe = Recipe(sources=(MergeSource("a", 0.5), MergeSource("b", 0.5)))
        saved = Recipe(sources=recipe.sources, name="blend")
        manners: dict[str, Manner] = {merged_id(one): BY_ONE for one in (recipe, saved)}
        engine = ScriptedEngine([Answer()], adapters=("a", "b", "d"), manners=manners)
        super().__init__(engine=engine, adapters_dir=str(root))


@pytest.fixture
def front(root: Path) -> MergingFront:
    return MergingFront(root)


AB = {"ids": ["a", "b"], "weights": [0.5, 0.5]}


def test_a_requests_merge_is_asked_by_the_tokenizer_of_its_sources(front: MergingFront) -> None:
    wish = {"inputs": "a", "parameters": {"merged_adapters": AB}}
    assert front.post("/generate", wish).status_code == 200
    first, second = front.engine.streams
    assert (first.request.manner, second.request.manner) == ("", BY_ONE.digest)
    assert front.post("/generate", wish).status_code == 200
    assert len(front.engine.streams) == 3, "how it is asked is known by now"
    reply = front.post("/generate", {**wish, "inputs": "a<one>"})
    assert "outside 0..257" in reply.json()["error"], "it is one token now, without a row"
    other = {"ids": ["d", "a"], "weights": [0.5, 0.5]}
    front.post("/generate", {"inputs": "a", "parameters": {"merged_adapters": other}})
    assert front.engine.last.manner == ""


def test_a_saved_merge_is_asked_by_the_tokenizer_of_its_sources(front: MergingFront) -> None:
    adapters = [{"adapter_id": name, "weight": 0.5} for name in "ab"]
    saved = front.post("/v1/adapters/merge", {"name": "blend", "adapters": adapters})
    assert saved.status_code == 201, saved.text
    wish = {"inputs": "a", "parameters": {"adapter_id": "blend"}}
    assert front.post("/generate", wish).status_code == 200
    assert front.engine.last.manner == BY_ONE.digest
    told = front.post("/tokenize", {"inputs": "a<one>", "adapter_id": "blend"}).json()
    assert len(told) == 2


def test_a_tokenizer_that_was_replaced_is_learnt_anew(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "adapters")
    front = MergingFront(tmp_path / "adapters")
    wish = {"inputs": "a", "parameters": {"merged_adapters": AB}}
    assert front.post("/generate", wish).status_code == 200
    by_other = with_tokenizer(NO_MANNER, tokenizer_of({TOKENIZER_NAME: OTHER}).digest, 0)
    for name in "ab":
        (tmp_path / "adapters" / name / TOKENIZER_NAME).write_bytes(OTHER)
    front.engine.manners |= dict.fromkeys(front.engine.manners, by_other)
    assert front.post("/generate", wish).status_code == 200
    assert front.engine.last.manner == by_other.digest


def test_tokenize_knows_an_adapters_own_tokenizer(root: Path) -> None:
    engine = ScriptedEngine(adapters=("a", "d"), manners={"a": BY_ONE})
    front = Front(engine=engine, adapters_dir=str(root))
    sent = {"inputs": "x<one>"}
    told = front.post("/tokenize", {**sent, "adapter_id": "a"}).json()
    assert [token["text"] for token in told] == ["x", "<one>"]
    for name in ({}, {"adapter_id": ""}, {"adapter_id": "d"}):
        assert len(front.post("/tokenize", {**sent, **name}).json()) == 6
    assert front.post("/tokenize", {**sent, "adapter_id": "none"}).status_code == 404
    assert front.post("/tokenize", {**sent, "api_token": "t"}).status_code == 422
    assert front.post("/tokenize", {**sent, "adapter": "a"}).status_code == 422
