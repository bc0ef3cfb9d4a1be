"""Layers: forward and hand-written backward, side by side. Each file has one family of layers."""

from xpnet.layers.activations import (
    ELU,
    GELU,
    HardSigmoid,
    HardSwish,
    HardTanh,
    Identity,
    LeakyReLU,
    LogSoftmax,
    Mish,
    PReLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Step,
    Tanh,
)  # fmt: skip
from xpnet.layers.base import Layer
from xpnet.layers.containers import Sequential
from xpnet.layers.convolution import Conv2D, Conv2DTranspose, DepthwiseConv2D
from xpnet.layers.dense import Dense
from xpnet.layers.dropout import Dropout
from xpnet.layers.embedding import Embedding
from xpnet.layers.merging import Add, Average, Concatenate, Dot, Maximum, Multiply, Subtract
from xpnet.layers.normalization import BatchNorm, GroupNorm, InstanceNorm, LayerNorm
from xpnet.layers.pooling import (
    AvgPool2D,
    GlobalAveragePool2D,
    GlobalMaxPool2D,
    MaxPool2D,
    Upsample2D,
    ZeroPadding2D,
)  # fmt: skip
from xpnet.layers.residual import Residual
from xpnet.layers.shape import Flatten, Permute, Rescale, Reshape, Slice

__all__ = ["ELU", "GELU", "Add", "Average", "AvgPool2D", "BatchNorm", "Concatenate", "Conv2D", "Conv2DTranspose",
           "Dense", "DepthwiseConv2D", "Dot", "Dropout", "Embedding", "Flatten", "GlobalAveragePool2D",
           "GlobalMaxPool2D", "GroupNorm", "HardSigmoid", "HardSwish", "HardTanh", "Identity", "InstanceNorm", "Layer",
           "LayerNorm", "LeakyReLU", "LogSoftmax", "MaxPool2D", "Maximum", "Mish", "Multiply", "PReLU", "Permute",
           "ReLU", "ReLU6", "Rescale", "Reshape", "Residual", "Sequential", "SiLU", "Sigmoid", "Slice", "Softmax",
           "Softplus", "Step", "Subtract", "Tanh", "Upsample2D", "ZeroPadding2D"]  # fmt: skip
