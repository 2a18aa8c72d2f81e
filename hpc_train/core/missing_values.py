"""Which stored numbers stand for no value: CF conventions, netCDF-4's own fill value, and numbers that are none."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_ATTRIBUTES = ("_FillValue", "missing_value")
_NETCDF_FILL = 9.969209968386869e36  # what netCDF-4 reads of floats that nobody wrote (NC_FILL_FLOAT of netcdf.h)


def declared_missing(attributes: Mapping[str, Any], dtype: np.dtype, is_netcdf: bool) -> set[float]:
    """The numbers that stand for no value in a data set with these attributes; NaN does without being told.

    is_netcdf: whether the netCDF library wrote its file (attribute _NCProperties).
    """
    found: set[float] = set()
    for name in _ATTRIBUTES:
        stored = np.ravel(attributes.get(name, []))
        if stored.dtype.kind in "iuf":
            found.update(stored[~np.isnan(stored)].tolist())
    if dtype.kind == "f" and is_netcdf and "_FillValue" not in attributes:
        found.add(_NETCDF_FILL)
    return found


def is_missing(stored: np.ndarray, values: tuple[float, ...]) -> np.ndarray:
    """Where stored numbers stand for no value: NaN, infinite ones, and those equal to one of `values`."""
    missing = ~np.isfinite(stored) if stored.dtype.kind == "f" else np.zeros(stored.shape, bool)
    for value in values:
        missing |= stored == np.asarray(value).astype(stored.dtype)
    return missing
