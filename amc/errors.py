"""What a user can do wrong, as one short exception tree.

Every message names what is wrong, why, and the way out. The command line prints the message alone, without a
traceback, and exits with `exit_status`.
"""


class AmcError(Exception):
    """The user's input is at fault."""

    exit_status = 2


class UsageError(AmcError):
    """An option or argument has a value that can't be used."""


class ModelError(AmcError):
    """A model can't be loaded, traced or slimmed."""


class DataError(AmcError):
    """Data can't be read, or doesn't fit the model."""


class BudgetError(AmcError):
    """A budget can't be parsed or reached."""


class PolicyError(AmcError):
    """A policy file can't be read, or doesn't fit the model."""


class DeviceError(AmcError):
    """A device can't be reached or used for measuring."""


class RunError(AmcError):
    """A run directory can't be used as asked."""


class SearchFailed(AmcError):
    """The search could not evaluate what it proposed."""

    exit_status = 1


class Interrupted(AmcError):
    """A signal stopped the run; it can be resumed."""

    exit_status = 3
