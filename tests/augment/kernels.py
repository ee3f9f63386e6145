"""The augmentation's kernels in machine code for GPUs that are not here: what a pixel costs.

`python -m tests.augment.kernels` prints a table. It needs Triton, whose package brings the assembler and its tools.
"""

import ast
import importlib
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch

from robust_dist.augment import RobustAugment, TrivialAugment, fused_triton, sample_keys

KERNELS = {
    "partners_kernel": "prepare",
    "prepare_kernel": "prepare",
    "luts_kernel": "prepare",
    "statistics_kernel": "prepare",
    "pixels_kernel": "pixels",
}
CAPABILITIES = 80, 90, 100
# The function or branch of the way that only pixels of some operations go; all else is every pixel's.
WAYS = {
    "warp": "read_warped",
    "straight": "not warps",
    "levels": "_toned",
    "colour": "_coloured",
    "sharpness": "(op_own == _SHARPNESS) | (op_other == _SHARPNESS)",
    "targets": "_store_targets",
}
OPERATIONS = {"Identity": "straight", "Posterize": "straight levels", "Rotate": "warp", "Color": "straight colour"}


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        self.grid = grid
        return self.launch

    def launch(self, *args, **options):
        names = self.kernel.arg_names
        self.arguments = dict(zip(names, args, strict=False))
        self.arguments |= {name: options.pop(name) for name in names if name in options}
        self.options = options

    def is_aligned(self, parameter):
        """Whether the compiler is told that a tensor starts at a multiple of 16 bytes."""
        argument = self.arguments[parameter.name]
        free = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        return isinstance(argument, torch.Tensor) and not free and argument.data_ptr() % 16 == 0

    def compile(self, capability):
        """To PTX and machine code for a compute capability, as the just-in-time compiler would."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime.jit import mangle_type

        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        kinds = {n: "constexpr" if n in constants else mangle_type(a) for n, a in self.arguments.items()}
        aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(self.kernel.params) if self.is_aligned(p)}
        source = ASTSource(self.kernel, kinds, {name: self.arguments[name] for name in constants}, aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def recorders(put):
    """Recorders by the kernels' names, which `put(module, name, recorder)` sets in the kernels' places."""
    found = {}
    for name, file in KERNELS.items():
        module = importlib.import_module(f"robust_dist.augment.fused_triton_{file}")
        found[name] = Recorder(getattr(module, name).jit)
        put(module, name, found[name])
    return found


def launch(shape=(4, 3, 32, 32), **settings):
    """Augment a batch that is gathered from a set."""
    module = RobustAugment(10, shape[2:], (0.5,) * shape[1], (0.2,) * shape[1], **settings)
    keys, images = sample_keys(0, 0, range(shape[0])), torch.zeros(shape, dtype=torch.uint8)
    fused_triton.augment(module, images, torch.zeros(shape[0], dtype=torch.int64), keys, keys.abs() % shape[0])


def launch_alone(shape):
    """TrivialAugment alone."""
    images, stage = torch.zeros(shape, dtype=torch.uint8), TrivialAugment()
    fused_triton.trivial(stage, images, stage.plan(sample_keys(0, 0, range(shape[0]))))


def _tool(name, *arguments):
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


@cache
def _places(file):
    """The functions that each line of a file belongs to, and the branches, named as their conditions."""
    found = defaultdict(tuple)
    for node in ast.walk(ast.parse(Path(file).read_text())):
        parts = [(node.name, node.body)] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            parts = [(test, node.body), (f"not {test}", node.orelse)]
        for name, body in parts:
            for line in range(body[0].lineno, body[-1].end_lineno + 1) if body else ():
                found[line] += (name,)
    return found


class Machine:
    """A kernel's machine code.

    Attributes:
        registers: Of a thread.
        spilled: Bytes of a thread's registers that are kept in memory.
        shared: Bytes of shared memory of a program.
        code: Each instruction with the functions and branches that it comes from.
        edges: Where a stretch without a branch or a label begins.
        loop: Which instructions are repeated for each pass over the pixels: the longest loop.
    """

    def __init__(self, cubin):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            text = _tool("nvdisasm", "-c", "-gi", file.name)
        found = re.search(r"REG:(\d+) STACK:\d+ SHARED:(\d+) LOCAL:(\d+)", usage)
        self.registers, self.shared = int(found[1]), int(found[2])
        self.code, places, fresh, labels, loops, edges = [], (), True, {}, [(0, 0)], set()
        for line in text.splitlines():
            if loc := re.match(r'\s*//## File "(.+?)", line (\d+)', line):
                here = _places(loc[1])[int(loc[2])]
                places, fresh = here if fresh else (*places, *here), False
            elif label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(self.code)
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.+?) ?;", line):
                fresh = True
                if not found[1].startswith("NOP"):
                    self.code.append((found[1], places))
                back = re.match(r"BRA.*`\((\.L_x_\d+)\)", found[1])
                if back and back[1] in labels:
                    loops.append((len(self.code) - labels[back[1]], labels[back[1]]))
                if found[1].split()[0] in ("BRA", "EXIT", "RET", "CALL", "BSYNC", "BRX"):
                    edges.add(len(self.code))
        self.edges = edges | set(labels.values())
        length, start = max(loops)
        self.loop = range(start, start + length)
        self.spilled = sum(4 for text, _ in self.code if text.startswith("STL"))

    def widths(self, kind):
        """How many global loads ("LDG") or stores ("STG") there are, by the bits each moves."""
        count = Counter()
        for text, _ in self.code:
            if found := re.match(rf"{kind}\.E(?:\.\w+)*?(?:\.(?:[US])?(8|16|64|128))?(?:\.\w+)* ", text):
                count[int(found[1] or 32)] += 1
        return dict(sorted(count.items()))

    def of_a_pixel(self, ways, pixels, passes):
        """Instructions for a pixel on one way through the branches, for `pixels` a thread and pass.

        A stretch without a branch is left out where most of it comes from other ways.
        """
        others = {name for way, name in WAYS.items() if way not in ways.split()}
        strange = [not others.isdisjoint(places) for _, places in self.code]
        edges = sorted({0, *self.edges, len(self.code)})
        taken = 0
        for start, end in pairwise(edges):
            if 2 * sum(strange[start:end]) <= end - start:
                taken += sum(passes if i in self.loop else 1 for i in range(start, end))
        return taken / (pixels * passes)


def main():
    """The table: both sizes, each format and GPU."""
    found = recorders(setattr)
    print(
        "| images, out | sm | registers | shared, spilled (bytes) | stores by bits | " + " | ".join(OPERATIONS) + " |"
    )
    print("|" + "---|" * (5 + len(OPERATIONS)))
    for size, channels_last in ((32, False), (224, False), (224, True)):
        for capability in CAPABILITIES:
            launch((4, 3, size, size), dtype=torch.bfloat16, channels_last=channels_last)
            pixels = Machine(found["pixels_kernel"].compile(capability).asm["cubin"])
            given = found["pixels_kernel"].arguments
            passes = given["TILE"] // given["QUADS"]
            costs = [f"{pixels.of_a_pixel(ways, 4, passes):.0f}" for ways in OPERATIONS.values()]
            layout = "channels_last" if channels_last else "planes"
            stores = ", ".join(f"{number} of {bits}" for bits, number in pixels.widths("STG").items())
            cells = (
                f"{size} x {size}, {layout}",
                capability,
                pixels.registers,
                f"{pixels.shared}, {pixels.spilled}",
                stores,
            )
            print("| " + " | ".join(map(str, (*cells, *costs))) + " |", flush=True)


if __name__ == "__main__":
    main()
