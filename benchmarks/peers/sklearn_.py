"""scikit-learn's MLPClassifier; a step is a call of partial_fit with one batch."""

import warnings

from sklearn.neural_network import MLPClassifier

from benchmarks.nets import CLASSES, RATES, Net
from benchmarks.samples import batch_of


class Sklearn:
    def __init__(self, net: Net, batch: int) -> None:
        widths = [layer[1] for layer in net.layers if layer[0] == "dense"][:-1]
        self.model = MLPClassifier(
            widths, solver=net.optimizer, learning_rate_init=RATES[net.optimizer], momentum=0.0, alpha=0.0,
            batch_size=batch, max_iter=1, random_state=0
        )  # fmt: skip
        self.x, self.y = batch_of(net, batch)
        self.model.partial_fit(self.x, self.y, classes=range(CLASSES))

    def step(self) -> None:
        self.model.partial_fit(self.x, self.y)

    def synchronize(self) -> None:
        pass

    def epoch(self, x, y) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one epoch does not converge
            self.model.fit(x, y)
            self.model.score(x, y)  # fit does not compute the accuracy

    def predict(self, x):
        return self.model.predict_proba(x)


def make(net: Net, batch: int, device: str, option: str) -> Sklearn:
    return Sklearn(net, batch)
