"""GPUs: peak rates by the device's full name, and memory and links by the short name that a plan takes.

Peaks are dense matrix TFLOP/s from the makers' data sheets; a figure printed with 2:4 sparsity is halved here. A
device that is not listed has no figure, rather than a guess: `tracking.peak_tflops` sets one. Sources:

- NVIDIA data sheets of H100, H200, GH200, A100, A800, H800, H20, A30, A40, A10, L4, L40, L40S, V100, T4, HGX B200 and
  GB200 NVL72; the Ada, Ampere GA102 and Blackwell RTX white papers for GeForce (half precision with float32 sums).
- AMD data sheets of Instinct MI210, MI250, MI250X (torch sees one of two dies, which has half), MI300X, MI325X.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

import torch

# Between nodes most clusters of a GPU's time have one network card per GPU: ConnectX-7 (400 Gbit/s) for H100, H200 and
# B200 (NVIDIA DGX H100/B200 User Guides), ConnectX-6 (200) for A100 (DGX A100 User Guide), 100 Gbit/s elsewhere.
_NDR, _HDR, _EDR = 400.0, 200.0, 100.0
_PCIE5, _PCIE4, _PCIE3 = 512.0, 256.0, 128.0  # Gbit/s of 16 lanes, one direction


@dataclass(frozen=True)
class Peak:
    """Dense TFLOP/s of one device; None where it lacks the format.

    Attributes:
        half: float16 with float32 sums.
        tf32: float32 tensors multiplied as TF32.
        single: float32 without TF32.
        bfloat16: Whether bfloat16 is as fast as float16; if not, the device lacks it.
    """

    half: float
    tf32: float | None
    single: float
    bfloat16: bool = True


# The first pattern that matches the device's name counts, so narrower ones come first.
_PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bGB[23]00\b", Peak(2500, 1250, 80)),
    (r"\bB200\b", Peak(2250, 1125, 75)),
    (r"\bGH200\b", Peak(990, 494.7, 67)),
    (r"\bH[12]00 NVL\b", Peak(835.5, 417.5, 60)),
    (r"\bH100 PCIe\b", Peak(756, 378, 51)),
    (r"\bH800 PCIe\b", Peak(756, 378, 51)),
    (r"\bH[128]00\b", Peak(989.4, 494.7, 67)),
    (r"\bH20\b", Peak(148, 74, 44)),
    (r"\bA[18]00\b", Peak(312, 156, 19.5)),
    (r"\bA30\b", Peak(165, 82, 10.3)),
    (r"\bA40\b", Peak(149.7, 74.8, 37.4)),
    (r"\bA10\b", Peak(125, 62.5, 31.2)),
    (r"\bRTX A6000\b", Peak(154.8, 77.4, 38.7)),
    (r"\bRTX 6000 Ada\b", Peak(364.2, 182.1, 91.1)),
    (r"\bL40S\b", Peak(362, 183, 91.6)),
    (r"\bL40\b", Peak(181, 90.5, 90.5)),
    (r"\bL4\b", Peak(121, 60, 30.3)),
    (r"\bV100S", Peak(130, None, 16.4, bfloat16=False)),
    (r"\bV100-PCIE", Peak(112, None, 14, bfloat16=False)),
    (r"\bV100", Peak(125, None, 15.7, bfloat16=False)),
    (r"\bT4\b", Peak(65, None, 8.1, bfloat16=False)),
    (r"\bRTX 5090$", Peak(209.5, 104.8, 104.8)),
    (r"\bRTX 4090$", Peak(165.2, 82.6, 82.6)),
    (r"\bRTX 3090 Ti$", Peak(80, 40, 40)),
    (r"\bRTX 3090$", Peak(71, 35.6, 35.6)),
    # MIOpen's convolutions do not use the TF32 of these.
    (r"\bMI325X\b", Peak(1307.4, None, 163.4)),
    (r"\bMI300X\b", Peak(1307.4, None, 163.4)),
    (r"\bMI250X\b", Peak(191.5, None, 47.9)),
    (r"\bMI250\b", Peak(181, None, 45.3)),
    (r"\bMI210\b", Peak(181, None, 45.3)),
)


def find_peak(name: str) -> Peak | None:
    """The peaks of a device by the name from `torch.cuda.get_device_name`; None for a MIG part, or where unlisted."""
    if " MIG " in name:
        return None
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)


def peak_tflops(name: str, mixed: str) -> float | None:
    """Dense TFLOP/s of a device in the number format of a run.

    Args:
        name: The device's name, from `torch.cuda.get_device_name`.
        mixed: "bf16", "fp16" or "no". Float32 counts as TF32 where the device has it and cuDNN may use it, which is
            torch's default for convolutions.

    Returns:
        None for a device (or a part of one) that is not listed, or a format that it lacks.
    """
    peak = find_peak(name)
    if peak is None:
        return None
    if mixed == "no":
        return peak.tf32 if peak.tf32 is not None and torch.backends.cudnn.allow_tf32 else peak.single
    if mixed == "fp16":
        return peak.half
    return peak.half if mixed == "bf16" and peak.bfloat16 else None


@dataclass(frozen=True)
class Gpu:
    """The figures of a GPU that a plan needs.

    Attributes:
        device: Its name among the peaks.
        memory_gib: Memory, GiB.
        memory_gbytes: Rate of its memory, GB/s.
        intra_gbps: Link to the node's other GPUs, Gbit/s in one direction.
        inter_gbps: Network card per GPU, Gbit/s in one direction.
        host_gbps: Link to the host's memory, Gbit/s in one direction.
        source: Where the figures are published.
    """

    device: str
    memory_gib: float
    memory_gbytes: float
    intra_gbps: float
    inter_gbps: float
    host_gbps: float
    source: str

    @property
    def peak(self) -> Peak:
        """Its peak rates."""
        peak = find_peak(self.device)
        assert peak is not None
        return peak

    def tflops(self, precision: str) -> float:
        """Dense TFLOP/s in half precision, or in float32 without TF32 for "no"."""
        return self.peak.single if precision == "no" else self.peak.half


GPUS: dict[str, Gpu] = {
    "b200": Gpu("B200", 180, 8000, 7200, _NDR, _PCIE5, "NVIDIA DGX B200 data sheet (an eighth of it)"),
    "h200": Gpu("H200", 141, 4800, 3600, _NDR, _PCIE5, "NVIDIA H200 data sheet, SXM"),
    "h100": Gpu("H100", 80, 3350, 3600, _NDR, _PCIE5, "NVIDIA H100 data sheet, SXM"),
    "a100-80": Gpu("A100", 80, 2039, 2400, _HDR, _PCIE4, "NVIDIA A100 data sheet, SXM"),
    "a100-40": Gpu("A100", 40, 1555, 2400, _HDR, _PCIE4, "NVIDIA A100 data sheet, SXM"),
    "l40s": Gpu("L40S", 48, 864, _PCIE4, _EDR, _PCIE4, "NVIDIA L40S data sheet"),
    "l4": Gpu("L4", 24, 300, _PCIE4, _EDR, _PCIE4, "NVIDIA L4 data sheet"),
    "a10": Gpu("A10", 24, 600, _PCIE4, _EDR, _PCIE4, "NVIDIA A10 data sheet"),
    "v100-32": Gpu("V100", 32, 900, 1200, _EDR, _PCIE3, "NVIDIA V100 data sheet, SXM2"),
    "v100-16": Gpu("V100", 16, 900, 1200, _EDR, _PCIE3, "NVIDIA V100 data sheet, SXM2"),
    "t4": Gpu("T4", 16, 320, _PCIE3, _EDR, _PCIE3, "NVIDIA T4 data sheet"),
    "rtx4090": Gpu("RTX 4090", 24, 1008, _PCIE4, _EDR, _PCIE4, "NVIDIA Ada architecture white paper"),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in lower or upper case.

    Raises:
        ValueError: It is not in the table; lists the names.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    close = get_close_matches(name.lower(), GPUS, 1, 0.5)
    guess = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"--gpu={name!r} is not in the table.{guess} There are {', '.join(GPUS)}; for another one name the nearest and "
        "give its own --memory-gb, --intra-gbps and --inter-gbps"
    )
