"""The failures a user can mend. Each message is one clear line: what, where, what was expected, how to mend
it.
"""

from __future__ import annotations


class DataPrepError(ValueError):
    """Something the user gave or changed is wrong; the command line prints the message and exits with 2."""

    exit_code = 2


class DiskFullError(DataPrepError):
    """No space is left. Finished tasks are kept: make room and run the same command again."""

    exit_code = 3


class AuditError(DataPrepError):
    """`verify` found damage, or the books of a run do not balance; the message has one line a finding."""

    exit_code = 4


class LostLeaseError(DataPrepError):
    """Another run has taken over the output; this one must not write any more."""

    exit_code = 5
