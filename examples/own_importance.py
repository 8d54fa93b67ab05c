"""An importance criterion of your own: a function, and one line that registers it.

The function gets the evidence (the weights by group, and calibration batches if you gave some) and returns, for every
group, a list of `(channels,)` tensors, one for each layer that has a say; higher is kept. Run it:

    python examples/own_importance.py
"""

import numpy as np
import torch

from amc.catalog import CRITERIA
from amc.groups import Group, Slice, Structure, TensorInfo
from amc.importance import Evidence, Members, rank


def spread(evidence: Evidence) -> Members:
    """A filter whose weights are all alike only blurs: rank by their standard deviation."""
    return {g.name: [filters.std(dim=1) for filters in evidence.filters(g)] for g in evidence.groups}


CRITERIA["spread"] = ("standard deviation of the filters", f"{__name__}:spread")


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[0].weight[2] = 0.5  # the filter that blurs

    channels = np.arange(4)
    slices = (Slice("0.weight", 0, channels, channels), Slice("2.weight", 1, channels, channels))
    tensors = {name: TensorInfo(tuple(t.shape), "float32", True) for name, t in model.state_dict().items()}
    structure = Structure((Group("0", 4, (1, 2, 3, 4), slices=slices),), (), tensors, {"0.weight": 1, "2.weight": 1})

    for criterion in ("l1", "spread"):
        print(f"{criterion:8s} keeps channels in the order {rank(model, structure, criterion)['0'].tolist()}")


if __name__ == "__main__":
    main()
