"""What a neuron's pre-activation becomes. No torch here: the reader and the predictor import it."""

from __future__ import annotations

from dataclasses import dataclass

ACTIVATIONS = ("relu", "relu2", "fatrelu")


@dataclass(frozen=True)
class Activation:
    """A ReLU-type activation: exactly zero unless the pre-activation is above `threshold`.

    relu: max(x, 0)      relu2: max(x, 0)²      fatrelu: x where x > threshold, else 0
    """

    name: str  # one of ACTIVATIONS
    threshold: float = 0.0  # not 0 for fatrelu only

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"{self.name!r} is none of {', '.join(ACTIVATIONS)}")
        if not self.threshold >= 0 or (self.threshold and self.name != "fatrelu"):
            raise ValueError(f"{self.name} has no threshold of {self.threshold}")

    @property
    def squared(self) -> bool:
        """Whether what is above the threshold is squared."""
        return self.name == "relu2"
