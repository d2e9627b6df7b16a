"""How weights get into vLLM's own model, and whether all of it has got some.

vLLM maps Hugging Face names to its fused ones, takes its shard of each, and passes over a name that it does not know.
With `load_format=dummy` a parameter that nothing was loaded into stays random, and no name that was sent tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def loader(part: Mapping[str, Tensor]) -> Callable[[Any], set[str]]:
    """For `apply_model`: loads a part of an update, and gives the model's names of what it went into."""

    def load(model: Any) -> set[str]:
        with torch.no_grad():
            loaded = set(model.load_weights(iter(part.items())))
        assert loaded, f"vLLM took none of {len(part)} weights, e.g. {next(iter(part))}"
        return loaded

    return load


def reloader(whole: Mapping[str, Tensor]) -> Callable[[Any], set[str]]:
    """For `collective_rpc`: as `loader` on CPU, whose build packs its layers after loading: it takes whole models."""

    def reload(worker: Any) -> set[str]:
        model, found = worker.get_model(), set[str]()
        own = model.load_weights

        def recorded(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            found.update(own(weights))
            return found

        model.load_weights = recorded  # vLLM's reload calls it and keeps what it returns to itself
        try:
            worker.reload_weights(weights_iterator=iter(whole.items()))
        finally:
            model.load_weights = own
        return found

    return reload


def repack_tied_head(model: Any) -> None:
    """On CPU a tied head keeps a packed copy of the embedding, which reloading the embedding does not renew."""
    head = model.language_model.lm_head
    head.quant_method.process_weights_after_loading(head)


def without_weights(loaded: Iterable[str], *, tied_head: bool) -> Callable[[Any], list[str]]:
    """For `apply_model`: the model's parameters that are not among `loaded`. A tied head has the embedding's."""
    known = set(loaded)

    def compare(model: Any) -> list[str]:
        names = {name for name, _ in model.named_parameters()} - known
        return sorted(name for name in names if not (tied_head and name.endswith("lm_head.weight")))

    return compare
