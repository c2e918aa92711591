"""What the Triton kernels are compiled to, for GPUs that needn't be at hand.

Counted is in the machine code how many instructions a warp executes on its way through the loop over the maps of an
operator.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported, which then would not compile

import triton
from cases import GPUS
from results import Rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnunet_lomix.loss.backends import fused, kernels

KEY = ("gpu", "scales", "classes", "kernel")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPERATORS = [kind.__name__.lower() for kind in fused.KINDS]
KERNELS = {"forward": kernels.forward_kernel, "backward": kernels.backward_kernel}
# a warp's 32 lanes execute an instruction each for the values of a block that it has; padded values are counted, too
LANES_OF_VALUE = 32 / fused.VALUES_OF_WARP


def measure(cases: Sequence[tuple[int, int]]) -> Rows:
    """A row for each GPU, number of scales and of classes, and kernel.

    ``registers`` and ``stack`` (bytes) are those of a lane. The name of each operator stands for the instructions for
    each value of a map of all scales, where classes are padded to a power of two.
    """
    return [
        {"gpu": gpu, "scales": scales, "classes": classes, "kernel": kernel, **count(gpu, scales, classes, kernel)}
        for gpu in GPUS
        for scales, classes in cases
        for kernel in KERNELS
    ]


def count(gpu: str, scales: int, classes: int, kernel: str, regions: bool = False) -> dict[str, float]:
    """The figures of a row."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compile_for(GPUS[gpu], KERNELS[kernel], scales, classes, regions=regions).asm["cubin"])
        usage = run_tool("cuobjdump", "-res-usage", binary)
        loops = find_loops(run_tool("nvdisasm", "-c", binary).splitlines())
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    instructions = {operator: len(loop) * LANES_OF_VALUE for operator, loop in zip(OPERATORS, loops, strict=True)}
    return {"registers": int(found[1]), "stack": int(found[2]), **instructions}


def run_tool(tool: str, *args: str | Path) -> str:
    """What one of the CUDA tools prints that Triton brings along."""
    return subprocess.run([TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout


def compile_for(
    capability: int,
    kernel: triton.JITFunction,
    scales: int,
    classes: int,
    regions: bool = False,
    valid: bool = False,
) -> triton.compiler.CompiledKernel:
    """As the backend ``fused`` launches it on images whose size is a multiple of 16, for a GPU of this capability."""
    constants: dict[str, int] = {
        **fused.block_of(classes),
        "S": scales,
        "REGIONS": regions,
        "VALID": valid,
    }
    warps = constants.pop("num_warps")
    if classes == 1:  # a number 1 is a constant to Triton
        constants["C"] = 1
    numbers = dict.fromkeys(["C", "N", "NUMBER", *kernels.UNSPECIALISED], "i32")
    tables = dict.fromkeys(["ranges", "subsets", "offsets"], "*i32")
    types = numbers | tables | {"labels": "*fp32" if regions else "*i64"}
    signature: dict[str, str | tuple[str, ...]] = {}
    aligned = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "resampled":
            signature[name] = ("*fp32",) * scales
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(scales)}
        else:
            signature[name] = types.get(name, "*fp32")
            if name not in numbers or name == "N":
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def find_loops(lines: Sequence[str]) -> list[list[str]]:
    """The instructions of each loop that has no other one in it; there is one for each operator, in their order."""
    places: dict[str, int] = {}
    instructions: list[str] = []
    for line in map(str.strip, lines):
        if label := re.match(r"(\.L\w+):", line):
            places[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            instructions.append(instruction[1])
    loops = []
    for end, jump in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L\w+)\)", jump)
        if target and places[target[1]] < end:
            loops.append((places[target[1]], end))
    inner = sorted(a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops))
    assert len(inner) == len(OPERATORS), inner
    return [instructions[start : end + 1] for start, end in inner]
