"""What the Triton kernels are compiled to, for GPUs that needn't be at hand, and what the loss should take on one.

Counted is in the machine code how many instructions a warp executes on its way through the loop over blocks of pixels
(forward) or over maps (backward) of an operator.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported, which then would not compile

import triton
from cases import GPUS, STRIDE, Case
from results import Rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnunet_lomix.loss.backends import fused, kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = {"forward": kernels.forward_kernel, "backward": kernels.backward_kernel}
OPERATORS = ("sum", "product", "fusion", "concat", "unmixed")  # in the order of the kernels' codes
# what the loop of an operator has more of than those behind it; the last two load their logits, and are alike
CHARACTERISTICS = {"fusion": "MUFU.EX2", "sum": "FADD", "product": "FMUL", "concat": "", "unmixed": ""}
# a warp's 32 lanes execute an instruction each for the values of a block that it has; padded values are counted, too
LANES_OF_VALUE = 32 / fused.VALUES_OF_WARP

# What an H100 is reckoned to do in a second, of fp32 where it matters, and how long the host takes for all operations
INSTRUCTIONS = 0.6 * 132 * 4 * 32 * 1.755e9  # of lanes: processors, schedulers, lanes, clock
FLOPS, BANDWIDTH, HOST = 40e12, 2.5e12, 172 * 5e-6
# How often, in a forward and in a backward pass
SCALE_MOVED = (9, 9)  # a scale on the grid is read or written, on average, by resampling, kernels and products
ROW_MOVED = (2, 6)  # so is a row of what is linear
FINEST_MOVED = (2, 4)  # so is z_0 at its full size, where a grid is taken of it
PRODUCTS = (1, 3)  # matrices are multiplied; the first of the backward pass is that of the forward pass again


def measure(shapes: Sequence[tuple[int, int]], cases: Sequence[Case]) -> Rows:
    """A row for each GPU, number of mixed scales and of classes, and kernel; and one for each case and stride.

    ``registers`` and ``stack`` (bytes) are those of a lane. The name of each operator stands for the instructions for
    each value of a map of all scales, where classes are padded to a power of two. For cases see :func:`estimate`.
    """
    compiled = [
        {"gpu": gpu, "case": f"K = {scales}, {classes} classes", "what": kernel, **count(gpu, kernel, scales, classes)}
        for gpu in GPUS
        for scales, classes in shapes
        for kernel in KERNELS
    ]
    estimates = [
        {"gpu": "H100", "case": str(case), "what": f"stride {stride}", **estimate(case, stride)}
        for case in cases
        for stride in (STRIDE, 1)
    ]
    return compiled + estimates


def count(gpu: str, kernel: str, mixed_scales: int, classes: int, regions: bool = False) -> dict[str, float]:
    """Registers, stack and instructions by operator of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compile_for(GPUS[gpu], KERNELS[kernel], mixed_scales, classes, regions).asm["cubin"])
        usage = run_tool("cuobjdump", "-res-usage", binary)
        loops = find_loops(run_tool("nvdisasm", "-c", binary).splitlines())
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    lengths = {}
    for operator, kind in CHARACTERISTICS.items():
        loop = max(loops, key=lambda loop: sum(kind in instruction for instruction in loop))
        loops.remove(loop)
        lengths[operator] = len(loop) * LANES_OF_VALUE
    return {"registers": int(found[1]), "stack": int(found[2]), **{name: lengths[name] for name in OPERATORS}}


def run_tool(tool: str, *args: str | Path) -> str:
    """What one of the CUDA tools prints that Triton brings along."""
    return subprocess.run([TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout


def compile_for(
    capability: int,
    kernel: triton.JITFunction,
    mixed_scales: int,
    classes: int,
    regions: bool = False,
    valid: bool = False,
) -> triton.compiler.CompiledKernel:
    """As the backend ``fused`` launches it, for a GPU of this capability."""
    constants = {**fused.block_of(classes), "K": mixed_scales, "REGIONS": regions, "SQUARED": False, "VALID": valid}
    warps = constants.pop("num_warps")
    types = {
        **dict.fromkeys(constants, "constexpr"),
        **dict.fromkeys(kernels.NUMBERS, "i32"),
        **dict.fromkeys(["table", "ends"], "*i32"),
        "labels": "*fp32" if regions else "*i64",
    }
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def find_loops(lines: Sequence[str]) -> list[list[str]]:
    """The instructions of each loop that has no other one in it; there is one for each operator."""
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


def estimate(case: Case, stride: int) -> dict[str, float]:
    """Milliseconds that a forward and a backward pass of all maps should take on an H100, and their parts.

    The instructions of the kernels, the matrix products and the traffic of the memory, one after the other; and at
    least what the host takes. The forward pass is repeated if there are several slabs. Every map counts as one of all
    scales, which is too much.
    """
    from examples import engine_case, make_lomix  # takes nnU-Net's time to import, which compile_for doesn't need

    backend = fused.Fused(engine_case(make_lomix(case), "cpu"))
    layout, finest = backend.layout, prod(case.size)
    pixels = prod(-(-length // stride) for length in case.size)
    slabs = -(-pixels // backend.pixels_at_once(case.batch, pixels, finest))
    mixed, padded = layout.constants["K"], layout.constants["BC"]
    passes = 2 if slabs > 1 else 1  # forward

    def total(forward: float, backward: float) -> float:
        return passes * forward + backward

    executed = {}
    for kernel in KERNELS:
        instructions = count("H100", kernel, mixed, case.classes, case.regions)
        executed[kernel] = sum(instructions[OPERATORS[code]] for code in layout.table[:, 0].tolist())
    of_pixel = total(*SCALE_MOVED) * case.scales * case.classes + total(*ROW_MOVED) * layout.rows
    of_image = total(*FINEST_MOVED) * finest * case.classes if stride > 1 else 0
    flops = total(*PRODUCTS) * 2 * layout.rows * mixed * case.classes
    seconds = {
        "forward": case.batch * pixels * padded * passes * executed["forward"] / INSTRUCTIONS,
        "backward": case.batch * pixels * padded * executed["backward"] / INSTRUCTIONS,
        "products": case.batch * pixels * flops / FLOPS,
        "memory": case.batch * 4 * (pixels * of_pixel + of_image) / BANDWIDTH,
    }
    seconds["estimate"] = max(HOST, sum(seconds.values()))
    return {"slabs": slabs, **{f"{part}_ms": 1000 * s for part, s in seconds.items()}}
