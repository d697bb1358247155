"""The version. Package metadata, ``trimode.__version__`` and manifests take it from here."""

__version__ = "0.1.0"
