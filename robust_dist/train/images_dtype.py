"""Images in the dtype that autocast would cast them to, where a model does nothing with them before that."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

# Of the functions that autocast runs in the lower dtype, those that images come to first; and those that only look at
# them another way.
_CASTING = frozenset(("conv1d", "conv2d", "conv3d", "linear", "matmul", "addmm", "mm"))
_VIEWING = frozenset(("flatten", "view", "reshape", "contiguous", "permute", "transpose", "unflatten", "squeeze"))
_ASKING = frozenset(
    ("size", "dim", "stride", "is_contiguous", "shape", "ndim", "requires_grad", "device", "is_floating_point")
)


def images_dtype(mixed: str, model: nn.Module, channels: int, size: int) -> torch.dtype:
    """The dtype of training images: bfloat16 under bf16 autocast where that changes no bit, else float32.

    A convolution or a matrix product under autocast casts its input first, so that an image that is written in bfloat16
    gives the same result with a fifth of the bytes. A model that adds, scales or normalises images before is left
    with float32 ones.

    Args:
        mixed: "bf16", "fp16" or "no", as the engine has it.
        model: The whole model, before an engine wraps it; it is run without data and left as it was.
        channels: Of the images.
        size: Their side in pixels.
    """
    if mixed != "bf16" or not _casts_first(model, torch.empty(1, channels, size, size, device="meta")):
        return torch.float32
    return torch.bfloat16


class _Uses(TorchFunctionMode):
    """Notes whether images come to anything but a function that casts them."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.cast, self.otherwise = [images], False, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and note what it does with the images."""
        result = func(*args, **(kwargs or {}))
        if any(one is image for one in _flat([args, kwargs or {}]) for image in self.images):
            self._note(_name(func), result)
        return result

    def _note(self, name: str, result: Any) -> None:
        if name in _CASTING:
            self.cast = True
        elif name in _VIEWING and isinstance(result, Tensor):
            self.images.append(result)
        elif name not in _ASKING:
            self.otherwise = True


def _flat(given: Any) -> Iterator[Any]:
    """What lies in arguments, also in lists of them."""
    if isinstance(given, (list, tuple)):
        for one in given:
            yield from _flat(one)
    elif isinstance(given, dict):
        yield from _flat(list(given.values()))
    else:
        yield given


def _name(func: Callable[..., Any]) -> str:
    """A function's name; a property's for its getter."""
    name = func.__name__
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _casts_first(model: nn.Module, images: Tensor) -> bool:
    """Whether all that a model does with images is casting them; False where it does not run without data."""
    tensors = {name: tensor.detach().to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modes = {module: module.training for module in model.modules()}
    # In evaluation mode one image is enough for batch normalisation.
    model.eval()
    try:
        with torch.no_grad(), _Uses(images) as uses:
            functional_call(model, tensors, (images,))
    except Exception:
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    return uses.cast and not uses.otherwise
