"""Every error that a user can cause. Each is also a standard exception, so ordinary handlers work.

A message names the layer or argument, and says what was expected, what was given, and what to do about it.
"""

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

__all__ = ["ArgumentError", "ArgumentTypeError", "BackendError", "CaptureError", "DataError",
           "DeviceMemoryError", "DistributedError", "DivergenceError", "DownloadError", "FileError",
           "MissingPackageError", "PositionError", "ShapeError", "StateError", "UnknownImportError",
           "UnknownNameError", "XpnetError", "module_attributes", "shape_text", "shown", "suggestion",
           "unknown_name"]  # fmt: skip


class XpnetError(Exception):
    """The base of all errors raised on purpose by xpnet."""


class ArgumentError(XpnetError, ValueError):
    """An argument has an invalid value."""


class ShapeError(ArgumentError):
    """An array has the wrong shape for its use."""


class DataError(ArgumentError):
    """The data is invalid: empty, NaN or infinite, labels out of range, lengths that differ."""


class ArgumentTypeError(XpnetError, TypeError):
    """An argument has an invalid type."""


class PositionError(XpnetError, IndexError):
    """There is no layer at this position."""


class UnknownNameError(XpnetError, AttributeError):
    """A module has no such name; the message suggests the nearest ones."""


class UnknownImportError(XpnetError, ImportError):
    """A module has no such name to import; the message suggests the nearest ones."""


class BackendError(XpnetError, RuntimeError):
    """The requested device cannot be used; the message gives the precise reason."""


class DeviceMemoryError(XpnetError, MemoryError):
    """The device does not have enough free memory."""


class CaptureError(XpnetError, RuntimeError):
    """A training step cannot be captured as a CUDA graph. `fit` catches it and runs the step eagerly."""


class DistributedError(XpnetError, RuntimeError):
    """The ranks of a run disagree, or one of them has failed."""


class StateError(XpnetError, RuntimeError):
    """A method was called at the wrong time: before build, backward without forward, or while fit is running."""


class DivergenceError(XpnetError, FloatingPointError, RuntimeError):
    """The loss, a weight or a buffer became NaN or infinite. `fit` restores the epoch's first weights."""


class MissingPackageError(XpnetError, ImportError):
    """An optional dependency is not installed; the message gives the pip command."""


class FileError(XpnetError, OSError):
    """A file is missing, damaged or of another format."""


class DownloadError(FileError):
    """The file could not be downloaded; the message lists every address tried."""


_LONGEST = 200  # characters of a value in an error


def shown(value: Any) -> str:
    """The repr of a value for an error, cut off if it is long."""
    try:
        text = repr(value)
    except Exception:  # that of integers of many digits, or of a class of the user
        return f"this {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def shape_text(shape: tuple[int, ...] | list[tuple[int, ...]]) -> str:
    """(4, 5) as "(N, 4, 5)", (None, 5) as "(N, T, 5)", and a list of shapes as "(N, 4), (N, 5)"."""
    if isinstance(shape, list):
        return ", ".join(map(shape_text, shape))
    return f"(N, {', '.join('T' if n is None else str(n) for n in shape)})" if shape else "(N,)"


#: Our names of classes, functions, strings and arguments, and what other libraries call the same thing, spelled as by
#: `_normalized`. Names are separated by spaces on either side.
_ELSEWHERE = {
    # layers
    "Dense": "linear fullyconnected fc lazylinear",
    "Conv2D": "convolution2d conv convolution lazyconv2d",
    "Conv2DTranspose": "convtranspose2d convtranspose deconv2d deconvolution2d",
    "DepthwiseConv2D": "depthwiseconv separableconv2d",
    "MaxPool2D": "maxpooling2d maxpooling maxpool",
    "AvgPool2D": "averagepooling2d avgpooling2d averagepool2d avgpool averagepooling",
    "GlobalAveragePool2D": "globalaveragepooling2d globalavgpool2d globalavgpooling2d adaptiveavgpool2d gap",
    "AvgPool1D": "averagepooling1d avgpooling1d averagepool1d",
    "GlobalAveragePool1D": "globalaveragepooling1d globalavgpool1d globalavgpooling1d adaptiveavgpool1d",
    "GlobalMaxPool1D": "globalmaxpooling1d adaptivemaxpool1d",
    "SimpleRNN": "elman",
    "MultiHeadAttention": "attention selfattention",
    "Upsample2D": "upsampling2d upsample resize",
    "BatchNorm": "batchnormalization batchnorm1d batchnorm2d batchnorm3d bn",
    "LayerNorm": "layernormalization ln",
    "GroupNorm": "groupnormalization gn",
    "InstanceNorm": "instancenormalization instancenorm1d instancenorm2d",
    "GlobalMaxPool2D": "globalmaxpooling2d adaptivemaxpool2d",
    "ZeroPadding2D": "zeropad2d constantpad2d pad padding",
    "HardTanh": "clip clamp",
    "Slice": "cropping1d cropping2d crop narrow getitem",
    "Dropout": "dropout1d dropout2d spatialdropout2d alphadropout",
    "SiLU": "swish",
    "Step": "heaviside threshold",
    "Flatten": "ravel",
    "Permute": "transpose",
    "Reshape": "view unflatten",
    "Rescale": "rescaling normalization normalize",
    "Identity": "linearactivation",
    "Residual": "skipconnection resblock residualblock",
    # losses
    "MeanSquaredError": "mseloss mse squarederror l2loss",
    "MeanAbsoluteError": "l1loss maeloss mae absoluteerror",
    "Huber huber": "huberloss smoothl1loss smoothl1",
    "BinaryCrossEntropy binary_cross_entropy": "bceloss bce bcewithlogitsloss binarycrossentropyloss logloss",
    "SoftmaxCrossEntropy softmax_cross_entropy": "crossentropyloss crossentropy categoricalcrossentropy "
                                                 "sparsecategoricalcrossentropy nllloss softmaxcrossentropyloss",
    "KLDivergence kl_divergence": "kldivloss kld kldiv kullbackleiblerdivergence",
    "CosineSimilarity cosine_similarity": "cosineembeddingloss cosineloss cosine",
    "TripletMargin triplet_margin": "tripletmarginloss tripletloss triplet",
    "mse": "mseloss l2loss squarederror",
    "mae": "l1loss maeloss absoluteerror",
    # metrics
    "Accuracy accuracy": "acc categoricalaccuracy binaryaccuracy sparsecategoricalaccuracy",
    "TopKAccuracy": "topkcategoricalaccuracy topk",
    "F1 f1": "f1score",
    "R2 r2": "r2score",
    # callbacks, schedules, initializers
    "Checkpoint": "modelcheckpoint backupandrestore",
    "ReduceLROnPlateau": "reducelearningrateonplateau",
    "StepDecay": "steplr multisteplr piecewiseconstantdecay",
    "ExponentialDecay": "exponentiallr",
    "CosineDecay": "cosineannealinglr cosineannealing cosinelr",
    "LinearWarmup": "warmup linearlr",
    "OneCycle": "onecyclelr onecyclepolicy",
    "InverseTimeDecay": "inversetime polynomialdecay",
    "GlorotUniform glorot_uniform": "xavieruniform xavier",
    "GlorotNormal glorot_normal": "xaviernormal",
    "HeUniform he_uniform": "kaiminguniform kaiming",
    "HeNormal he_normal": "kaimingnormal kaiming",
    "Normal normal": "randomnormal truncatednormal gaussian",
    "Uniform uniform": "randomuniform",
    # augment, datasets, functions
    "RandomAffine": "randomrotation randomtranslation randomzoom randomshear affine",
    "ElasticDistortion": "elastictransform elastic",
    "mnist": "loadmnist", "fashion_mnist": "loadfashionmnist", "digits": "loaddigits",
    "moons": "makemoons twomoons", "blobs": "makeblobs",
    "load": "loadmodel", "Sequential": "nn",
    # arguments
    "units": "outfeatures outputsize outputdim neurons nunits outputs size hiddensize hiddenunits",
    "filters": "outchannels nfilters numfilters channels",
    "kernel_size": "kernel poolsize filtersize kernelshape ksize windowsize",
    "pool_size": "kernelsize pool windowsize kernel",
    "strides": "stride subsample",
    "padding": "pad paddingmode",
    "dilation": "dilationrate dilations",
    "depth_multiplier": "channelmultiplier multiplier",
    "use_bias": "bias withbias",
    "weight_initializer": "kernelinitializer weightinit init initializer kernelinit winit embeddingsinitializer",
    "bias_initializer": "biasinit binit",
    "l1 l2": "kernelregularizer weightregularizer regularizer embeddingsregularizer",
    "rate": "p dropoutrate prob probability droprate initiallearningrate lr learningrate",
    "negative_slope": "alpha slope leak",
    "threshold": "theta",
    "epsilon": "eps",
    "center": "affine elementwiseaffine bias usebias",
    "scale": "affine elementwiseaffine",
    "reverse": "gobackwards backwards",
    "padding_index": "maskzero paddingidx",
    "mlp_ratio": "dimfeedforward feedforwarddim",
    "vocabulary_size": "numembeddings inputdim vocabsize numwords vocabulary",
    "features": "embeddingdim outputdim embeddim dim units",
    "target_shape": "shape size newshape",
    "axes": "dims dim perm order axis",
    "size": "scalefactor factor scale",
    "interpolation": "mode method",
    "approximate": "approximation",
    "count_include_pad": "includepad countincludepadding",
    "layers": "modules",
    "input_shape": "inputsize inputdim shape inshape batchinputshape",
    "backend": "device",
    "seed": "randomstate randomseed",
    "learning_rate": "lr eta rate stepsize alpha learningrateinit",
    "beta1 beta2": "betas beta",
    "rho": "decay smoothing alpha",
    "clip_norm": "clipnorm maxnorm globalclipnorm maxgradnorm gradientclip clipvalue",
    "weight_decay": "l2 decay wd",
    "every": "stepsize decaysteps period savefreq saveevery",
    "steps": "tmax decaysteps totalsteps warmupsteps nsteps",
    "factor": "gamma decayrate",
    "decay": "decayrate gamma",
    "final": "etamin alpha minlr end",
    "peak": "maxlr maxlearningrate maxrate",
    "warmup": "pctstart",
    "start_factor": "divfactor", "end_factor": "finaldivfactor",
    "min_rate": "minlr minlearningrate",
    "restore_best": "restorebestweights", "monitor": "metric value quantity",
    "keep_best": "savebestonly savebest savetopk",
    "path": "filepath filename file dirpath",
    "label_smoothing": "smoothing",
    "reduction": "reduce sizeaverage",
    "delta": "beta",
    "class_weight": "weight posweight classweights",
    "std": "stddev sigma scale", "mean": "mu loc",
    "low": "minval a minimum", "high": "maxval b maximum",
    "n": "nsamples samples numsamples", "data_dir": "root dir path directory",
    "shift": "translate translation widthshiftrange heightshiftrange", "rotation": "degrees angle rotationrange",
    "shear": "shearrange",
    "batch_size": "batch bs", "epochs": "epoch nepochs numepochs maxiter", "validation_data": "validation val valdata",
    # methods of models
    "fit": "compile fitgenerator", "train_on_batch": "trainstep trainingstep", "apply_gradients": "step zerograd",
    "forward": "train eval call", "to": "cuda cpu gpu", "state_dict": "getweights", "load_state_dict": "setweights",
    "parameters": "namedparameters weights trainableweights trainablevariables trainableparameters",
    "metrics": "metric", "loss": "criterion lossfn lossfunction", "optimizer": "optim opt",
}  # fmt: skip


def _normalized(name: str) -> str:
    """The name in lower case, without underscores and the like."""
    return "".join(character for character in name.lower() if character.isalnum())


#: {one of our names: what other libraries call it}.
_SYNONYMS = {name: theirs.split() for ours, theirs in _ELSEWHERE.items() for name in ours.split()}


def suggestion(name: str, known: Iterable[str], advice: str = "") -> str:
    """ "Did you mean 'adam'? " if some of the known names mean the same as this one or are near it, else "".

    advice: returned if no known name means the same, in place of similar names.
    """
    ours, given = sorted(known), _normalized(str(name))
    found = [one for one in ours if _normalized(one) == given]
    found = found or [one for one in ours if given in _SYNONYMS.get(one, ())]
    if not found and advice:
        return f"{advice} "
    if not found:
        import difflib  # here, because only errors need it

        spelled: dict[str, list[str]] = {}
        for one in ours:
            spelled.setdefault(_normalized(one), []).append(one)
        found = [one for key in difflib.get_close_matches(given, spelled, n=3, cutoff=0.5) for one in spelled[key]]
    return f"Did you mean {' or '.join(map(repr, found))}? " if found else ""


def unknown_name(kind: str, name: str, known: Iterable[str], aliases: Iterable[str] = ()) -> ArgumentError:
    """An error for a misspelled name, which suggests the nearest known ones, or the nearest of their aliases."""
    names = sorted(known)
    hint = suggestion(name, [*names, *aliases])
    return ArgumentError(f"unknown {kind} {shown(name)}. {hint}Known: {', '.join(names)}.")


def module_attributes(
    module: str, public: Iterable[str], load: Callable[[str], Any] = lambda name: None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """(__getattr__, __dir__) of a module: an unknown name is an error with a suggestion; dir() lists what is public.

    load: returns an attribute that is imported at its first use, or None.
    """
    names = sorted(public)

    def attribute(name: str) -> Any:
        if (loaded := load(name)) is not None:
            return loaded
        if name.startswith("_"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        hint = suggestion(name, names)
        if _imports(sys._getframe(1)):  # Python replaces the text of an AttributeError by its own
            raise UnknownImportError(f"cannot import name {name!r} from {module!r}. {hint}".strip())
        raise UnknownNameError(f"module {module!r} has no attribute {name!r}. {hint}".strip())

    return attribute, lambda: names


def _imports(frame: Any) -> bool:
    """Whether this frame executes `from module import name`."""
    from opcode import opmap  # here, because only errors need it

    code, position = frame.f_code.co_code, frame.f_lasti
    return 0 <= position < len(code) and bool(code[position] == opmap["IMPORT_FROM"])


if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every name, misspelled ones too
    __getattr__, __dir__ = module_attributes(__name__, __all__)
