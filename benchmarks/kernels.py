"""What the Triton kernels are compiled to, for GPUs that needn't be at hand, and what the loss costs an H100 at least.

    pip install -e ".[benchmarks]"
    python benchmarks/kernels.py

Two tables. The first one: registers and stack of a lane, and the instructions for each value of a map of all scales, by
operator, counted in the machine code of a warp's way through the loop over its maps. The second one: how long the loss
takes an H100 if each kind of work ran alone and at the full rate of its unit.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from itertools import product
from math import prod
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import pandas as pd
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnunet_lomix.backends import fused, kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPERATORS = [kind.__name__.lower() for kind in fused.KINDS]
KERNELS = ("statistics", "gradient")
VALUES = 32 / fused.VALUES_OF_BLOCK  # lanes that execute an instruction, for each value of a block, padded ones, too
GPUS = {"A100": 80, "RTX 3090": 86, "H100": 90}
CASES = [(5, 14), (4, 14), (5, 3), (7, 4), (5, 64)]  # scales and classes
# of the SXM module. In a clock: instructions, exponentials and shuffles of single lanes; in a second: the rest
CLOCK, PROCESSORS = 1.98e9, 132
LANES, EXPONENTIALS, SHUFFLES = 128 * PROCESSORS * CLOCK, 16 * PROCESSORS * CLOCK, 32 * PROCESSORS * CLOCK
BYTES, FP32, TF32 = 3.35e12, 67e12, 494e12


def main():
    print(f"triton {triton.__version__}\n")
    code = {case: assemble(*case) for case in product(GPUS, CASES, KERNELS)}
    print(pd.DataFrame([describe(*case, *code[case]) for case in code]).to_markdown(index=False, floatfmt=".0f"), "\n")
    loops = {(scales, kernel): code["H100", (scales, 14), kernel][2] for scales in (4, 5) for kernel in KERNELS}
    print("Milliseconds of (2, 14, 128 × 128 × 128), S = K = 5, on an H100:\n")
    print(bounds(loops).to_markdown(floatfmt=".1f"))


def assemble(gpu: str, case: tuple[int, int], kernel: str) -> tuple[int, int, list[list[str]]]:
    """Registers, bytes of stack, and the instructions of the loop of each operator."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compile_for(GPUS[gpu], getattr(kernels, f"{kernel}_kernel"), *case).asm["cubin"])
        usage = run("cuobjdump", "-res-usage", binary)
        lines = run("nvdisasm", "-c", binary).splitlines()
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, find_loops(lines)


def describe(gpu: str, case: tuple[int, int], kernel: str, registers: int, stack: int, loops: list[list[str]]) -> dict:
    """A row of the first table."""
    row = {"GPU": gpu, "S, C": "{}, {}".format(*case), "kernel": kernel, "registers": registers, "stack": stack}
    return row | {operator: len(loop) * VALUES for operator, loop in zip(OPERATORS, loops, strict=True)}


def run(tool: str, *args) -> str:
    return subprocess.run([TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout


def compile_for(capability: int, kernel, scales: int, classes: int, regions: bool = False, valid: bool = False):
    """As :class:`nnunet_lomix.backends.fused.FusedMaps` launches it on images whose size is a multiple of 16."""
    padded = fused.power_of_two(classes)
    block = fused.VALUES_OF_BLOCK // padded
    constants = {"S": scales, "BC": padded, "P": block, "REGIONS": regions, "VALID": valid}
    if classes == 1:  # a number 1 is a constant to Triton
        constants["C"] = 1
    types = {"C": "i32", "N": "i32", "labels": "*fp32" if regions else "*i64", "ranges": "*i32", "subsets": "*i32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name == "N"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": fused.WARPS})


def find_loops(lines: list[str]) -> list[list[str]]:
    """The instructions of each loop that lies in no other one; there is one for each operator, in their order."""
    places, instructions, loops = {}, [], []
    for line in map(str.strip, lines):
        if label := re.match(r"(\.L\w+):", line):
            places[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            instructions.append(instruction[1])
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L\w+)\)", instruction)
        if target and places[target[1]] < end:
            loops.append((places[target[1]], end))
    outer = sorted(a for a in loops if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in loops))
    assert len(outer) == len(OPERATORS), outer
    return [instructions[start : end + 1] for start, end in outer]


def bounds(loops: dict, classes=14, batch=2, size=(128, 128, 128)) -> pd.DataFrame:
    """The second table: milliseconds of nnU-Net's 3D size with all mutants of five scales.

    Scales that a map by fusion doesn't have are jumped over; how much that saves is seen in the loop for four scales.
    Memory: z written, read by the product of concat and by the kernel, maps by concat written and read, labels; and
    backward their gradients written and read by two products, the gradient of z written, and read and written again.
    """
    pixels, scales, mutants = batch * prod(size), 5, 26
    missing = scales - 75 / mutants  # 75 is the sum of the sizes of the subsets
    concats, z, padded = mutants * classes, scales * classes, fused.power_of_two(classes)  # values of a pixel
    rows = {}
    for kernel, products in zip(KERNELS, (1, 3), strict=True):
        count = [Counter(all=len(loop), shuffles=sum("SHFL" in i for i in loop)) for loop in loops[5, kernel]]
        fewer = Counter(all=len(loops[4, kernel][-1]), shuffles=sum("SHFL" in i for i in loops[4, kernel][-1]))
        work = {}
        for what in ("all", "shuffles"):
            of_fusion = count[-1][what] - missing * (count[-1][what] - fewer[what])
            of_maps = scales * count[0][what] + mutants * (sum(c[what] for c in count[1:-1]) + of_fusion)
            work[what] = pixels * padded * VALUES * of_maps
        moved = 3 * z + 2 + 2 * concats + (kernel == "gradient") * (3 * concats + 4 * z)
        multiplications = products * pixels * concats * z
        rows[kernel] = {
            "instructions": work["all"] / LANES,
            "shuffles": work["shuffles"] / SHUFFLES,
            "exponentials": pixels * (padded * (scales + 4 * mutants) + 75) / EXPONENTIALS,
            "memory": 4 * pixels * moved / BYTES,
            "concat, fp32": 2 * multiplications / FP32,
            "concat, TF32": 2 * multiplications / TF32,
        }
    table = 1000 * pd.DataFrame(rows).T
    table.loc["both"] = table.sum()
    return table


if __name__ == "__main__":
    main()
