"""Everyday networks of PyTorch, small: {name: (a function that makes the module, shapes of the inputs)}."""

import torch
from torch import nn
from torch.nn import functional as f


class Call(nn.Module):
    """A module of a function of x and of the modules that are given by name: Call(lambda m, x: m.a(x) + x, a=...)."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *x):
        return self.function(self, *x)


def conv(inputs, outputs, kernel=3, stride=1, activation=nn.ReLU, **more):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False, **more),
        nn.BatchNorm2d(outputs),
        activation(),
    )


def skip(*layers):
    return Call(lambda m, x: x + m.inner(x), inner=nn.Sequential(*layers))


def cat(*branches):
    return Call(lambda m, x: torch.cat([branch(x) for branch in m.branches], 1), branches=nn.ModuleList(branches))


def head(channels, classes=5):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def alexnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(True), nn.MaxPool2d(3, 2), nn.Conv2d(8, 12, 5, padding=2), nn.ReLU(True),
        nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Dropout(), nn.Linear(12, 16), nn.ReLU(True), nn.Linear(16, 5),
    )  # fmt: skip


def vgg():
    stack = [conv(3, 8), conv(8, 8), nn.MaxPool2d(2), conv(8, 12), nn.MaxPool2d(2, 2)]
    flat = Call(lambda m, x: torch.flatten(x, 1))
    return nn.Sequential(*stack, flat, nn.Linear(12 * 64, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 5))


def basic_block(inputs, outputs, stride=1, **more):
    short = nn.Identity() if stride == 1 else nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
    )  # fmt: skip
    main = nn.Sequential(conv(inputs, outputs, 3, stride), conv(outputs, outputs, activation=nn.Identity, **more))
    return Call(lambda m, x: torch.relu(m.main(x) + m.short(x)), main=main, short=short)


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), basic_block(8, 8),
        basic_block(8, 16, 2), head(16),
    )  # fmt: skip


def bottleneck(channels, inner, groups=1):
    stack = [
        conv(channels, inner, 1),
        conv(inner, inner, groups=groups),
        conv(inner, channels, 1, activation=nn.Identity),
    ]
    return nn.Sequential(skip(*stack), nn.ReLU())


def preactivation():
    unit = [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), skip(*unit), skip(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)), head(8)
    )


def squeeze_excite(channels, inner, gate=nn.Sigmoid, activation=nn.ReLU):
    return Call(
        lambda m, x: x * m.gate(x),
        gate=nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, inner, 1), activation(), nn.Conv2d(inner, channels, 1), gate()
        ),
    )


def se_by_linear(channels, inner):
    def forward(m, x):
        n, c, _, _ = x.size()
        return x * m.fc(m.pool(x).view(n, c)).view(n, c, 1, 1).expand_as(x)

    fc = nn.Sequential(nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels), nn.Sigmoid())
    return Call(forward, pool=nn.AdaptiveAvgPool2d(1), fc=fc)


def inverted_residual(channels, inner, activation=nn.ReLU6, kernel=3, attention=None):
    return skip(
        conv(channels, inner, 1, activation=activation),
        conv(inner, inner, kernel, groups=inner, activation=activation),
        *([attention] if attention else []),
        conv(inner, channels, 1, activation=nn.Identity),
    )


def mobilenet1():
    parts = [conv(3, 8, 3, 2), conv(8, 8, groups=8), conv(8, 16, 1), conv(16, 16, 3, 2, groups=16), conv(16, 8, 1)]
    return nn.Sequential(*parts, Call(lambda m, x: f.avg_pool2d(x, 8).view(-1, 8)), nn.Linear(8, 5))


def mobilenet2():
    mean = Call(lambda m, x: x.mean([2, 3]))
    return nn.Sequential(
        conv(3, 8, 3, 2, nn.ReLU6), inverted_residual(8, 16), inverted_residual(8, 24), mean, nn.Linear(8, 5)
    )


def mobilenet3():
    attention = squeeze_excite(16, 4, nn.Hardsigmoid)
    return nn.Sequential(
        conv(3, 8, 3, 2, nn.Hardswish), inverted_residual(8, 16, nn.Hardswish, 5, attention), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, 5),
    )  # fmt: skip


def efficientnet():
    attention = squeeze_excite(16, 4, activation=nn.SiLU)
    return nn.Sequential(conv(3, 8, 3, 2, nn.SiLU), inverted_residual(8, 16, nn.SiLU, 3, attention), head(8))


def shuffle(groups):
    def forward(m, x):
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return Call(forward)


def shufflenet():
    return nn.Sequential(
        conv(3, 8), skip(conv(8, 8, 1, groups=2), shuffle(2), conv(8, 8, groups=8, activation=nn.Identity)), nn.ReLU(),
        cat(nn.AvgPool2d(3, 2, 1), conv(8, 8, 3, 2)), head(16),
    )  # fmt: skip


def fire(inputs, squeeze, expand):
    expands = cat(
        nn.Sequential(nn.Conv2d(squeeze, expand, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(squeeze, expand, 3, padding=1), nn.ReLU()),
    )
    return nn.Sequential(nn.Conv2d(inputs, squeeze, 1), nn.ReLU(), expands)


def squeezenet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), fire(8, 4, 8),
        nn.MaxPool2d(3, 2, ceil_mode=True), fire(16, 4, 8), nn.Dropout(0.5), nn.Conv2d(16, 5, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
    )  # fmt: skip


def googlenet():
    pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(8, 4, 1))
    block = cat(
        conv(8, 4, 1), nn.Sequential(conv(8, 4, 1), conv(4, 6)), nn.Sequential(conv(8, 2, 1), conv(2, 4, 5)), pool
    )
    return nn.Sequential(conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, ceil_mode=True), block, head(18))


def inception3():
    def factored(inputs, outputs):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, (1, 7), padding=(0, 3)), nn.ReLU(),
            nn.Conv2d(outputs, outputs, (7, 1), padding=(3, 0)), nn.ReLU(),
        )  # fmt: skip

    pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(8, 4, 1))
    return nn.Sequential(conv(3, 8, 3, 2), cat(conv(8, 4, 1), factored(8, 6), pool), nn.MaxPool2d(3, 2), head(14))


def densenet():
    def layer(inputs):
        inner = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 4, 3, padding=1, bias=False))
        return cat(nn.Identity(), inner)

    transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2, 2))
    return nn.Sequential(
        conv(3, 8), layer(8), layer(12), layer(16), transition, layer(10), nn.BatchNorm2d(14), nn.ReLU(), head(14)
    )


def unet(up):
    def forward(m, x):
        a = m.first(x)
        b = m.second(m.pool(a))
        return m.last(torch.cat([a, m.up(b)], dim=1))

    modules = {"first": conv(3, 6), "second": conv(6, 12), "up": up, "pool": nn.MaxPool2d(2)}
    return Call(forward, **modules, last=nn.Sequential(conv(12, 6), nn.Conv2d(6, 2, 1)))


def unet_transposed():
    return unet(nn.ConvTranspose2d(12, 6, 2, 2))


def unet_bilinear():
    return unet(nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(12, 6, 1)))


def unet_nearest():
    return unet(nn.Sequential(Call(lambda m, x: f.interpolate(x, scale_factor=2.0)), conv(12, 6)))


def fcn():
    def forward(m, x):
        a = m.first(x)
        b = m.second(a)
        return f.interpolate(m.score_a(a) + m.up(m.score_b(b)), size=x.shape[2:], mode="bilinear", align_corners=False)

    return Call(
        forward, first=conv(3, 8, 3, 2), second=conv(8, 12, 3, 2), score_a=nn.Conv2d(8, 4, 1),
        score_b=nn.Conv2d(12, 4, 1), up=nn.ConvTranspose2d(4, 4, 4, 2, 1),
    )  # fmt: skip


def convnext():
    def forward(m, x):
        y = m.depthwise(x).permute(0, 2, 3, 1)
        return x + (m.scale * m.mlp(m.norm(y))).permute(0, 3, 1, 2)

    block = Call(
        forward, depthwise=nn.Conv2d(8, 8, 7, padding=3, groups=8), norm=nn.LayerNorm(8, eps=1e-6),
        mlp=nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), scale=nn.Parameter(torch.rand(8)),
    )  # fmt: skip
    mean = Call(lambda m, x: m.norm(x.mean([-2, -1])), norm=nn.LayerNorm(8))
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), block, mean, nn.Linear(8, 5))


def convnext_by_channel():
    def forward(m, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return m.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + m.bias[:, None, None]

    norm = Call(forward, weight=nn.Parameter(torch.rand(8)), bias=nn.Parameter(torch.rand(8)))
    return nn.Sequential(nn.Conv2d(3, 8, 2, 2), norm, nn.Conv2d(8, 8, 2, 2), nn.GELU(), head(8))


def convmixer():
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.BatchNorm2d(8),
        skip(nn.Conv2d(8, 8, 5, groups=8, padding="same"), nn.GELU(), nn.BatchNorm2d(8)), nn.Conv2d(8, 8, 1),
        nn.GELU(), head(8),
    )  # fmt: skip


def mlp_mixer():
    def mixed(m, x):
        return x + m.mlp(m.norm(x).transpose(1, 2)).transpose(1, 2)

    patches = Call(lambda m, x: m.conv(x).flatten(2).transpose(1, 2), conv=nn.Conv2d(3, 8, 8, 8))
    tokens = Call(mixed, norm=nn.LayerNorm(8), mlp=nn.Sequential(nn.Linear(16, 6), nn.GELU(), nn.Linear(6, 16)))
    channels = skip(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    return nn.Sequential(patches, tokens, channels, Call(lambda m, x: x.mean(1)), nn.Linear(8, 5))


def autoencoder():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 256, 6), nn.Linear(6, 4 * 256), nn.ReLU(),
        nn.Unflatten(1, (4, 16, 16)), nn.ConvTranspose2d(4, 1, 3, 2, 1, output_padding=1), nn.Sigmoid(),
    )  # fmt: skip


def autoencoder_of_vectors():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 1024), nn.Sigmoid(), nn.Unflatten(1, (1, 32, 32))
    )


def generator():
    return nn.Sequential(
        nn.ConvTranspose2d(10, 16, 4, 1, 0, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


def generator_of_vectors():
    project = Call(lambda m, z: m.linear(z).view(-1, 8, 4, 4), linear=nn.Linear(10, 128))
    return nn.Sequential(project, nn.Upsample(scale_factor=2), conv(8, 4), nn.Conv2d(4, 1, 3, padding=1), nn.Tanh())


def discriminator():
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(8, 16, 4, 2, 1), nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2, True), nn.Conv2d(16, 1, 8), nn.Sigmoid(), Call(lambda m, x: x.view(-1, 1)),
    )  # fmt: skip


def vae():
    def forward(m, x):
        h = m.encoder(x)
        mean = m.mean(h)
        return m.decoder(mean), mean, m.log_variance(h)

    return Call(
        forward, encoder=nn.Sequential(conv(1, 4, 3, 2), nn.Flatten(), nn.Linear(1024, 12), nn.ReLU()),
        mean=nn.Linear(12, 3), log_variance=nn.Linear(12, 3),
        decoder=nn.Sequential(
            nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 1024), nn.Sigmoid(), nn.Unflatten(1, (1, 32, 32))
        ),
    )  # fmt: skip


def super_resolution():
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 9, 3, padding=1), nn.PixelShuffle(3), nn.Sigmoid()
    )


def normalized():
    def forward(m, x):
        return m.net((x - m.mean) / m.std)

    mean, std = (nn.Parameter(torch.tensor(a).view(1, 3, 1, 1), False) for a in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
    return Call(forward, mean=mean, std=std, net=nn.Sequential(conv(3, 8, 3, 2), head(8)))


def network_in_network():
    return nn.Sequential(
        conv(3, 8, 5), conv(8, 8, 1), nn.MaxPool2d(3, 2, 1), conv(8, 5, 1), nn.AvgPool2d(16), nn.Flatten()
    )


def group_norms():
    stack = [nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU()]
    return nn.Sequential(*stack, skip(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)), head(8))


def style_transfer():
    unit = [nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU()]
    up = [nn.Upsample(scale_factor=2), nn.ZeroPad2d(1), nn.Conv2d(8, 3, 3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), skip(*unit), *up)


def reflection():
    return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), nn.ReLU())


def siamese():
    def forward(m, a, b):
        return m.score(torch.abs(m.trunk(a) - m.trunk(b)))

    trunk = nn.Sequential(conv(1, 4, 3, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 8), nn.Sigmoid())
    return Call(forward, trunk=trunk, score=nn.Sequential(nn.Linear(8, 1), nn.Sigmoid()))


def two_inputs():
    def forward(m, image, meta):
        return m.last(torch.cat([m.trunk(image), meta], dim=1))

    return Call(forward, trunk=nn.Sequential(conv(3, 4, 3, 2), head(4, 6)), last=nn.Linear(10, 3))


def two_heads():
    def forward(m, x):
        h = m.trunk(x)
        return m.digit(h), torch.sigmoid(m.odd(h))

    return Call(
        forward,
        trunk=nn.Sequential(conv(3, 4, 3, 2), head(4, 6), nn.ReLU()),
        digit=nn.Linear(6, 4),
        odd=nn.Linear(6, 1),
    )


def highway():
    def forward(m, x):
        gate = torch.sigmoid(m.gate(x))
        return gate * torch.relu(m.main(x)) + (1 - gate) * x

    blocks = [Call(forward, gate=nn.Linear(12, 12), main=nn.Linear(12, 12)) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(12, 3))


def cbam():
    def channels(m, x):
        average, largest = f.adaptive_avg_pool2d(x, 1), f.adaptive_max_pool2d(x, 1)
        return x * torch.sigmoid(m.mlp(average) + m.mlp(largest))

    def pixels(m, x):
        both = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
        return x * torch.sigmoid(m.conv(both))

    mlp = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1))
    return nn.Sequential(
        conv(3, 8, 3, 2), Call(channels, mlp=mlp), Call(pixels, conv=nn.Conv2d(2, 1, 7, padding=3)), head(8)
    )


def feature_pyramid():
    def forward(m, x):
        c1 = m.stage1(x)
        c2 = m.stage2(c1)
        p2 = m.side2(c2)
        p1 = m.side1(c1) + f.interpolate(p2, size=c1.shape[-2:], mode="nearest")
        return m.smooth(p1), m.smooth(p2)

    sides = {"side1": nn.Conv2d(6, 4, 1), "side2": nn.Conv2d(8, 4, 1), "smooth": nn.Conv2d(4, 4, 3, padding=1)}
    return Call(forward, stage1=conv(3, 6, 3, 2), stage2=conv(6, 8, 3, 2), **sides)


def atrous_pyramid():
    def pooled(m, x):
        return f.interpolate(m.inner(x), size=x.shape[-2:], mode="bilinear", align_corners=False)

    image = Call(pooled, inner=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU()))
    dilated = [
        nn.Sequential(nn.Conv2d(8, 4, 3, padding=rate, dilation=rate), nn.BatchNorm2d(4), nn.ReLU()) for rate in (2, 4)
    ]
    return nn.Sequential(conv(3, 8, 3, 2), cat(conv(8, 4, 1), *dilated, image), nn.Conv2d(16, 3, 1))


def yolo():
    pools = [nn.MaxPool2d(size, 1, size // 2) for size in (5, 9)]
    return nn.Sequential(conv(3, 8, 3, 2, nn.SiLU), cat(nn.Identity(), *pools), conv(24, 6, 1, activation=nn.Mish))


def separable():
    def unit(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.Conv2d(inputs, outputs, 1))

    main = nn.Sequential(nn.ReLU(), unit(8, 12), nn.BatchNorm2d(12), nn.MaxPool2d(3, 2, 1))
    block = Call(lambda m, x: m.main(x) + m.short(x), main=main, short=nn.Conv2d(8, 12, 1, 2))
    return nn.Sequential(conv(3, 8), block, nn.ReLU(), head(12))


def repvgg():
    branches = [conv(3, 6, activation=nn.Identity), conv(3, 6, 1, activation=nn.Identity)]
    total = Call(lambda m, x: torch.relu(m.a(x) + m.b(x)), a=branches[0], b=branches[1])
    again = Call(lambda m, x: m.a(x) + m.b(x) + m.c(x), a=conv(6, 6), b=conv(6, 6, 1), c=nn.BatchNorm2d(6))
    return nn.Sequential(total, again, nn.PReLU(6), head(6))


def gated():
    return nn.Sequential(nn.Linear(12, 8), nn.GLU(), nn.Linear(4, 3))


def mlp():
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.SELU(), nn.Dropout(), nn.Linear(16, 3), nn.Softmax(1)
    )


def wide_and_deep():
    def forward(m, words, numbers):
        return m.deep(torch.cat([m.table(words).flatten(1), numbers], 1)) + m.wide(numbers)

    deep = nn.Sequential(nn.Linear(17, 8), nn.ReLU(), nn.Linear(8, 1))
    return Call(forward, table=nn.Embedding(20, 4), deep=deep, wide=nn.Linear(5, 1))


def classifier(rnn, output):
    """A recurrent layer, and a Linear of its "last" step, its last "state" or the "mean" of all steps."""

    def forward(m, x):
        steps, state = m.rnn(x)
        if output == "mean":
            return m.linear(steps.mean(1))
        if output == "last":
            return m.linear(steps[:, -1])
        state = state[0] if isinstance(state, tuple) else state
        return m.linear(torch.cat([state[-2], state[-1]], 1) if m.rnn.bidirectional else state[-1])

    width = rnn.hidden_size * (2 if rnn.bidirectional else 1)
    return Call(forward, rnn=rnn, linear=nn.Linear(width, 3))


def words(rnn):
    return nn.Sequential(nn.Embedding(20, 6), classifier(rnn, "state"))


def cnn1d():
    def unit(inputs, outputs, stride=1):
        return nn.Sequential(nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())

    return nn.Sequential(
        unit(4, 8), nn.MaxPool1d(2), skip(unit(8, 8), nn.Conv1d(8, 8, 5, padding=4, dilation=2)), unit(8, 12, 2),
        nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


def temporal_convolution():
    causal = Call(lambda m, x: torch.relu(m.conv(f.pad(x, (4, 0)))), conv=nn.Conv1d(4, 4, 3, dilation=2))
    return nn.Sequential(skip(causal), nn.GroupNorm(2, 4), nn.Conv1d(4, 3, 1), Call(lambda m, x: x.amax(-1)))


def attention(width, heads, causal=False, packed=True):
    """Self-attention as it is written by hand."""

    def forward(m, x):
        n, t, _ = x.shape
        if packed == "by axis":
            q, k, v = m.qkv(x).reshape(n, t, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = m.qkv(x).chunk(3, -1) if packed else (m.q(x), m.k(x), m.v(x))
            q, k, v = (part.view(n, t, heads, width // heads).transpose(1, 2) for part in parts)
        if packed == "by axis":
            y = f.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:
            scores = q @ k.transpose(-2, -1) * (width // heads) ** -0.5
            scores = scores.masked_fill(m.mask[:t, :t] == 0, float("-inf")) if causal else scores
            y = scores.softmax(-1) @ v
        return m.out(y.transpose(1, 2).reshape(n, t, width))

    modules = {"qkv": nn.Linear(width, 3 * width)} if packed else {p: nn.Linear(width, width) for p in "qkv"}
    mask = nn.Parameter(torch.ones(16, 16).tril(), False)
    return Call(forward, **modules, out=nn.Linear(width, width), mask=mask)


def block(width, attend, norm=nn.LayerNorm):
    return nn.Sequential(
        skip(norm(width), attend),
        skip(norm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
    )


def vit(attend, class_token):
    def forward(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) if class_token else x
        x = m.norm(m.blocks(x + m.positions))
        return m.head(x[:, 0] if class_token else x.mean(1))

    blocks = nn.Sequential(block(8, attend()), block(8, attend()))
    return Call(
        forward, patches=nn.Conv2d(3, 8, 8, 8), token=nn.Parameter(torch.randn(1, 1, 8)), blocks=blocks,
        positions=nn.Parameter(torch.randn(1, 16 + class_token, 8)), norm=nn.LayerNorm(8), head=nn.Linear(8, 5),
    )  # fmt: skip


def gpt():
    def forward(m, x):
        h = m.tokens(x) + m.positions(torch.arange(x.shape[1]))
        return m.head(m.norm(m.blocks(h)))

    blocks = nn.Sequential(*[block(8, attention(8, 2, causal=True)) for _ in range(2)])
    return Call(
        forward, tokens=nn.Embedding(20, 8), positions=nn.Embedding(16, 8), blocks=blocks, norm=nn.LayerNorm(8),
        head=nn.Linear(8, 20, bias=False),
    )  # fmt: skip


def self_attention():
    return Call(
        lambda m, x: m.inner(x, x, x, need_weights=False)[0], inner=nn.MultiheadAttention(8, 2, batch_first=True)
    )


def decoder():
    def forward(m, x, memory):
        return m.inner(m.norm(x), memory, memory)[0] + x

    return Call(forward, inner=nn.MultiheadAttention(8, 2, batch_first=True), norm=nn.LayerNorm(8))


def rms_norms():
    return nn.Sequential(nn.Linear(8, 6), nn.RMSNorm(6, eps=1e-6), nn.SiLU(), nn.RMSNorm(6, eps=1e-5), nn.Linear(6, 3))


IMAGE, GRAY = (3, 32, 32), (1, 32, 32)
NETS = {
    "LeNet": (lenet, [(1, 28, 28)]),
    "AlexNet": (alexnet, [(3, 64, 64)]),
    "VGG": (vgg, [IMAGE]),
    "ResNet": (resnet, [IMAGE]),
    "ResNet of bottlenecks": (lambda: nn.Sequential(conv(3, 8, 3, 2), bottleneck(8, 4), head(8)), [IMAGE]),
    "ResNeXt": (lambda: nn.Sequential(conv(3, 8, 3, 2), bottleneck(8, 4, groups=2), head(8)), [IMAGE]),
    "ResNet, normalized first": (preactivation, [IMAGE]),
    "RepVGG": (repvgg, [IMAGE]),
    "SE by convolutions": (lambda: nn.Sequential(conv(3, 8), squeeze_excite(8, 2), head(8)), [IMAGE]),
    "SE by Linear": (lambda: nn.Sequential(conv(3, 8), se_by_linear(8, 2), head(8)), [IMAGE]),
    "CBAM": (cbam, [IMAGE]),
    "MobileNet V1": (mobilenet1, [IMAGE]),
    "MobileNet V2": (mobilenet2, [IMAGE]),
    "MobileNet V3": (mobilenet3, [IMAGE]),
    "EfficientNet": (efficientnet, [IMAGE]),
    "ShuffleNet": (shufflenet, [IMAGE]),
    "Xception": (separable, [IMAGE]),
    "SqueezeNet": (squeezenet, [IMAGE]),
    "GoogLeNet": (googlenet, [IMAGE]),
    "Inception V3": (inception3, [IMAGE]),
    "DenseNet": (densenet, [IMAGE]),
    "network in network": (network_in_network, [IMAGE]),
    "YOLO": (yolo, [IMAGE]),
    "U-Net": (unet_transposed, [IMAGE]),
    "U-Net, bilinear": (unet_bilinear, [IMAGE]),
    "U-Net, nearest": (unet_nearest, [IMAGE]),
    "FCN": (fcn, [IMAGE]),
    "feature pyramid": (feature_pyramid, [IMAGE]),
    "ASPP": (atrous_pyramid, [IMAGE]),
    "ConvNeXt": (convnext, [IMAGE]),
    "ConvNeXt, normalized by channel": (convnext_by_channel, [IMAGE]),
    "ConvMixer": (convmixer, [IMAGE]),
    "MLP-Mixer": (mlp_mixer, [IMAGE]),
    "autoencoder": (autoencoder, [GRAY]),
    "autoencoder of vectors": (autoencoder_of_vectors, [GRAY]),
    "VAE": (vae, [GRAY]),
    "DCGAN generator": (generator, [(10, 1, 1)]),
    "generator of vectors": (generator_of_vectors, [(10,)]),
    "DCGAN discriminator": (discriminator, [IMAGE]),
    "super-resolution": (super_resolution, [(1, 12, 12)]),
    "style transfer": (style_transfer, [IMAGE]),
    "reflection padding": (reflection, [IMAGE]),
    "GroupNorm": (group_norms, [IMAGE]),
    "normalized channels": (normalized, [IMAGE]),
    "siamese": (siamese, [GRAY, GRAY]),
    "two inputs": (two_inputs, [IMAGE, (4,)]),
    "two heads": (two_heads, [IMAGE]),
    "highway": (highway, [(12,)]),
    "GLU": (gated, [(12,)]),
    "MLP": (mlp, [(12,)]),
    "wide and deep": (wide_and_deep, [(3,), (5,)]),
    "LSTM": (lambda: classifier(nn.LSTM(4, 6, num_layers=2, batch_first=True), "last"), [(5, 4)]),
    "LSTM of words": (lambda: words(nn.LSTM(6, 5, batch_first=True)), [(7,)]),
    "LSTM, both ways": (lambda: classifier(nn.LSTM(4, 6, bidirectional=True, batch_first=True), "mean"), [(5, 4)]),
    "GRU": (lambda: classifier(nn.GRU(4, 6, batch_first=True), "state"), [(5, 4)]),
    "GRU of words": (lambda: words(nn.GRU(6, 5, batch_first=True, bias=False)), [(7,)]),
    "GRU, both ways": (
        lambda: classifier(nn.GRU(4, 6, num_layers=2, bidirectional=True, batch_first=True), "state"),
        [(5, 4)],
    ),
    "RNN": (lambda: classifier(nn.RNN(4, 6, batch_first=True), "last"), [(5, 4)]),
    "1-D CNN": (cnn1d, [(4, 16)]),
    "temporal convolution": (temporal_convolution, [(4, 9)]),
    "ViT": (lambda: vit(lambda: attention(8, 2, packed="by axis"), True), [IMAGE]),
    "ViT, mean of patches": (lambda: vit(lambda: attention(8, 2, packed=False), False), [IMAGE]),
    "ViT of MultiheadAttention": (lambda: vit(self_attention, True), [IMAGE]),
    "GPT": (gpt, [(9,)]),
    "cross-attention": (decoder, [(5, 8), (3, 8)]),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [(5, 8)]),
    "RMSNorm": (rms_norms, [(5, 8)]),
}
#: What one of the exporters cannot write: PyTorch's older one has no fused attention.
WITHOUT_OLD_EXPORTER = ("ViT of MultiheadAttention", "TransformerEncoderLayer", "RMSNorm")
#: Nets of words, the integers from 0 to 19.
WORDS = ("wide and deep", "LSTM of words", "GRU of words", "GPT")


def made(name, samples=3):
    """(the module, in evaluation, with running statistics of its own; the inputs; the outputs) of a net."""
    make, shapes = NETS[name]
    torch.manual_seed(0)
    net = make()
    x = [torch.randn(samples, *shape) for shape in shapes]
    if name in WORDS:
        x[0] = torch.randint(20, x[0].shape)
    with torch.no_grad():
        net(*x)  # changes the running statistics
        net.eval()
        y = net(*x)
    return net, x, list(y) if isinstance(y, tuple) else [y]


def exported(net, x, path, dynamo):
    """Write the net to an ONNX file with one of PyTorch's exporters."""
    names = [f"x{i}" for i in range(len(x))]
    with torch.no_grad():
        if dynamo:
            torch.onnx.export(net, tuple(x), path, dynamo=True, opset_version=18, external_data=False, verbose=False,
                              input_names=names)  # fmt: skip
        else:
            axes = {name: {0: "N"} for name in names}
            torch.onnx.export(net, tuple(x), path, dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes)
