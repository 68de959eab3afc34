"""The one error tree. It lives in the lowest room, so that every room may raise from it.

The command line turns exactly these into one line on standard error; anything else keeps its
traceback, since it is a fault of ours.
"""

from __future__ import annotations


class Qwen2xError(Exception):
    """Something that its reader can act on: expected, got, what to do."""


class InputError(Qwen2xError, ValueError):
    """The user's input does not fit; the command line exits with 2."""


class ConfigError(InputError):
    """A ``config.json`` that is not a Qwen2 model that we can carry over faithfully."""


class CheckpointError(InputError):
    """Weights that are missing, surplus, misshaped, damaged, or not finite."""


class SourceError(InputError):
    """Neither a folder nor a hub id that can be reached."""


class SchemeError(InputError):
    """A quantization scheme that does not exist or does not fit a matrix."""


class BundleError(InputError):
    """A bundle that is damaged, was changed, points outside its folder, or cannot be written."""


class BackendError(InputError):
    """A backend, device or extra that is missing here."""


class RequestError(InputError):
    """A prompt, sampling value or length that a runtime cannot take."""
