"""Stands in for those modules of transformers' tests that its source distribution leaves out.

It holds the test files of the top folder alone. The mixins of generation and of exporters are therefore empty here:
generation is tested in tests/unit/hf.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


class ExportTesterMixin:
    """Has no tests."""


class GenerationTesterMixin:
    """Has no tests."""


config_common_kwargs: dict[str, Any] = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "bos_token_id": 6,
    "pad_token_id": 7,
    "eos_token_id": 8,
    "problem_type": "regression",
}
"""Settings that every configuration keeps."""


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a wrapper that calls a function on `world_size` gloo ranks of its own."""

    def wrapper(function: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            mp.spawn(_rank, args=(world_size, port, function, arguments), nprocs=world_size, join=True)

        return run

    return wrapper


def _rank(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    function(rank, *arguments)
    dist.destroy_process_group()
