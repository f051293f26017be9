"""The settings: each documented, each reaching the part it is for, each wrong one refused."""

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lory_router.config import (
    ConfigError,
    ServeConfig,
    check_environment,
    engine_environment,
    environment_names,
    serve_parameters,
)
from lory_router.values import parse_size
from lory_server.messages import EngineOptions

ROOT = Path(__file__).parents[1]


def config(**flags: Any) -> ServeConfig:
    return ServeConfig.from_flags({"model": "org/base"} | flags)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512MiB", 512 * 1024**2),
        ("512mib", 512 * 1024**2),
        ("4GB", 4 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("7KB", 7000),
        ("2TiB", 2 * 1024**4),
        ("9B", 9),
    ],
)
def test_sizes_are_read_in_thousands_and_in_1024s(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "4G", "-1", "1e9", "GB", "4 GBs", "0x10", "inf", "4GB 1"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        parse_size(text)


@given(st.integers(0, 10**15))
def test_a_bare_number_is_bytes(number: int) -> None:
    assert parse_size(str(number)) == number


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": ""}, "--model: name the base"),
        ({"model": "./not-there"}, "--model: there is no folder ./not-there"),
        ({"adapters": "not-there"}, "--adapters: there is no folder not-there"),
        ({"double_quant": True}, "--double-quant: needs --quantize nf4"),
        ({"port": 70000}, "--port: 70000 is too large; at most 65535"),
        ({"port": -1}, "--port: -1 is too small"),
        ({"max_batch_rows": 0}, "--max-batch-rows: 0 is too small; at least 1"),
        ({"max_queued": 0}, "--max-queued"),
        ({"max_best_of": 0}, "--max-best-of"),
        ({"threads": -1}, "--threads"),
        ({"price_per_hour": float("nan")}, "--price-per-hour: nan"),
        ({"price_per_hour": -1.0}, "--price-per-hour"),
        ({"step_timeout": 0.0}, "--step-timeout: must be more than 0"),
        ({"request_timeout": float("inf")}, "--request-timeout: inf"),
        ({"max_body_bytes": 0}, "--max-body-bytes"),
        ({"max_step_tokens": 8, "max_batch_rows": 9}, "--max-step-tokens: 8 cannot hold"),
        ({"max_model_len": 64, "max_input_length": 64}, "--max-input-length: 64 leaves no room"),
        ({"memory": 100, "kv_memory": 60, "adapter_memory": 60}, "--memory: 100 bytes"),
        ({"memory": 100, "kv_memory": 60, "full_weights_memory": 60}, "--memory: 100 bytes"),
        ({"api_key": " "}, "--api-key: holds no key"),
        ({"api_key": ","}, "--api-key: holds no key"),
        ({"metrics_adapter_labels": 0}, "--metrics-adapter-labels"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_its_flag(
    flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as told:
        config(**flags)
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)
    assert told.value.exit_code == 2


def test_a_file_or_an_adapter_in_a_folders_place_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text("{}")
    for flags, message in (
        ({"model": str(file)}, f"--model: {file} is a file, not a folder"),
        ({"adapters": str(file)}, f"--adapters: {file} is a file, not a folder"),
        (
            {"adapters": str(tmp_path)},
            f"--adapters: {tmp_path} is itself an adapter; give its parent, {tmp_path.parent}",
        ),
    ):
        with pytest.raises(ConfigError) as told:
            config(**flags)
        assert str(told.value) == message


def test_every_engine_option_can_be_set_and_arrives(tmp_path: Path) -> None:
    flags = {
        "adapters": str(tmp_path / "a"), "adapter_cache": str(tmp_path / "c"),
        "device": "cpu", "dtype": "bfloat16", "quantize": "nf4",
        "double_quant": True, "max_model_len": 99, "max_batch_rows": 3, "max_step_tokens": 77,
        "max_queued": 5, "block_size": 8, "memory": 1000, "kv_memory": 300, "adapter_memory": 200,
        "adapter_host_memory": 400, "full_weights_memory": 100, "max_resident_adapters": 2,
        "reader_processes": 2,
        "prefix_caching": False, "cuda_graphs": False,
        "threads": 1, "allow_base_mismatch": True, "log_level": "warning",
    }  # fmt: skip
    (tmp_path / "a").mkdir()
    options = config(**flags).engine_options()
    untouched = EngineOptions(model="")
    for name in EngineOptions.__struct_fields__:
        assert getattr(options, name) != getattr(untouched, name), name
    assert options.adapter_pool_bytes == 200
    assert options.adapter_host_bytes == 400
    assert options.full_weight_bytes == 100


def test_defaults_are_the_engines_own() -> None:
    assert config().engine_options() == EngineOptions(model="org/base")


def test_the_fronts_settings_arrive() -> None:
    settings = config(
        api_key="one, two", max_queued=7, max_input_length=11, max_best_of=2,
        max_stop_sequences=3, max_body_bytes=999, request_timeout=4.0, served_model_name="a,b",
    ).router_settings()  # fmt: skip
    assert settings.api_keys == ("one", "two")
    assert settings.model_names == ("a", "b")
    assert settings.max_concurrent_requests == 7
    assert settings.max_input_length == 11
    assert settings.max_best_of == 2
    assert settings.max_stop_sequences == 3
    assert settings.max_body_bytes == 999
    assert settings.request_timeout_s == 4.0


def test_a_local_base_is_called_by_its_folders_name_not_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    assert config(model=str(folder)).model_names == ("tiny",)
    assert config(model="org/base").model_names == ("org/base",)


def test_keys_are_not_shown_when_the_configuration_is() -> None:
    assert "s3cret" not in repr(config(api_key="s3cret"))


def test_every_setting_has_one_sentence_and_a_variable() -> None:
    names = [parameter.name for parameter in serve_parameters()]
    assert len(names) == len(set(names)) > 30
    assert {f"LORY_{name.upper()}" for name in names} == environment_names()
    for parameter in serve_parameters():
        assert parameter.default.help.endswith(".")


def test_every_section_is_documented() -> None:
    for section in fields(ServeConfig):
        assert getattr(config(), section.name).__doc__


@pytest.mark.parametrize(
    ("name", "hint"),
    [("LORY_MODLE", "did you mean LORY_MODEL"), ("LORY_ZZZZ", "see lory serve --help")],
)
def test_a_misspelt_variable_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{hint}"):
        check_environment({"PATH": "/bin", "LORY_PORT": "1", name: "x"})


def test_known_and_foreign_variables_pass() -> None:
    check_environment(dict.fromkeys(environment_names(), "1") | {"HF_TOKEN": "x", "LORYX": "y"})


def test_the_engine_does_not_inherit_our_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORY_API_KEY", "s3cret")
    monkeypatch.setenv("HF_HOME", "/cache")
    inherited = engine_environment()
    assert "LORY_API_KEY" not in inherited
    assert inherited["HF_HOME"] == "/cache"


def test_no_other_module_reads_the_environment() -> None:
    readers = []
    for package in ("router", "server", "kernels", "trainer"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if any(
                isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
                for node in ast.walk(tree)
            ):
                readers.append(path.name)
    assert readers == ["config.py"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_the_engine_allocates_huge_pages_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert engine_environment()["GLIBC_TUNABLES"] == expected
