"""Lets CPU torch import PyPI's torchvision, which vLLM's Qwen2.5-VL imports. Tests only; run on torchvision 0.28.

PyPI has torchvision as a CUDA build alone. Beside CPU torch its library does not load, and then its import fails where
it describes `nms` and `qnms` to torch.compile. Those two operators are declared here, without a body: nothing in vLLM
calls them. To be removed once PyPI has a CPU build of torchvision, or vLLM's Qwen2.5-VL does without it.

Python imports a module of this name at start, in the processes that vLLM starts too. torch itself is imported only
when torchvision is.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself: declares the operators when torchvision is about to be imported."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and self.library is None:
            import torch

            # The declarations live as long as this object.
            self.library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                self.library.define(schema)


sys.meta_path.insert(0, _BeforeTorchvision())
