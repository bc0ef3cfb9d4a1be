"""Published architectures in PyTorch, in their full size, with random weights. Names and order are torchvision's."""

import torch
from torch import nn
from torch_nets import cat


def unit(inputs, outputs, kernel, stride=1, padding=0, epsilon=1e-5):
    """Convolution, batch normalization and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=epsilon), nn.ReLU(inplace=True))


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.main = nn.Sequential(
            unit(inputs, width, 1), unit(width, width, 3, stride, 1), unit(width, 4 * width, 1)[:2]
        )
        self.skip = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.skip = unit(inputs, 4 * width, 1, stride)[:2]

    def forward(self, x):
        return torch.relu(self.main(x) + self.skip(x))


def resnet50():
    """He et al. 2016."""
    stack, channels = [unit(3, 64, 7, 2, 3), nn.MaxPool2d(3, 2, 1)], 64
    for width, blocks, stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for k in range(blocks):
            stack.append(Bottleneck(channels, width, stride if k == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def densenet121(growth=32):
    """Huang et al. 2017."""

    def before(inputs, outputs, kernel):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv]

    stack, channels = [unit(3, 64, 7, 2, 3), nn.MaxPool2d(3, 2, 1)], 64
    for k, count in enumerate((6, 12, 24, 16)):
        if k:
            stack += [*before(channels, channels // 2, 1), nn.AvgPool2d(2, 2)]
            channels //= 2
        for _ in range(count):
            new = nn.Sequential(*before(channels, 4 * growth, 1), *before(4 * growth, growth, 3))
            stack.append(cat(nn.Identity(), new))
            channels += growth
    last = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return nn.Sequential(*stack, *last)


def squeezenet11():
    """Iandola et al. 2016, version 1.1."""

    def fire(inputs, squeeze, expand):
        one, three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)
        expands = cat(nn.Sequential(one, nn.ReLU()), nn.Sequential(three, nn.ReLU()))
        return nn.Sequential(nn.Conv2d(inputs, squeeze, 1), nn.ReLU(), expands)

    def pool():
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), fire(64, 16, 64), fire(128, 16, 64), pool(), fire(128, 32, 128),
        fire(256, 32, 128), pool(), fire(256, 48, 192), fire(384, 48, 192), fire(384, 64, 256), fire(512, 64, 256),
        nn.Dropout(), nn.Conv2d(512, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
    )  # fmt: skip


def inception3():
    """Szegedy et al. 2016, without the auxiliary classifier."""

    def conv(inputs, outputs, kernel, stride=1, padding=0):
        return unit(inputs, outputs, kernel, stride, padding, epsilon=0.001)

    def chain(*steps):
        return nn.Sequential(*[conv(*step) for step in steps])

    def pooled(inputs, outputs):
        return nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(inputs, outputs, 1))

    def a(inputs, features):
        return cat(
            conv(inputs, 64, 1), chain((inputs, 48, 1), (48, 64, 5, 1, 2)),
            chain((inputs, 64, 1), (64, 96, 3, 1, 1), (96, 96, 3, 1, 1)), pooled(inputs, features),
        )  # fmt: skip

    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))

    def c(width):
        return cat(
            conv(768, 192, 1), chain((768, width, 1), (width, width, *row), (width, 192, *column)),
            chain((768, width, 1), (width, width, *column), (width, width, *row), (width, width, *column),
                  (width, 192, *row)),
            pooled(768, 192),
        )  # fmt: skip

    def split(before):
        both = cat(conv(384, 384, (1, 3), 1, (0, 1)), conv(384, 384, (3, 1), 1, (1, 0)))
        return nn.Sequential(*before, both)

    def e(inputs):
        return cat(
            conv(inputs, 320, 1), split([conv(inputs, 384, 1)]),
            split([conv(inputs, 448, 1), conv(448, 384, 3, 1, 1)]), pooled(inputs, 192),
        )  # fmt: skip

    first = chain((3, 32, 3, 2), (32, 32, 3), (32, 64, 3, 1, 1))
    second = chain((64, 80, 1), (80, 192, 3))
    b = cat(conv(288, 384, 3, 2), chain((288, 64, 1), (64, 96, 3, 1, 1), (96, 96, 3, 2)), nn.MaxPool2d(3, 2))
    seven = chain((768, 192, 1), (192, 192, *row), (192, 192, *column), (192, 192, 3, 2))
    d = cat(chain((768, 192, 1), (192, 320, 3, 2)), seven, nn.MaxPool2d(3, 2))
    return nn.Sequential(
        first, nn.MaxPool2d(3, 2), second, nn.MaxPool2d(3, 2), a(192, 32), a(256, 64), a(288, 64), b, c(128),
        c(160), c(160), c(192), d, e(1280), e(2048), nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten(),
        nn.Linear(2048, 1000),
    )  # fmt: skip


#: name: (function, number of parameters in the publication's reference implementation)
NETS = {
    "ResNet-50": (resnet50, 25_557_032),
    "DenseNet-121": (densenet121, 7_978_856),
    "SqueezeNet 1.1": (squeezenet11, 1_235_496),
    "Inception V3": (inception3, 23_834_568),
}
