"""What makes an HDF5 file a netCDF-4 file: dimensions, coordinates and attributes, by the CF conventions."""

from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

CONVENTIONS = "CF-1.10"
# How netCDF-4 marks a dimension that has no coordinates (its "file format specifications").
_NO_COORDINATES = "This is a netCDF dimension but not a netCDF variable.{:>10}"


@dataclass(frozen=True)
class Netcdf:
    """The dimensions, coordinates and attributes of a file's arrays.

    dimensions: names for the axes of each array, outermost first. "sample", the first of all, is a group's own.
    coordinates: values along a dimension, by its name. attributes: by the name of an array or a dimension.
    """

    dimensions: dict[str, tuple[str, ...]]
    coordinates: dict[str, np.ndarray]
    attributes: dict[str, dict[str, Any]]

    def write(self, file: h5py.File) -> None:
        """Describes the arrays, which exist. By one process alone."""
        file.attrs["Conventions"] = CONVENTIONS
        for name, values in self.coordinates.items():
            file.create_dataset(name, data=values).make_scale(name)
        for name, dimensions in self.dimensions.items():
            dataset, group = file[name], name.rpartition("/")[0]
            for axis, dimension in enumerate(dimensions):
                path = dimension if dimension in self.coordinates else f"{group}/{dimension}"
                if path not in file:
                    size = dataset.shape[axis]
                    file.create_dataset(path, (size,), ">f4").make_scale(_NO_COORDINATES.format(size))
                dataset.dims[axis].attach_scale(file[path])
        for name, attributes in self.attributes.items():
            file[name].attrs.update(attributes)
