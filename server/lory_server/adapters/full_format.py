"""Which weights of its own an adapter has in place of the base's, and why others are refused.

In: a configuration, the tensors by module, and the base. Out: full weights, their tensors taken
out of those that are left for LoRA. PEFT saves them in four ways:

    modules_to_save            lm_head.weight, model.norm.weight, ...
    LoRA on an end             lm_head.base_layer.weight beside its factors, trained or not
    a resized vocabulary       lm_head.weight, model.embed_tokens.weight, whatever the configuration
    trainable_token_indices    model.embed_tokens.token_adapter.trainable_tokens_delta

Where both of the first and the third are so, an end comes three times: `weight`, which PEFT loads,
`modules_to_save.weight`, the same again, and `original_module.weight`, which nothing computes with.
It must not know torch or tiers.
"""

from collections.abc import Iterator

from lory_server.adapters.config import AdapterConfig
from lory_server.adapters.header import TensorSpec
from lory_server.adapters.manifest import Base, FullWeight, is_end
from lory_server.adapters.tensors import Tensors, check_shape, invalid
from lory_server.model.sites import EMBEDDING_MODULE, HEAD_MODULE


def drop_copies(tensors: dict[str, Tensors]) -> None:
    """Of an end that comes three times, the two that PEFT passes over."""
    for module, roles in tensors.items():
        weight, saved = roles.get("weight"), roles.pop("saved.weight", None)
        original = roles.pop("original.weight", None)
        copies = [spec for spec in (saved, original) if spec is not None]
        if weight is None and saved is not None:
            weight = roles["weight"] = saved
            copies.remove(saved)
        for spec in copies:
            if weight is None or not is_end(module):
                raise invalid(spec.name, "is beside no weight that it is a copy of")
            check_shape(spec, weight.shape, "as the weight that is served")


MOST_TIMES_THE_BASE = 2
"""Largest vocabulary of an adapter's own, beside that of a small base:"""
ALWAYS_ALLOWED_TOKENS = 4096


def own_vocab_size(tensors: dict[str, Tensors], base: Base, has_tokenizer: bool) -> int:
    """Tokens of its own embedding and head, where both are whole and of another size than the
    base's; 0: as many as the base has. Raises AdapterInvalidError."""
    found = {
        module: tensors.get(module, {}).get("weight") for module in (EMBEDDING_MODULE, HEAD_MODULE)
    }
    shapes = _shapes(base)
    other = [
        (spec, shapes[module][0])
        for module, spec in found.items()
        if spec is not None and module in shapes and _other_size(spec, shapes[module])
    ]
    if not other:
        return 0
    spec, num_base = other[0]
    most = max(ALWAYS_ALLOWED_TOKENS, MOST_TIMES_THE_BASE * num_base)
    sizes = {None if one is None else one.shape[0] for one in found.values()}
    if sizes != {spec.shape[0]}:
        reason = (
            "in a vocabulary of its own embed_tokens and lm_head must both be saved, of one size"
        )
        raise _own_size(spec, num_base, reason)
    if not 0 < spec.shape[0] <= most:
        raise _own_size(spec, num_base, f"an adapter may have {most}")
    if not has_tokenizer:
        raise _own_size(spec, num_base, "save its tokenizer (tokenizer.json) in its folder")
    return spec.shape[0]


def _other_size(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return len(spec.shape) == 2 and spec.shape[0] != shape[0]


def _own_size(spec: TensorSpec, num_base: int, fix: str) -> Exception:
    return invalid(
        spec.name,
        f"has {spec.shape[0]} tokens, the base {num_base}: {fix}, or train without"
        " resize_token_embeddings",
    )


def take_full_weights(
    config: AdapterConfig, tensors: dict[str, Tensors], base: Base, vocab_size: int = 0
) -> tuple[FullWeight, ...]:
    """In the order of the base's modules; raises AdapterInvalidError. `vocab_size`: of its own."""
    shapes = _shapes(base)
    if vocab_size:
        for module in (EMBEDDING_MODULE, HEAD_MODULE):
            shapes[module] = (vocab_size, *shapes[module][1:])
            _check_whole(config, module, tensors.get(module, {}))
    found = [
        weight
        for module, shape in shapes.items()
        for weight in _of_module(config, module, shape, tensors.get(module, {}), base)
    ]
    for module, roles in tensors.items():
        for role in ("weight", "base_layer.weight", "rows"):
            if spec := roles.get(role):
                raise invalid(
                    spec.name,
                    f"is a full weight of {module}, which is packed with others and is not served;"
                    " train LoRA on it: name it in target_modules, not in modules_to_save",
                )
    return tuple(found)


def is_tied(config: AdapterConfig, base: Base) -> bool:
    """Whether PEFT does to the head what it does to the embedding."""
    return config.ties_ends and base.tied_head


def is_adapted(config: AdapterConfig, module: str, base: Base) -> bool:
    """Whether a module has LoRA."""
    if module == HEAD_MODULE and is_tied(config, base):
        return config.is_selected(EMBEDDING_MODULE)
    return config.is_selected(module)


def _shapes(base: Base) -> dict[str, tuple[int, ...]]:
    """Of what an adapter may have whole: embedding, head, norms."""
    ends: dict[str, tuple[int, ...]] = {
        part.module: (site.in_features, part.out_features)
        for site in base.sites
        for part in site.slices
        if is_end(part.module)
    }
    if HEAD_MODULE in ends:
        ends[HEAD_MODULE] = ends[HEAD_MODULE][::-1]
    return {**ends, **{module: (size,) for module, size in base.norms}}


def _of_module(
    config: AdapterConfig, module: str, shape: tuple[int, ...], tensors: Tensors, base: Base
) -> Iterator[FullWeight]:
    if spec := tensors.pop("weight", None):
        _check_asked(config, module, spec)
        _check_full_shape(spec, shape)
        yield FullWeight(module, spec)
    elif config.is_saved(module) or (
        module == HEAD_MODULE and is_tied(config, base) and config.is_saved(EMBEDDING_MODULE)
    ):
        raise _missing(module, "weight", "modules_to_save")
    if spec := tensors.pop("base_layer.weight", None):
        if not is_end(module) or not is_adapted(config, module, base):
            raise invalid(spec.name, "is of a module that the configuration does not select")
        _check_full_shape(spec, shape)
        yield FullWeight(module, spec, is_tied=base.tied_head, may_be_base=True)
    yield from _rows(config, module, shape, tensors, base)


def _check_asked(config: AdapterConfig, module: str, spec: TensorSpec) -> None:
    """A whole end may be there without being named: PEFT adds it where a vocabulary was resized."""
    if config.is_saved(module):
        return
    if not is_end(module):
        raise invalid(spec.name, "is of a module that modules_to_save does not name")
    if config.is_selected(module):
        raise invalid(spec.name, "is of a module with LoRA, where PEFT reads base_layer.weight")


def _check_whole(config: AdapterConfig, module: str, tensors: Tensors) -> None:
    """What changes rows or columns of an end is for as many as the base has."""
    for role, spec in tensors.items():
        if role != "weight":
            raise invalid(
                spec.name,
                "is beside a vocabulary of the adapter's own size, whose embed_tokens and lm_head"
                " are served whole alone; name them in modules_to_save and nowhere else",
            )
    if config.trained_rows(module):
        raise _missing(module, "token_adapter.trainable_tokens_delta", _TOKENS)


def _check_full_shape(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    if len(shape) == 2 and _other_size(spec, shape):
        raise _own_size(spec, shape[0], "name embed_tokens and lm_head in modules_to_save")
    check_shape(spec, shape, "[tokens, hidden_size]" if len(shape) == 2 else "[size]")


def _rows(
    config: AdapterConfig, module: str, shape: tuple[int, ...], tensors: Tensors, base: Base
) -> Iterator[FullWeight]:
    """Trained tokens. With a tied head PEFT trains both ends at once, unless the configuration
    gives each tokens of its own."""
    token_ids = config.trained_rows(module)
    spec = tensors.pop("rows", None)
    in_embedding = config.trained_rows(EMBEDDING_MODULE)
    in_head = config.trained_rows(HEAD_MODULE)
    are_tied = base.tied_head and bool(in_embedding) and in_head in ((), in_embedding)
    if spec is None:
        if token_ids and not (are_tied and module == HEAD_MODULE):
            raise _missing(module, "token_adapter.trainable_tokens_delta", _TOKENS)
        return
    if not token_ids:
        raise invalid(spec.name, f"is of a module that {_TOKENS} does not name")
    if max(token_ids) >= shape[0]:
        raise invalid(
            spec.name,
            f"is of token {max(token_ids)}, the base has {shape[0]}: adapters with added tokens are"
            " not served",
        )
    check_shape(spec, (len(token_ids), *shape[1:]), "[tokens trained, hidden_size]")
    yield FullWeight(module, spec, token_ids, is_tied=are_tied)


_TOKENS = "trainable_token_indices"


def _missing(module: str, name: str, field: str) -> Exception:
    name = f"base_model.model.{module}.{name}"
    return invalid(name, f"is missing, though the configuration's {field} asks for it")
