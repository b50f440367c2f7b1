"""What a model looks like, as numbers and strings: nothing here imports torch."""

from mechdsl.models.anatomy import Anatomy, BlockAnatomy, Layout, Tap
from mechdsl.models.locate import locate
from mechdsl.models.shape import (
    ModelShape,
    missing_site,
    read_shape,
    shape_from_config,
    units,
    width,
)

__all__ = [
    "Anatomy",
    "BlockAnatomy",
    "Layout",
    "ModelShape",
    "Tap",
    "locate",
    "missing_site",
    "read_shape",
    "shape_from_config",
    "units",
    "width",
]
