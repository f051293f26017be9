"""The trainer's YAML: every mistake is named, every default written out."""

import pytest

from lory_trainer.config import load_options, parse_options
from lory_trainer.errors import ConfigError
from lory_trainer.template import render, template_fields

MINIMAL = "base: ../base\ndata: rows.jsonl\n"


def test_minimal_config_has_every_default():
    options = parse_options(MINIMAL)
    assert options.template is None
    assert options.lora.r == 8
    assert options.lora.resolved_alpha == 16
    assert options.lora.target_modules == "all-linear"
    assert options.overlong == "error"


def test_learning_rate_in_scientific_notation_is_a_number():
    """YAML 1.1 reads 4e-4, without a dot, as text."""
    options = parse_options(MINIMAL + "learning_rate: 4e-4\nlora: {alpha: 3.2e1}\n")
    assert options.learning_rate == 4e-4
    assert options.lora.resolved_alpha == 32


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learnin_rate: 0.1", "learnin_rate: no such key; did you mean `learning_rate`?"),
        ("lora: {rank: 8}", "lora.rank: no such key; did you mean `lora.r`?"),
        ("lora: {target_module: x}", "did you mean `target_modules`?"),
        ("epochs: 2.5", "epochs: "),
        ("epochs: true", "epochs: "),
        ("batch_size: 0", "batch_size: "),
        ("batch_size: '8'", "batch_size: "),
        ("learning_rate: fast", "learning_rate: "),
        ("learning_rate: .nan", "learning_rate: "),
        ("learning_rate: nan", "learning_rate: "),
        ("schedule: cosin", "schedule: "),
        ("lora: {r: 0}", "lora.r: "),
        ("warmup_fraction: 1", "warmup_fraction: "),
        ("epochs: 1\nepochs: 2", "given twice: epochs"),
        ("lora: {r: 1, r: 2}", "given twice: r"),
        ("template: no column", "template: names no column"),
        ("template: '{text'", "template: "),
        ("template: '{text.__class__}'", "only {name} is allowed"),
        ("template: '{text[0]}'", "only {name} is allowed"),
        ("template: '{0}'", "only {name} is allowed"),
        ("template: '{}'", "only {name} is allowed"),
        ("template: '{text!r}'", "takes no `:` or `!`"),
        ("template: '{text:>20}'", "takes no `:` or `!`"),
        ("completion: completion\ntemplate: '{text} {completion}'", "shows the answer"),
        ("[", "not valid YAML"),
        ("? [a, b]\n: 1", "a key must be text, not a list or mapping"),
        ("lora: {? {a: b} : 1}", "a key must be text, not a list or mapping"),
        ("lora: &a {lora: *a}", "an alias within itself"),
    ],
)
def test_a_mistake_is_named(line, message):
    with pytest.raises(ConfigError) as caught:
        parse_options(f"{MINIMAL}{line}\n", "run.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("run.yaml:")


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="data: is required"):
        parse_options("base: x\n")
    with pytest.raises(ConfigError, match="key: value"):
        parse_options("")


def test_every_mistake_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_options(MINIMAL + "epoch: 1\nbatchsize: 2\n")
    assert "epochs" in str(caught.value)
    assert "batch_size" in str(caught.value)


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_options(tmp_path / "none.yaml")


def test_template_keeps_braces_of_template_and_of_text():
    template = '{{"in": {text}, "by": {who}}} {text}'
    assert template_fields(template) == ("text", "who")
    row = {"text": "{a} {{b}}", "who": "{text}"}
    assert render(template, row) == '{"in": {a} {{b}}, "by": {text}} {a} {{b}}'


def test_what_is_to_be_evaluated_is_checked_before_the_run():
    section = "evaluation: {data: test.jsonl, metrics: [label], gate: {label.accuracy: '> base'}}\n"
    assert parse_options(MINIMAL + section) == parse_options(MINIMAL)
    for wrong, says in (("{data: a, metric: [x]}", "did you mean `metrics`"), ("[a]", "lines")):
        with pytest.raises(ConfigError, match=f"evaluation: .*{says}"):
            parse_options(f"{MINIMAL}evaluation: {wrong}\n")
