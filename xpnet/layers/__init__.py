"""Layers: forward and hand-written backward, side by side. One file a family."""

from xpnet.layers.activations import (
    ELU,
    GELU,
    Identity,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Step,
    Tanh,
)
from xpnet.layers.base import Layer
from xpnet.layers.containers import Sequential
from xpnet.layers.dense import Dense
from xpnet.layers.dropout import Dropout
from xpnet.layers.shape import Flatten, Permute, Rescale, Reshape

__all__ = [
    "ELU",
    "GELU",
    "Dense",
    "Dropout",
    "Flatten",
    "Identity",
    "Layer",
    "LeakyReLU",
    "LogSoftmax",
    "Permute",
    "ReLU",
    "Rescale",
    "Reshape",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Step",
    "Tanh",
]
