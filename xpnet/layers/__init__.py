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
from xpnet.layers.attention import MultiHeadAttention
from xpnet.layers.base import Layer
from xpnet.layers.containers import Sequential
from xpnet.layers.convolution import Conv1D, Conv2D, Conv2DTranspose, DepthwiseConv2D
from xpnet.layers.dense import Dense
from xpnet.layers.dropout import Dropout
from xpnet.layers.embedding import Embedding
from xpnet.layers.masking import Masking
from xpnet.layers.merging import Add, Average, Concatenate, Dot, Maximum, Multiply, Subtract
from xpnet.layers.normalization import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from xpnet.layers.pooling import (
    AvgPool2D,
    GlobalAveragePool2D,
    GlobalMaxPool2D,
    MaxPool2D,
    Upsample2D,
    ZeroPadding2D,
)  # fmt: skip
from xpnet.layers.positions import PositionalEmbedding
from xpnet.layers.recurrent import GRU, LSTM, Bidirectional, SimpleRNN
from xpnet.layers.residual import Residual
from xpnet.layers.sequence_pooling import AvgPool1D, GlobalAveragePool1D, GlobalMaxPool1D, MaxPool1D
from xpnet.layers.shape import Flatten, Permute, Rescale, Reshape, Slice
from xpnet.layers.transformer import TransformerBlock

__all__ = ["ELU", "GELU", "GRU", "LSTM", "Add", "Average", "AvgPool1D", "AvgPool2D", "BatchNorm", "Bidirectional",
           "Concatenate", "Conv1D", "Conv2D", "Conv2DTranspose", "Dense", "DepthwiseConv2D", "Dot", "Dropout",
           "Embedding", "Flatten", "GlobalAveragePool1D", "GlobalAveragePool2D", "GlobalMaxPool1D", "GlobalMaxPool2D",
           "GroupNorm", "HardSigmoid", "HardSwish", "HardTanh", "Identity", "InstanceNorm", "Layer", "LayerNorm",
           "LeakyReLU", "LogSoftmax", "Masking", "MaxPool1D", "MaxPool2D", "Maximum", "Mish", "MultiHeadAttention",
           "Multiply", "PReLU", "Permute", "PositionalEmbedding", "RMSNorm", "ReLU", "ReLU6", "Rescale", "Reshape",
           "Residual", "Sequential", "SiLU", "Sigmoid", "SimpleRNN", "Slice", "Softmax", "Softplus", "Step",
           "Subtract", "Tanh", "TransformerBlock", "Upsample2D", "ZeroPadding2D"]  # fmt: skip
