"""Accuracy of XPClassifier and of scikit-learn's MLPClassifier on digits, for several penalties `alpha`.

    python -m benchmarks.estimators_alpha

Both get the same split, network (50 hidden units), solver, batch size and number of epochs. The table shows the mean
test accuracy over the seeds. The exit status is 1 if two means differ by more than 0.02.
"""

import sys
import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from xpnet.estimators import XPClassifier

ALPHAS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
SEEDS = 5
LARGEST_DIFFERENCE = 0.02


def mean_accuracies(alpha):
    """The mean accuracies of (XPClassifier, MLPClassifier) over the seeds, trained and tested on half of the digits."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
    scaler = StandardScaler().fit(x_train)
    x_train, x_test = scaler.transform(x_train), scaler.transform(x_test)
    settings = {"alpha": alpha, "hidden_layer_sizes": (50,), "solver": "adam", "batch_size": 200, "max_iter": 100}
    means = []
    for kind, extra in ((XPClassifier, {"backend": "cpu"}), (MLPClassifier, {})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = [kind(random_state=s, **settings, **extra).fit(x_train, y_train) for s in range(SEEDS)]
        means.append(float(np.mean([estimator.score(x_test, y_test) for estimator in fitted])))
    return tuple(means)


def main():
    print(f"{'alpha':>8}  XPClassifier  MLPClassifier  difference")
    worst = 0.0
    for alpha in ALPHAS:
        own, theirs = mean_accuracies(alpha)
        worst = max(worst, abs(own - theirs))
        print(f"{alpha:8g}  {own:12.4f}  {theirs:13.4f}  {own - theirs:+10.4f}", flush=True)
    return 0 if worst <= LARGEST_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
