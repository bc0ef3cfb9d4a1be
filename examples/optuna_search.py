"""Search for the learning rate, width and dropout of a network with Optuna, which ends bad trials early.

    pip install optuna
    python examples/optuna_search.py                 # 20 trials on the digits that ship with xpnet
    python examples/optuna_search.py --trials 50

Trials are compared on validation images. The test images are used once, for the best settings.
"""

import argparse

import numpy as np
import optuna

import xpnet
from xpnet import callbacks, datasets, layers, optimizers

EPOCHS, BATCH_SIZE = 15, 64


class Pruning(callbacks.Callback):
    """Reports the validation accuracy of each epoch, and ends the trial if Optuna finds it hopeless."""

    def __init__(self, trial):
        self.trial = trial

    def on_epoch_end(self, model, epoch, logs):
        self.trial.report(logs["val_accuracy"], epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def images():
    """(training, validation, test) images and labels."""
    x, y = datasets.digits()
    order = np.random.default_rng(0).permutation(len(x))
    return [(x[part], y[part]) for part in np.split(order, [1000, 1400])]


def network(settings, backend):
    stack = [
        *[layers.Rescale(1 / 16), layers.Flatten(), layers.Dense(settings["units"]), layers.ReLU()],
        *[layers.Dropout(settings["dropout"]), layers.Dense(10)],
    ]
    return xpnet.Sequential(stack, (8, 8), backend)


def train(settings, backend, data, **options):
    model = network(settings, backend)
    optimizer = optimizers.AdamW(settings["learning_rate"])
    model.fit(*data, optimizer=optimizer, epochs=EPOCHS, batch_size=BATCH_SIZE, verbose=0, **options)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="(default: 20)")
    parser.add_argument("--backend", default="auto", help='"auto", "cpu", "gpu" or "gpu:1" (default: %(default)s)')
    options = parser.parse_args()
    training, validation, test = images()

    def objective(trial):
        settings = {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
            "units": trial.suggest_int("units", 8, 128, log=True),
            "dropout": trial.suggest_float("dropout", 0.0, 0.6),
        }
        model = train(settings, options.backend, training, validation_data=validation, callbacks=Pruning(trial))
        return model.evaluate(*validation)["accuracy"]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
    study.optimize(objective, n_trials=options.trials)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"{len(study.trials)} trials, of which {pruned} were ended early")
    print("best settings: " + ", ".join(f"{name} {value:.4g}" for name, value in study.best_params.items()))
    accuracy = train(study.best_params, options.backend, training).evaluate(*test)["accuracy"]
    print(f"accuracy: validation {study.best_value:.3f}, test {accuracy:.3f}")


if __name__ == "__main__":
    main()
