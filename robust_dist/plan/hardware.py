"""GPUs by name: memory, peak rates and links, with the makers' data sheets as sources."""

from dataclasses import dataclass
from difflib import get_close_matches

# Between nodes most clusters of a GPU's time have one network card a GPU: ConnectX-7 (400 Gbit/s) beside H100, H200 and
# B200 (NVIDIA DGX H100/B200 User Guides), ConnectX-6 (200) beside A100 (DGX A100 User Guide), 100 Gbit/s elsewhere.
_NDR, _HDR, _EDR = 400.0, 200.0, 100.0
_PCIE4, _PCIE3 = 256.0, 128.0  # Gbit/s of 16 lanes, one direction
_PCIE5 = 512.0


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know of a GPU.

    Attributes:
        memory_gib: Memory, GiB.
        half_tflops: Dense peak in bfloat16 (float16 where it has no bfloat16), TFLOP/s.
        single_tflops: Peak in float32 without TF32, TFLOP/s.
        memory_gbytes: Rate of its memory, GB/s.
        intra_gbps: Link to the node's other GPUs, Gbit/s in one direction.
        inter_gbps: Network card a GPU, Gbit/s in one direction.
        host_gbps: Link to the host's memory, Gbit/s in one direction.
        source: Where the figures are printed.
        bf16: Whether it calculates in bfloat16.
    """

    memory_gib: float
    half_tflops: float
    single_tflops: float
    memory_gbytes: float
    intra_gbps: float
    inter_gbps: float
    host_gbps: float
    source: str
    bf16: bool = True


GPUS: dict[str, Gpu] = {
    "b200": Gpu(180, 2250, 75, 8000, 7200, _NDR, _PCIE5, "NVIDIA DGX B200 data sheet (an eighth of it)"),
    "h200": Gpu(141, 989, 67, 4800, 3600, _NDR, _PCIE5, "NVIDIA H200 data sheet, SXM"),
    "h100": Gpu(80, 989, 67, 3350, 3600, _NDR, _PCIE5, "NVIDIA H100 data sheet, SXM"),
    "a100-80": Gpu(80, 312, 19.5, 2039, 2400, _HDR, _PCIE4, "NVIDIA A100 data sheet, SXM"),
    "a100-40": Gpu(40, 312, 19.5, 1555, 2400, _HDR, _PCIE4, "NVIDIA A100 data sheet, SXM"),
    "l40s": Gpu(48, 362, 91.6, 864, _PCIE4, _EDR, _PCIE4, "NVIDIA L40S data sheet"),
    "l4": Gpu(24, 121, 30.3, 300, _PCIE4, _EDR, _PCIE4, "NVIDIA L4 data sheet"),
    "a10": Gpu(24, 125, 31.2, 600, _PCIE4, _EDR, _PCIE4, "NVIDIA A10 data sheet"),
    "v100-32": Gpu(32, 125, 15.7, 900, 1200, _EDR, _PCIE3, "NVIDIA V100 data sheet, SXM2", bf16=False),
    "v100-16": Gpu(16, 125, 15.7, 900, 1200, _EDR, _PCIE3, "NVIDIA V100 data sheet, SXM2", bf16=False),
    "t4": Gpu(16, 65, 8.1, 320, _PCIE3, _EDR, _PCIE3, "NVIDIA T4 data sheet", bf16=False),
    "rtx4090": Gpu(24, 165.2, 82.6, 1008, _PCIE4, _EDR, _PCIE4, "NVIDIA Ada architecture white paper"),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in small or capital letters.

    Raises:
        ValueError: There is none; lists the names.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    close = get_close_matches(name.lower(), GPUS, 1, 0.5)
    guess = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"--gpu={name!r} is not in the table.{guess} There are {', '.join(GPUS)}; for another one name the nearest and "
        "give its own --memory-gb, --intra-gbps and --inter-gbps"
    )
