"""Every error qkv raises on purpose.

Each says what was given, what was expected and what to try. Each also derives from the built-in class a caller would
guess (``ValueError``, ``LookupError``, ``RuntimeError`` ...), so that code written against Python's own classes works.
"""


class QKVError(Exception):
    """Base of all errors raised on purpose by qkv."""


class UnknownName(QKVError, LookupError):
    """A method, parameter, task or site that does not exist; the message names the nearest ones."""


class InvalidParameter(QKVError, ValueError):
    """A parameter outside its declared range or of the wrong type."""


class InvalidInput(QKVError, ValueError):
    """Tensors of wrong shape, dtype or device, non-finite values, empty or over-long input."""


class Refused(QKVError, ValueError):
    """A method that does not fit a model, a site, or another method; nothing was changed."""


class NotApplied(QKVError, RuntimeError):
    """`revert`, `report` or `save` on a model that carries no method."""


class NeverFired(QKVError, RuntimeError):
    """A method that was applied but whose site was never called: its result would mean nothing."""


class StateError(QKVError, RuntimeError):
    """A cache or recurrent state that cannot do what was asked (crop deeper than kept, another operator's state)."""


class SavedDataError(QKVError, ValueError):
    """A saved folder that is damaged, foreign, from a future version, or made for another base model."""


class MissingDependency(QKVError, ImportError):
    """An optional package that a chosen feature needs."""


class BrokenLaw(QKVError, AssertionError):
    """A method that breaks a law of its kind; the message says which, by how much, and what usually causes it."""


class TrainingError(QKVError, RuntimeError):
    """A training run that cannot start or go on (configuration changed on resume, loss not finite)."""


class AssetError(QKVError, RuntimeError):
    """A model or text that cannot be fetched, is not what it claims to be, or is damaged on disk."""


class StorageError(QKVError, OSError):
    """A file or folder that cannot be written (disk full, no permission); what was there before is untouched."""
