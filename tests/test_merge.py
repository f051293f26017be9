"""Merged numbers are what they are called: the sum to the last digit, or what PEFT computes."""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from adapter_files import BASE, Tensors, write_adapter
from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.config import MAX_RANK
from lory_server.adapters.errors import AdapterError, AdapterInvalidError, RevisionNotFoundError
from lory_server.adapters.format import AdapterManifest, AdapterSlice, Base
from lory_server.adapters.merge import dare_generator, source_revision
from lory_server.adapters.merge_plan import MAX_SVD_RANKS, module_of
from lory_server.adapters.merge_sources import locate
from lory_server.adapters.reader import Reader, ThreadReader
from lory_server.adapters.store import AdapterStore
from lory_server.model.families import read_spec
from lory_server.model.sites import Site
from lory_server.recipes import MergeSource, Recipe, called, merged_id, read_recipe

SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def recipe_of(*sources: tuple[str, float], **fields: Any) -> Recipe:
    return Recipe(sources=tuple(MergeSource(*source) for source in sources), **fields)


def load(root: Path, name: str, base: Base = BASE, reader: Reader | None = None) -> AdapterBlob:
    reader = reader or ThreadReader(base, torch.float32)
    with locate(AdapterStore(root), name) as files:
        return reader.blob(files, reader.manifest(files))


def merged(
    root: Path, *sources: tuple[str, float], base: Base = BASE, **fields: Any
) -> AdapterBlob:
    return load(root, merged_id(recipe_of(*sources, **fields)), base)


def factors(blob: AdapterBlob) -> Iterator[tuple[str, AdapterSlice, Tensor, Tensor]]:
    """Module, slice, A [rank, in] and B [out, rank]."""
    for part, starts in blob.manifest.placed(blob.chunk_starts):
        assert part.a is not None
        assert part.b is not None
        a = blob.data[starts["a"] :][: math.prod(part.a.shape)].view(part.a.shape)
        b = blob.data[starts["b"] :][: math.prod(part.b.shape)].view(part.b.shape[::-1]).T
        yield module_of(part), part, a, b


def deltas(blob: AdapterBlob) -> dict[str, Tensor]:
    return {module: part.scale * (b.double() @ a.double()) for module, part, a, b in factors(blob)}


def weighted_sum(root: Path, *sources: tuple[str, float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, weight in sources:
        for module, delta in deltas(load(root, name)).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
    return total


def refusal(root: Path, *sources: tuple[str, float], **fields: Any) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        merged(root, *sources, **fields)
    return caught.value


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    for module, delta in found.items():
        error = (delta - expected[module]).norm() / expected[module].norm()
        assert error < relative, (module, float(error))


# -- the sum --------------------------------------------------------------------------------


@pytest.fixture
def unequal(tmp_path: Path) -> Path:
    """Ranks, alphas, scalings, dtypes and modules of all sorts."""
    write_adapter(tmp_path / "a", rank=3, seed=1)
    write_adapter(tmp_path / "b", 8, ("q_proj", "v_proj"), seed=2, use_rslora=True)
    pattern = {"rank_pattern": {}, "alpha_pattern": {"down_proj": 5}}
    write_adapter(tmp_path / "c", rank=5, seed=3, dtype=torch.bfloat16, lora_alpha=7, **pattern)
    write_adapter(tmp_path / "d", 2, ("o_proj",), seed=4, layers_to_transform=[1], change=_second)
    return tmp_path


def _second(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.0." in name]:
        del tensors[name]


def test_linear_is_the_weighted_sum_of_what_each_changes(unequal: Path) -> None:
    sources = (("a", 0.5), ("b", -1.25), ("c", 2.0), ("d", 3.0))
    blob = merged(unequal, *sources)
    check_same(deltas(blob), weighted_sum(unequal, *sources), 1e-5)
    ranks = {module: part.rank for module, part, _, _ in factors(blob)}
    assert ranks["model.layers.0.self_attn.q_proj"] == 3 + 8 + 5
    assert ranks["model.layers.0.self_attn.o_proj"] == 3 + 5
    assert ranks["model.layers.1.self_attn.o_proj"] == 3 + 5 + 2


def test_one_source_twice_is_the_source_twice(unequal: Path) -> None:
    check_same(
        deltas(merged(unequal, ("b", 1.0), ("b", 1.0))), weighted_sum(unequal, ("b", 2.0)), 1e-6
    )
    check_same(deltas(merged(unequal, ("b", 1.0))), deltas(load(unequal, "b")), 1e-6)


def test_svd_without_loss_is_the_sum_and_with_it_the_nearest(unequal: Path) -> None:
    sources = (("a", 0.5), ("b", -1.25), ("c", 2.0))
    expected = weighted_sum(unequal, *sources)
    check_same(deltas(merged(unequal, *sources, method="svd", rank=64)), expected, 1e-5)
    blob = merged(unequal, *sources, method="svd", rank=2)
    assert {part.rank for _, part, _, _ in factors(blob)} == {2}
    for module, delta in deltas(blob).items():
        u, s, vh = torch.linalg.svd(expected[module])
        best = u[:, :2] * s[:2] @ vh[:2]
        assert (delta - best).norm() < 1e-4 * best.norm(), module


def test_a_result_is_rounded_once(unequal: Path) -> None:
    name = merged_id(recipe_of(("a", 0.3), ("c", 0.7)))
    exact = load(unequal, name)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = load(unequal, name, reader=ThreadReader(BASE, dtype))
        assert rounded.revision == exact.revision
        for one, other in zip(factors(rounded), factors(exact), strict=True):
            assert torch.equal(one[2], other[2].to(dtype))
            assert torch.equal(one[3], other[3].to(dtype))


# -- PEFT -----------------------------------------------------------------------------------


class Peft:
    """The same adapters in transformers + PEFT, merged by PEFT."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "adapters"
        self.model_folder = tiny_models.build("llama", folder / "base")
        equal = {"rank": 6, "alpha": 9, "target_modules": SPLIT}
        few = {"rank": 6, "alpha": 12, "target_modules": ["q_proj", "down_proj"]}
        kinds: dict[str, dict[str, Any]] = {
            "a": equal,
            "b": {**equal, "alpha": 3, "use_rslora": True},
            "c": few,
            "wide": {"rank": 16, "alpha": 16, "target_modules": ["q_proj", "o_proj"]},
        }
        for seed, (name, kind) in enumerate(kinds.items()):
            tiny_models.save_adapter(self.root / name, self.model_folder, seed=seed, **kind)
        self.base = Base(sites_of(self.model_folder))
        self.model = self._loaded(list(kinds))
        self._num_merged = 0

    def _loaded(self, names: list[str]) -> Any:
        from peft import PeftModel

        base = tiny_models.load_reference(self.model_folder, torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, *others = names
            model = PeftModel.from_pretrained(base, str(self.root / first), adapter_name=first)
            for name in others:
                model.load_adapter(str(self.root / name), adapter_name=name)
        return model

    def merged(self, *sources: tuple[str, float], **how: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each module that has any."""
        self._num_merged += 1
        name = f"merged{self._num_merged}"
        names, weights = [list(one) for one in zip(*sources, strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.add_weighted_adapter(names, weights, name, **how)
        return {
            module.removeprefix("base_model.model."): (
                layer.lora_A[name].weight.detach(),
                layer.lora_B[name].weight.detach(),
            )
            for module, layer in self.layers()
            if name in layer.lora_A
        }

    def layers(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module


def sites_of(folder: Path) -> tuple[Site, ...]:
    return read_spec(folder).sites()


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> Peft:
    return Peft(tmp_path_factory.mktemp("peft"))


def check_like_peft(
    peft: Peft, expected: dict[str, tuple[Tensor, Tensor]], *sources: tuple[str, float], **how: Any
) -> None:
    blob = merged(peft.root, *sources, base=peft.base, **how)
    found = {module: (a, b) for module, _, a, b in factors(blob)}
    assert found.keys() == expected.keys()
    for module, (a, b) in found.items():
        torch.testing.assert_close(a, expected[module][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(b, expected[module][1], rtol=1e-6, atol=1e-7)
    assert {part.scale for part in blob.manifest.slices} == {1.0}


def test_linear_is_pefts_cat(peft: Peft) -> None:
    sources = (("a", 0.7), ("wide", -0.4), ("b", 1.5))
    expected = {
        module: (a, b) for module, (a, b) in peft.merged(*sources, combination_type="cat").items()
    }
    blob = merged(peft.root, *sources, base=peft.base)
    for module, part, a, b in factors(blob):
        # PEFT gives every module the rank of them all, and leaves zeros.
        wide_a, wide_b = expected[module]
        torch.testing.assert_close(a, wide_a[: part.rank], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(b, wide_b[:, : part.rank], rtol=1e-6, atol=1e-7)
        assert not wide_a[part.rank :].any()


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_pruning_is_pefts(peft: Peft, method: str, density: float, sign: str) -> None:
    sources = (("a", 0.7), ("b", -1.5), ("c", 0.4))
    how = {"density": density, "majority_sign_method": sign}
    expected = peft.merged(*sources, combination_type=method, **how)
    check_like_peft(peft, expected, *sources, method=method, **how)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_with_the_same_draws(peft: Peft, method: str, density: float) -> None:
    sources = (("a", 0.7), ("b", -1.5), ("c", 0.4))
    names, weights = [list(one) for one in zip(*sources, strict=True)]
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    for module, layer in peft.layers():
        name = module.removeprefix("base_model.model.")
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.set_rng_state(dare_generator(11, name).get_state())
            present = [one for one in names if one in layer.lora_A]
            if present:
                expected[name] = tuple(
                    peft.model.base_model._generalized_task_arithmetic_weighted_adapter(
                        method, names, weights, layer, density, "total"
                    )
                )
    check_like_peft(peft, expected, *sources, method=method, density=density, seed=11)


def test_dare_draws_by_its_seed_and_nothing_else(peft: Peft) -> None:
    def data(seed: int, *names: str) -> Tensor:
        sources = [(name, 1.0) for name in names]
        how: dict[str, Any] = {"method": "dare_linear", "density": 0.5, "seed": seed}
        return merged(peft.root, *sources, base=peft.base, **how).data

    assert torch.equal(data(1, "a", "b"), data(1, "a", "b"))
    assert not torch.equal(data(1, "a", "b"), data(2, "a", "b"))


def test_svd_is_pefts(peft: Peft) -> None:
    sources = (("a", 0.7), ("wide", -0.4))
    expected = peft.merged(*sources, combination_type="svd", svd_rank=5)
    blob = merged(peft.root, *sources, base=peft.base, method="svd", rank=5)
    check_same(
        deltas(blob),
        {module: b.double() @ a.double() for module, (a, b) in expected.items()},
        1e-4,
    )


# -- LoRAX ----------------------------------------------------------------------------------


def test_loraxs_linear_sums_a_and_b_and_is_not_the_sum(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", rank=4, seed=1, lora_alpha=8)
    write_adapter(tmp_path / "b", rank=4, seed=2, lora_alpha=64)
    sources = (("a", 0.5), ("b", 0.5))
    first = {module: (a, b) for module, _, a, b in factors(load(tmp_path, "a"))}
    second = {module: (a, b) for module, _, a, b in factors(load(tmp_path, "b"))}
    blob = merged(tmp_path, *sources, method="lorax_linear")
    for module, part, a, b in factors(blob):
        torch.testing.assert_close(a, 0.5 * (first[module][0] + second[module][0]))
        torch.testing.assert_close(b, 0.5 * (first[module][1] + second[module][1]))
        assert part.scale == 2.0  # the first adapter's, whatever the others'
    doubled = deltas(merged(tmp_path, ("a", 2.0), ("a", 0.0), method="lorax_linear"))
    check_same(doubled, weighted_sum(tmp_path, ("a", 4.0)), 1e-5)


def test_loraxs_ties_weighs_by_the_weight_alone(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, rank=4, seed=seed, lora_alpha=4)
    one, other = (("a", 0.25), ("b", 0.25)), (("a", 0.5), ("b", 0.5))
    lorax = merged(tmp_path, *one, method="lorax_ties", density=0.5)
    plain = merged(tmp_path, *one, method="ties", density=0.5)
    torch.testing.assert_close(lorax.data, 0.5 * plain.data)
    assert lorax.revision != merged(tmp_path, *other, method="lorax_ties", density=0.5).revision


# -- revisions ------------------------------------------------------------------------------


def test_a_source_has_the_revision_it_has_by_itself(unequal: Path) -> None:
    reader = ThreadReader(BASE, torch.float32)
    for name in "abcd":
        with AdapterStore(unequal).locate(name) as files:
            manifest = reader.manifest(files)
            expected = reader.blob(files, manifest).revision
            assert source_revision(files.weights_fd, manifest) == expected


def test_a_revision_is_of_the_sources_bytes_and_the_recipe(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, seed=seed)
    write_adapter(tmp_path / "copy", seed=0)
    base = merged(tmp_path, ("a", 0.5), ("b", 0.5)).revision
    assert merged(tmp_path, ("copy", 0.5), ("b", 0.5), name="saved").revision == base
    hows: tuple[dict[str, Any], ...] = (
        {"method": "svd"},
        {"method": "svd", "rank": 2},
        {"method": "ties", "density": 0.5},
        {"method": "ties", "density": 0.25},
        {"method": "ties", "density": 0.5, "majority_sign_method": "frequency"},
        {"method": "dare_linear", "density": 0.5},
        {"method": "dare_linear", "density": 0.5, "seed": 1},
    )
    others = {
        merged(tmp_path, ("a", 0.5), ("b", 0.25)).revision,
        merged(tmp_path, ("b", 0.5), ("a", 0.5)).revision,
        merged(tmp_path, ("a", 0.5)).revision,
        *(merged(tmp_path, ("a", 0.5), ("b", 0.5), **how).revision for how in hows),
    }
    assert len(others) == 10
    assert base not in others
    write_adapter(tmp_path / "a", seed=9)
    assert merged(tmp_path, ("a", 0.5), ("b", 0.5)).revision not in {base, *others}


def test_a_source_may_be_wanted_at_a_revision(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    revision = load(tmp_path, "a").revision
    at = Recipe(sources=(MergeSource("a", 1.0, revision[:8]),))
    load(tmp_path, merged_id(at))
    write_adapter(tmp_path / "a", seed=1)
    with pytest.raises(RevisionNotFoundError, match=f"{revision[:8]} was asked for") as caught:
        load(tmp_path, merged_id(at))
    assert caught.value.source == "a"


# -- refusals -------------------------------------------------------------------------------


def poison(tensors: Tensors) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


WRONG: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "has a bias": {"lora_bias": True},
    "not finite": {"change": poison},
    "is missing": {"change": lambda tensors: tensors.pop(next(iter(tensors)))},
    "an activated LoRA": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize(("says", "kind"), WRONG.items(), ids=list(WRONG))
def test_a_source_that_cannot_be_merged_is_named(
    says: str, kind: dict[str, Any], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "good")
    write_adapter(tmp_path / "bad", **kind)
    error = refusal(tmp_path, ("good", 0.5), ("bad", 0.5))
    assert isinstance(error, AdapterInvalidError)
    assert str(error).startswith("source 2 ('bad'): ")
    assert says in str(error)
    assert error.source == "bad"


def test_what_nobody_has_is_not_found_by_its_name(tmp_path: Path) -> None:
    write_adapter(tmp_path / "good")
    for name in ("none", "../good", "+{}"):
        error = refusal(tmp_path, ("good", 0.5), (name, 0.5))
        assert (error.code, error.source) == ("adapter_not_found", name)


def test_ranks_that_do_not_go_together_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for rank in (4, 6):
        write_adapter(tmp_path / f"r{rank}", rank=rank)
    write_adapter(tmp_path / "r200", 200, ("q_proj",))
    for method in ("ties", "dare_linear", "dare_ties", "magnitude_prune", "lorax_linear"):
        error = refusal(tmp_path, ("r4", 1.0), ("r6", 1.0), method=method, density=0.5)
        assert "ranks are 4, 6" in str(error)
        assert "use linear, or svd" in str(error)
    error = refusal(tmp_path, ("r200", 1.0), ("r200", 1.0))
    assert f"add up to 400, and an adapter's is at most {MAX_RANK}" in str(error)
    assert "svd with a rank" in str(error)
    assert merged(tmp_path, *[("r200", 1.0)] * 5, method="svd", rank=8).manifest.max_rank == 8
    error = refusal(tmp_path, *[("r200", 1.0)] * 6, method="svd", rank=8)
    assert f"at most {MAX_SVD_RANKS}" in str(error)


def test_what_overflows_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", change=lambda tensors: [t.mul_(1e3) for t in tensors.values()])
    name = merged_id(recipe_of(("a", 1000.0)))
    with pytest.raises(AdapterInvalidError, match="not finite in float16"):
        load(tmp_path, name, reader=ThreadReader(BASE, torch.float16))


def test_merging_knows_all_that_an_adapter_may_have() -> None:
    """Another field would be left out of a merge in silence: refuse it in `plan_merge` first."""
    slice_fields = set(AdapterSlice.__struct_fields__)
    assert slice_fields == {
        "site", "slice", "rank", "scale", "a", "b", "magnitude", "b_bias", "bias", "has_base_bias",
        "is_lookup", "is_head",
    }  # fmt: skip
    manifest_fields = {field.name for field in dataclasses.fields(AdapterManifest)}
    assert manifest_fields == {
        "slices", "base_model_name", "file_bytes", "digest", "invocation_tokens", "full",
        "tokenizer", "vocab_size",  # sources are read without their tokenizers
    }  # fmt: skip


def test_a_name_says_all_of_a_recipe() -> None:
    recipe = recipe_of(("a/b", 0.1), ("@c", -2.0), method="dare_ties", density=0.25, seed=2**64 - 1)
    assert read_recipe(merged_id(recipe)) == recipe
    told = recipe_of(("a", 1.0), density=float("1"), majority_sign_method="".join(["to", "tal"]))
    assert merged_id(told) == merged_id(recipe_of(("a", 1.0)))
    assert called(merged_id(recipe)) == "dare_ties of a/b, @c"
    assert called(merged_id(recipe_of(("a", 1.0), name="blend"))) == "blend"
    assert called("plain") == "plain"
