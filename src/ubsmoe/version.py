"""The version of this source tree. The metadata of an editable installation may be older than the code that runs."""

__version__ = "0.2.0"
