"""The matrix of PEFT's features is whole, true of what the code does, and what the docs say."""

import ast
import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftType

import parity_table
from adapter_files import make_config
from lory_server.adapters.config import AdapterConfig, read_config
from lory_server.adapters.errors import AdapterInvalidError
from parity_matrix import REFUSED, ROWS, SERVED, WITHOUT_EFFECT, Proof, Row

TESTS = Path(__file__).parent


def name_of(row: Row) -> str:
    return re.sub(r"\W+", "-", row.feature)


def read(example: Mapping[str, Any]) -> AdapterConfig:
    return read_config(json.dumps(make_config(4, **example)).encode())


@cache
def source_of(module: str) -> str:
    return (TESTS / f"{module}.py").read_text()


@cache
def functions_of(module: str) -> frozenset[str]:
    nodes = ast.walk(ast.parse(source_of(module)))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef))


def test_every_field_of_the_installed_peft_has_its_row_and_no_other() -> None:
    known = set(LoraConfig.__dataclass_fields__)
    listed = {name for row in ROWS for name in row.fields}
    assert known - listed == set(), "fields of LoraConfig that the matrix does not know"
    assert listed - known == set(), "fields that LoraConfig does not have"


def test_no_feature_stands_twice() -> None:
    assert Counter(row.feature for row in ROWS).most_common(1)[0][1] == 1


@pytest.mark.parametrize("row", SERVED, ids=name_of)
def test_what_is_served_is_accepted_and_has_a_test_that_runs_it(row: Row) -> None:
    assert row.proofs
    assert not row.says
    assert set(row.example) <= {*row.fields, "task_type"}
    read(row.example)


@pytest.mark.parametrize("row", REFUSED, ids=name_of)
def test_what_is_refused_is_refused_by_name(row: Row) -> None:
    assert row.says
    if row.proofs:
        return  # it takes the adapter's tensors, too: the proof looks for the words
    with pytest.raises(AdapterInvalidError) as caught:
        read(row.example)
    assert row.says in str(caught.value)
    assert any(name in str(caught.value) for name in row.fields)


@pytest.mark.parametrize("row", WITHOUT_EFFECT, ids=name_of)
def test_what_has_no_effect_changes_nothing_that_is_read(row: Row) -> None:
    plain, changed = read({}), read(row.example)
    for name in AdapterConfig.__dataclass_fields__:
        if name not in ("is_selected", "base_model_name"):
            assert getattr(plain, name) == getattr(changed, name)
    modules = [f"model.layers.{i}.{name}" for i in range(3) for name in ("mlp.up_proj", "x.q_proj")]
    assert all(plain.is_selected(name) == changed.is_selected(name) for name in modules)


@pytest.mark.parametrize(
    "proof",
    sorted({p for row in ROWS for p in row.proofs}, key=str),
    ids=lambda p: f"{p.test}-{p.case}",
)
def test_a_proof_is_a_test_with_that_case(proof: Proof) -> None:
    module, function = proof.test.split("::")
    assert function in functions_of(module)
    source = source_of(module)
    if proof.case and f'"{proof.case}"' not in source:
        from_world = re.search(r"from parity_world import \(?([\w\s,]+)", source)
        assert from_world, proof
        assert "ParityWorld" in from_world[1]
        assert f'"{proof.case}"' in source_of("parity_world")


@pytest.mark.parametrize("row", [row for row in REFUSED if row.proofs], ids=name_of)
def test_a_proof_of_a_refusal_looks_for_its_words(row: Row) -> None:
    for proof in row.proofs:
        assert row.says in source_of(proof.test.split("::")[0])


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind != PeftType.LORA])
def test_every_other_kind_of_adapter_is_refused_by_name(kind: str) -> None:
    with pytest.raises(AdapterInvalidError, match=f"peft_type is '{kind}'; only LORA is served"):
        read({"peft_type": kind})


def test_the_docs_have_the_table_as_it_is() -> None:
    text = parity_table.PAGE.read_text()
    assert parity_table.fill(text) == text, "run python tests/parity_table.py"


def test_a_table_that_is_missing_is_noticed() -> None:
    with pytest.raises(ValueError, match="has 0 tables of parity"):
        parity_table.fill("no table")
