"""Tables to regress on: numbers, and categories by their order."""

from __future__ import annotations

import lzma
import pickle
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from posterity_studies.data import packages
from posterity_studies.data.cache import DataError


@dataclass(frozen=True)
class Table:
    """Where a table is in the package, what is asked, and which columns say nothing."""

    inside: str
    target: str
    dropped: tuple[str, ...] = ()


TABLES = {
    "boston": Table("MASS/Boston", "medv"),
    "concrete": Table("modeldata/concrete", "compressive_strength"),
    "auto": Table("ISLR/Auto", "mpg", ("name",)),
    "diamonds": Table("ggplot2/diamonds", "price"),
}


def load(name: str) -> tuple[Tensor, Tensor]:
    """Inputs (rows, columns) and targets (rows,), float32, as they are written.

    Raises:
        DataError: an unknown table, pandas is not installed, or the package cannot be fetched.
    """
    if name not in TABLES:
        raise DataError(f"no table {name!r}; there are {', '.join(TABLES)}")
    try:
        import pandas  # pyright: ignore
    except ImportError:
        raise DataError("tables need pandas: pip install pandas") from None
    table = TABLES[name]
    file = packages.folder("tables") / f"{table.inside}.pkl.compress"
    with warnings.catch_warnings():  # it was written by an older numpy
        warnings.simplefilter("ignore", DeprecationWarning)
        frame = pickle.loads(lzma.decompress(file.read_bytes()))  # of a known checksum
    frame = frame.drop(columns=["rownames", *table.dropped]).dropna()
    for column in frame.columns:
        if not pandas.api.types.is_numeric_dtype(frame[column]):
            frame[column] = frame[column].astype("category").cat.codes
    values = torch.tensor(frame.to_numpy("float32"))
    at = list(frame.columns).index(table.target)
    rest = [k for k in range(values.shape[1]) if k != at]
    return values[:, rest], values[:, at]
