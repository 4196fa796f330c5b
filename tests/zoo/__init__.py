"""A zoo: every head class of transformers that can be built tiny, with ragged synthetic rows."""

from tests.zoo.catalog import Head, head, heads
from tests.zoo.compare import measure
from tests.zoo.data import collate

__all__ = ["Head", "collate", "head", "heads", "measure"]
