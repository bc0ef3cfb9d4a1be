"""Plots of images in a grid: images of a dataset, the weights of a layer, and what a model looks at in images."""

import math
from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib import colormaps
from matplotlib.figure import Figure

from xpnet.config import as_shape, integer, real_array
from xpnet.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError, shown, unknown_name
from xpnet.model import Sequential
from xpnet.plots.common import require_weights, texts
from xpnet.plots.notebooks import AxesGrid, new_figure


def image_grid(
    images: Any, titles: Sequence[Any] | None = None, columns: int = 8, cmap: str = "gray", figure: Figure | None = None
) -> Any:
    """Images (N, H, W), (N, H, W, 1) or RGB (N, H, W, 3) side by side, `columns` in a row.

    titles: one text per image, above it. cmap: the color map of grayscale images, over their common range.
    figure: the figure to draw in, by default a new one. Returns the Axes of all cells, an array (rows, columns).
    """
    return _grid(real_array(images, "images"), titles, columns, cmap, figure)


def attribution(
    maps: Any,
    images: Any = None,
    titles: Sequence[Any] | None = None,
    columns: int = 8,
    figure: Figure | None = None,
) -> Any:
    """Maps (N, H, W) of `xpnet.attribution` over their images: blue above 0, red below, the more opaque the larger.

    maps: each is scaled by its largest absolute value. In maps (N, H, W, channels), each pixel shows the channel of
    largest absolute value. images: (N, H, W), (N, H, W, 1) or RGB (N, H, W, 3), drawn pale; without them, only the
    maps are drawn. titles, columns, figure: as in `image_grid`. Returns the Axes of all cells, an array (rows,
    columns). Raises ShapeError for maps or images of another shape, and DataError for NaN or infinity in maps.
    """
    values = real_array(maps, "maps").astype(float)
    if values.ndim not in (3, 4) or not values.size:
        hint = " Draw features as bars, with pyplot.barh(names, maps[0])." if values.ndim in (1, 2) else ""
        raise ShapeError(f"maps must have shape (N, H, W) or (N, H, W, channels), not {values.shape}.{hint}")
    if not numpy.isfinite(values).all():
        raise DataError("maps contain NaN or infinity.")
    if values.ndim == 4:
        values = numpy.take_along_axis(values, abs(values).argmax(axis=3)[..., None], axis=3)[..., 0]
    pale = numpy.ones((*values.shape, 3))
    if images is not None:
        under = real_array(images, "images").astype(float)
        if under.shape[:3] != values.shape or under.shape[3:] not in ((), (1,), (3,)):
            raise ShapeError(
                f"images must have shape (N, H, W), (N, H, W, 1) or (N, H, W, 3) with the N, H and W of the maps, "
                f"{values.shape}, not {under.shape}."
            )
        spread = float(numpy.ptp(under)) or 1.0
        pale[...] = 0.5 + 0.5 * ((under - under.min()) / spread).reshape(*values.shape, -1)
    grid = _grid(pale, titles, columns, "gray", figure)
    sizes = abs(values).max(axis=(1, 2), keepdims=True)
    values = values / numpy.where(sizes == 0, 1.0, sizes)
    colors = colormaps["RdBu"](0.5 + 0.5 * values)
    colors[..., 3] = abs(values)
    for ax, overlay in zip(grid.flat, colors, strict=False):
        ax.imshow(overlay)
    return grid


def filters(
    model: Sequential,
    image_shape: Sequence[int] | None = None,
    name: str | None = None,
    columns: int = 8,
    figure: Figure | None = None,
) -> Any:
    """The weights of each unit of the first layer as an image: blue above 0, white at 0 and red below.

    image_shape: (H, W) or (H, W, C) of the inputs, if the model's input_shape is neither; C images per unit.
    name: the name of another weight, such as "2.weight". Returns the Axes of all cells, an array (rows, columns).
    """
    require_weights(model)
    known = {p.name: p for p in model.parameters if len(p.shape) in (2, 4)}
    if not known or (name is not None and (not isinstance(name, str) or name not in known)):
        raise unknown_name("weight", str(name), known)
    parameter = known[next(iter(known)) if name is None else name]
    weight = model.backend.to_numpy(parameter.value)
    if weight.ndim == 2:
        features, units = weight.shape
        side = math.isqrt(features)
        guesses = [shape for shape in (model.input_shape, (side, side)) if len(shape) in (2, 3)]
        shape = (
            as_shape(image_shape)
            if image_shape is not None
            else next((s for s in guesses if math.prod(s) == features), ())
        )
        if len(shape) not in (2, 3) or math.prod(shape) != features:
            raise ShapeError(
                f"image_shape must be (H, W) or (H, W, C) with a product of {features}, because {parameter.name} has "
                f"{features} inputs; not {image_shape}."
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
        raise ShapeError(f"images must have shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), not {images.shape}.")
    titles = texts("titles", titles)
    if figure is not None and not hasattr(figure, "subplots"):
        raise ArgumentTypeError(f"figure must be a Figure of matplotlib, or None for a new one, not {shown(figure)}.")
    if not isinstance(cmap, str) or cmap not in colormaps:
        raise ArgumentError(f'cmap must name a color map of matplotlib, such as "gray", not {shown(cmap)}.')
    if titles is not None and len(titles) != len(images):
        raise ShapeError(f"titles must have one title per image: {len(images)}, not {len(titles)}.")
    columns = min(integer("", "columns", columns), len(images))
    rows = -(-len(images) // columns)
    made = figure is None
    if figure is None:
        height = images.shape[1] / images.shape[2] + (0.0 if titles is None else 0.2)
        width = columns + (0.2 if limits is None else 1.2)  # grids with limits have a color bar
        figure = new_figure((width, rows * height + 0.05))
    grid = figure.subplots(rows, columns, squeeze=False)
    low, high = (images.min(), images.max()) if limits is None else limits
    for i, ax in enumerate(grid.flat):
        ax.set_axis_off()
        if i < len(images):
            ax.imshow(images[i], cmap=cmap, vmin=low, vmax=high)
            if titles is not None:
                ax.set_title(str(titles[i]), fontsize="medium", pad=3)
    return grid.view(AxesGrid) if made else grid
