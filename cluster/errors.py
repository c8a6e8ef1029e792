"""Every error that Zephyra raises on purpose, one class per cause.

    ZephyraError
    ├── InvalidInput            a value that cannot be: the message names it, what was expected, and what to do
    │   ├── InvalidMixture      weights that are NaN, negative, all zero, or too many
    │   ├── PromptTooLong       prompt and max_tokens together exceed the model's context
    │   └── UploadTooLarge      an adapter whose files exceed what may be uploaded
    ├── UnknownModel            a model name that is none of base, zephyra, zephyra:<domain>
    ├── UnknownDomain           a domain or a version of one that the catalog does not hold
    ├── UnknownRequest          feedback on a request that is not remembered, or was judged before
    ├── IncompatibleAdapter     an adapter of another base, of wrong shapes, or of a kind that cannot be mixed exactly
    ├── CorruptArtifact         a file that is damaged, unsafe, or not what its name says
    │   └── InvalidAdapter      the same of an adapter that somebody hands in: theirs to mend, not ours
    ├── CatalogConflict         somebody else published first
    ├── InvalidData             training data that lacks a column, is empty, or holds a value that cannot be
    ├── GateRefused             a domain that was trained and measured, and did not pass
    ├── DiskFull                no room where a run writes its artifacts and checkpoints
    ├── StageOrder              a training stage started before the one it needs
    ├── NotTrained              serving was asked for a root that holds no base
    ├── PortTaken               another process listens where we were to
    ├── PeerRefused             a caller from another machine, or what was turned off for all
    ├── InvalidKey              no API key where one is needed, or one that is not known
    ├── RoleRefused             an API key whose role does not allow what was asked
    ├── KeysUnavailable         the file of API keys cannot be read
    ├── Overloaded              the queue is full: try again later
    ├── DeadlineExceeded        the time that the request gave itself is over
    ├── RouterUnavailable       the router does not answer
    ├── PublisherUnavailable    the publisher, which adds and withdraws domains, does not answer
    ├── AdapterUnavailable      the shard that holds an adapter does not answer
    ├── StorageUnavailable      the bucket that holds the root does not answer
    └── ReplicaLost             the base replica died and its answer could not be resumed

Each takes one message, so that it survives pickling between processes. The border maps each to an HTTP status and a
gRPC code. The message reaches the client as it is: it never holds a traceback or a path beyond what the user gave.
"""


class ZephyraError(Exception):
    """The root of the tree. `str(error)` is one sentence: what was given, what was expected, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class InvalidInput(ZephyraError):
    """A value that cannot be."""


class InvalidMixture(InvalidInput):
    """Weights that are NaN, negative, all zero, or too many."""


class PromptTooLong(InvalidInput):
    """Prompt and max_tokens together exceed the model's context."""


class UploadTooLarge(InvalidInput):
    """An adapter whose files exceed what may be uploaded."""


class UnknownModel(ZephyraError):
    """A model name that is none of base, zephyra, zephyra:<domain>."""


class UnknownDomain(ZephyraError):
    """A domain, or a version of one, that the catalog does not hold."""


class UnknownRequest(ZephyraError):
    """Feedback on a request that is not remembered, or was judged before."""


class IncompatibleAdapter(ZephyraError):
    """An adapter of another base, of wrong shapes, or of a kind that cannot be mixed exactly."""


class CorruptArtifact(ZephyraError):
    """A file that is damaged, unsafe, or not what its name says."""


class InvalidAdapter(CorruptArtifact):
    """An adapter that somebody hands in, damaged, unsafe, or not what its name says: theirs to mend, not ours."""


class CatalogConflict(ZephyraError):
    """Somebody else published first."""


class InvalidData(ZephyraError):
    """Training data that lacks a column, is empty, or holds a value that cannot be."""


class GateRefused(ZephyraError):
    """A domain that was trained and measured, and did not pass: nothing of it was published."""


class DiskFull(ZephyraError):
    """No room where a run writes its artifacts and checkpoints."""


class StageOrder(ZephyraError):
    """A training stage started before the one it needs."""


class NotTrained(ZephyraError):
    """Serving was asked for a root that holds no base."""


class PortTaken(ZephyraError):
    """Another process listens where we were to."""


class PeerRefused(ZephyraError):
    """A caller from another machine where only this one is served, or a change nobody may make."""


class InvalidKey(ZephyraError):
    """No API key where one is needed, or one that is not known."""


class RoleRefused(ZephyraError):
    """An API key whose role does not allow what was asked."""


class KeysUnavailable(ZephyraError):
    """The file of API keys cannot be read, so that nobody's can be checked."""


class Overloaded(ZephyraError):
    """The queue is full: try again later."""


class DeadlineExceeded(ZephyraError):
    """The time that the request gave itself is over."""


class RouterUnavailable(ZephyraError):
    """The router does not answer."""


class PublisherUnavailable(ZephyraError):
    """The publisher, which adds and withdraws domains, does not answer."""


class AdapterUnavailable(ZephyraError):
    """The shard that holds an adapter does not answer."""


class StorageUnavailable(ZephyraError):
    """The bucket that holds the root does not answer."""


class ReplicaLost(ZephyraError):
    """The base replica died and its answer could not be resumed."""
