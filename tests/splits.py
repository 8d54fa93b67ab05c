"""What tests of data sets share."""

from __future__ import annotations

import numpy as np
import pytest

from amc.data import load_data
from amc.errors import DataError


def everything(split):
    return split.batch(np.arange(len(split)))


def refused(spec, *words, **options):
    with pytest.raises(DataError) as caught:
        everything(load_data(spec, **options).train)
    for word in words:
        assert word in str(caught.value), str(caught.value)
