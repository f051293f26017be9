"""Evaluations through a front: who is asked what, what it comes to, and what can go wrong."""

import asyncio
import json
import math
import re
from dataclasses import replace

import httpx
import msgspec
import pytest
import yaml

from eval_world import ARROW, Around, Oracle, make_front, run, write_rows
from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.facts import AdapterFacts
from lory_trainer.evaluation.options import read_options
from lory_trainer.evaluation.results import Evaluation
from lory_trainer.evaluation.rows import Row
from lory_trainer.evaluation.variants import Sampling, adapter_variant, base_variant, request
from scripted_engine import Front


def prompts(front: Front, adapter_id: str) -> set[str]:
    engine = front.engine
    assert isinstance(engine, Oracle)
    return {prompt for name, prompt in engine.prompts if name == adapter_id}


# -- side by side ---------------------------------------------------------------------------


def test_adapter_and_base_are_asked_the_same_and_compared_row_by_row(tmp_path):
    front = make_front()
    result = run(front, data=write_rows(tmp_path))
    assert [variant.name for variant in result.variants] == ["loud", "base"]
    loud, base = result.variants
    assert (loud.scores["exact_match"].value, base.scores["exact_match"].value) == (0.75, 0)
    assert prompts(front, "loud") == prompts(front, "") == {
        "one ->", "two ->", "quiet ->", "four ->"
    }  # fmt: skip
    (pairing,) = result.pairings
    assert (pairing.wins, pairing.ties, pairing.losses) == (3, 1, 0)
    assert result.candidate == "loud"
    assert [row.place for row in result.worst(9)] == ["rows.jsonl line 3"]
    assert loud.revision
    assert not base.revision


def test_the_server_fills_in_the_template_of_an_adapter(tmp_path):
    """Its fields are sent, so that what is scored is what callers get."""
    sent = []

    def see(request: httpx.Request) -> None:
        if request.url.path == "/generate":
            sent.append(json.loads(request.content))

    front = make_front()
    run(front, data=write_rows(tmp_path, ("one",)), transport=Around(front, see))
    assert [body["inputs"] for body in sent] == [{"text": "one"}, "one ->"]
    assert all(body["parameters"]["do_sample"] is False for body in sent)


def test_an_adapter_without_a_template_takes_the_one_given(tmp_path):
    front = make_front()
    front.engine.manners.clear()
    data = write_rows(tmp_path, ("one",))
    with pytest.raises(EvaluationError, match="--template"):
        run(front, data=data)
    result = run(front, data=data, template="{text} ->")
    assert result.variants[0].scores["exact_match"].value == 1


def test_an_adapter_of_a_source_may_be_unknown_until_it_is_asked(tmp_path):
    """The front has no sources, so it says so when the first row is asked."""
    data = write_rows(tmp_path, ("one",))
    with pytest.raises(EvaluationError, match="--template"):
        run(make_front(), data=data, adapters=["hub:org/name"])
    with pytest.raises(EvaluationError, match="--adapter-cache"):
        run(make_front(), data=data, adapters=["hub:org/name"], template="{text} ->")


def test_prompt_only_shows_examples_that_are_not_asked(tmp_path):
    front = make_front()
    data = write_rows(tmp_path, ("one", "two", "three", "four"))
    shown = {"instruction": "Shout.", "shots": 2}
    run(front, data=data, rows=2, compare=["prompt_only"], prompt_only=shown)
    asked = sorted(prompts(front, ""))
    assert len(asked) == 2
    examples = {"three ->THREE", "four ->FOUR"}
    for prompt, own in zip(asked, ("one ->", "two ->"), strict=True):
        instruction, *shots, last = prompt.split("\n\n")
        assert (instruction, set(shots), last) == ("Shout.", examples, own)
    with pytest.raises(EvaluationError, match="--shots-from"):
        run(front, data=data, compare=["prompt_only"], prompt_only=shown)


def test_prompt_only_ends_where_the_next_example_would_begin(tmp_path):
    front = make_front(says=lambda name, prompt: "ONE\n\ntwo ->")
    result = run(front, data=write_rows(tmp_path, ("one",)), compare=["prompt_only"])
    answers = result.rows[0].answers
    assert answers == {"loud": "ONE\n\ntwo ->", "prompt_only": "ONE"}


def test_prompt_only_may_be_a_chat(tmp_path):
    front = make_front()
    more = write_rows(tmp_path, ("a", "b"))
    shown = {"instruction": "Up", "shots": 1, "style": "chat"}
    more_keys = {"compare": ["prompt_only"], "prompt_only": shown, "max_new_tokens": 4}
    result = run(front, data=more, rows=1, **more_keys)
    (prompt,) = prompts(front, "")
    assert prompt.index("Up") < prompt.index("b ->") < prompt.index("a ->")
    assert result.variants[1].spent.generated_tokens > 0


def test_what_answers_begin_with_by_training_is_no_mistake(tmp_path):
    front = make_front(says=lambda name, prompt: " ONE" if name else "ONE")
    front.engine.manners["loud"] = msgspec.structs.replace(ARROW, completion_prefix=" ")
    result = run(front, data=write_rows(tmp_path, ("one",)))
    assert [v.scores["exact_match"].value for v in result.variants] == [1, 1]


def test_an_adapter_of_chats_is_compared_with_the_base_in_a_chat(tmp_path):
    front = make_front()
    front.engine.manners["loud"] = msgspec.structs.replace(ARROW, is_chat=True)
    data = write_rows(tmp_path, ("one",))
    run(front, data=data)
    assert prompts(front, "loud") == prompts(front, "")
    assert prompts(front, "") != {"one ->"}
    front.engine.prompts.clear()
    front.engine.manners["loud"] = msgspec.structs.replace(
        ARROW, digest="whole", template="", fields=(), is_chat=True
    )
    run(front, data=data, template="{text} ->")
    assert prompts(front, "loud") == prompts(front, "") != {"one ->"}
    front.engine.prompts.clear()
    result = run(front, data=data, template="{text} ->", metrics=["perplexity"])
    assert result.variants[0].scores["perplexity"].value == pytest.approx(math.exp(0.25))
    (asked,) = {prompt for prompt in prompts(front, "loud") if prompt.endswith("ONE")}
    assert asked == "<user>one ->\n<assistant>ONE"


def test_the_base_ends_where_the_adapter_does():
    """Or what it goes on to say would count against it alone."""
    like = adapter_variant(
        AdapterFacts("loud", template="{text} ->", stop=("\n",)), "", is_conversation=False
    )
    row, sampling = Row("line 1", {"text": "one"}, "ONE"), Sampling(0, 8, is_greedy=True)
    _, body = request(base_variant("tiny", like), row, sampling)
    assert body["parameters"]["stop"] == ["\n"]
    assert "stop" not in request(like, row, sampling)[1]["parameters"]
    _, body = request(base_variant("tiny", replace(like, stop=())), row, sampling)
    assert "stop" not in body["parameters"]


def test_two_adapters_are_compared_without_a_base(tmp_path):
    front = make_front()
    result = run(front, data=write_rows(tmp_path), adapters=["loud", "meek"], compare=[])
    assert [variant.name for variant in result.variants] == ["loud", "meek"]
    assert not prompts(front, "")


def test_the_same_seed_gives_the_same_figures(tmp_path):
    data = write_rows(tmp_path)
    metrics = ["exact_match", "rouge_l", "bleu", "label", "perplexity"]

    def figures() -> Evaluation:
        result = run(make_front(), data=data, metrics=metrics)
        timeless = [replace(one, spent=result.variants[0].spent) for one in result.variants]
        return replace(result, variants=tuple(timeless[1:]))

    assert figures() != replace(figures(), seed=1)
    assert [v.scores for v in figures().variants] == [v.scores for v in figures().variants]


def test_perplexity_is_of_the_wanted_answers_tokens(tmp_path):
    front = make_front()
    result = run(front, data=write_rows(tmp_path), metrics=["perplexity", "exact_match"])
    assert result.variants[0].scores["perplexity"].value == pytest.approx(math.exp(0.25))
    assert result.lower_is_better == ("perplexity",)


def test_answers_have_room_for_the_longest_wanted_one_and_no_more(tmp_path):
    front = make_front()
    data = write_rows(tmp_path, ("one", "longer"))
    assert run(front, data=data).max_new_tokens == len("longer") + 8
    assert run(front, data=data, max_new_tokens=2).max_new_tokens == 2
    assert run(front, data=data, max_new_tokens=2).variants[0].num_cut == 2


def test_costs_are_of_the_time_that_a_variant_took(tmp_path):
    result = run(make_front(), data=write_rows(tmp_path), price_per_hour=3600.0)
    loud, base = (variant.spent for variant in result.variants)
    num_tokens = loud.prompt_tokens + loud.generated_tokens
    assert loud.cost_per_million_tokens == pytest.approx(loud.wall_s / num_tokens * 1e6)
    assert loud.cost_per_correct == pytest.approx(loud.wall_s / 3)
    assert base.cost_per_correct is None


# -- a judge --------------------------------------------------------------------------------


def mark_of(prompt: str) -> str:
    found = re.search(r"<<[0-9a-f]{16}>>", prompt)
    assert found is not None
    return found[0]


def judge(prefers) -> httpx.MockTransport:
    """`prefers` is given both answers as the judge sees them."""

    def answer(request: httpx.Request) -> httpx.Response:
        text = json.loads(request.content)["messages"][0]["content"]
        _, _, a, b = [part.strip("\n") for part in text.split(mark_of(text))[2::2]]
        message = {"role": "assistant", "content": prefers(a, b)}
        return httpx.Response(200, json={"choices": [{"message": message}]})

    return httpx.MockTransport(answer)


@pytest.mark.parametrize(
    ("prefers", "counts"),
    [
        (lambda a, b: "A" if a.isupper() else "B", (3, 1, 0, 0)),
        (lambda a, b: "Answer: B." if a.isupper() else " **a**", (0, 1, 3, 0)),
        (lambda a, b: "A", (0, 4, 0, 0)),
        (lambda a, b: "Tie", (0, 4, 0, 0)),
        (lambda a, b: "A tie, or B", (0, 1, 0, 3)),
        (lambda a, b: [{"type": "text", "text": "A"}], (0, 1, 0, 3)),
        (lambda a, b: None, (0, 1, 0, 3)),
    ],
    ids=["better", "worse", "by place", "ties", "nonsense", "no text", "nothing"],
)
def test_a_judge_sees_both_orders(tmp_path, prefers, counts):
    result = run(
        make_front(),
        data=write_rows(tmp_path),
        judged_by=judge(prefers),
        judge={"url": "http://judge", "model": "wise"},
    )
    (found,) = result.judged
    assert (found.first, found.second) == ("loud", "base")
    assert (found.wins, found.ties, found.losses, found.unreadable) == counts


@pytest.mark.parametrize("body", [[], {}, {"choices": []}, {"choices": [{"text": "A"}]}])
def test_a_judge_that_speaks_another_way_gives_no_verdict(tmp_path, body):
    result = run(
        make_front(),
        data=write_rows(tmp_path),
        judged_by=httpx.MockTransport(lambda request: httpx.Response(200, json=body)),
        judge={"url": "http://judge", "model": "wise"},
    )
    assert result.judged[0].unreadable == 3


# -- what can go wrong ----------------------------------------------------------------------


def after(num: int, act):
    """Let so many generations through first."""
    seen = 0

    def spoil(request: httpx.Request) -> httpx.Response | None:
        nonlocal seen
        if request.url.path != "/generate":
            return None
        seen += 1
        return act(request) if seen > num else None

    return spoil


def die(request: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("the connection was closed", request=request)


def test_a_server_that_dies_midway_is_told_with_what_was_done(tmp_path):
    front = make_front()
    with pytest.raises(EvaluationError) as lost:
        run(front, data=write_rows(tmp_path), transport=Around(front, after(6, die)), concurrency=1)
    text = str(lost.value)
    assert "no answer from http://lory: the connection was closed" in text
    assert "2 of 4 rows of base were answered" in text


def test_a_refusal_is_told_in_the_servers_words(tmp_path):
    with pytest.raises(
        EvaluationError, match=r"rows.jsonl line \d: .*422.*max_new_tokens.*\(0 of 4 rows of loud"
    ):
        run(make_front(), data=write_rows(tmp_path), max_new_tokens=1000)


def test_overload_is_waited_out(tmp_path):
    busy = 0

    def overload(request: httpx.Request) -> httpx.Response | None:
        nonlocal busy
        busy += 1
        if busy > 3:
            return None
        return httpx.Response(429, headers={"retry-after": "0"}, json={"error": "full"})

    front = make_front()
    result = run(front, data=write_rows(tmp_path), transport=Around(front, after(1, overload)))
    assert result.variants[0].scores["exact_match"].value == 0.75


def test_no_more_than_so_many_are_asked_at_once(tmp_path):
    running, most = 0, 0

    class Counting(httpx.AsyncBaseTransport):
        def __init__(self, front: Front) -> None:
            self._inner = httpx.ASGITransport(app=front.app)

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            response = await self._inner.handle_async_request(request)
            running -= 1
            return response

    data = write_rows(tmp_path, tuple("abcdefghijklmnop"))
    run(make_front(), data=data, transport=Counting(make_front()), concurrency=3)
    assert most == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapters": ["nobody"]}, "serves no adapter 'nobody'"),
        ({"adapters": []}, "--adapter"),
        ({"completion": "answer"}, "--completion"),
        ({"metrics": ["exact_mach"]}, "did you mean exact_match"),
        ({"template": "{other}", "adapters": ["plain"]}, "line 1.*column `other`"),
        ({"template": "{text}"}, "loud has one of its own"),
        ({"metrics": ["json_fields"]}, "a wanted answer is not JSON"),
    ],
)
def test_what_cannot_be_evaluated_says_why_before_anything_is_asked(tmp_path, changes, says):
    front = make_front(adapters=("loud", "plain"))
    with pytest.raises(EvaluationError, match=says):
        run(front, **{"data": write_rows(tmp_path), **changes})
    assert not front.engine.streams


def test_an_adapter_replaced_midway_is_no_result(tmp_path, monkeypatch):
    from scripted_engine import ScriptedStream

    revisions = iter("abcdefgh")
    begin = ScriptedStream.__init__

    def begin_as_another(self, *args) -> None:
        begin(self, *args)
        self.adapter_revision = next(revisions)

    monkeypatch.setattr(ScriptedStream, "__init__", begin_as_another)
    with pytest.raises(EvaluationError, match="replaced while"):
        run(make_front(), data=write_rows(tmp_path))


def test_a_refused_adapter_is_told_by_its_refusal(tmp_path):
    front = make_front()
    entry = front.engine.entry

    def refused(adapter_id: str):
        return msgspec.structs.replace(entry(adapter_id), refusal="tensor x is damaged")

    front.engine.entry = refused
    with pytest.raises(EvaluationError, match="tensor x is damaged"):
        run(front, data=write_rows(tmp_path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no rows"),
        ("{\n", "line 1: not JSON"),
        ("[1]", "line 1: expected an object"),
        ('{"completion": null}', "line 1: column `completion` must hold text; it is null"),
        ('{"a": 5}', "no column of the wanted answer .*found: a; --completion"),
        ('{"text": "a"}', "a text alone has no answer to compare with; cut it in two"),
        ('{"text": "a", "text": "b"}', "`text` is there twice"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, content, says):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=says):
        run(make_front(), data=str(path))


def test_rows_may_be_one_json_list_and_hold_any_line_end(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a\u2028b", "completion": "A\u2028B"}]))
    assert run(make_front(), data=str(path)).variants[0].scores["exact_match"].value == 1
    line = json.dumps({"text": "a\u2028b", "completion": "x"}, ensure_ascii=False)
    path.write_text(line + "\n", encoding="utf-8")
    assert len(run(make_front(), data=str(path)).rows) == 1


# -- options --------------------------------------------------------------------------------


def section(tmp_path, **keys) -> dict:
    file = tmp_path / "run.yaml"
    values = {"base_model": "x", "adapter_id": "loud", "evaluation": keys}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return {"config": file}


def test_a_training_file_holds_an_evaluation(tmp_path):
    config = section(
        tmp_path,
        data="rows.jsonl",
        metrics=["exact_match", {"json_schema": "schema.json"}],
        compare=["base", "prompt_only"],
        gate={"json_schema.valid": ">= 0.95", "exact_match": "> base"},
        prompt_only={"shots": 2, "shots_from": "train.jsonl"},
    )["config"]
    options = read_options(config, {})
    assert options.data == str(tmp_path / "rows.jsonl")
    assert options.metrics == ("exact_match", f"json_schema={tmp_path / 'schema.json'}")
    assert options.gate == ("json_schema.valid >= 0.95", "exact_match > base")
    assert options.adapters == ("loud",)
    assert options.prompt_only.shots_from == str(tmp_path / "train.jsonl")
    more = read_options(config, {"data": "own.jsonl", "seed": 5, "prompt_only": {"shots": 1}})
    assert (more.data, more.seed) == ("own.jsonl", 5)
    assert more.prompt_only.shots == 1
    assert more.prompt_only.shots_from == options.prompt_only.shots_from


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"data": "a", "metric": ["x"]}, "metric: no such key; did you mean `metrics`"),
        ({"data": "a", "prompt_only": {"shot": 1}}, "did you mean `shots`"),
        ({"data": "a", "seed": "0"}, "seed"),
        ({"data": "a", "compare": ["bas"]}, "compare"),
        ({"data": "a", "concurrency": 0}, "concurrency"),
        ({"metrics": []}, "data: is required"),
        ({"data": "a", "judge": {"url": "http://x"}}, "judge.model: is required"),
    ],
)
def test_a_key_that_is_wrong_is_named(tmp_path, keys, says):
    with pytest.raises(EvaluationError, match=says):
        read_options(section(tmp_path, **keys)["config"], {})


def test_a_file_without_the_section_says_so(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base_model: x\n")
    with pytest.raises(EvaluationError, match="evaluation"):
        read_options(path, {})
