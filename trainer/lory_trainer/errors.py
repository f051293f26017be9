"""The trainer's errors. Each message names what is wrong and the fix.

TrainerError
  ConfigError     the YAML file: a key, a value, a path
  DataError       the rows: a line, a column, a length
  TrainingError   the run itself: the loss is not a number
  OutputError     the folder that the adapter is written to
"""


class TrainerError(Exception):
    """Anything that is for the user to mend; printed without a traceback."""


class ConfigError(TrainerError):
    pass


class DataError(TrainerError):
    pass


class TrainingError(TrainerError):
    pass


class OutputError(TrainerError):
    pass
