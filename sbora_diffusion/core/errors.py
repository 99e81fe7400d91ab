"""The typed errors. Each says in one line what was expected, what was found and what to do."""


class SboraError(Exception):
    """Wrong input: the command line prints the message in one line and exits with status 2.

    Args:
        problem: what is wrong, naming the file, layer or setting.
        remedy: what the person can do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(" ".join(f"{problem}; {remedy}".split()) if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class ConfigError(SboraError):
    """A setting, a `concept.toml` or a command-line value is unknown or out of range."""


class DataError(SboraError):
    """A reference image or caption cannot be used."""


class FormatError(SboraError):
    """A file is not what it claims to be: header, keys, shapes or types."""


class IntegrityError(SboraError):
    """A file's payload does not match its digest."""


class BaseMismatch(SboraError):
    """A concept belongs to another base model."""


class CapacityError(SboraError):
    """No free indices are left in the binding layer."""


class ConflictError(SboraError):
    """Two concepts claim the same indices, placeholder token or name."""


class NonFiniteError(SboraError):
    """A loss, gradient, weight or picture became NaN or infinite."""


class ResourceError(SboraError):
    """Memory, disk space or a permission is missing."""
