"""What the Triton kernels are compiled to, for GPUs that needn't be at hand, and what a GPU can't be faster than.

    python benchmarks/kernels.py

Two tables. The first one: registers and spilled bytes of a lane, and the instructions for each value of a map of
all scales, by operator, counted in the machine code of a warp's way through the loop over maps. The second one: how
long the loss takes at least on an H100, if nothing but instructions, exponentials, memory or matrix products took time.
"""

import os
import re
import subprocess
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from math import prod
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import pandas as pd
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnunet_lomix.backends import fused

SOURCE = Path(fused.__file__).with_name("kernels.py")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPERATORS = [kind.__name__.lower() for kind in fused.KINDS]
GPUS = {"A100": 80, "RTX 3090": 86, "H100": 90}
# lanes, of them for exponentials, in a clock; clocks and bytes in a second; fp32 and TF32 operations in a second
H100 = {"lanes": 132 * 128, "exponentials": 132 * 16, "clock": 1.755e9, "bytes": 3.35e12, "fp32": 67e12, "tf32": 494e12}
CASES = [(5, 14), (5, 3), (7, 4), (5, 64)]  # scales and classes


def main():
    print(f"triton {triton.__version__}\n")
    table = pd.DataFrame([describe(*case) for case in product(GPUS, CASES, ("statistics", "gradient"))])
    print(table.to_markdown(index=False), "\n")
    print(bounds(table).to_markdown(index=False))


def describe(gpu: str, case: tuple[int, int], kernel: str) -> dict:
    """A row of the first table."""
    scales, classes = case
    code, registers, spilled = assemble(GPUS[gpu], f"{kernel}_kernel", scales, classes)
    row = {"GPU": gpu, "S, C": f"{scales}, {classes}", "kernel": kernel, "registers": registers, "spilled": spilled}
    for number, operator in enumerate(OPERATORS):
        code, *_ = assemble(GPUS[gpu], f"{kernel}_kernel", scales, classes, number)
        # each of 32 lanes executes the instruction; a block has as many values of a map, padded ones, too
        row[operator] = round(len(loop(code)) * 32 / fused.VALUES_OF_BLOCK)
    return row


def assemble(capability: int, kernel: str, scales: int, classes: int, operator: int | None = None):
    """Instructions, registers and spilled bytes; with the loop of one operator only, if it is given."""
    text = SOURCE.read_text()
    if operator is not None:
        text = text.replace("tl.static_range(OPERATORS)", f"tl.static_range({operator}, {operator + 1})")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.py"  # Triton reads the source of a function from its file
        path.write_text(text)
        spec = spec_from_file_location("kernels", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compile_for(capability, getattr(module, kernel), scales, classes).asm["cubin"])
        usage = run("cuobjdump", "-res-usage", binary)
        lines = run("nvdisasm", "-c", binary).splitlines()
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return lines, registers, spilled


def run(tool: str, *args) -> str:
    return subprocess.run([TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout


def compile_for(capability: int, kernel, scales: int, classes: int, regions: bool = False, valid: bool = False):
    """As :class:`nnunet_lomix.backends.fused.FusedMaps` launches it on images whose size is a multiple of 16."""
    padded = fused.power_of_two(classes)
    block = fused.VALUES_OF_BLOCK // padded
    constants = {"S": scales, "BC": padded, "P": block, "REGIONS": regions, "VALID": valid}
    if classes == 1:  # a number 1 is a constant to Triton
        constants["C"] = 1
    types = {"C": "i32", "N": "i32", "labels": "*i64", "ranges": "*i32", "subsets": "*i32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name == "N"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": fused.WARPS})


def loop(lines: list[str]) -> list[str]:
    """The instructions of the longest loop."""
    places, instructions, loops = {}, [], []
    for line in map(str.strip, lines):
        if label := re.match(r"(\.L\w+):", line):
            places[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            instructions.append(instruction[1])
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L\w+)\)", instruction)
        if target and places[target[1]] < end:
            loops.append(instructions[places[target[1]] : end + 1])
    return max(loops, key=len)


def bounds(table: pd.DataFrame, scales=5, classes=14, batch=2, size=(128, 128, 128)) -> pd.DataFrame:
    """The second table: milliseconds of nnU-Net's 3D size with all mutants of all scales."""
    pixels = batch * prod(size)
    mutants = 2**scales - 1 - scales
    maps = dict(zip(OPERATORS, [scales] + [mutants] * 4, strict=True))
    padded = fused.power_of_two(classes)
    rows = []
    for kernel, products in (("statistics", 1), ("gradient", 3)):
        (row,) = table[
            (table.GPU == "H100") & (table["S, C"] == f"{scales}, {classes}") & (table.kernel == kernel)
        ].to_dict("records")
        instructions = pixels * padded * sum(row[operator] * number for operator, number in maps.items())
        exponentials = pixels * (padded * sum(maps.values()) + scales * mutants)
        concats, z = mutants * classes, scales * classes  # values of a pixel
        # z three times (stacked, into the product, into the kernel), labels, concats written and read; their gradients
        # written, and read by two products, and the gradient of z written, and read and written
        moved = 3 * z + 2 + 2 * concats + (kernel == "gradient") * (3 * concats + 4 * z)
        operations = products * 2 * pixels * concats * z
        rows.append(
            {
                "kernel": kernel,
                "instructions": instructions / H100["lanes"] / H100["clock"],
                "exponentials": exponentials / H100["exponentials"] / H100["clock"],
                "memory": 4 * pixels * moved / H100["bytes"],
                "concat, fp32": operations / H100["fp32"],
                "concat, TF32": operations / H100["tf32"],
            }
        )
    result = pd.DataFrame(rows).set_index("kernel") * 1000
    result.loc["both"] = result.sum()
    return result.round(1).reset_index()


if __name__ == "__main__":
    main()
