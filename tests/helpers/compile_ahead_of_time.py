"""Compiles Triton's kernels to machine code of GPUs that need not be there; prints a line of JSON for each.

    python -m tests.helpers.compile_ahead_of_time '[[90, "softmax", 768]]' '[[true, true]]'

The arguments are (compute capability, Theta, parameter tokens), and what a pass does: (takes row sums, uses them).
A line is the case, the resources that the machine code uses, and whether it loads 128 bits at a time. Where the Theta
is called rotary, the case is a rotation of heads of as many features instead, of which a quarter is rotated.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron.kernels.pattention.triton_passes import backward_rows, forward_rows, launch_sizes
from megatron.kernels.pattention.triton_theta import TRITON_THETAS
from megatron.kernels.rotary.triton_rotation import rotate_rows

PASSES = {
    forward_rows: (("a_ptr", "h_ptr"), ("sums_ptr",), ("ACCUMULATE", "WEIGHTS"), ("start",)),
    backward_rows: (("g_ptr", "a_ptr", "h_ptr"), ("statistic_ptr", "sums_ptr"), ("PRODUCT", "GRADIENT"), ("weights",)),
}
"""Kernel -> its pointers to bf16, those to fp32, the functions that make up its two parts, and what it always has."""


def compiled(kernel: Any, theta: Any, part: tuple[bool, bool], num_tokens: int, capability: int) -> Any:
    """Returns the compiled kernel for bf16 scores, as it is launched for rows of `num_tokens`."""
    scores, statistics, names, always = PASSES[kernel]
    block, warps = launch_sizes(num_tokens)
    fixed = {"FACTORS": theta.factors, "WIDE": tl.float32, "WHOLE": num_tokens <= block, "BLOCK": block}
    fixed |= {name.upper(): getattr(theta, name) for name in always}
    fixed |= {name: getattr(theta, name.lower()) if wanted else None for name, wanted in zip(names, part, strict=True)}
    pointers = dict.fromkeys(scores, "*bf16") | dict.fromkeys(statistics, "*fp32")
    signature = pointers | {"num_tokens": "i32", "scale_base": "i32"} | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in fixed.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "num_tokens")},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def compiled_rotation(features: int, capability: int) -> Any:
    """Returns the compiled rotation of up to 16 bf16 heads."""
    tensors = dict.fromkeys(("q_ptr", "k_ptr", "new_q_ptr", "new_k_ptr"), "*bf16")
    tables = dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
    sizes = (
        "length",
        "q_heads",
        "k_heads",
        "features",
        "half",
        "q_batch",
        "q_position",
        "q_head",
        "k_batch",
        "k_position",
        "k_head",
    )
    fixed = {"ONE_TABLE": True, "BACK": True, "WIDE": tl.float32, "HEADS": 16}
    fixed |= {"HALF": triton.next_power_of_2(features // 8), "KEPT": triton.next_power_of_2(features - features // 4)}
    source = ASTSource(
        rotate_rows,
        tensors | tables | dict.fromkeys(sizes, "i32") | dict.fromkeys(fixed, "constexpr"),
        constexprs={(rotate_rows.arg_names.index(name),): value for name, value in fixed.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def resources(binary: Any) -> str:
    """Returns registers, stack and local memory, as NVIDIA's cuobjdump, which comes with Triton, names them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(cases: list[tuple[int, str, int]], parts: list[tuple[bool, bool]]) -> None:
    """Compiles every part of both passes in every case."""
    for capability, _, features in (case for case in cases if case[1] == "rotary"):
        usage = resources(compiled_rotation(features, capability))
        print(json.dumps([capability, "rotary", features, rotate_rows.__name__, [], usage, True]))
    of_pattention = [case for case in cases if case[1] != "rotary"]
    for (capability, name, num_tokens), part, kernel in itertools.product(of_pattention, parts, PASSES):
        binary = compiled(kernel, TRITON_THETAS[name], part, num_tokens, capability)
        wide_loads = ".v4.b32" in binary.asm["ptx"]
        print(json.dumps([capability, name, num_tokens, kernel.__name__, part, resources(binary), wide_loads]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
