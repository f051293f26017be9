"""aLoRA, DoRA, plain adapters, merges and the base in one batch, under every pressure at once.

KV runs short, the device holds fewer adapters than run, prompts share prefixes, two tenants ask
for the same: every token is still what PEFT says for that adapter alone.
"""

import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lory_router.cli import app
from lory_server.recipes import MergeSource, Recipe, merged_id
from parity_world import ParityWorld, Session, save_adapters
from test_engine_parity import BASE
from test_engine_parity_alora import (
    INVOCATIONS,
    InvokedReference,
    compare,
    filler,
    make_adapters,
)

SOURCES = (("plain-8", 0.75), ("plain-3", -0.5))
MERGE = merged_id(Recipe(sources=tuple(MergeSource(*one) for one in SOURCES)))
NAMES = ("alora-8", "alora-16", "alora-pattern", "dora-8", "plain-8", "plain-3", MERGE, BASE)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    """The merge's folder, by which PEFT knows it, lies beside those that are served."""

    def make(family: str, base: Path, folder: Path) -> dict[str, Path]:
        more = {"plain-3": {"rank": 3, "alpha": 9, "target_modules": "all-linear"}}
        adapters = make_adapters(family, base, folder) | save_adapters(more, base, folder)
        of = [part for name, weight in SOURCES for part in ("--of", f"{name}={weight}")]
        places = ["--model", str(base), "--adapters", str(folder)]
        written = folder.parent / "merged"
        assert CliRunner().invoke(app, ["merge", str(written), *of, *places]).exit_code == 0
        return {**adapters, MERGE: written}

    return ParityWorld.make("llama", tmp_path_factory.mktemp("llama"), make)


def submit_mixed(session: Session) -> None:
    """Every adapter on documents that all share, each tenant in a round of its own; the invocation
    of an aLoRA stands in prompts of others, too."""
    rng = random.Random(11)
    documents = [filler(rng, length) for length in (21, 40)]
    for turn in range(4):
        asked = [(name, document) for name in NAMES for document in documents]
        rng.shuffle(asked)
        for name, document in asked:
            invocation = INVOCATIONS.get(name, rng.choice([*INVOCATIONS.values()]))
            session.submit(
                len(session.answers),
                [*document, *invocation, *filler(rng, rng.randrange(3))],
                name,
                tenant=("one", "two")[turn % 2],
                max_new_tokens=rng.randint(1, 12),
                ignore_eos=True,
            )
            session.step()


@pytest.mark.parametrize("depth", [0, 1])
def test_all_kinds_in_one_batch_under_every_pressure_say_what_peft_says(
    world: ParityWorld, depth: int
) -> None:
    options = world.options(kv_bytes=20 * 4096, max_step_tokens=13, max_resident_adapters=3)
    session = Session(options, depth)
    submit_mixed(session)
    session.run()
    session.close()
    assert session.preemptions > 0
    assert session.moves("evict", "device") > 0
    assert sum(report.prefix_hits for report in session.reports) > 0
    asked = {command.adapter_id for command in session.prompts.values()}
    assert asked == {*NAMES}
    assert all(a.finished and a.finished.reason == "length" for a in session.answers.values())
    compare(session, world, InvokedReference(world.base)).check()
