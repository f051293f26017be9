"""The router's own reading of tokenizer files, held against transformers', and chat templates."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_tokenizers
from lory_router.chat_template import ChatTemplate, TemplateError
from lory_router.text import load_text_model

SAMPLES = [
    "the cat",
    " a\n<s>b</s> \u4f60\u597d \U0001f600",
    "",
    "  two  spaces",
    "na\u00efve\tt5 t6",
]
MESSAGES = [
    {"role": "system", "content": "be <kind> & 'brief'"},
    {"role": "user", "content": "h\u00e9llo"},
    {"role": "assistant", "content": "yes\n"},
    {"role": "user", "content": "again"},
]
TEMPLATES = [
    tiny_tokenizers.TEMPLATE,
    "{{ bos_token }}{%- for m in messages %}\n  {%- if m.role == 'user' %}\n"
    "[INST] {{ m.content | trim }} [/INST]\n"
    "  {%- else %}{{ m.content }}{{ eos_token }}{% endif %}\n{%- endfor %}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "{{ strftime_now('%Y') }}{% if tools is none %}no tools{% endif %}{{ undefined_name }}",
    "{{ dict(a=1)['a'] }}",
]
MODELS = ["byte_level", "words", "sentence_pieces", "metaspace"]


def save(folder: Path, name: str, template: str | None = None, **config: object) -> None:
    getattr(tiny_tokenizers, name)().tokenizer.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>", "special": True}
    known = {"bos_token": "<s>", "eos_token": eos, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(known | config))


def oracle(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.mark.parametrize("name", MODELS)
def test_encoding_and_decoding_are_transformers(tmp_path: Path, name: str):
    save(tmp_path, name)
    ours, theirs = load_text_model(str(tmp_path)), oracle(tmp_path)
    for sample in SAMPLES:
        for special in (True, False):
            token_ids = theirs.encode(sample, add_special_tokens=special)
            assert list(ours.encode(sample, special)) == token_ids
            text = theirs.decode(
                token_ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
            )
            assert ours.decode(token_ids, skip_special_tokens=special) == text


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_file", [True, False])
def test_a_prompts_ends_are_transformers(tmp_path: Path, config: dict, in_file: bool):
    save(tmp_path, "byte_level", **config)
    if in_file:
        model = tiny_tokenizers.with_bos(tiny_tokenizers.byte_level())
        model.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert list(load_text_model(str(tmp_path)).encode("ab")) == oracle(tmp_path).encode("ab")


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_rendered_as_transformers_renders_them(tmp_path: Path, template: str):
    save(tmp_path, "byte_level", template)
    model = load_text_model(str(tmp_path))
    assert model.chat_template is not None
    theirs = oracle(tmp_path).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert model.chat_template.render(MESSAGES) == theirs


def test_named_special_tokens_are_special_even_if_only_words(tmp_path: Path):
    from tokenizers import Tokenizer, models

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    Tokenizer(models.WordLevel(vocab, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    model = load_text_model(str(tmp_path))
    assert model.special_ids == {2}
    assert model.decode([3, 2]) == "a"


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path):
    tokenizer = tiny_tokenizers.byte_level().tokenizer
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_text_model(str(tmp_path)).encode("abcd") == (97, 98, 99, 100)


def test_a_template_file_goes_before_the_configuration(tmp_path: Path):
    save(tmp_path, "byte_level", "from config")
    (tmp_path / "chat_template.jinja").write_text("from file")
    model = load_text_model(str(tmp_path))
    assert model.chat_template is not None
    assert model.chat_template.render(MESSAGES) == "from file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    save(tmp_path, "byte_level", chat_template=named)
    model = load_text_model(str(tmp_path))
    assert model.chat_template is not None
    assert model.chat_template.render(MESSAGES) == "y"


def test_a_folder_without_a_fast_tokenizer_is_refused_with_the_fix(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json; save its fast tokenizer"):
        load_text_model(str(tmp_path))


def test_a_template_that_does_not_compile_is_refused_at_start():
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ messages[99]['content'] + 1 }}",
        "{{ 1 / 0 }}",
        "{{ dict.__class__.__mro__ }}",
        "{{ dict.mro() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox_or_break_the_server(template: str):
    with pytest.raises(TemplateError):
        ChatTemplate(template, {}).render(MESSAGES)


def test_the_front_loads_neither_torch_nor_transformers():
    code = (
        "import lory_router.app, sys;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'lory_kernels') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
