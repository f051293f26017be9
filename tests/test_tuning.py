"""Fine-tuning jobs from a caller's wish to a served adapter, with a trainer that trains nothing."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import fake_trainer
from lory_router.errors import Invalid
from lory_router.keys import Caller
from lory_router.registry import Registry
from lory_router.tuning.shapes import CreateJob
from scripted_engine import BASE
from tuning_world import (
    CHAT,
    FILES,
    JOBS,
    PAIR,
    WAIT_S,
    RefusingEngine,
    World,
    key,
    name_of,
    run,
    settings_in,
    unserved,
)

# -- files ----------------------------------------------------------------------------------


def test_a_file_is_kept_shown_and_deleted(tmp_path: Path):
    async def story(world: World) -> None:
        file_id = await world.upload(CHAT, CHAT, name="größe.jsonl")
        shown = (await world.client.get(f"{FILES}/{file_id}")).json()
        assert (shown["object"], shown["purpose"], shown["status"]) == (
            "file",
            "fine-tune",
            "processed",
        )
        content = (await world.client.get(f"{FILES}/{file_id}/content")).content
        assert len(content) == shown["bytes"]
        assert [json.loads(line) for line in content.splitlines()] == [CHAT, CHAT]
        listed = (await world.client.get(FILES)).json()
        assert [one["id"] for one in listed["data"]] == [file_id]
        gone = (await world.client.delete(f"{FILES}/{file_id}")).json()
        assert gone == {"id": file_id, "object": "file", "deleted": True}
        for path in ("", "/content"):
            assert (await world.client.get(f"{FILES}/{file_id}{path}")).status_code == 404
        assert list(world.settings.files.iterdir()) == []

    run(tmp_path, story)


def test_files_are_listed_in_pages_either_way_round(tmp_path: Path):
    async def story(world: World) -> None:
        ids = [await world.upload(CHAT) for _ in range(3)]
        one = (await world.client.get(f"{FILES}?limit=2")).json()
        assert ([f["id"] for f in one["data"]], one["has_more"]) == (ids[:0:-1], True)
        two = (await world.client.get(f"{FILES}?limit=2&after={one['last_id']}")).json()
        assert ([f["id"] for f in two["data"]], two["has_more"]) == (ids[:1], False)
        up = (await world.client.get(f"{FILES}?order=asc&purpose=fine-tune")).json()
        assert [f["id"] for f in up["data"]] == ids
        assert (await world.client.get(f"{FILES}?purpose=batch")).json()["data"] == []
        for query in ("order=up", "limit=0", "limit=x", "after=file-none", "nonsense=1"):
            assert (await world.client.get(f"{FILES}?{query}")).status_code == 400

    run(tmp_path, story)


def test_what_is_no_training_file_is_refused_and_leaves_nothing(tmp_path: Path):
    async def story(world: World) -> None:
        wrong = [
            await world.send(b"{}", purpose="assistants"),
            await world.send(b""),
            await world.send(b"{}", expires_after="1"),
            await world.client.post(FILES, data={"purpose": "fine-tune"}),
            await world.client.post(FILES, json={"file": "x"}),
        ]
        assert [reply.status_code for reply in wrong] == [400, 400, 400, 415, 415]
        assert (await world.send(b"{" * 2000)).status_code == 413
        assert (await world.send(b"{" * 900)).status_code == 200
        assert (await world.send(b"{" * 900)).status_code == 507
        assert len(list(world.settings.files.iterdir())) == 1

    run(tmp_path, story, max_file_bytes=1000, max_files_bytes=1500)


def test_a_slow_upload_holds_nobody_up_but_its_bytes_count(tmp_path: Path):
    async def story(world: World) -> None:
        begun, go = asyncio.Event(), asyncio.Event()
        head = b'--B\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        parts = head % (b"purpose", b"", b"fine-tune") + head % (
            b"file",
            b'; filename="a"',
            b"{" * 800,
        )

        async def body() -> AsyncIterator[bytes]:
            yield parts
            begun.set()
            await go.wait()
            yield b"--B--\r\n"

        form = {"content-type": "multipart/form-data; boundary=B"}
        slow = asyncio.create_task(world.client.post(FILES, content=body(), headers=form))
        await begun.wait()
        assert (await world.send(b"{" * 900)).status_code == 507
        assert (await world.send(b"{" * 500)).status_code == 200
        go.set()
        assert (await slow).status_code == 200

    run(tmp_path, story, max_file_bytes=1000, max_files_bytes=1500)


def test_what_a_killed_server_left_of_an_upload_is_removed(tmp_path: Path):
    async def story(world: World) -> None:
        assert not leftover.exists()

    leftover = settings_in(tmp_path).files / ".file-x.part"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"x")
    run(tmp_path, story)


# -- a job that goes well -------------------------------------------------------------------


def test_a_job_ends_in_an_adapter_and_tells_every_step(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create(suffix="Support Desk!", metadata={"team": "a"})
        assert (job["object"], job["fine_tuned_model"]) == ("fine_tuning.job", None)
        assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": AUTO}}
        done = await world.until(job["id"], "succeeded", "failed")
        assert (done["status"], done["error"]) == ("succeeded", None)
        name = done["fine_tuned_model"]
        assert name.startswith("ft-support-desk-")
        assert (world.settings.adapters / name / "adapter_config.json").is_file()
        assert (done["trained_tokens"], done["seed"], done["metadata"]) == (40, 1, {"team": "a"})
        assert done["finished_at"] >= done["created_at"] > 0
        assert done["estimated_finish"] is None
        told = await world.events(job["id"])
        assert told.pop(5).startswith("Trained for ")
        loaded = told.pop(4)
        assert loaded.startswith("Loaded and tokenized, after ")
        assert loaded.endswith(" s: step 0 of 4 done")
        assert told == [
            f"Created fine-tuning job: {job['id']}",
            "Files validated, moving job to queued state",
            "Fine-tuning job started",
            "The run begins by loading the base and tokenizing the rows, 1 in the training file",
            f"New fine-tuned model created: {name}",
            "The job has successfully completed",
        ]
        run_folder = world.settings.runs / job["id"]
        assert not [path for path in run_folder.iterdir() if path.is_dir()]
        steps = await world.events(job["id"], "metrics")
        assert steps[0] == "Step 1/4: training loss=1.0000"
        assert len(steps) == 4
        [result] = done["result_files"]
        table = (await world.client.get(f"{FILES}/{result}/content")).text.splitlines()
        assert table[0] == "step,train_loss,valid_loss,learning_rate,grad_norm,tokens"
        assert table[4] == "4,0.25,,0.001,0.5,40"
        shown = (await world.client.get("/metrics")).text
        values = dict(line.rsplit(" ", 1) for line in shown.splitlines() if line[0] != "#")
        seconds = float(values['lory_training_seconds_total{tenant="default"}'])
        assert 0 < seconds < WAIT_S
        cost = float(values['lory_training_cost_total{tenant="default"}'])
        assert cost == pytest.approx(seconds)
        assert cost == pytest.approx(done["usage"]["cost"], abs=0.1)
        assert values['lory_training_tokens_total{tenant="default"}'] == "40.0"
        assert float(values["lory_training_jobs_running"]) == 0

    run(tmp_path, story)


AUTO = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}


def test_the_last_checkpoints_are_served_beside_it(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create()
        done = await world.until(job["id"], "succeeded", "failed")
        reply = (await world.client.get(f"{JOBS}/{job['id']}/checkpoints")).json()
        found = [(c["step_number"], c["fine_tuned_model_checkpoint"]) for c in reply["data"]]
        name = done["fine_tuned_model"]
        assert found == [(step, f"{name}-step-{step}") for step in (4, 3, 2)]
        assert reply["data"][0]["metrics"]["train_loss"] == 0.25
        folders = sorted(path.name for path in world.settings.adapters.iterdir())
        assert folders == [name, *(f"{name}-step-{step}" for step in (2, 3, 4))]
        kept = world.settings.adapters / f"{name}-step-4"
        assert {path.name for path in kept.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }

    run(tmp_path, story)


def test_a_trainer_gets_the_job_in_its_own_words(tmp_path: Path):
    async def story(world: World) -> None:
        dpo = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5, "beta": 0.3}
        pairs = await world.upload(PAIR)
        method = {"type": "dpo", "dpo": {"hyperparameters": dpo}}
        job = await world.create(
            model="also", training_file=pairs, validation_file=pairs, method=method
        )
        assert job["method"] == method
        await world.until(job["id"], "succeeded")
        config = json.loads((world.settings.runs / job["id"] / "config.yaml").read_text())
        assert config["base"] == "/base"
        assert config["quantization"] == {"bits": 4, "double": True}
        assert config["data"] == config["eval_data"] == str(world.settings.file(pairs))
        assert (config["method"], config["epochs"]) == ("dpo", 2)
        assert config["dpo"] == {"beta": 0.3, "sft_weight": 1.0}
        assert (config["batch_size"], config["learning_rate_multiplier"]) == (4, 0.5)

    run(tmp_path, story, quantize="nf4", double_quant=True)


# -- a job that does not --------------------------------------------------------------------

ROW = json.dumps(CHAT).encode()


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (b'{"messages": []}', "line 1: messages must be a list"),
        (ROW + b"\n\nnonsense", "line 3: is not JSON"),
        (ROW + b"\n[1]", "line 2: is not a JSON object"),
        (b'{"prompt": "a"}', "line 1: messages must be a list"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "the last message must be"),
        (b'{"messages": [{"role": "boss", "content": "a"}]}', "each needs a role"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "each needs a content"),
        (b'{"messages": "\xff\xfe"}', "is not JSON"),
        (b'{"messages": ' + b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_wrong_row_is_named_before_anything_runs(tmp_path: Path, rows: bytes, why: str):
    async def story(world: World) -> None:
        sent = await world.send(rows)
        job = await world.create(training_file=sent.json()["id"])
        failed = await world.until(job["id"], "failed", "succeeded")
        error = failed["error"]
        assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
        assert why in error["message"]
        assert not (world.settings.runs / job["id"]).exists()

    run(tmp_path, story)


def test_preferences_are_asked_for_by_dpo_alone(tmp_path: Path):
    async def story(world: World) -> None:
        pairs, chat = await world.upload(PAIR), await world.upload(CHAT)
        for file_id, kind in ((pairs, "supervised"), (chat, "dpo")):
            job = await world.create(training_file=file_id, method={"type": kind})
            assert (await world.until(job["id"], "failed", "succeeded"))["status"] == "failed"

    run(tmp_path, story)


@pytest.mark.parametrize(
    ("seed", "code", "message"),
    [
        (fake_trainer.FAILING, "training_failed", "row 7 is too long"),
        (
            fake_trainer.DYING,
            "training_failed",
            "signal 9, as the kernel does where memory runs out: about to die",
        ),
        (fake_trainer.HUNGRY, "memory_exceeded", "more than 209715200 bytes"),
        (fake_trainer.HUNGRY_CHILD, "memory_exceeded", "more than 209715200 bytes"),
    ],
)
def test_a_run_that_fails_says_why_and_the_next_one_runs(
    tmp_path: Path, seed: int, code: str, message: str
):
    async def story(world: World) -> None:
        bad, good = await world.create(seed=seed), await world.create()
        error = (await world.until(bad["id"], "failed"))["error"]
        assert error["code"] == code
        assert message in error["message"]
        assert (await world.job(bad["id"]))["fine_tuned_model"] is None
        await world.until(good["id"], "succeeded")

    run(tmp_path, story, max_memory_bytes=200 * 2**20)


def test_no_folder_of_the_machine_is_told(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create(seed=fake_trainer.TELLING)
        failed = await world.until(job["id"], "failed", "succeeded")
        told = json.dumps(failed) + (await world.client.get(f"{JOBS}/{job['id']}/events")).text
        assert "look at" in told
        assert "no room" in told
        assert str(tmp_path) not in told

    run(tmp_path, story)


def test_events_are_listed_in_pages(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create()
        await world.until(job["id"], "succeeded", "failed")
        other = await world.create()
        await world.until(other["id"], "succeeded", "failed")
        path = f"{JOBS}/{job['id']}/events"
        whole = (await world.client.get(f"{path}?limit=100")).json()
        assert (len(whole["data"]), whole["has_more"]) == (8 + fake_trainer.NUM_STEPS, False)
        found: list[Any] = []
        more, after = True, ""
        while more:
            page = (await world.client.get(f"{path}?limit=3{after}")).json()
            assert len(page["data"]) <= 3
            found += page["data"]
            more, after = page["has_more"], f"&after={page['last_id']}"
        assert found == whole["data"]
        stranger = (await world.client.get(f"{JOBS}/{other['id']}/events")).json()["last_id"]
        assert (await world.client.get(f"{path}?after={stranger}")).status_code == 400

    run(tmp_path, story)


def test_an_adapter_that_the_server_refuses_is_a_failure(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create()
        error = (await world.until(job["id"], "failed", "succeeded"))["error"]
        assert error["code"] == "adapter_refused"
        assert "a tensor matches nothing" in error["message"]
        assert not (world.settings.adapters / name_of(job)).exists()

    run(tmp_path, story, engine=RefusingEngine)


# -- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-4o"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"training_file": ""}, "training_file"),
        ({"validation_file": ""}, "validation_file"),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta"),
        ({"hyperparameters": {"n_epoch": 1}}, "hyperparameters.n_epoch"),
        ({"method": {"type": "dpo"}, "hyperparameters": {}}, "hyperparameters"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 9.0}}}},
            "method.dpo.hyperparameters.beta",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"lr": 9.0}}}},
            "method.dpo.hyperparameters.lr",
        ),
        ({"models": "x"}, "models"),
    ],
)
def test_a_wish_is_checked_field_by_field(tmp_path: Path, fields: dict[str, Any], param: str):
    async def story(world: World) -> None:
        body = {"model": BASE, "training_file": await world.upload(CHAT), **fields}
        reply = await world.client.post(JOBS, json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert (await world.client.get(JOBS)).json()["data"] == []

    run(tmp_path, story)


def test_jobs_are_listed_in_pages_and_by_metadata(tmp_path: Path):
    async def story(world: World) -> None:
        file_id = await world.upload(CHAT)
        ids = [
            (await world.create(training_file=file_id, metadata={"n": str(n)}))["id"]
            for n in range(3)
        ]
        one = (await world.client.get(f"{JOBS}?limit=2")).json()
        assert ([job["id"] for job in one["data"]], one["has_more"]) == (ids[:0:-1], True)
        picked = (await world.client.get(JOBS, params={"metadata[n]": "1"})).json()["data"]
        assert [job["id"] for job in picked] == [ids[1]]
        for path in (f"{JOBS}/ftjob-none", f"{JOBS}/ftjob-none/events"):
            assert (await world.client.get(path)).status_code == 404

    run(tmp_path, story)


def test_only_so_many_jobs_wait_and_their_files_stay(tmp_path: Path):
    async def story(world: World) -> None:
        job = await world.create(seed=fake_trainer.SLOW)
        body = {"model": BASE, "training_file": job["training_file"]}
        assert (await world.client.post(JOBS, json=body)).status_code == 429
        gone = await world.client.delete(f"{FILES}/{job['training_file']}")
        assert gone.status_code == 409
        await world.until(job["id"], "succeeded")
        assert (await world.client.delete(f"{FILES}/{job['training_file']}")).status_code == 200

    run(tmp_path, story, max_jobs=1)


# -- tenants --------------------------------------------------------------------------------


def test_a_tenants_files_jobs_and_adapters_are_its_own(tmp_path: Path):
    async def story(world: World) -> None:
        world.client.headers.update(key("of-acme"))
        job = await world.create()
        done = await world.until(job["id"], "succeeded", "failed")
        assert (done["status"], done["organization_id"]) == ("succeeded", "acme")
        name = done["fine_tuned_model"]
        assert name.startswith("acme/ft-")
        assert (world.settings.adapters / name / "adapter_config.json").is_file()
        paths = [f"{JOBS}/{job['id']}", f"{JOBS}/{job['id']}/events"]
        paths += [f"{FILES}/{job['training_file']}", f"{FILES}/{job['training_file']}/content"]
        world.client.headers.update(key("of-other"))
        for path in paths:
            assert (await world.client.get(path)).status_code == 404
        assert (await world.client.get(JOBS)).json()["data"] == []
        assert (await world.client.get(FILES)).json()["data"] == []
        body = {"model": BASE, "training_file": job["training_file"]}
        assert (await world.client.post(JOBS, json=body)).status_code == 400
        world.client.headers.update(key("root"))
        for path in paths:
            assert (await world.client.get(path)).status_code == 200

    run(tmp_path, story)
    registry = Registry(str(tmp_path / "registry"))
    owners = registry.state.owners
    assert len(owners) == 1 + fake_trainer.NUM_STEPS
    assert set(owners.values()) == {"acme"}
    registry.close()


def test_a_tenant_takes_no_more_than_its_share(tmp_path: Path):
    async def story(world: World) -> None:
        world.client.headers.update(key("of-acme"))
        job = await world.create(seed=fake_trainer.SLOW)
        body = {"model": BASE, "training_file": job["training_file"]}
        assert (await world.client.post(JOBS, json=body)).status_code == 429
        assert (await world.send(b"{" * 950)).status_code == 507
        world.client.headers.update(key("of-other"))
        assert (await world.send(b"{" * 900)).status_code == 200
        await world.create()

    run(tmp_path, story, max_jobs_per_tenant=1, max_files_bytes_per_tenant=1000)


def test_a_tenants_job_needs_a_registry_that_is_kept(tmp_path: Path):
    async def whole() -> None:
        registry = Registry()
        tuning = unserved(tmp_path, registry)
        wish = CreateJob(model=BASE, training_file="file-x")
        with pytest.raises(Invalid, match="--registry"):
            await tuning.create(Caller("acme"), wish)
        tuning.close()
        registry.close()

    asyncio.run(whole())
