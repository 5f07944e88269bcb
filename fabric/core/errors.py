"""Every error a user can meet, drawn:

    FabricError                 (never raised itself)
    ├── ModelError              the model can't be served as it is: unknown architecture, bad file
    ├── ConfigError             a configuration value is wrong; names its path and what is valid
    ├── RequestError            the client's request is wrong (HTTP 400); `param` names the field
    │   ├── ModelNotFound       (404)
    │   └── ContextOverflow     prompt + max_tokens does not fit
    ├── Failed                  this request can't be done: it broke what ran it (500)
    ├── Overloaded              the queue is full (429); `retry_after_s` is computed
    └── Unavailable             loading, draining or no replica (503)

Messages are written for the reader of an HTTP response: no path of the server, no stack, no prompt.
(`ModelError` and `ConfigError` are for the operator and may name files.)
"""

from __future__ import annotations


class FabricError(Exception):
    """Base of all errors that are meant for a user."""


class ModelError(FabricError):
    """The model can't be served as it is."""


class ConfigError(FabricError):
    """A configuration value is wrong."""


class RequestError(FabricError):
    """The client's request is wrong."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFound(RequestError):
    """The named model is not served here."""


class ContextOverflow(RequestError):
    """Prompt and output together are longer than the model's context."""


class Failed(FabricError):
    """This very request broke what ran it, and would do so again. The message names its id."""


class Overloaded(FabricError):
    """The queue is full; come back after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(FabricError):
    """Nothing can serve the request right now."""

    def __init__(self, message: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
