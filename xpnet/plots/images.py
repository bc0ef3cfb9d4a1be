"""Images side by side: those of a dataset, and those that a model looks for."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
from matplotlib.figure import Figure

from xpnet.errors import ArgumentError, ShapeError, unknown_name
from xpnet.plots.common import on_host, require_weights

if TYPE_CHECKING:
    from xpnet.model import Sequential


def image_grid(
    images: Any,
    titles: Sequence[Any] | None = None,
    columns: int = 8,
    cmap: str = "gray",
    figure: Figure | None = None,
) -> Any:
    """Images (N, H, W), (N, H, W, 1) or, in colour, (N, H, W, 3), side by side in rows of `columns`.

    titles: a text above each. cmap: the colours of images without colour, over their common range.
    figure: where to draw, instead of a new one. Returns the Axes of all cells, (rows, columns), as a NumPy array.
    """
    return _grid(on_host(images), titles, columns, cmap, figure)


def filters(
    model: "Sequential",
    image_shape: Sequence[int] | None = None,
    name: str | None = None,
    columns: int = 8,
    figure: Figure | None = None,
) -> Any:
    """What each unit of the first layer looks for: its weights as an image, blue above 0, white at 0 and red below.

    image_shape: (H, W) or (H, W, C) of the inputs, if the model's input_shape does not say; C images a unit.
    name: of another weight than the first, such as "2.weight". Returns the Axes of all cells, as `image_grid` does.
    """
    require_weights(model)
    known = {p.name: p for p in model.parameters if len(p.shape) in (2, 4)}
    if not known or (name is not None and name not in known):
        raise unknown_name("weight", str(name), known)
    parameter = known[next(iter(known)) if name is None else name]
    weight = model.backend.to_numpy(parameter.value)
    if weight.ndim == 2:
        features, units = weight.shape
        side = math.isqrt(features)
        guesses = [shape for shape in (model.input_shape, (side, side)) if len(shape) in (2, 3)]
        shape = tuple(image_shape) if image_shape else next((s for s in guesses if math.prod(s) == features), ())
        if len(shape) not in (2, 3) or math.prod(shape) != features:
            raise ShapeError(
                f"{parameter.name} has {features} inputs, which image_shape={image_shape} does not arrange: "
                f"give (H, W) or (H, W, C) with a product of {features}."
            )
        weight = weight.reshape(*shape[:2], -1, units)
    height, width, channels, units = weight.shape
    images = weight.transpose(3, 2, 0, 1).reshape(-1, height, width)
    titles = [f"{unit}" if channels == 1 else f"{unit}, {c}" for unit in range(units) for c in range(channels)]
    bound = float(numpy.abs(images).max()) or 1.0
    grid = _grid(images, titles, columns, "RdBu", figure, (-bound, bound))
    grid[0, 0].figure.colorbar(grid[0, 0].images[0], ax=grid, label=parameter.name)
    return grid


def _grid(
    images: numpy.ndarray[Any, Any],
    titles: Sequence[Any] | None,
    columns: int,
    cmap: str,
    figure: Figure | None,
    limits: tuple[float, float] | None = None,
) -> Any:
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)) or not images.size:
        raise ShapeError(f"images must be some of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), not {images.shape}.")
    if titles is not None and len(titles) != len(images):
        raise ShapeError(f"titles must be one an image: there are {len(titles)}, but {len(images)} images.")
    if columns < 1:
        raise ArgumentError(f"columns must be at least 1, not {columns}.")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    if figure is None:
        height = images.shape[1] / images.shape[2] + (0.0 if titles is None else 0.2)
        width = columns + (0.2 if limits is None else 1.2)  # a colour bar explains the limits
        figure = Figure(figsize=(width, rows * height + 0.05), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    low, high = (images.min(), images.max()) if limits is None else limits
    for i, ax in enumerate(grid.flat):
        ax.set_axis_off()
        if i < len(images):
            ax.imshow(images[i], cmap=cmap, vmin=low, vmax=high)
            if titles is not None:
                ax.set_title(str(titles[i]), fontsize="medium", pad=3)
    return grid
