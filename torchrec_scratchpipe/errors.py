# SPDX-License-Identifier: BSD-3-Clause
"""Every error that reaches a user of this package on purpose.

::

    ScratchPipeError
    ├── ConfigError              (ValueError)    a setting cannot be served
    ├── MeasurementError         (ValueError)    a measurement cannot be made, or does not fit the model
    ├── DataError                (ValueError)    training data cannot be read, or is not what it should be
    ├── IdOutOfRangeError        (ValueError)    an id points outside its table
    ├── ScratchpadFullError      (RuntimeError)  one batch needs more slots than there are
    ├── BatchesInFlightError     (RuntimeError)  batches were planned for another model
    ├── BackwardTwiceError       (RuntimeError)  a lookup's rows were already released
    ├── TableOverwrittenError    (RuntimeError)  a table was written in place while the scratchpad held newer rows of it
    ├── PrivacyError             (RuntimeError)  something would leave or change a private model without its noise
    ├── PeerFailedError          (RuntimeError)  another rank of the job has failed or ended
    ├── TableStorageError        (OSError)       a table cannot be put where it was asked to be
    ├── CheckpointSaveError      (OSError)       a checkpoint could not be written; earlier ones are untouched
    ├── CheckpointMismatchError  (ValueError)    a checkpoint is damaged, or of another model; nothing was loaded
    └── StageFailedError         (RuntimeError)  rows were lost between table and scratchpad
"""

__all__ = [
    "BackwardTwiceError",
    "BatchesInFlightError",
    "CheckpointMismatchError",
    "CheckpointSaveError",
    "ConfigError",
    "DataError",
    "IdOutOfRangeError",
    "MeasurementError",
    "PeerFailedError",
    "PrivacyError",
    "ScratchPipeError",
    "ScratchpadFullError",
    "StageFailedError",
    "TableOverwrittenError",
    "TableStorageError",
]


class ScratchPipeError(Exception):
    """Base of every error of this package."""


class ConfigError(ScratchPipeError, ValueError):
    """A setting cannot be served; the message names the table, the value and what to set."""


class MeasurementError(ScratchPipeError, ValueError):
    """Working sets cannot be measured or read, or are those of other tables."""


class DataError(ScratchPipeError, ValueError):
    """Training data cannot be read, or is not what it should be; the message names file, row group and column."""


class IdOutOfRangeError(ScratchPipeError, ValueError):
    """An id is negative or not below its table's number of rows; nothing was planned."""


class ScratchpadFullError(ScratchPipeError, RuntimeError):
    """A batch needs more slots than can be free for it; nothing was evicted for it."""


class BatchesInFlightError(ScratchPipeError, RuntimeError):
    """Batches in flight were planned for another model, or for another sharding, than what is asked for now."""


class BackwardTwiceError(ScratchPipeError, RuntimeError):
    """Backward ran through a lookup whose rows were already released."""


class TableOverwrittenError(ScratchPipeError, RuntimeError):
    """A table was written in place, by other means than load_state_dict, while the scratchpad held newer rows of it."""


class PrivacyError(ScratchPipeError, RuntimeError):
    """Something would change a private model, or leave it, without the noise that its promise needs."""


class PeerFailedError(ScratchPipeError, RuntimeError):
    """Another rank of the job has failed or ended; the message has its reason, where it left one."""


class TableStorageError(ScratchPipeError, OSError):
    """A table's storage is missing, read-only or out of space."""


class CheckpointSaveError(ScratchPipeError, OSError):
    """A checkpoint could not be written; those that were complete before still are."""


class CheckpointMismatchError(ScratchPipeError, ValueError):
    """A checkpoint's files are damaged, or it was saved from another model; nothing was loaded from it."""


class StageFailedError(ScratchPipeError, RuntimeError):
    """Insert or a load stopped half-way; the pool refuses further work, restore from a checkpoint."""
