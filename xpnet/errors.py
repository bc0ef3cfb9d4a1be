"""Every error that a user can cause. Each is also a standard exception, so ordinary handlers work.

A message names the layer or argument, and says what was expected, what was given, and what to do about it.
"""

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

__all__ = ["ArgumentError", "ArgumentTypeError", "BackendError", "CaptureError", "DataError",
           "DeviceMemoryError", "DistributedError", "DivergenceError", "DownloadError", "FileError",
           "MissingPackageError", "PositionError", "ShapeError", "StateError", "UnknownImportError",
           "UnknownKeyError", "UnknownNameError", "XpnetError", "advice_on", "correction",
           "module_attributes", "no_layer_at", "shape_text", "shown", "suggestion", "synonyms",
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


class UnknownKeyError(XpnetError, KeyError):
    """A History has no values of this name; the message suggests the nearest ones."""

    __str__ = Exception.__str__  # that of KeyError shows the repr of the text


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


def _normalized(name: str) -> str:
    """The name in lower case, without underscores and the like."""
    return "".join(character for character in name.lower() if character.isalnum())


#: {our names: what other libraries call the same class, function, string, argument or method}. Names are separated by
#: spaces; those of other libraries are normalized.
_SYNONYM_TABLE = {
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
    "Rescale": "rescaling normalize",
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
    "clip_norm": "maxnorm globalclipnorm maxgradnorm gradientclip clipvalue",
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
    "fit": "fitgenerator", "train_on_batch": "trainstep trainingstep",
    "parameters": "trainableparameters",
    "metrics": "metric", "loss": "criterion lossfn lossfunction", "optimizer": "optim opt",
}  # fmt: skip


#: {kind: {normalized names, separated by spaces: advice}}, for names of other libraries that no single name here
#: replaces. The kind is "argument" for constructors, functions and methods; for attributes, the kind of the object or
#: the name of the module.
_ADVICE_TABLE: dict[str, dict[str, str]] = {
    "argument": {
        "activation": "Add the activation as the next layer, such as layers.ReLU().",
        "infeatures inchannels inputdim inputshape inputsize numfeatures normalizedshape batchinputshape inputlength":
            "Leave it out: a layer gets the shape of its input from the layer before it, and the first layer from the "
            "input_shape of the Sequential or from xpnet.Input.",
        "device dtype backend": "Give it to the model: xpnet.Sequential(..., backend=, dtype=).",
        "axis dim": "Leave it out: it works on the last axis, the features.",
        "dataformat": "Leave it out: images are (N, H, W, channels).",
        "inplace": "Leave it out: layers reuse their own buffers.",
        "fromlogits": "Leave it out: this loss takes logits.",
        "trainable": "Set it afterwards: layer.trainable = False.",
        "seed": "Leave it out: all noise follows from the seed of the model.",
        "lr learningrate": "Give it to the optimizer: optimizer=xpnet.optimizers.Adam(0.01).",
        "earlystopping": "Use callbacks=[xpnet.callbacks.EarlyStopping()], with validation data.",
        "stepsperepoch": "Leave it out: an epoch is all of the data.",
        "initialepoch": "Leave it out: a second fit with an equal optimizer continues the first one.",
        "amsgrad": "Leave it out: it is not implemented.",
        "epochs": "fit of a model takes it; an estimator takes max_iter.",
        "model": "An estimator takes hidden layers, layers=[...], and fit adds the output layer.",
    },
    "Parameter": {
        "requiresgrad": "To freeze it, set trainable = False.",
        "data": "Its array is its value.",
        "gradient": "Its gradient is grad.",
    },
    "Buffer": {"requiresgrad": "A buffer is not trained.", "data": "Its array is its value."},
    "layer": {
        "requiresgrad freeze frozen": "To freeze it, set trainable = False.",
        "training trainingmode": "fit trains and predict does not; to choose, call model.forward(x, training=True).",
        "addweight addvariable registerparameter createparameter": "Call add_parameter(name, shape, initializer).",
        "registerbuffer": "Call add_buffer(name, value).",
        "getweights": "Use model.state_dict(), or the value of each of its parameters.",
        "setweights": "Use model.load_state_dict(state), or assign arrays: layer.weight = array.",
        "rng random": "Noise comes from self.random_bits(x) or self.random_normal(x), so that the seed repeats it.",
        "weights": "Its arrays are in parameters; to set one, assign to it: layer.weight = array.",
    },
    "model": {
        "predictclasses": "Use predict(x).argmax(axis=1).",
        "predictlogproba": "Use numpy.log(predict_proba(x)).",
        "score": "Use evaluate(x, y).",
        "partialfit": "Use train_on_batch(x, y), or xpnet.estimators.XPClassifier for scikit-learn's methods.",
        "getparams setparams": "Estimators for scikit-learn are in xpnet.estimators: XPClassifier and XPRegressor.",
        "coefs coef intercepts intercept": "The weights are in parameters, or in state_dict().",
        "classes": "Labels are class numbers; xpnet.estimators.XPClassifier has classes_.",
        "niter losscurve validationscores": "The values of each epoch are in model.history.",
        "requiresgrad freeze frozen": "To freeze all parameters, set trainable = False.",
        "half bfloat16 float double": 'Give dtype= or precision= to the constructor, or use to(backend, '
                                      'dtype="float64").',
        "children modules namedchildren namedmodules": "The layers are in layers.",
        "train eval training trainingmode": "Leave it out: fit trains and predict does not; in your own "
                                            "loop, forward(x, training=True) is a training pass.",
        "zerograd": "Leave it out: backward overwrites the gradients.",
        "add append addmodule": "Give all layers as a list: xpnet.Sequential([...]).",
        "countparams": "summary() shows the number of parameters.",
        "compile": "Leave it out: loss, optimizer and metrics are arguments of fit.",
        "stoptraining": 'Call self.stop("reason") in a callback.',
        "call": "Use predict(x), or forward(x) for an array on the device.",
        "weights variables trainablevariables trainableweights namedparameters": "The weights are in parameters.",
        "getweights": "Use state_dict().",
        "setweights": "Use load_state_dict(state).",
        "saveweights": "Use save(path), or state_dict().",
        "loadweights": "Use xpnet.load(path), or load_state_dict(state).",
        "todevice cuda cpu gpu": 'Use to("gpu") or to("cpu").',
        "step": "Use apply_gradients(optimizer), or train_on_batch(x, y).",
    },
    "optimizer": {
        "step zerograd minimize applygradients": "Call model.apply_gradients(optimizer) after model.backward(...); "
                                                 "gradients need no reset.",
        "paramgroups": "Set learning_rate, or parameter_rates for individual parameters.",
        "statedict loadstatedict": "The state belongs to the model: callbacks.Checkpoint saves it, and "
                                   "resume_from loads it.",
    },
    "callback": {
        "stoptraining": 'Call self.stop("reason").',
        "model": "Each method gets the model as its argument.",
        "params": "self.run describes the current call of fit.",
    },
    "xpnet": {
        "nn module functional f": "Layers are in xpnet.layers, losses in xpnet.losses, models are "
                                  "xpnet.Sequential and xpnet.Model.",
        "nograd inferencemode": "Leave it out: predict keeps nothing for backward.",
        "tensor variable array": "Arrays are NumPy's, or CuPy's on a GPU: every method takes NumPy arrays.",
        "utils": "Datasets are in xpnet.datasets, plots in xpnet.plots, callbacks in xpnet.callbacks.",
        "models": "Models are xpnet.Sequential and xpnet.Model.",
        "device cuda": 'Give the device to the model: backend="gpu", "cpu" or "auto"; see xpnet.available_backends().',
        "manualseed setseed randomseed seed": "Give the seed to the model: xpnet.Sequential(..., seed=0).",
        "save savemodel": "Use model.save(path).",
        "loadmodel": "Use xpnet.load(path).",
        "crossentropy": 'Use the loss "softmax_cross_entropy".',
        "compile jit": "Leave it out: fit captures its steps automatically.",
        "standardscaler normalize": "Scale the data with NumPy, (x - x.mean(axis=0)) / x.std(axis=0), or with "
                                    "layers.Rescale.",
        "traintestsplit": "Use validation_split= of fit, or train_test_split of scikit-learn.",
        "mlpclassifier": "Use xpnet.estimators.XPClassifier.",
        "mlpregressor": "Use xpnet.estimators.XPRegressor.",
        "optim": "Optimizers are in xpnet.optimizers.",
        "dataloader dataset data": "Give arrays to fit, with batch_size=; for data on disk, there is "
                                   "xpnet.datasets.Stream.",
    },
    "xpnet.layers": {
        "activation": "Each activation is a layer, such as layers.ReLU().",
        "input inputlayer": "Give the shape as input_shape= to xpnet.Sequential, or make an xpnet.Input for an "
                            "xpnet.Model.",
        "modulelist moduledict": "Give the layers as a list to xpnet.Sequential, or call them on tensors for an "
                                 "xpnet.Model.",
        "normalization": "Scale the data: (x - x.mean(axis=0)) / x.std(axis=0).",
        "lambda": "Derive a class from layers.Layer, with forward and backward.",
        "model functional": "Use xpnet.Model.",
        "conv3d": "Convolutions are Conv1D and Conv2D.",
        "randomflip randomrotation randomzoom randomcrop": "Image augmentation is in xpnet.augment.",
    },
    "xpnet.callbacks": {
        "learningratescheduler": "Give a schedule to the optimizer: optimizers.Adam(schedules.CosineDecay(...)).",
        "lambdacallback": "Derive a class from callbacks.Callback.",
    },
    "xpnet.datasets": {
        "loadiris iris": "Use load_iris of scikit-learn; dir(xpnet.datasets) lists the datasets here.",
        "dataloader": "Give arrays to fit, with batch_size=; for data on disk, there is datasets.Stream.",
    },
    "xpnet.optimizers": {
        "lrscheduler schedules": "Schedules are in xpnet.schedules; give one as learning_rate to the optimizer.",
    },
}  # fmt: skip


#: {one of our names: what other libraries call it}.
_SYNONYMS = {name: theirs.split() for ours, theirs in _SYNONYM_TABLE.items() for name in ours.split()}

#: {kind: {one normalized name: advice}}.
_ADVICE = {
    kind: {name: advice for names, advice in table.items() for name in names.split()}
    for kind, table in _ADVICE_TABLE.items()
}


def synonyms(name: str, known: Iterable[str]) -> list[str]:
    """The known names for what other libraries call `name`."""
    given = _normalized(name)
    return [one for one in known if given in _SYNONYMS.get(one, ())]


def advice_on(kind: str, name: str) -> str:
    """What to write in place of an argument or attribute of other libraries; "" if there is no advice on it."""
    return _ADVICE.get(kind, {}).get(_normalized(name), "")


def suggestion(name: str, known: Iterable[str], advice: str = "") -> str:
    """ "Did you mean 'adam'? " if some of the known names mean the same as this one or are near it, else "".

    advice: returned if no known name means the same, in place of similar names.
    """
    ours, given = sorted(known), _normalized(str(name))
    found = [one for one in ours if _normalized(one) == given] or synonyms(str(name), ours)
    if not found and advice:
        return f"{advice} "
    if not found:
        import difflib  # here, because only errors need it

        spelled: dict[str, list[str]] = {}
        for one in ours:
            spelled.setdefault(_normalized(one), []).append(one)
        found = [one for key in difflib.get_close_matches(given, spelled, n=3, cutoff=0.5) for one in spelled[key]]
    return f"Did you mean {' or '.join(map(repr, found))}? " if found else ""


def correction(name: str, known: Iterable[str]) -> str:
    """The known name of which this one is an obvious misspelling; "" if there is none.

    They differ in case and underscores, or by one typing error: two neighboring letters swapped, or one letter missing
    or added. The error is not at the end, since an attribute of the user's own may be a plural.
    """
    lower, given = name.lower(), _normalized(name)
    alike = (one for one in known if one != name and (_normalized(one) == given or _one_typing_error(lower, one)))
    return next(alike, "")


def _one_typing_error(name: str, meant: str) -> bool:
    """Whether they differ as `correction` says. Short names are never taken for each other."""
    if min(len(name), len(meant)) < 6 or abs(len(name) - len(meant)) > 1:
        return False
    shorter = min(len(name), len(meant))
    start = next((i for i in range(shorter) if name[i] != meant[i]), shorter)
    end = next((i for i in range(shorter - start) if name[-1 - i] != meant[-1 - i]), shorter - start)
    here, there = name[start : len(name) - end], meant[start : len(meant) - end]
    if len(here) == len(there) == 2:
        return here == there[::-1]
    return end > 0 and len(here) + len(there) == 1 and (here + there).isalpha()


def unknown_name(kind: str, name: str, known: Iterable[str], aliases: Iterable[str] = ()) -> ArgumentError:
    """An error for a misspelled name, which suggests the nearest known ones, or the nearest of their aliases."""
    names = sorted(known)
    hint = suggestion(name, [*names, *aliases])
    return ArgumentError(f"unknown {kind} {shown(name)}. {hint}Known: {', '.join(names)}.")


def no_layer_at(position: Any, owner: str, count: int) -> PositionError:
    """An error for a position beyond the layers of a model or container, which has this many."""
    return PositionError(f"there is no layer {shown(position)}: {owner} has {count} layers, 0 to {count - 1}.")


def module_attributes(
    module: str,
    public: Iterable[str],
    load: Callable[[str], Any] = lambda name: None,
    hidden: Iterable[str] = (),
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """(__getattr__, __dir__) of a module: an unknown name is an error with a suggestion; dir() lists what is public.

    load: returns an attribute that is imported at its first use, or None.  hidden: names that are not suggested.
    """
    names = sorted(public)

    def attribute(name: str) -> Any:
        if (loaded := load(name)) is not None:
            return loaded
        if name.startswith("_"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        hint = advice_on(module, name) or _submodule_hint(module, names, name)
        hint = hint or suggestion(name, set(names) - set(hidden))
        if _imports(sys._getframe(1)):  # Python replaces the text of an AttributeError with its own
            raise UnknownImportError(f"cannot import name {name!r} from {module!r}. {hint}".strip())
        raise UnknownNameError(f"module {module!r} has no attribute {name!r}. {hint}".strip())

    return attribute, lambda: names


def _submodule_hint(package: str, modules: Iterable[str], name: str) -> str:
    """Which public module of this package has the name; "" if none has."""
    for path in (f"{package}.{module}" for module in modules):
        if name in getattr(sys.modules.get(path), "__all__", ()):
            return f"It is in {path}: from {path} import {name}."
    return ""


def _imports(frame: Any) -> bool:
    """Whether this frame executes `from module import name`."""
    from opcode import opmap  # here, because only errors need it

    code, position = frame.f_code.co_code, frame.f_lasti
    return 0 <= position < len(code) and bool(code[position] == opmap["IMPORT_FROM"])


if not TYPE_CHECKING:  # a type checker that sees __getattr__ accepts every name, misspelled ones too
    __getattr__, __dir__ = module_attributes(__name__, __all__)
