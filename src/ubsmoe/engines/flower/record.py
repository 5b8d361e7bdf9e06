"""A packed message as Flower carries it: a ConfigRecord with the header, an ArrayRecord with the blob, uncut.

Flower stores equal blobs once, so a payload that many clients get is uploaded once.
"""

from ubsmoe.errors import require
from ubsmoe.wire.packed import Packed, WireError

require("flwr", "flower")
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict  # noqa: E402


def to_record(packed: Packed) -> RecordDict:
    """The record that carries a packed message."""
    blob = Array(dtype="uint8", shape=(len(packed.tensors),), stype="safetensors", data=packed.tensors)
    return RecordDict({"header": ConfigRecord({"json": packed.header}), "blob": ArrayRecord({"safetensors": blob})})


def from_record(record: RecordDict) -> Packed:
    """The packed message in a record. Raises WireError for a record of any other shape."""
    try:
        header, blob = record.config_records["header"]["json"], record.array_records["blob"]["safetensors"].data
    except KeyError:
        raise WireError("a record without our header or blob") from None
    if not isinstance(header, bytes) or not isinstance(blob, bytes):
        raise WireError("a record whose header or blob is not bytes")
    return Packed(header, blob)
