"""The trainer's errors. Each message names what is wrong and the fix.

TrainerError
  ConfigError         the YAML file: a key, a value, a path
  DataError           the rows: a line, a column, a length
  TrainingError       the run itself: the loss is not a number, or runs away
    OutOfMemoryError  it does not fit, even row by row
  OutputError         the folders that the adapter and the run are written to
  PublishError        the server that the adapter is sent to
  StoppedError        a signal ended the run, after a checkpoint
"""


class TrainerError(Exception):
    """Anything that is for the user to mend; printed without a traceback."""

    code = "internal"
    """What the event `failed` calls it."""


class ConfigError(TrainerError):
    code = "config"


class DataError(TrainerError):
    code = "data"


class TrainingError(TrainerError):
    code = "training"


class OutOfMemoryError(TrainingError):
    code = "out_of_memory"


class OutputError(TrainerError):
    code = "output"


class PublishError(TrainerError):
    code = "publish"


class StoppedError(TrainerError):
    code = "stopped"
