"""The version, in one place: the package's metadata, ``trimode.__version__`` and manifests read it from here."""

__version__ = "0.1.0"
