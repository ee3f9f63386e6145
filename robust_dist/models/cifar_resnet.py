"""The small ResNets of He et al. 2016 (section 4.2) for 32x32 images: 6n+2 layers, 16, 32 and 64 channels."""

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from robust_dist.validate import whole_number


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A).

    Where the block halves the image and widens it, the shortcut takes every second pixel and appends zero channels;
    elsewhere it is the identity.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(out)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return pad(x, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else x


class CifarResNet(nn.Module):
    """ResNet of 6 * num_blocks + 2 layers: three stages of `num_blocks` blocks, then mean pooling and a linear layer.

    With 10 classes and 3 channels: ResNet-8 75,290 parameters, ResNet-20 269,722, ResNet-56 853,018. Convolution
    weights are drawn as in He et al. 2015 (normal, fan-out); the linear layer keeps torch's initialisation.

    Args:
        num_blocks: n of 6n+2.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        stem_stride: Stride of the first convolution; 1 is the paper's, 2 costs about a quarter as much.
        width: Channels of the first stage; the next two have two and four times as many.

    Raises:
        TypeError: stem_stride or width is not a whole number.
        ValueError: stem_stride or width is below 1.
    """

    def __init__(
        self, num_blocks: int, num_classes: int, in_channels: int = 3, *, stem_stride: int = 1, width: int = 16
    ) -> None:
        super().__init__()
        whole_number("stem_stride", stem_stride, 1)
        whole_number("width", width, 1)
        self.conv1 = _conv3x3(in_channels, width, stem_stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, num_blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, num_blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, num_blocks, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_conv(module)

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_channels, H, W] to logits [B, num_classes]."""
        x = relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def init_conv(conv: nn.Conv2d) -> None:
    """Initialise a convolution's weights with the normal distribution that preserves gradient scale through ReLU."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)))
