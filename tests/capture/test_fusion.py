"""Fusion: the passes that replace operators of a captured step on a GPU by fewer and by fused ones."""

import numpy as np
import pytest
from captured_trainings import IMAGES, X, Y
from precisions import require_precision
from traced_gpu_steps import arrays, captured_steps, checked_list, listed, names

import xpnet
from xpnet import layers, losses, optimizers
from xpnet.backends.reference.windows import Windows
from xpnet.capture import branches


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    """Calls stay in the order of the trace."""
    monkeypatch.setattr(branches, "STREAMS", 1)


def check(gpu, work, given, expected, tolerance=1e-6):
    """Assert that the list of work(backend, *given) has these calls, and computes what `work` computes."""
    with gpu.device():
        calls = checked_list(gpu, work, given, rtol=tolerance, atol=tolerance)
    assert names(calls) == expected.split(), " ".join(names(calls))


# Bias and ReLU -------------------------------------------------------------------------------------------------------


def test_a_bias_and_relu_are_fused(gpu):
    def work(backend, x, b, y):
        z = backend.rescale(x, 2.0, 1.0, out=backend.empty((6, 4), "float32"))
        backend.relu(backend.add_to_rows(z, b), out=y)

    check(gpu, work, arrays(gpu, (6, 4), (4,), (6, 4)), "rescale add_to_rows_relu")


def test_images_get_the_bias_of_their_rows(gpu):
    def work(backend, x, b, y):
        z = backend.empty(x.shape, "float32")
        backend.relu(x, out=z)
        backend.add_to_rows(z.reshape(-1, 3), b)
        backend.relu(z, out=y)

    check(gpu, work, arrays(gpu, (2, 4, 4, 3), (3,), (2, 4, 4, 3)), "relu add_to_rows_relu")


def test_a_relu_in_place_is_fused_although_its_result_is_read(gpu):
    def work(backend, x, b, y):
        backend.relu(backend.add_to_rows(x, b), out=x)
        y += x

    check(gpu, work, arrays(gpu, (6, 4), (4,), (6, 4)), "add_to_rows_relu add")


def reads_before_activation(backend, z, b, y):
    backend.relu(backend.add_to_rows(z, b), out=y)
    y += z


def reads_before_relu(backend, z, b, y):
    z = backend.relu(z, out=backend.empty(z.shape, "float32"))
    backend.add_to_rows(z, b)
    y += z
    backend.relu(z, out=y)


def keeps_z(backend, z, b, y):
    backend.relu(backend.add_to_rows(z, b), out=y)  # z is not temporary: the step's caller sees it


def half_of_the_rows(backend, z, b, y):
    z = backend.relu(z, out=backend.empty(z.shape, "float32"))
    backend.add_to_rows(z[:3], b)
    backend.relu(z, out=y)


@pytest.mark.parametrize(("work", "expected"), [
    (reads_before_activation, "add_to_rows relu add"), (reads_before_relu, "relu add_to_rows add relu"),
    (keeps_z, "add_to_rows relu"), (half_of_the_rows, "relu add_to_rows relu"),
], ids=lambda a: getattr(a, "__name__", ""))  # fmt: skip
def test_a_bias_whose_sum_is_needed_is_not_fused(gpu, work, expected):
    check(gpu, work, arrays(gpu, (6, 4), (4,), (6, 4)), expected)


# Products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
def test_a_product_is_fused_with_its_bias_and_relu(gpu, relu):
    def work(backend, x, w, b, y):
        z = backend.matmul(x, w, out=backend.empty((6, 4), "float32") if relu else y)
        backend.add_to_rows(z, b)
        if relu:
            backend.relu(z, out=y)

    check(gpu, work, arrays(gpu, (6, 5), (5, 4), (4,), (6, 4)), "matmul_bias")


def test_a_product_of_patches_gets_the_bias_of_its_images(gpu):
    def work(backend, x, w, b, y):
        z = backend.empty((2, 3, 4), "float32")
        backend.matmul(x, w, out=z.reshape(-1, 4))
        backend.add_to_rows(z.reshape(-1, 4), b)
        backend.relu(z, out=y)

    check(gpu, work, arrays(gpu, (6, 5), (5, 4), (4,), (2, 3, 4)), "matmul_bias")


def test_the_gradient_of_relu_is_fused_with_the_product_before(gpu):
    def work(backend, g, w, y, out):
        grad = backend.matmul(g, w.T, out=backend.empty((6, 4), "float32"))
        backend.relu_grad(grad, y, out=out)

    check(gpu, work, arrays(gpu, (6, 5), (4, 5), (6, 4), (6, 4)), "matmul_relu_grad")


def test_a_product_is_fused_with_the_sums_of_its_second_matrix(gpu):
    def work(backend, x, g, w, grad_w, grad_b, grad_x):
        backend.matmul(x.T, g, out=grad_w)
        backend.matmul(g, w.T, out=grad_x)
        backend.sum_rows(g, out=grad_b)

    check(gpu, work, arrays(gpu, (6, 5), (6, 4), (5, 4), (5, 4), (4,), (6, 5)), "matmul_sum_rows matmul")


def biases_some_rows(backend, x, w, b, y):
    backend.matmul(x, w, out=y)
    backend.add_to_rows(y[:3], b)


def reads_the_product(backend, x, w, b, y):
    z = backend.matmul(x, w, out=backend.empty((6, 4), "float32"))
    y += z
    backend.add_to_rows(z, b)
    y += z


def changes_the_bias(backend, x, w, b, y):
    backend.matmul(x, w, out=y)
    b += 1.0
    backend.add_to_rows(y, b)


def needs_the_gradient(backend, x, w, b, y):
    grad = backend.matmul(x, w, out=backend.empty((6, 4), "float32"))
    backend.relu_grad(grad, y, out=backend.empty((6, 4), "float32"))
    out = backend.relu_grad(grad, y, out=backend.empty((6, 4), "float32"))
    y += out + grad


def overwrites_its_mask(backend, x, w, b, y):
    grad = backend.matmul(x, w, out=backend.empty((6, 4), "float32"))
    backend.relu_grad(grad, y, out=y)


def sums_the_first_matrix(backend, x, w, b, y):
    backend.matmul(x, w, out=y)
    backend.sum_rows(y, out=b)


def changes_the_second_matrix(backend, x, w, b, y):
    backend.matmul(x, w, out=y)
    w *= 2.0
    backend.sum_rows(w, out=b)


@pytest.mark.parametrize(("work", "expected"), [
    (biases_some_rows, "matmul add_to_rows"), (reads_the_product, "matmul add add_to_rows add"),
    (changes_the_bias, "matmul add add_to_rows"), (needs_the_gradient, "matmul relu_grad elementwise"),
    (overwrites_its_mask, "matmul relu_grad"), (sums_the_first_matrix, "matmul sum_rows"),
    (changes_the_second_matrix, "matmul multiply sum_rows"),
], ids=lambda a: getattr(a, "__name__", ""))  # fmt: skip
def test_other_products_are_not_fused(gpu, work, expected):
    check(gpu, work, arrays(gpu, (6, 5), (5, 4), (4,), (6, 4)), expected)


# Gradient of ReLU and of the bias ------------------------------------------------------------------------------------


def test_the_gradient_of_relu_and_its_sums_are_fused_over_other_calls(gpu):
    def work(backend, grad, y, x, grad_w, grad_b, out):
        backend.relu_grad(grad, y, out=out)
        backend.matmul(x.T, out, out=grad_w)
        backend.sum_rows(out, out=grad_b)

    check(gpu, work, arrays(gpu, (6, 4), (6, 4), (6, 5), (5, 4), (4,), (6, 4)), "relu_grad_sum_rows matmul")


def test_the_gradients_of_images_are_summed_as_rows(gpu):
    def work(backend, grad, y, grad_b, out):
        backend.relu_grad(grad, y, out=out)
        backend.sum_rows(out.reshape(-1, 3), out=grad_b)

    check(gpu, work, arrays(gpu, *[(2, 4, 4, 3)] * 2, (3,), (2, 4, 4, 3)), "relu_grad_sum_rows")


def sums_another_array(backend, grad, y, sums, out):
    backend.relu_grad(grad, y, out=out)
    backend.sum_rows(grad, out=sums)


def changes_the_result(backend, grad, y, sums, out):
    backend.relu_grad(grad, y, out=out)
    out *= 2.0
    backend.sum_rows(out, out=sums)


def uses_the_old_sums(backend, grad, y, sums, out):
    backend.relu_grad(grad, y, out=out)
    backend.add_to_rows(grad, sums)
    backend.sum_rows(out, out=sums)


def sums_some_rows(backend, grad, y, sums, out):
    backend.relu_grad(grad, y, out=out)
    backend.sum_rows(out[:3], out=sums)


@pytest.mark.parametrize(("work", "expected"), [
    (sums_another_array, "relu_grad sum_rows"), (changes_the_result, "relu_grad multiply sum_rows"),
    (uses_the_old_sums, "relu_grad add_to_rows sum_rows"), (sums_some_rows, "relu_grad sum_rows"),
], ids=lambda a: getattr(a, "__name__", ""))  # fmt: skip
def test_other_sums_are_not_fused(gpu, work, expected):
    check(gpu, work, arrays(gpu, (6, 4), (6, 4), (4,), (6, 4)), expected)


# Max pooling ---------------------------------------------------------------------------------------------------------

PAIRS = Windows((4, 4), (2, 2), (2, 2), (2, 2))


def pooling(bias=True, relu=True, between=None, reshaped=False):
    """A function that pools the result of a convolution."""

    def work(backend, x, row, y):
        z = backend.relu(x, out=backend.empty(x.shape, "float32"))
        if bias:
            backend.add_to_rows(z.reshape(-1, 3), row)
        if between == "z":
            y += z[:, ::2, ::2]
        pooled, choice = backend.empty(y.shape, "float32"), backend.empty(y.shape, "uint8")
        backend.max_pool(z, PAIRS, out=pooled, choice=choice)
        if between == "pooled":
            y += pooled
        if relu:
            out = backend.empty(y.shape, "float32")
            pooled = backend.relu(*[a.reshape(2, -1) if reshaped else a for a in (pooled, out)]).reshape(y.shape)
        y += pooled
        y *= choice + 1.0
        if between == "later":
            y += z[:, ::2, ::2]

    return work


FUSED = "relu add_to_rows_max_pool add add multiply"


@pytest.mark.parametrize(("options", "expected"), [
    ({}, FUSED), ({"bias": False}, FUSED), ({"relu": False}, FUSED), ({"reshaped": True}, FUSED),
    ({"bias": False, "relu": False}, FUSED.replace("add_to_rows_", "")),
    ({"between": "z"}, "relu add_to_rows add add_to_rows_max_pool add add multiply"),
    ({"between": "later"}, "relu add_to_rows add_to_rows_max_pool add add multiply add"),
    ({"between": "pooled"}, "relu add_to_rows_max_pool relu add elementwise multiply"),
], ids=str)  # fmt: skip
def test_the_bias_and_relu_of_a_pooled_convolution_are_fused(gpu, options, expected):
    check(gpu, pooling(**options), arrays(gpu, (2, 4, 4, 3), (3,), (2, 2, 2, 3)), expected)


def unpooling(between=None):
    """A function that passes a gradient through ReLU and pooling."""

    def work(backend, grad, y, out):
        masked, choice = backend.empty(y.shape, "float32"), backend.empty(y.shape, "uint8")
        choice[...] = y > 0.5
        backend.relu_grad(grad, y, out=masked)
        if between == "masked":
            masked *= 2.0
        elif between == "y":
            y *= 0.0
        backend.max_pool_grad(masked, choice, PAIRS, out=out)
        if between == "later":
            y += masked

    return work


@pytest.mark.parametrize(("between", "expected"), [
    (None, "relu_grad_max_pool_grad"), ("masked", "relu_grad multiply max_pool_grad"),
    ("y", "relu_grad multiply max_pool_grad"), ("later", "relu_grad max_pool_grad add"),
])  # fmt: skip
def test_the_gradients_of_relu_and_pooling_are_fused(gpu, between, expected):
    given = arrays(gpu, (2, 2, 2, 3), (2, 2, 2, 3), (2, 4, 4, 3))
    check(gpu, unpooling(between), given, f"greater copyto {expected}")


# Cross-entropy -------------------------------------------------------------------------------------------------------


def cross_entropy(scale=True, count=True, between=None, weights=False, other_labels=False):
    """A function that computes the loss of a step in the order of a training step."""

    def work(backend, logits, w, losses, grad, grad_w, loss_sum, total, labels, more_labels):
        backend.cross_entropy(logits, labels, 0.1, losses, grad)
        if scale:
            grad *= 1 / 6
        if weights:
            grad *= losses.reshape(-1, 1)
        if between is not None:
            between(logits, losses, grad, loss_sum, total)
        backend.matmul(logits.T, grad, out=grad_w)
        backend.sum_to(losses, loss_sum)
        if count:
            total[...] = total + backend.count_correct(logits, more_labels if other_labels else labels)

    return work


def double_losses(logits, losses, grad, loss_sum, total):
    losses *= 2.0


def change_logits(logits, losses, grad, loss_sum, total):
    logits *= 2.0


def read_the_sum(logits, losses, grad, loss_sum, total):
    losses[...] = loss_sum.astype("float32")


def reset_the_total(logits, losses, grad, loss_sum, total):
    total += 1


UNFUSED = "cross_entropy {} matmul sum_to count_correct add"
LOSSES = {
    "all": ({}, "cross_entropy_sums matmul"),
    "a sum over samples": ({"scale": False}, "cross_entropy_sums matmul"),
    "no accuracy": ({"count": False}, "cross_entropy_sums matmul"),
    "neither": ({"scale": False, "count": False}, "cross_entropy_sums matmul"),
    "weights": ({"weights": True}, "cross_entropy_sums multiply matmul"),
    "the accuracy of other labels": ({"other_labels": True}, "cross_entropy_sums matmul count_correct add"),
    "other logits": ({"between": change_logits}, "cross_entropy_sums multiply matmul count_correct add"),
    "another total": ({"between": reset_the_total}, "cross_entropy_sums add matmul count_correct add"),
    "other losses": ({"between": double_losses}, UNFUSED.format("elementwise")),
    "the old sum": ({"between": read_the_sum}, UNFUSED.format("copyto copyto multiply")),
}


@pytest.mark.parametrize(("options", "expected"), LOSSES.values(), ids=LOSSES.keys())
def test_cross_entropy_is_fused_with_its_sums(gpu, options, expected):
    given = arrays(gpu, (6, 3), (3, 3), (6,), (6, 3), (3, 3))
    given += [gpu.zeros((), "float64"), gpu.zeros((2,), "int64")]
    given += [gpu.asarray(np.arange(6) % 3), gpu.asarray(np.arange(6)[::-1] % 3)]
    check(gpu, cross_entropy(**options), given, expected)


def test_counts_that_something_else_reads_are_not_fused(gpu):
    def work(backend, logits, losses, grad, loss_sum, total, last, labels):
        backend.cross_entropy(logits, labels, 0.0, losses, grad)
        backend.sum_to(losses, loss_sum)
        counts = backend.count_correct(logits, labels)
        total += counts
        last -= counts

    given = arrays(gpu, (6, 3), (6,), (6, 3))
    given += [gpu.zeros((), "float64"), gpu.zeros((2,), "int64"), gpu.zeros((2,), "int64")]
    given += [gpu.asarray(np.arange(6) % 3)]
    check(gpu, work, given, "cross_entropy_sums count_correct add subtract")


# The output layer of a classifier ------------------------------------------------------------------------------------


def output_layer(bias=True, count=True, gradient=True, mask=True, between=None, later=None):
    """A function that computes the output of a classifier with its loss and gradients."""

    def work(backend, h, w, b, losses, grad, grad_w, grad_b, out, loss_sum, total, labels):
        logits = backend.matmul(h, w, out=backend.empty(grad.shape, "float32"))
        if bias:
            backend.add_to_rows(logits, b)
        if between == "logits":
            logits *= 2.0
        backend.cross_entropy(logits, labels, 0.1, losses, grad)
        if between == "gradient":
            grad += 1.0
        grad *= 1 / 6
        if count:
            total += backend.count_correct(logits, labels)
        backend.sum_to(losses, loss_sum)
        backend.matmul(h.T, grad, out=grad_w)
        backend.sum_rows(grad, out=grad_b)
        if between == "weight":
            w *= 2.0
        if gradient:
            grad_h = backend.empty(h.shape, "float32") if mask else out
            backend.matmul(grad, w.T, out=grad_h)
            if mask:
                backend.relu_grad(grad_h, h, out=out)
            if later == "grad_h":
                out += grad_h
        if later == "logits":
            losses += logits[:, 0]

    return work


WHOLE = "dense_cross_entropy sum_to matmul_sum_rows"
OUTPUTS = {
    "all": ({}, WHOLE),
    "no bias": ({"bias": False}, WHOLE),
    "no accuracy": ({"count": False}, WHOLE),
    "frozen layers before": ({"gradient": False}, WHOLE),
    "no mask": ({"mask": False}, WHOLE),
    "an unmasked gradient that is needed": ({"later": "grad_h"}, f"{WHOLE} relu_grad add"),
    "another weight": ({"between": "weight"}, f"{WHOLE} multiply matmul_relu_grad"),
    "another gradient": (
        {"between": "gradient"},
        "dense_cross_entropy sum_to elementwise matmul_sum_rows matmul_relu_grad",
    ),
    "other logits": (
        {"between": "logits"},
        "matmul_bias multiply cross_entropy_sums matmul_sum_rows matmul_relu_grad",
    ),
    "logits that are needed": (
        {"later": "logits"},
        "matmul_bias cross_entropy_sums matmul_sum_rows matmul_relu_grad add",
    ),
}


@pytest.mark.parametrize(("options", "expected"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_the_output_layer_of_a_classifier_is_fused(gpu, options, expected):
    given = arrays(gpu, (6, 5), (5, 3), (3,), (6,), (6, 3), (5, 3), (3,), (6, 5))
    given[0] *= given[0] > 0
    given += [gpu.zeros((), "float64"), gpu.zeros((2,), "int64"), gpu.asarray(np.arange(6) % 3)]
    check(gpu, output_layer(**options), given, expected)


@pytest.mark.parametrize("sizes", [(6, 5, 17), (2, 2049, 3)])
def test_large_output_layers_are_not_fused(gpu, sizes):
    rows, depth, classes = sizes
    given = arrays(
        gpu, (rows, depth), (depth, classes), (classes,), (rows,), (rows, classes), (depth, classes), (classes,)
    )
    given += [gpu.zeros((rows, depth), "float32"), gpu.zeros((), "float64"), gpu.zeros((2,), "int64")]
    given += [gpu.asarray(np.arange(rows) % classes)]
    check(gpu, output_layer(), given, OUTPUTS["logits that are needed"][1].removesuffix(" add"))


# Convolutions --------------------------------------------------------------------------------------------------------

SAME = Windows(image=(5, 6), grid=(5, 6), kernel=(3, 3), before=(1, 1))


def convolution(between=None, bias=True, relu=True, patches_read=False, windows=SAME):
    """A function that convolves as a layer does."""

    def work(backend, x, w, b, y):
        patches = backend.empty((len(x), *windows.grid, *windows.kernel, x.shape[3]), "float32")
        z = backend.empty(y.shape, "float32") if relu else y
        rows = z.reshape(-1, y.shape[3])
        backend.im2col(x, windows, patches)
        if between is not None:
            between(x, w, b, y)
        backend.matmul(patches.reshape(-1, len(w)), w, out=rows)
        if bias:
            backend.add_to_rows(rows, b)
        if relu:
            backend.relu(z, out=y)
        if patches_read:
            y += patches[:, :, :, 1, 1, :1]

    return work


def change_images(x, w, b, y):
    x += 1.0


def change_weight(x, w, b, y):
    w += 1.0


CONVOLUTIONS = {
    "all": ({}, "convolve"),
    "no bias": ({"bias": False}, "convolve relu"),
    "neither": ({"bias": False, "relu": False}, "convolve"),
    "no relu": ({"relu": False}, "convolve"),
    "patches that are read": ({"patches_read": True}, "im2col matmul_bias add"),
    "images that change afterwards": ({"between": change_images}, "convolve add"),
    "a weight that changes": ({"between": change_weight}, "im2col add matmul_bias"),
}


@pytest.mark.parametrize(("options", "expected"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_a_convolution_gathers_its_patches(gpu, options, expected):
    check(gpu, convolution(**options), arrays(gpu, (2, 5, 6, 4), (36, 8), (8,), (2, 5, 6, 8)), expected, 2e-5)


@pytest.mark.parametrize(("channels", "filters"), [(4, 6), (5, 8)])
def test_a_convolution_without_a_kernel_stays(gpu, channels, filters):
    given = arrays(gpu, (2, 5, 6, channels), (9 * channels, filters), (filters,), (2, 5, 6, filters))
    check(gpu, convolution(), given, "im2col matmul_bias")


def test_a_relu_that_overwrites_the_images_stays(gpu):
    def work(backend, x, w, b):
        y = backend.empty(x.shape, "float32")
        convolution(relu=False)(backend, x, w, b, y)
        backend.relu(y, out=x)

    check(gpu, work, arrays(gpu, (2, 5, 6, 4), (36, 4), (4,)), "convolve relu")


def gradients(windows=SAME, between=None, sums=True, add=False):
    """A function that computes the gradients of a convolution in the order of the operator."""

    def work(backend, x, w, grad, grad_w, grad_b, grad_x):
        patches = backend.empty((len(x), *windows.grid, *windows.kernel, x.shape[3]), "float32")
        rows, grad_rows = patches.reshape(-1, len(w)), grad.reshape(-1, grad.shape[3])
        backend.im2col(x, windows, patches)
        if add:
            backend.add_matmul(rows.T, grad_rows, grad_w, backend.empty(grad_w.shape, "float32"))
        else:
            backend.matmul(rows.T, grad_rows, out=grad_w)
        backend.matmul(grad_rows, w.T, out=rows)
        if between is not None:
            between(x, grad, patches)
        backend.col2im(patches, windows, out=grad_x)
        if sums:
            backend.sum_rows(grad_rows, out=grad_b)

    return work


def change_gradient(x, grad, patches):
    grad *= 2.0


def change_patches(x, grad, patches):
    patches *= 2.0


def through_relu(between=None, after=None):
    """A function that computes the gradient of a convolution's images, and of the ReLU before it."""

    def work(backend, w, grad, y, grad_z):
        patches = backend.empty((len(y), *SAME.grid, *SAME.kernel, y.shape[3]), "float32")
        grad_y = backend.empty(y.shape, "float32")
        backend.matmul(grad.reshape(-1, grad.shape[3]), w.T, out=patches.reshape(-1, len(w)))
        backend.col2im(patches, SAME, out=grad_y)
        if between is not None:
            between(y, grad_y)
        backend.relu_grad(grad_y, y, out=grad_z)
        if after is not None:
            after(grad_y, grad_z)

    return work


def change_y(y, grad_y):
    y *= 0.0


def change_grad_y(y, grad_y):
    grad_y += 1.0


def read_grad_y(grad_y, grad_z):
    grad_z += grad_y


THROUGH_RELU = {
    "alone": ({}, "convolve_input_grad"),
    "another y": ({"between": change_y}, "convolve_input_grad multiply relu_grad"),
    "another gradient": ({"between": change_grad_y}, "convolve_input_grad add relu_grad"),
    "a gradient that is read": ({"after": read_grad_y}, "convolve_input_grad relu_grad add"),
}


@pytest.mark.parametrize(("options", "expected"), THROUGH_RELU.values(), ids=THROUGH_RELU.keys())
def test_the_gradient_of_images_continues_through_relu(gpu, options, expected):
    given = arrays(gpu, (36, 8), (2, 5, 6, 8), (2, 5, 6, 4), (2, 5, 6, 4))
    given[2] *= given[2] > 0
    check(gpu, through_relu(**options), given, expected, 2e-5)


STRIDED = Windows(image=(5, 6), grid=(3, 3), kernel=(3, 3), strides=(2, 2), before=(1, 1))
GRADIENTS = {
    "all": ({}, "convolve_weight_grad convolve_input_grad"),
    "no bias": ({"sums": False}, "convolve_weight_grad convolve_input_grad"),
    "added": ({"add": True}, "convolve_weight_grad convolve_input_grad"),
    "strides": ({"windows": STRIDED}, "convolve_weight_grad matmul col2im"),
    "a gradient that changes": (
        {"between": change_gradient}, "convolve_weight_grad convolve_input_grad multiply sum_rows",
    ),
    "patches that change": ({"between": change_patches}, "convolve_weight_grad matmul multiply col2im"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), GRADIENTS.values(), ids=GRADIENTS.keys())
def test_the_gradients_of_a_convolution_gather_their_patches(gpu, options, expected):
    grid = options.get("windows", SAME).grid
    shapes = (2, 5, 6, 4), (36, 8), (2, *grid, 8), (36, 8), (8,), (2, 5, 6, 4)
    check(gpu, gradients(**options), arrays(gpu, *shapes), expected, 2e-5)


# Zeros ---------------------------------------------------------------------------------------------------------------


def test_what_is_added_to_zeros_is_stored(gpu):
    def work(backend, a, b, term, product, total):
        xp = backend.xp
        products, sums = (backend.empty(shape, "float32") for shape in ((1, 4, 3), (1, 3)))
        products[...] = 0.0
        sums[...] = 0.0
        backend.add_matmul(a, b, products[0], backend.empty((4, 3), "float32"))
        sums[0] += backend.sum_rows(b, out=backend.empty((3,), "float32"))
        xp.sum(products, axis=0, out=product)
        xp.sum(sums, axis=0, out=total)

    check(gpu, work, arrays(gpu, (4, 5), (5, 3), (3,), (4, 3), (3,)), "matmul_sum_rows")


def adds_twice(backend, a, b, out):
    out[...] = 0.0
    for _ in range(2):
        backend.add_matmul(a, b, out, backend.empty(out.shape, "float32"))


def adds_to_ones(backend, a, b, out):
    out[...] = 1.0
    backend.add_matmul(a, b, out, backend.empty(out.shape, "float32"))


def adds_to_some_rows(backend, a, b, out):
    out[...] = 0.0
    backend.add_matmul(a[:2], b, out[:2], backend.empty((2, 3), "float32"))


def sums_two(backend, a, b, out):
    backend.xp.sum(a.reshape(2, 2, 5)[:, :, :3], axis=1, out=out[:2])


@pytest.mark.parametrize(("work", "expected"), [
    (adds_twice, "matmul add_matmul"), (adds_to_ones, "copyto add_matmul"),
    (adds_to_some_rows, "copyto add_matmul"), (sums_two, "sum"),
], ids=lambda a: getattr(a, "__name__", ""))  # fmt: skip
def test_other_sums_stay(gpu, work, expected):
    check(gpu, work, arrays(gpu, (4, 5), (5, 3), (4, 3)), expected)


# Elements ------------------------------------------------------------------------------------------------------------


def combines(backend, a, b, out):
    xp = backend.xp
    xp.multiply(a, b, out=out)
    out += a
    xp.multiply(out, 2.0, out=out)
    xp.add(out, b[0], out=out)
    xp.add(a[:1], b[:1], out=out[:1])


@pytest.mark.parametrize(("rows", "expected"), [
    (128, "multiply add multiply add add"), (256, "multiply_arrays add_arrays multiply add add"),
])  # fmt: skip
def test_large_arrays_are_combined_by_kernels(gpu, rows, expected):
    check(gpu, combines, arrays(gpu, *[(rows, 256)] * 3), expected)


def computes_with_rows(backend, a, b, c, out):
    xp = backend.xp
    mean = a * 0.25
    scale = xp.sqrt(b + 1e-5)
    backend.add_to_rows(out, mean)  # needs only the first
    out += 1.0  # too large to wait
    mean *= 3.0
    scale /= c
    out[0] = scale - mean


def computes_with_elements(backend, a, b, c, out):
    first, all_of_it = b[:1], b * 2.0
    all_of_it += first
    first += 1.0  # not by element: all elements of the line before need it
    b += c
    b *= first  # as before
    out[0] = b + all_of_it
    a[1:] += a[:-1]


@pytest.mark.parametrize(("work", "expected"), [
    (computes_with_rows, "elementwise add_to_rows add elementwise"),
    (computes_with_elements, "elementwise add add multiply add add"),
], ids=lambda a: getattr(a, "__name__", ""))  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_operations_on_small_arrays_are_made_together(gpu, work, expected, dtype, rng):
    shapes = (40,), (40,), (40,), (1000, 40)
    values = [np.abs(rng.normal(size=shape)).astype(dtype) + 0.5 for shape in shapes]
    with gpu.device():
        given = [gpu.asarray(value) for value in values]
        calls = listed(gpu, work, *given)
        for array, value in zip(given, values, strict=True):
            array[...] = gpu.asarray(value[::-1].copy())
        wanted = [gpu.asarray(value[::-1].copy()) for value in values]
        work(gpu, *wanted)
        calls()
        for got, want in zip(given, wanted, strict=True):
            np.testing.assert_array_equal(gpu.to_numpy(got), gpu.to_numpy(want))
    assert names(calls) == expected.split(), " ".join(names(calls))


def test_more_operations_than_a_kernel_takes_are_divided(gpu):
    def work(backend, a):
        for _ in range(20):
            a += 1.0

    with gpu.device():
        a = gpu.zeros((3,), "float32")
        calls = listed(gpu, work, a)
        a[...] = 0.0
        calls()
        assert gpu.to_numpy(a).tolist() == [20.0] * 3
        assert names(calls) == ["elementwise", "elementwise"]


# Normalization -------------------------------------------------------------------------------------------------------


def normalizes(backend, x, center, scale, out):
    y = backend.scale_shift(x, center, scale, center, out=backend.empty(x.shape, "float32"))
    backend.relu(y, out)


def normalizes_and_needs_both(backend, x, center, scale, out):
    y = backend.scale_shift(x, center, scale, center, out=backend.empty(x.shape, "float32"))
    backend.relu(y, out)
    out += y


def sums_twice(backend, x, center, scale, out):
    backend.sum_rows(x, out=out[0])
    backend.sum_products(x, x, center, out=out[1])


def sums_twice_in_another_order(backend, x, center, scale, out):
    backend.sum_products(x, x, center, out=out[1])
    backend.sum_rows(x, out=scale)


def sums_what_has_changed(backend, x, center, scale, out):
    backend.sum_products(x, x, center, out=out[1])
    x[...] = 1.0
    backend.sum_rows(x, out=out[0])


@pytest.mark.parametrize(("work", "expected"), [
    (normalizes, "scale_shift_relu"), (normalizes_and_needs_both, "scale_shift relu add"),
    (sums_twice, "sum_rows_and_products"), (sums_twice_in_another_order, "sum_rows_and_products"),
    (sums_what_has_changed, "sum_products copyto sum_rows"),
], ids=lambda a: getattr(a, "__name__", ""))  # fmt: skip
def test_normalization(gpu, work, expected):
    check(gpu, work, arrays(gpu, (6, 5), (5,), (5,), (6, 5)), expected)


# Whole steps ---------------------------------------------------------------------------------------------------------

STEP = "matmul_bias dense_cross_entropy matmul_sum_rows matmul_sum_rows sum_to whole_update"
DOUBLE_STEP = "matmul add_to_rows_relu dense_cross_entropy matmul sum_rows matmul sum_rows sum_to whole_update"
STEPS = {
    "plain": ({}, {}, STEP),
    "half precision": ({"precision": "bfloat16"}, {}, STEP),
    "float64": ({"dtype": "float64"}, {}, DOUBLE_STEP),
    "weighted": (
        {}, {"sample_weight": np.linspace(0.5, 2.0, 200), "metrics": []},
        None,
    ),
    "accumulated": ({}, {"accumulate": 2}, None),
    "clipped": ({}, {"optimizer": optimizers.Adam(clip_norm=1.0)}, STEP.replace("whole", "clip_norm whole")),
    "smoothed": ({}, {"loss": losses.SoftmaxCrossEntropy(label_smoothing=0.1)}, STEP),
}  # fmt: skip


@pytest.mark.parametrize(("model_options", "options", "expected"), STEPS.values(), ids=STEPS.keys())
def test_the_step_of_an_mlp(gpu, model_options, options, expected):
    require_precision(gpu, model_options.get("precision", "float32"))
    stack = [layers.Dense(24), layers.ReLU(), layers.Dense(10)]
    model = xpnet.Sequential(stack, (64,), backend=gpu, seed=3, **model_options)
    (step,) = captured_steps(model, X[:200], Y[:200], **{"optimizer": optimizers.SGD(0.1), **options})
    if expected is not None:
        assert names(step.calls) == expected.split()
    name = "add_to_rows_relu" if "dtype" in model_options else "matmul_bias"
    assert names(step.calls).count(name) == options.get("accumulate", 1)


CONVOLUTIONAL = (
    "convolve convolve dense_cross_entropy matmul_sum_rows convolve_weight_grad convolve_input_grad "
    "convolve_weight_grad sum_to whole_update"
)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_the_step_of_a_convolutional_network(gpu, precision):
    require_precision(gpu, precision)
    stack = [layers.Conv2D(4, 3), layers.ReLU(), layers.Conv2D(8, 3), layers.Flatten(), layers.Dense(10)]
    model = xpnet.Sequential(stack, (8, 8, 1), backend=gpu, seed=3, precision=precision)
    (step,) = captured_steps(model, IMAGES[:200], Y[:200], optimizer="sgd")
    assert names(step.calls) == CONVOLUTIONAL.split()


def test_parts_of_a_batch_add_to_the_gradient(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "workspace_bytes", 12 * 36 * 9 * 4)  # patches of 12 images
    model = xpnet.Sequential([layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(10)], (8, 8, 1), backend=gpu, seed=3)
    (step,) = captured_steps(model, IMAGES[:200], Y[:200], optimizer="sgd")
    calls = names(step.calls)
    assert calls.count("convolve") == 2 and "im2col" not in calls
    assert [call.args[5] for call in step.calls.calls if call.name == "convolve_weight_grad"] == [False, True]


def test_convolutions_store_their_gradients_where_the_optimizer_reads_them(gpu):
    stack = [layers.Conv2D(5, 3), layers.ReLU(), layers.Conv2D(3, 3), layers.Flatten(), layers.Dense(10)]
    model = xpnet.Sequential(stack, (8, 8, 1), backend=gpu, seed=3)
    (step,) = captured_steps(model, IMAGES[:200], Y[:200], optimizer="sgd")
    assert names(step.calls) == [
        *["im2col", "matmul_bias", "im2col", "matmul_bias", "dense_cross_entropy", "matmul_sum_rows"],
        *["im2col", "matmul_sum_rows", "matmul", "col2im", "relu_grad_sum_rows", "im2col", "matmul", "sum_to"],
        *["whole_update"],
    ]
