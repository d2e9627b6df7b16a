"""A process maps only the memory of a sender that it can see."""

from __future__ import annotations

import pytest
import torch

from verl.workers.weight_sync.channels import (
    MappedHandle,
    MappedReceiveEnd,
    MappedSendEnd,
    check_same_place,
    host_identity,
)

HANDLE = MappedHandle("GPU-1", "node1/boot/pid:[1]", ())


def test_a_rollout_on_another_node_is_refused_before_it_opens_a_path_of_its_own_proc() -> None:
    sizes, cpu = [4], torch.device("cpu")
    sent = MappedSendEnd(sizes, torch.float32, cpu)
    sent.bucket(0).copy_(torch.arange(4.0))
    assert sent.handle.host == host_identity()
    assert MappedReceiveEnd(sent.handle, sizes, torch.float32, cpu).bucket(0).tolist() == [0.0, 1.0, 2.0, 3.0]
    elsewhere = MappedHandle(sent.handle.place, "node2/boot/pid:[1]", None)
    with pytest.raises(RuntimeError, match=r"on host node2/boot/.*Ray must place both on one node"):
        MappedReceiveEnd(elsewhere, sizes, torch.float32, cpu)


def test_another_gpu_of_the_same_node_is_refused() -> None:
    check_same_place(HANDLE, HANDLE.host, "GPU-1")
    with pytest.raises(RuntimeError, match="the actor of this rank is on GPU GPU-1, this rollout on GPU GPU-2"):
        check_same_place(HANDLE, HANDLE.host, "GPU-2")
